"""The kernels of a generator in Triton's language: tensors between them are (B, T, C) in half precision, and every sum is float32.

Arguments that are annotated with `tl.constexpr` are fixed when a kernel is compiled. `T` counts the time steps of the input. Weights are
(taps, C_in, C_out), padded with zeros to whole tiles, so that only activations need masks. No tensor is padded in time: a step outside
the utterance is read where the padding mode takes it from. The grid is (tiles of steps, tiles of outputs, utterances).
"""

from __future__ import annotations

import triton
import triton.language as tl

ZEROS, REFLECT, REPLICATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def padded(s, T, MODE: tl.constexpr):
    """Return the time step that padding takes for step `s`; it is within the utterance except in mode ZEROS."""
    if MODE == REFLECT:
        s = tl.abs(s)
        s = tl.maximum(tl.minimum(s, 2 * (T - 1) - s), 0)  # steps far beyond the end belong to outputs that are not stored
    if MODE == REPLICATE:
        s = tl.maximum(tl.minimum(s, T - 1), 0)
    return s


@triton.jit
def activations(x, s, c, T, C: tl.constexpr, MODE: tl.constexpr):
    """Load the steps `s` and channels `c` of one utterance (T, C)."""
    s = padded(s, T, MODE)
    mask = (s >= 0)[:, None] & (s < T)[:, None] & (c < C)[None, :]
    return tl.load(x + s[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def leaky_relu(v, SLOPE: tl.constexpr):
    """Return max(v, SLOPE * v) for a slope of at most 1."""
    return tl.maximum(v, (v * SLOPE).to(v.dtype))  # two halves in one instruction, which tl.where is not


@triton.jit
def frames(mel, mean, scale, y, T,
           C: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, AFFINE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Transpose a mel (C, T) in float32 to (T, C), clipped and normalized in float32."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    utterance = tl.program_id(2).to(tl.int64)
    v = tl.load(mel + utterance * T * C + c[:, None] * T + t[None, :], mask=(c < C)[:, None] & (t < T)[None, :], other=0.0)
    if LOW < HIGH:
        v = tl.maximum(v, LOW, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, HIGH, propagate_nan=tl.PropagateNan.ALL)
    if AFFINE:
        v = (v - tl.load(mean + c, mask=c < C, other=0.0)[:, None]) / tl.load(scale + c, mask=c < C, other=1.0)[:, None]
    place = t[:, None] * C + c[None, :]
    tl.store(y + utterance * T * C + place, tl.trans(v).to(tl.float16), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def convolution(x, w, b, y, T, LEFT,
                C: tl.constexpr, CP: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr,
                CROP: tl.constexpr, MODE: tl.constexpr, SLOPE: tl.constexpr,
                BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Convolution of leaky_relu(x), (T, C) to (T, N), or a transposed one of kernel 2·S and stride S, (T, C) to (T·S, N / S).

    The transposed one is a convolution of two taps with one output for each phase and channel. The phases come first, so that row t holds
    the samples t·S to t·S + S - 1 in their final places, and CROP samples are cropped by shifting the address. With a crop there is one
    more row than steps.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    utterance = tl.program_id(2).to(tl.int64)
    x += utterance * T * C
    acc = tl.full((BT, BN), 0.0, tl.float32)
    chunks: tl.constexpr = CP // BK
    for i in range(TAPS * chunks):
        tap = i // chunks
        c = (i % chunks) * BK + tl.arange(0, BK)
        v = leaky_relu(activations(x, t + tap - LEFT, c, T, C, MODE), SLOPE)
        acc = tl.dot(v, tl.load(w + (tap * CP + c)[:, None] * W + n[None, :]), acc)
    acc += tl.load(b + n)[None, :]
    place = t[:, None] * N - CROP * (N // S) + n[None, :]
    mask = (n < N)[None, :] & (place >= 0) & (place < T * N)
    tl.store(y + utterance * T * N + place, acc.to(tl.float16), mask=mask)


@triton.jit
def block(x, wd, bd, wp, ws, b, y, T, D, LEFT,
          C: tl.constexpr, CP: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, SLOPE: tl.constexpr,
          BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Residual block: pointwise(leaky_relu(dilated(leaky_relu(x)))) + shortcut(x), (T, C) to (T, C); `b` is the sum of both biases.

    EARLY, for one chunk and one tile of outputs: what is read once is read before the taps, so that no sum waits for it.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    utterance = tl.program_id(2).to(tl.int64)
    x += utterance * T * C
    y += utterance * T * C
    every = tl.arange(0, CP)
    if EARLY:
        center = activations(x, t, every, T, C, ZEROS)
        pointwise = tl.load(wp + every[:, None] * CP + every[None, :])
        shortcut = tl.load(ws + every[:, None] * CP + every[None, :])
        bias, biases = tl.load(bd + every), tl.load(b + every)
    acc = tl.full((BT, CP), 0.0, tl.float32)
    chunks: tl.constexpr = CP // BK
    for i in range(TAPS * chunks):
        tap = i // chunks
        c = (i % chunks) * BK + tl.arange(0, BK)
        v = leaky_relu(activations(x, t + tap * D - LEFT, c, T, C, MODE), SLOPE)
        acc = tl.dot(v, tl.load(wd + (tap * CP + c)[:, None] * CP + every[None, :]), acc)
    if EARLY:
        h = leaky_relu(acc + bias[None, :], SLOPE).to(tl.float16)
        out = tl.dot(center, shortcut, tl.dot(h, pointwise)) + biases[None, :]
        tl.store(y + t[:, None] * C + every[None, :], out.to(tl.float16), mask=(t < T)[:, None] & (every < C)[None, :])
    else:
        h = leaky_relu(acc + tl.load(bd + every)[None, :], SLOPE).to(tl.float16)
        for n0 in range(0, CP, BN):
            n = n0 + tl.arange(0, BN)
            out = tl.dot(h, tl.load(wp + every[:, None] * CP + n[None, :]))
            for c0 in range(0, CP, BK):
                c = c0 + tl.arange(0, BK)
                out = tl.dot(activations(x, t, c, T, C, ZEROS), tl.load(ws + c[:, None] * CP + n[None, :]), out)
            out += tl.load(b + n)[None, :]
            tl.store(y + t[:, None] * C + n[None, :], out.to(tl.float16), mask=(t < T)[:, None] & (n < C)[None, :])


@triton.jit
def last(x, w, b, y, T, LEFT,
         C: tl.constexpr, CP: tl.constexpr, N: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr,
         MODE: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Convolution of leaky_relu(x) to few channels, and tanh: (T, C) to (T, N) in float32.

    One row of a product has the outputs of GROUP steps, because a product with N columns would compute 16 to keep N. The weight
    (TAPS, C, GROUP * N) has the convolution's own taps once for each of these steps, each time one step later.
    """
    t = tl.program_id(0) * (BT // GROUP) + tl.arange(0, BT // GROUP)
    utterance = tl.program_id(2).to(tl.int64)
    x += utterance * T * C
    n = tl.arange(0, W)
    k = tl.arange(0, BK)  # all channels of several taps, or some channels of one
    acc = tl.full((BT // GROUP, W), 0.0, tl.float32)
    for i in range(TAPS * CP // BK):
        s = padded((t * GROUP + i * BK // CP - LEFT)[:, None] + (k // CP)[None, :], T, MODE)
        s = tl.max_constancy(s, (1, min(BK, CP)))
        c = (i * BK % CP + k % CP)[None, :]
        v = tl.load(x + s * C + c, mask=(s >= 0) & (s < T) & (c < C), other=0.0)
        acc = tl.dot(leaky_relu(v, SLOPE), tl.load(w + (i * BK + k)[:, None] * W + n[None, :]), acc)
    acc += tl.load(b + n)[None, :]
    if TANH:
        acc = 1 - 2 / (tl.exp(2 * acc) + 1)
    place = t[:, None] * (GROUP * N) + n[None, :]
    tl.store(y + utterance * T * N + place, acc, mask=(n < GROUP * N)[None, :] & (place < T * N))


@triton.jit
def filter_bank(x, w, y, T, LEFT, S: tl.constexpr, SP: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr):
    """Join S sub-bands (T, S) to one signal (T·S) in float32; `w` is (taps, S, SP) with one output for each phase."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    utterance = tl.program_id(2).to(tl.int64)
    phase = tl.arange(0, SP)
    acc = tl.full((BT, SP), 0.0, tl.float32)
    for tap in range(TAPS):
        s = t + tap - LEFT
        for band in tl.static_range(S):
            v = tl.load(x + utterance * T * S + s * S + band, mask=(s >= 0) & (s < T), other=0.0)
            acc += v[:, None] * tl.load(w + (tap * S + band) * SP + phase)[None, :]
    tl.store(y + utterance * T * S + t[:, None] * S + phase[None, :], acc, mask=(t < T)[:, None] & (phase < S)[None, :])
