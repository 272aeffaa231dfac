"""Turn a generator into launches of a few kernels, with its weights in their layout.

A kernel is a function of `melrt_export.fused.kernels` with constants of the network; dilations and lengths are arguments, so that all
blocks of a stage share one. Tile sizes are not part of it: each GPU has its own (`melrt_export.fused.tiles`), and the weights suit all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from melrt.backends.fused.program import ALIGNMENT, Argument, Launch
from melrt.errors import EngineBuildError
from melrt_export.generator.config import GeneratorConfig

Constant = int | float | bool

# Values of kernels.py, which cannot be imported without Triton.
_MODES = {"zeros": 0, "reflect": 1, "replicate": 2}
# A block keeps its float32 sums of all channels in registers; beyond this width they do not fit.
MOST_CHANNELS = 256
# The smallest side of a product on tensor cores.
LEAST_SIDE = 16
# Outputs of one tile at most; weights of more outputs are padded to a multiple.
MOST_OUTPUTS = 128
# Weights of more channels than LEAST_SIDE are padded to a multiple of the chunk that one product takes.
CHUNK = 32
# The last convolution computes this many steps in one row of a product, and reads steps in multiples of READ: 256 bytes of 32 channels.
GROUP, READ = 16, 4
HALF, SINGLE = 2, 4
# Element types of the pointers that each kernel takes, in order.
POINTERS = {
    "frames": ("float32", "float32", "float32", "float16"), "convolution": ("float16", "float16", "float32", "float16"),
    "block": ("float16", "float16", "float32", "float16", "float16", "float32", "float16"),
    "last": ("float16", "float16", "float32", "float32"), "filter_bank": ("float32", "float32", "float32"),
}  # fmt: skip
_STEPS = Argument("steps")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel with the constants of one network, before tiles are chosen."""

    name: str
    """Unique name, such as `block_64`."""
    function: str
    """Function of `melrt_export.fused.kernels`."""
    constants: Mapping[str, Constant]
    """Values of its constants, except for the tile."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A generator as launches."""

    kernels: Mapping[str, Kernel]
    """Kernels by name."""
    launches: tuple[Launch, ...]
    """Launches of a run, in order."""
    buffers: tuple[int, ...]
    """Bytes of each buffer of activations for each mel frame."""
    weights: bytes
    """Weights of all launches."""


def refuse_unsupported(config: GeneratorConfig) -> None:
    """Raise EngineBuildError if the kernels cannot compute a generator of this shape."""
    reason = ""
    if config.mrf:
        reason = "it has HiFi-GAN's residual part (mrf); the kernels compute MelGAN's residual blocks"
    elif config.stage_channels[1] > MOST_CHANNELS:
        reason = f"its first stage has {config.stage_channels[1]} channels; a residual block takes at most {MOST_CHANNELS}"
    elif config.out_channels != config.subbands:
        reason = f"it has {config.out_channels} output channels without a filter bank; one channel is supported"
    if reason:
        raise EngineBuildError(f"this voice cannot become a fused engine: {reason}. Build a TensorRT engine instead: --engine tensorrt.")


def lower(config: GeneratorConfig, model: bytes) -> Lowered:
    """Turn a generator into launches.

    Args:
        config: The generator's shape.
        model: Its edge graph (`melrt_export.graph.deploy_graph`) in FP32 or FP16, which has the weights.

    Raises:
        EngineBuildError: The kernels cannot compute a generator of this shape.
    """
    refuse_unsupported(config)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}
    lowering = _Lowering(config, tensors)
    lowering.first()
    rate = 1
    for stage, scale in enumerate(config.upsample_scales):
        lowering.upsample(stage, rate)
        rate *= scale
        for block, dilation in enumerate(config.dilations):
            lowering.block(stage, block, dilation, rate)
    lowering.last(rate)
    return Lowered(lowering.kernels, tuple(lowering.launches), tuple(lowering.buffers), bytes(lowering.weights))


