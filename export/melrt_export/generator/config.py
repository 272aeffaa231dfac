"""The shape of a MelGAN or HiFi-GAN generator, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from melrt.checks import check_fields, even, flag, list_of, number, odd, one_of, optional, whole
from melrt.errors import CheckpointError
from melrt_export.generator.mrf import MAX_KERNEL, MrfConfig

PaddingMode = Literal["reflect", "replicate", "zeros"]
Crop = Literal["late", "early"]

# These limits keep a hostile or damaged config from describing a network that fills the memory.
MAX_CHANNELS = 8192
MAX_STAGES = 8
MAX_STACKS = 8
MAX_HOP = 8192
MAX_TAPS = 1022
_RULES = {
    **dict.fromkeys(("in_channels", "out_channels", "channels"), whole(1, MAX_CHANNELS)),
    **dict.fromkeys(("kernel_size", "stack_kernel_size"), odd(1, MAX_KERNEL)),
    "stacks": whole(1, MAX_STACKS),
    "upsample_scales": list_of(whole(2, MAX_HOP), 1, MAX_STAGES),
    "negative_slope": number(0, 1, below=True),
    "last_slope": optional(number(0, 1, below=True)),
    "padding_mode": one_of(*get_args(PaddingMode)),
    "crop": one_of(*get_args(Crop)),
    "pqmf_taps": even(0, MAX_TAPS),
    "input_clip": optional(list_of(number(-1e9, 1e9), 2, 2)),
    **dict.fromkeys(("bias", "final_tanh", "causal", "input_affine"), flag()),
}


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Shape of a generator of the MelGAN family.

    The defaults are the published generator (Kumar et al., NeurIPS 2019, appendix A).
    """

    in_channels: int = 80
    """Mel bands."""
    out_channels: int = 1
    """Channels of the last convolution: 1, or the number of sub-bands of a multi-band generator."""
    channels: int = 512
    """Channels after the first convolution; each upsampling stage halves them."""
    kernel_size: int = 7
    """Kernel size of the first and the last convolution, odd."""
    upsample_scales: tuple[int, ...] = (8, 8, 2, 2)
    """Stride of each transposed convolution; its kernel size is twice the stride."""
    stacks: int = 3
    """Number of residual blocks in each stage."""
    stack_kernel_size: int = 3
    """Kernel size of the dilated convolutions, odd; block j has dilation `stack_kernel_size ** j`."""
    mrf: MrfConfig | None = None
    """HiFi-GAN's residual part of a stage, which replaces `stacks` and `stack_kernel_size`; None for MelGAN."""
    negative_slope: float = 0.2
    """Slope of every LeakyReLU."""
    last_slope: float | None = None
    """Slope of the LeakyReLU before the last convolution; None for `negative_slope`."""
    padding_mode: PaddingMode = "reflect"
    """Padding of the convolutions in training."""
    bias: bool = True
    """True if the convolutions have biases."""
    final_tanh: bool = True
    """True if a tanh follows the last convolution."""
    pqmf_taps: int = 0
    """Filter length minus one of the pseudo-quadrature mirror filter bank that joins the sub-bands, even; 0 without sub-bands."""
    causal: bool = False
    """True if all padding is on the left, so that there is no look-ahead (`use_causal_conv` of ParallelWaveGAN)."""
    crop: Crop = "late"
    """Start of an odd stride's output: `late` (PyTorch's padding) is one sample after `early` (TensorFlow's "SAME")."""
    input_clip: tuple[float, float] | None = None
    """Limits to which the mel is clipped first, in units of plain log-mels, where a project clips normalized mels; None for no clipping."""
    input_affine: bool = False
    """True if `(mel - input.mean) / input.scale` per band is a separate step, because it cannot be folded into the first convolution."""

    def __post_init__(self) -> None:
        check_fields(self, _RULES, "generator", CheckpointError)
        object.__setattr__(self, "upsample_scales", tuple(self.upsample_scales))
        if self.input_clip is not None:
            low, high = map(float, self.input_clip)
            if low >= high:
                raise CheckpointError(f"generator: input_clip is {self.input_clip!r}; the lower limit must come first.")
            object.__setattr__(self, "input_clip", (low, high))
        if self.channels < 2 ** len(self.upsample_scales):
            raise CheckpointError(
                f"generator: {self.channels} channels cannot be halved {len(self.upsample_scales)} times, once in each upsampling stage."
            )
        if self.mrf and (self.padding_mode != "zeros" or self.causal):
            raise CheckpointError(
                f"generator: mrf with padding_mode {self.padding_mode} and causal {self.causal}; "
                "mrf needs padding_mode zeros and causal false."
            )
        if self.hop > MAX_HOP:
            raise CheckpointError(
                f"generator: upsample_scales {self.upsample_scales} make a hop of {self.hop}; at most {MAX_HOP} is allowed."
            )

    @property
    def hop(self) -> int:
        """Hop length in samples: output samples for each mel frame."""
        return math.prod(self.upsample_scales) * self.subbands

    @property
    def subbands(self) -> int:
        """Number of sub-bands that the filter bank joins; 1 without a filter bank."""
        return self.out_channels if self.pqmf_taps else 1

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels before the first stage and after each stage."""
        return tuple(self.channels // 2**i for i in range(len(self.upsample_scales) + 1))

    def crop_before(self, scale: int) -> int:
        """Return the number of samples that a transposed convolution of this stride drops at its start."""
        return 0 if self.causal else scale // 2 + (scale % 2 if self.crop == "late" else 0)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each residual block of a stage."""
        return tuple(self.stack_kernel_size**j for j in range(self.stacks))

    @property
    def resolved_last_slope(self) -> float:
        """Slope of the LeakyReLU before the last convolution, with the default resolved."""
        return self.negative_slope if self.last_slope is None else self.last_slope

    @property
    def widest_path(self) -> list[tuple[int, int]]:
        """Kernel size and dilation of each convolution on a stage's residual path with the largest receptive field."""
        return self.mrf.widest_branch if self.mrf else [(self.stack_kernel_size, dilation) for dilation in self.dilations]

    @property
    def smallest_input(self) -> int:
        """Smallest number of mel frames for which every reflection is possible: to reflect p samples takes more than p samples."""
        if self.padding_mode != "reflect":
            return 1
        both = 1 if self.causal else 2
        edge = (self.kernel_size - 1) // both
        rate, frames = 1, edge + 1
        for scale in self.upsample_scales:
            rate *= scale
            frames = max(frames, (self.stack_kernel_size - 1) * self.dilations[-1] // both // rate + 1)
        return max(frames, edge // rate + 1)

    def convolutions(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and weight shape of each convolution in order; transposed ones are (C_in, C_out, K) as in PyTorch."""
        width = self.stage_channels
        yield "first", (width[0], self.in_channels, self.kernel_size)
        for i, scale in enumerate(self.upsample_scales):
            before, after = width[i], width[i + 1]
            yield f"stages.{i}.upsample", (before, after, 2 * scale)
            for name, shape in self.mrf.convolutions(after) if self.mrf else self._stack_convolutions(after):
                yield f"stages.{i}.blocks.{name}", shape
        yield "last", (self.out_channels, width[-1], self.kernel_size)

    def _stack_convolutions(self, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for j in range(self.stacks):
            yield f"{j}.dilated", (width, width, self.stack_kernel_size)
            yield f"{j}.pointwise", (width, width, 1)
            yield f"{j}.shortcut", (width, width, 1)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each tensor of a folded state dict, in melrt's own naming."""
        if self.input_affine:
            yield "input.mean", (self.in_channels,)
            yield "input.scale", (self.in_channels,)
        for name, shape in self.convolutions():
            yield f"{name}.weight", shape
            if self.bias:
                yield f"{name}.bias", (shape[1] if name.endswith("upsample") else shape[0],)
        if self.pqmf_taps:
            yield "pqmf.weight", (self.out_channels, self.pqmf_taps + 1)

    @property
    def parameters(self) -> int:
        """Number of trained parameters, with weight norm folded."""
        return sum(math.prod(shape) for name, shape in self.tensors() if not name.startswith(("input.", "pqmf.")))

    @property
    def flop_per_frame(self) -> int:
        """Floating-point operations for each mel frame in convolutions and filter bank; a multiply-add counts as two."""
        rate, total = 1, 0
        scales = iter(self.upsample_scales)
        for name, shape in self.convolutions():
            total += 2 * math.prod(shape) * rate  # a transposed convolution computes at the rate of its input
            if name.endswith("upsample"):
                rate *= next(scales)
        return total + (2 * self.hop * (self.pqmf_taps + 1) if self.pqmf_taps else 0)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the fields that this kind of residual part does not use."""
        clip = None if self.input_clip is None else list(self.input_clip)
        values = asdict(self) | {"upsample_scales": list(self.upsample_scales), "input_clip": clip}
        unused = ("stacks", "stack_kernel_size") if self.mrf else ("mrf",)
        if self.mrf:
            values["mrf"] = self.mrf.to_dict()
        return {name: value for name, value in values.items() if name not in unused}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Create a config from the values that `to_dict` returns.

        Raises:
            CheckpointError: A field is unknown, or a value is out of its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(f"the generator config has unknown fields {unknown}; the known fields are {sorted(known)}.")
        mrf = values.get("mrf")
        return cls(**{**values, "mrf": None if mrf is None else MrfConfig.from_dict(mrf)})
