"""The receptive field of a generator, computed from its architecture alone."""

from __future__ import annotations

from typing import Literal

from melrt.planning.windows import ReceptiveField
from melrt_export.generator.config import GeneratorConfig


def receptive_field(config: GeneratorConfig) -> ReceptiveField:
    """Return the mel frames before and after frame t that the samples [t·hop, (t+1)·hop) of frame t depend on.

    The function walks through the network from its output to its input, with the first and the last index that each layer needs. The
    published generator has 6 frames before and 6 after; a causal one has none after.
    """
    first, last = 0, config.hop - 1

    def convolution(kernel_size: int, dilation: int) -> None:
        nonlocal first, last
        span = (kernel_size - 1) * dilation
        first -= span if config.causal else span // 2
        last += 0 if config.causal else span // 2

    if config.pqmf_taps:
        # output sample n takes sub-band samples t with |n - t·S| <= taps / 2
        reach = config.pqmf_taps // 2
        first, last = -((reach - first) // config.subbands), (last + reach) // config.subbands
    convolution(config.kernel_size, 1)
    for scale in reversed(config.upsample_scales):
        for kernel_size, dilation in reversed(config.widest_path):
            convolution(kernel_size, dilation)
        # output sample n is uncropped sample n + crop = t·scale + phase, computed from input samples t - 1 and t
        crop = config.crop_before(scale)
        first, last = (first + crop) // scale - 1, (last + crop) // scale
    convolution(config.kernel_size, 1)
    return ReceptiveField(-first, last, config.smallest_input, _end_reach(config))


def _end_reach(config: GeneratorConfig) -> int:
    """Return the number of mel frames at an end of an utterance that its outermost frame depends on; a window there must hold them.

    A reflection at any layer takes values from the inside. Frame 0 of a causal network has no receptive field to its right, and still
    depends on the frames that are reflected into its left context.
    """
    return max(_farthest_frame(config, "beginning"), _farthest_frame(config, "end")) + 1


def _farthest_frame(config: GeneratorConfig, end: Literal["beginning", "end"]) -> int:
    """Return the index, counted inwards from an end, of the last mel frame that the samples of the outermost frame depend on."""
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
        # counted from the end, sub-band sample t is at output sample t·S + S - 1
        shift = 0 if end == "beginning" else bands - 1
        nearest, farthest = max(-((reach - nearest + shift) // bands), 0), (farthest + reach - shift) // bands
    convolution(config.kernel_size, 1)
    for scale in reversed(config.upsample_scales):
        for kernel_size, dilation in reversed(config.widest_path):
            convolution(kernel_size, dilation)
        crop = config.crop_before(scale)
        if end == "beginning":
            nearest, farthest = max((nearest + crop) // scale - 1, 0), (farthest + crop) // scale
        else:  # sample m, counted from the end, is sample -1 - m, counted from a multiple of the scale
            nearest, farthest = max(-1 - (crop - 1 - nearest) // scale, 0), -((crop - 1 - farthest) // scale)
    convolution(config.kernel_size, 1)
    return farthest