@dataclass
class _Lowering:
    """Collects launches; activations alternate between two buffers."""

    config: GeneratorConfig
    tensors: Mapping[str, NDArray[np.floating]]
    kernels: dict[str, Kernel] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    buffers: list[int] = field(default_factory=lambda: [1, 1])
    weights: bytearray = field(default_factory=bytearray)
    newest: int = 0
    """Buffer with the newest activations."""

    def first(self) -> None:
        config = self.config
        low, high = config.input_clip or (0.0, 0.0)
        statistics = [
            self._store(self.tensors[f"input.{name}"].reshape(-1).astype(np.float32) if config.input_affine else np.zeros(1, np.float32))
            for name in ("mean", "scale")
        ]
        constants: dict[str, Constant] = {"C": config.in_channels, "LOW": low, "HIGH": high, "AFFINE": config.input_affine}
        result = self._result(config.in_channels * HALF)
        self._launch(Kernel("frames", "frames", constants), "first.frames", [Argument("mel"), *statistics, result, _STEPS], 1)
        sizes = padded_channels(config.in_channels), padded_outputs(config.channels)
        constants = {
            "C": config.in_channels, "CP": sizes[0], "N": config.channels, "W": sizes[1], "TAPS": config.kernel_size, "S": 1, "CROP": 0,
            "MODE": _MODES[config.padding_mode], "SLOPE": 1.0,
        }  # fmt: skip
        source, weights, result = self._newest(), self._convolution("first", *sizes), self._result(config.channels * HALF)
        self._launch(
            Kernel("first", "convolution", constants), "first", [source, *weights, result, _STEPS, self._left(config.kernel_size - 1)], 1
        )

    def upsample(self, stage: int, rate: int) -> None:
        config, name = self.config, f"stages.{stage}.upsample"
        before, after = config.stage_channels[stage : stage + 2]
        scale = config.upsample_scales[stage]
        crop = config.crop_before(scale)
        inputs, outputs = padded_channels(before), padded_outputs(after * scale)
        constants = {
            "C": before, "CP": inputs, "N": after * scale, "W": outputs, "TAPS": 2, "S": scale, "CROP": crop,
            "MODE": _MODES["replicate" if config.causal else "zeros"], "SLOPE": config.negative_slope,
        }  # fmt: skip
        weights = self._convolution(name, inputs, outputs, phases=scale)
        source, result = self._newest(), self._result(after * HALF * rate * scale)
        arguments = [source, *weights, result, _STEPS, Argument("integer", 1)]
        self._launch(Kernel(f"upsample_{before}x{scale}", "convolution", constants), name, arguments, rate, extra=int(crop > 0))

    def block(self, stage: int, block: int, dilation: int, rate: int) -> None:
        config, name = self.config, f"stages.{stage}.blocks.{block}"
        channels = config.stage_channels[stage + 1]
        side = power_of_two(channels)
        constants = {
            "C": channels, "CP": side, "TAPS": config.stack_kernel_size, "MODE": _MODES[config.padding_mode],
            "SLOPE": config.negative_slope,
        }  # fmt: skip
        dilated, dilated_bias = self._convolution(f"{name}.dilated", side, side)
        pointwise, shortcut = (self._store(self._packed(f"{name}.{part}", side, side)) for part in ("pointwise", "shortcut"))
        bias = self._store(self._bias(f"{name}.pointwise", side) + self._bias(f"{name}.shortcut", side))
        left = self._left((config.stack_kernel_size - 1) * dilation)
        source, result = self._newest(), self._result(channels * HALF * rate)
        arguments = [source, dilated, dilated_bias, pointwise, shortcut, bias, result, _STEPS, Argument("integer", dilation), left]
        self._launch(Kernel(f"block_{channels}", "block", constants), name, arguments, rate)

    def last(self, rate: int) -> None:
        config = self.config
        channels, bands, taps = config.stage_channels[-1], config.out_channels, config.kernel_size
        left = self._left(taps - 1).value
        start = -left % READ  # steps that are read before that of the first tap
        shape = _multiple(start + GROUP + taps - 1, READ), power_of_two(channels), power_of_two(GROUP * bands)
        constants = {
            "C": channels, "CP": shape[1], "N": bands, "W": shape[2], "TAPS": shape[0], "GROUP": GROUP,
            "MODE": _MODES[config.padding_mode], "SLOPE": config.resolved_last_slope, "TANH": config.final_tanh,
        }  # fmt: skip
        weight, bias = np.zeros(shape, np.float16), np.zeros(shape[2], np.float32)
        for step in range(GROUP):
            place = slice(step * bands, (step + 1) * bands)
            weight[start + step : start + step + taps, :, place] = self._packed("last", shape[1], bands)
            bias[place] = self._bias("last", bands)
        source = self._newest()
        result = self._result(bands * SINGLE * rate) if config.pqmf_taps else Argument("audio")
        arguments = [source, self._store(weight), self._store(bias), result, _STEPS, Argument("integer", left + start)]
        self._launch(Kernel("last", "last", constants), "last", arguments, rate)
        if config.pqmf_taps:
            self._filter_bank(rate)

    def _filter_bank(self, rate: int) -> None:
        weight = self.tensors["pqmf.weight"][:, :, 0]  # (phases, bands, taps)
        phases, bands, taps = weight.shape
        side = 1 << (phases - 1).bit_length()
        packed = np.zeros((taps, bands, side), np.float32)
        packed[:, :, :phases] = weight.transpose(2, 1, 0)
        left = Argument("integer", self.config.pqmf_taps // 2 // self.config.subbands)
        arguments = [self._newest(), self._store(packed), Argument("audio"), _STEPS, left]
        self._launch(Kernel("filter_bank", "filter_bank", {"S": bands, "SP": side, "TAPS": taps}), "pqmf", arguments, rate)

    def _launch(self, kernel: Kernel, layer: str, arguments: list[Argument], rate: int, extra: int = 0) -> None:
        if self.kernels.setdefault(kernel.name, kernel) != kernel:
            kernel = replace(kernel, name=f"{kernel.name}_{len(self.kernels)}")
            self.kernels[kernel.name] = kernel
        self.launches.append(Launch(kernel.name, layer, tuple(arguments), rate, extra))

    def _newest(self) -> Argument:
        return Argument("buffer", self.newest)

    def _result(self, size: int) -> Argument:
        """Return the other buffer, with room for this many bytes for each frame."""
        self.newest = 1 - self.newest
        self.buffers[self.newest] = max(self.buffers[self.newest], size)
        return self._newest()

    def _left(self, padding: int) -> Argument:
        """Return the steps before the first one that a convolution with this padding in all reads."""
        return Argument("integer", padding if self.config.causal else padding // 2)

    def _convolution(self, name: str, channels: int, outputs: int, phases: int = 1) -> list[Argument]:
        """Store weight and bias of a convolution; with phases the outputs (C, phases) of the graph become (phases, C)."""
        return [self._store(self._packed(name, channels, outputs, phases)), self._store(self._bias(name, outputs, phases))]

    def _packed(self, name: str, channels: int, outputs: int, phases: int = 1) -> NDArray[np.float16]:
        """Return a weight as (taps, C_in, C_out) in half precision, padded with zeros."""
        weight = self.tensors[f"{name}.weight"][:, :, 0]  # (C_out, C_in, taps)
        c_out, c_in, taps = weight.shape
        weight = weight.reshape(-1, phases, c_in, taps).swapaxes(0, 1).reshape(c_out, c_in, taps)
        packed = np.zeros((taps, channels, outputs), np.float16)
        packed[:, :c_in, :c_out] = weight.transpose(2, 1, 0)
        return packed

    def _bias(self, name: str, outputs: int, phases: int = 1) -> NDArray[np.float32]:
        packed = np.zeros(outputs, np.float32)
        if f"{name}.bias" in self.tensors:
            bias = self.tensors[f"{name}.bias"].astype(np.float32)
            packed[: len(bias)] = bias.reshape(-1, phases).T.reshape(-1)
        return packed

    def _store(self, array: NDArray[np.floating]) -> Argument:
        place = len(self.weights)
        self.weights += array.tobytes()
        self.weights += bytes(-len(self.weights) % ALIGNMENT)
        return Argument("weights", place)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is a side of a product and at least this size."""
    return max(LEAST_SIDE, 1 << (size - 1).bit_length())


def padded_channels(channels: int) -> int:
    """Return the input channels of a convolution's packed weight."""
    return _multiple(channels, CHUNK) if channels > LEAST_SIDE else LEAST_SIDE


def padded_outputs(outputs: int) -> int:
    """Return the outputs of a convolution's packed weight."""
    return _multiple(outputs, MOST_OUTPUTS) if outputs > MOST_OUTPUTS else power_of_two(outputs)


def _multiple(size: int, unit: int) -> int:
    """Return the smallest multiple of the unit that is at least this size."""
    return -(-size // unit) * unit
