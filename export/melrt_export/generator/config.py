"""The shape of a generator, MelGAN or HiFi-GAN, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from melrt.errors import CheckpointError
from melrt_export.generator.mrf import MrfConfig

PaddingMode = Literal["reflect", "replicate", "zeros"]
Crop = Literal["late", "early"]

# A hostile or damaged config must not be able to ask for a network that fills the memory.
MAX_CHANNELS = 8192
MAX_KERNEL = 255
MAX_STAGES = 8
MAX_STACKS = 8
MAX_HOP = 8192
MAX_TAPS = 1022


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """A generator of the MelGAN family; the defaults are the published one (Kumar et al., NeurIPS 2019, appendix A)."""

    in_channels: int = 80
    """Mel bands."""
    out_channels: int = 1
    """Channels of the last convolution: 1, or the sub-bands of a multi-band generator."""
    channels: int = 512
    """Channels after the first convolution; each upsampling stage halves them."""
    kernel_size: int = 7
    """Kernel of the first and the last convolution, odd."""
    upsample_scales: tuple[int, ...] = (8, 8, 2, 2)
    """Stride of each transposed convolution; its kernel is twice that."""
    stacks: int = 3
    """Residual blocks in a stage."""
    stack_kernel_size: int = 3
    """Kernel of the dilated convolutions, odd; block j has dilation `stack_kernel_size ** j`."""
    fusion: MrfConfig | None = None
    """HiFi-GAN's residual part of a stage, in place of `stacks` and `stack_kernel_size`."""
    negative_slope: float = 0.2
    """Slope of every LeakyReLU."""
    last_slope: float | None = None
    """Slope of the LeakyReLU before the last convolution, if it is another."""
    padding_mode: PaddingMode = "reflect"
    """How convolutions extend their input, as trained."""
    bias: bool = True
    """Whether the convolutions have biases."""
    final_tanh: bool = True
    """Whether a tanh follows the last convolution."""
    pqmf_taps: int = 0
    """Length less one, even, of the filters that join sub-bands to one signal (pseudo-quadrature mirror filter bank); 0: no sub-bands."""
    causal: bool = False
    """All padding on the left: no look-ahead (ParallelWaveGAN's `use_causal_conv`)."""
    crop: Crop = "late"
    """Where an odd stride's output begins: `late` one sample after `early`. PyTorch's padding is late, TensorFlow's "SAME" early."""
    input_clip: tuple[float, float] | None = None
    """Limits that the mel is clipped to first, where the project clips normalized mels; in the units of plain log-mels."""
    input_affine: bool = False
    """Whether `(mel - input.mean) / input.scale` per band comes next, as nodes of its own: where it cannot be folded."""

    def __post_init__(self) -> None:
        if not isinstance(self.upsample_scales, list | tuple):
            raise CheckpointError(f"upsample_scales is {self.upsample_scales!r}; it is a list of whole numbers.")
        object.__setattr__(self, "upsample_scales", tuple(self.upsample_scales))
        self._check_whole_numbers()
        self._check_input()
        self._check_shape()
        self._check_kinds()

    def _check_shape(self) -> None:
        if self.channels < 2 ** len(self.upsample_scales):
            raise CheckpointError(
                f"{self.channels} channels cannot be halved {len(self.upsample_scales)} times, once per upsampling stage."
            )
        for name in ("kernel_size", "stack_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise CheckpointError(f"{name} is {getattr(self, name)}; the family has odd kernels only.")
        if self.fusion and (self.padding_mode != "zeros" or self.causal):
            raise CheckpointError(f"fusion with padding_mode {self.padding_mode}, causal {self.causal}; it pads zeros, on both sides.")
        if self.hop > MAX_HOP:
            raise CheckpointError(f"upsample_scales {self.upsample_scales} makes a hop of {self.hop}; at most {MAX_HOP}.")

    def _check_kinds(self) -> None:
        for name, kinds in (("padding_mode", get_args(PaddingMode)), ("crop", get_args(Crop))):
            if getattr(self, name) not in kinds:
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(kinds)}.")
        if type(self.pqmf_taps) is not int or not 0 <= self.pqmf_taps <= MAX_TAPS or self.pqmf_taps % 2:
            raise CheckpointError(f"pqmf_taps is {self.pqmf_taps!r}; it is an even number up to {MAX_TAPS}, or 0 for no sub-bands.")
        for name, slope in (("negative_slope", self.negative_slope), ("last_slope", self.before_last)):
            if type(slope) not in (int, float) or not 0 <= slope < 1:
                raise CheckpointError(f"{name} is {slope!r}; it is a number in [0, 1).")
        for name in ("bias", "final_tanh", "causal", "input_affine"):
            if type(getattr(self, name)) is not bool:
                raise CheckpointError(f"{name} is {getattr(self, name)!r}; it is true or false.")

    def _check_input(self) -> None:
        if self.input_clip is None:
            return
        limits = tuple(self.input_clip) if isinstance(self.input_clip, list | tuple) else ()
        numbers = all(type(limit) in (int, float) and abs(limit) < 1e9 for limit in limits)
        if len(limits) != 2 or not numbers or not limits[0] < limits[1]:
            raise CheckpointError(f"input_clip is {self.input_clip!r}; it is two numbers, the lower first, or null.")
        object.__setattr__(self, "input_clip", tuple(float(limit) for limit in limits))

    def _check_whole_numbers(self) -> None:
        limits = {
            "in_channels": MAX_CHANNELS, "out_channels": MAX_CHANNELS, "channels": MAX_CHANNELS,
            "kernel_size": MAX_KERNEL, "stack_kernel_size": MAX_KERNEL, "stacks": MAX_STACKS,
        }  # fmt: skip
        values = [(name, getattr(self, name), limit) for name, limit in limits.items()]
        for name, value, limit in values:
            if type(value) is not int or not 1 <= value <= limit:
                raise CheckpointError(f"{name} is {value!r}; it is a whole number from 1 to {limit}.")
        scales = self.upsample_scales
        if not 1 <= len(scales) <= MAX_STAGES or not all(type(scale) is int and 2 <= scale <= MAX_HOP for scale in scales):
            raise CheckpointError(f"upsample_scales is {scales}; it is 1 to {MAX_STAGES} whole numbers from 2 to {MAX_HOP}.")

    @property
    def hop(self) -> int:
        """Samples of the output per mel frame."""
        return math.prod(self.upsample_scales) * self.subbands

    @property
    def subbands(self) -> int:
        """Signals that the filter bank joins; 1 without one."""
        return self.out_channels if self.pqmf_taps else 1

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels before the first stage and after each one."""
        return tuple(self.channels // 2**i for i in range(len(self.upsample_scales) + 1))

    def crop_before(self, scale: int) -> int:
        """Samples that a transposed convolution of this stride drops at its start."""
        return 0 if self.causal else scale // 2 + (scale % 2 if self.crop == "late" else 0)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each residual block of a stage."""
        return tuple(self.stack_kernel_size**j for j in range(self.stacks))

    @property
    def before_last(self) -> float:
        """Slope of the LeakyReLU before the last convolution."""
        return self.negative_slope if self.last_slope is None else self.last_slope

    @property
    def farthest_path(self) -> list[tuple[int, int]]:
        """Kernel and dilation of the convolutions of a stage's residual part that a sample sees farthest through."""
        return self.fusion.widest if self.fusion else [(self.stack_kernel_size, dilation) for dilation in self.dilations]

    @property
    def smallest_input(self) -> int:
        """The fewest mel frames for which every reflection is legal (reflection of p samples needs more than p)."""
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
        """Name and weight shape of each convolution in order; transposed ones are (C_in, C_out, K) as in PyTorch."""
        width = self.stage_channels
        yield "first", (width[0], self.in_channels, self.kernel_size)
        for i, scale in enumerate(self.upsample_scales):
            before, after = width[i], width[i + 1]
            yield f"stages.{i}.upsample", (before, after, 2 * scale)
            for name, shape in self.fusion.convolutions(after) if self.fusion else self._stack_convolutions(after):
                yield f"stages.{i}.blocks.{name}", shape
        yield "last", (self.out_channels, width[-1], self.kernel_size)

    def _stack_convolutions(self, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for j in range(self.stacks):
            yield f"{j}.dilated", (width, width, self.stack_kernel_size)
            yield f"{j}.pointwise", (width, width, 1)
            yield f"{j}.shortcut", (width, width, 1)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor of a folded state dict, in melrt's own naming."""
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
        """Trained numbers, folded."""
        return sum(math.prod(shape) for name, shape in self.tensors() if not name.startswith(("input.", "pqmf.")))

    @property
    def flop_per_frame(self) -> int:
        """Floating-point operations per mel frame in convolutions and filter bank, a multiply-add counted as two."""
        rate, total = 1, 0
        scales = iter(self.upsample_scales)
        for name, shape in self.convolutions():
            total += 2 * math.prod(shape) * rate  # a transposed convolution works at the rate of its input
            if name.endswith("upsample"):
                rate *= next(scales)
        return total + (2 * self.hop * (self.pqmf_taps + 1) if self.pqmf_taps else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the fields that the kind of residual part leaves unused."""
        clip = None if self.input_clip is None else list(self.input_clip)
        values = asdict(self) | {"upsample_scales": list(self.upsample_scales), "input_clip": clip}
        unused = ("stacks", "stack_kernel_size") if self.fusion else ("fusion",)
        if self.fusion:
            values["fusion"] = self.fusion.to_dict()
        return {name: value for name, value in values.items() if name not in unused}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Read `to_dict`'s form.

        Raises:
            CheckpointError: An unknown field, or a value out of its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(f"generator config has unknown fields {unknown}; known are {sorted(known)}.")
        fusion = values.get("fusion")
        return cls(**{**values, "fusion": None if fusion is None else MrfConfig.from_dict(fusion)})
