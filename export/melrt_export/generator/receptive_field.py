"""How far a sample looks: the mel frames that it depends on, from the architecture alone."""

from __future__ import annotations

from typing import Literal

from melrt.planning.windows import ReceptiveField
from melrt_export.generator.config import GeneratorConfig


def receptive_field(config: GeneratorConfig) -> ReceptiveField:
    """Mel frames before and after frame t that the samples of frame t, [t·hop, (t+1)·hop), depend on.

    Walks the network backwards with the first and last index that is needed at each layer; (6, 6) for the published generator,
    nothing after for a causal one.
    """
    first, last = 0, config.hop - 1

    def convolution(kernel_size: int, dilation: int) -> None:
        nonlocal first, last
        reach = (kernel_size - 1) * dilation
        first -= reach if config.causal else reach // 2
        last += 0 if config.causal else reach // 2

    if config.pqmf_taps:
        # output sample n takes sub-band samples t with |n - t·S| <= taps / 2
        reach = config.pqmf_taps // 2
        first, last = -((reach - first) // config.subbands), (last + reach) // config.subbands
    convolution(config.kernel_size, 1)
    for scale in reversed(config.upsample_scales):
        for kernel_size, dilation in reversed(config.farthest_path):
            convolution(kernel_size, dilation)
        # output sample n is uncropped sample n + left = t·scale + phase, made of inputs t - 1 and t
        left = config.crop_before(scale)
        first, last = (first + left) // scale - 1, (last + left) // scale
    convolution(config.kernel_size, 1)
    return ReceptiveField(-first, last, config.smallest_input, _end_reach(config))


def _end_reach(config: GeneratorConfig) -> int:
    """Mel frames of an utterance's beginning or end that its outermost frame depends on: what a short window there must hold.

    A reflection at any layer takes values from inside: frame 0 of a causal network, which sees nothing to its right, still depends on
    the frames that its left context is reflected onto.
    """
    return max(_farthest(config, "beginning"), _farthest(config, "end")) + 1


def _farthest(config: GeneratorConfig, end: Literal["beginning", "end"]) -> int:
    """The index, counted inwards from an end, of the last mel frame that the outermost frame's samples depend on."""
    nearest, farthest = 0, config.hop - 1
    reflected = config.padding_mode == "reflect"

    def convolution(kernel_size: int, dilation: int) -> None:
        nonlocal nearest, farthest
        span = (kernel_size - 1) * dilation
        before, after = (span, 0) if config.causal else (span // 2, span // 2)
        outwards, inwards = (before, after) if end == "beginning" else (after, before)
        farthest = max(farthest + inwards, outwards - nearest if reflected else 0)
        nearest = max(nearest - outwards, 0)

    if config.pqmf_taps:
        reach = config.pqmf_taps // 2
        bands = config.subbands
        # counted from the end, sub-band sample t stands at output sample t·S + S - 1
        shift = 0 if end == "beginning" else bands - 1
        nearest, farthest = max(-((reach - nearest + shift) // bands), 0), (farthest + reach - shift) // bands
    convolution(config.kernel_size, 1)
    for scale in reversed(config.upsample_scales):
        for kernel_size, dilation in reversed(config.farthest_path):
            convolution(kernel_size, dilation)
        left = 0 if config.causal else scale // 2 + scale % 2
        if end == "beginning":
            nearest, farthest = max((nearest + left) // scale - 1, 0), (farthest + left) // scale
        else:  # sample m from the end is sample -1 - m of a multiple of the scale
            nearest, farthest = max(-1 - (left - 1 - nearest) // scale, 0), -((left - 1 - farthest) // scale)
    convolution(config.kernel_size, 1)
    return farthest
