"""How far a sample looks: the mel frames that it depends on, from the architecture alone."""

from __future__ import annotations

from melrt_export.config import GeneratorConfig


def receptive_field(config: GeneratorConfig) -> tuple[int, int]:
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
        for dilation in reversed(config.dilations):
            convolution(config.stack_kernel_size, dilation)
        # output sample n is uncropped sample n + left = t·scale + phase, made of inputs t - 1 and t
        left = 0 if config.causal else scale // 2 + scale % 2
        first, last = (first + left) // scale - 1, (last + left) // scale
    convolution(config.kernel_size, 1)
    return -first, last
