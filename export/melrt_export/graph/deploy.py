"""The deploy graph: the trained generator's function, shaped for an inference engine.

Written node by node rather than traced, so that every tensor has a readable name, the same checkpoint gives the same
bytes, and a half-precision graph is half precision by construction. What differs from the trained network, each exact:

- transposed convolutions are 2-tap convolutions to scale·C channels, a reshape and a crop (polyphase);
- everything is 2-D with height 1, (B, C, 1, T), the layout of the engines' blocked kernels;
- the `interior` graph for windows has no padding nodes at all, and crops once, at the end (`melrt.planning.windows`): what lies beyond the crop
  reaches no farther into the window than the network sees;
- the mean of a HiFi-GAN stage is a sum, its factor part of the convolution that follows (LeakyReLU passes a factor on);
- a normalization of the mel is part of the first convolution already (`checkpoints.checkpoint.fold_normalization`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from melrt.planning.windows import GraphKind
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig

Weights = Mapping[str, np.ndarray]
GraphPrecision = Literal["fp32", "fp16"]

# 19 is the first opset with half-precision Q/DQ scales, and is read by TensorRT 10.12 and ONNX Runtime 1.17 and later.
OPSET = 19
IR_VERSION = 9
_ONNX_PAD = {"reflect": "reflect", "replicate": "edge"}


def deploy_graph(
    config: GeneratorConfig,
    weights: Weights,
    precision: GraphPrecision = "fp32",
    graph: GraphKind = "edge",
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Build the ONNX model of a generator.

    Args:
        config: The generator's shape.
        weights: Folded float32 weights, named as `config.tensors()` names them.
        precision: "fp16" computes in half precision between float32 input and output; the tanh stays in float32.
        graph: `edge` pads as trained; `interior` with zeros inside the convolutions, exact but for the receptive field at both ends.
        metadata: Facts for `metadata_props`, so that a lone file still knows its mel convention.

    Returns:
        A checked model: `mel` (batch, M, frames) float32 to `audio` (batch, frames·hop) float32.
    """
    if graph == "interior":
        config = replace(config, padding_mode="zeros")
    net = _Net(config, _with_means(config, weights), graph, np.dtype(np.float16 if precision == "fp16" else np.float32))
    x = net.op("Unsqueeze", net.normalized("mel"), net.shape("height_axis", [2]), name="mel_2d")
    if precision == "fp16":
        x = net.cast(x, TensorProto.FLOAT16, "mel_half")
    x = net.conv("first", x, padding=config.kernel_size - 1)
    for i, scale in enumerate(config.upsample_scales):
        x = net.upsample(f"stages.{i}.upsample", net.leaky(x, f"stages.{i}.lrelu"), scale)
        x = net.fused(f"stages.{i}.blocks", x, config.fusion) if config.fusion else net.residual_stack(f"stages.{i}.blocks", x)
    x = net.conv("last", net.leaky(x, "last.lrelu", config.before_last), padding=config.kernel_size - 1)
    x = net.cropped(x, "last")
    if precision == "fp16":
        x = net.cast(x, TensorProto.FLOAT, "audio_single")
    if config.final_tanh:
        x = net.op("Tanh", x, name="tanh")
    if config.pqmf_taps:
        x = net.filter_bank("pqmf", x)
    net.op("Reshape", x, net.shape("audio_shape", [0, -1]), name="audio", output="audio")
    return _model(net, config, metadata or {})


def _with_means(config: GeneratorConfig, weights: Weights) -> Weights:
    """The weights, those behind a stage of fused branches divided by the number of branches."""
    if not config.fusion:
        return weights
    behind = [f"stages.{i}.upsample.weight" for i in range(1, len(config.upsample_scales))] + ["last.weight"]
    return {**weights, **{name: weights[name] / len(config.fusion.kernel_sizes) for name in behind}}


@dataclass
class _Net:
    """Collects nodes and weights; every method returns the name of the tensor that it makes."""

    config: GeneratorConfig
    weights: Weights
    graph: GraphKind
    dtype: np.dtype[np.floating]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    too_long: tuple[int, int] = (0, 0)
    """Samples before and after those that the newest tensor stands for."""

    def op(self, kind: str, *inputs: str, name: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def shape(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values, np.int64))

    def cast(self, x: str, to: int, name: str) -> str:
        return self.op("Cast", x, name=name, to=to)

    def leaky(self, x: str, name: str, slope: float | None = None) -> str:
        return self.op("LeakyRelu", x, name=name, alpha=self.config.negative_slope if slope is None else slope)

    def normalized(self, x: str) -> str:
        """What of the mel's normalization is not in the first convolution; in float32 always."""
        if self.config.input_clip:
            low, high = (np.array(limit, np.float32) for limit in self.config.input_clip)
            x = self.op("Clip", x, self.constant("input.low", low), self.constant("input.high", high), name="input.clip")
        if self.config.input_affine:
            mean, scale = (self.constant(f"input.{name}", self.weights[f"input.{name}"][:, None]) for name in ("mean", "scale"))
            x = self.op("Div", self.op("Sub", x, mean, name="input.centerd"), scale, name="input.scaled")
        return x

    def conv(self, name: str, x: str, padding: int, dilation: int = 1) -> str:
        """A convolution over time; `padding` is what it adds in all, split as trained (all left if causal)."""
        left = padding if self.config.causal else padding // 2
        sides = (left, padding - left)
        if self.config.padding_mode != "zeros" and padding:
            x, sides = self._pad(x, sides, _ONNX_PAD[self.config.padding_mode], f"{name}.pad"), (0, 0)
        return self._conv2d(name, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), x, sides=sides, dilation=dilation)

    def residual_stack(self, name: str, x: str) -> str:
        for j, dilation in enumerate(self.config.dilations):
            x = self.residual_block(f"{name}.{j}", x, dilation)
        return x

    def fused(self, name: str, x: str, fusion: MrfConfig) -> str:
        """The sum of the branches; `_with_means` has the factor that makes it their mean."""
        total = ""
        for i, (kernel, dilations) in enumerate(zip(fusion.kernel_sizes, fusion.dilations, strict=True)):
            branch = x
            for j, dilation in enumerate(dilations):
                branch = self.fusion_block(f"{name}.{i}.{j}", branch, kernel, dilation)
            total = self.op("Add", total, branch, name=f"{name}.{i}.sum") if total else branch
        return total

    def fusion_block(self, name: str, x: str, kernel: int, dilation: int) -> str:
        h = self.conv(f"{name}.dilated", self.leaky(x, f"{name}.lrelu0"), padding=(kernel - 1) * dilation, dilation=dilation)
        if f"{name}.plain.weight" in self.weights:
            h = self.conv(f"{name}.plain", self.leaky(h, f"{name}.lrelu1"), padding=kernel - 1)
        return self.op("Add", h, x, name=f"{name}.add")

    def residual_block(self, name: str, x: str, dilation: int) -> str:
        h = self.conv(f"{name}.dilated", self.leaky(x, f"{name}.lrelu0"),
                      padding=(self.config.stack_kernel_size - 1) * dilation, dilation=dilation)  # fmt: skip
        h = self.conv(f"{name}.pointwise", self.leaky(h, f"{name}.lrelu1"), padding=0)
        return self.op("Add", h, self.conv(f"{name}.shortcut", x, padding=0), name=f"{name}.add")

    def upsample(self, name: str, x: str, scale: int) -> str:
        """ConvTranspose(kernel 2·scale, stride scale) as convolution, reshape and crop.

        Output sample t·scale + p of the uncropped result is x[t]·W[p] + x[t-1]·W[p+scale]: two taps, one output channel per
        phase p.
        """
        weight = self.weights[f"{name}.weight"]  # (C_in, C_out, 2·scale)
        c_in, c_out, _ = weight.shape
        taps = weight.reshape(c_in, c_out, 2, scale)[:, :, ::-1]  # tap 0 meets x[t-1], tap 1 meets x[t]
        taps = taps.transpose(1, 3, 0, 2).reshape(c_out * scale, c_in, 2)
        bias = self.weights.get(f"{name}.bias")
        bias = None if bias is None else np.repeat(bias, scale)
        if self.config.causal:
            sides = (1, 0)
            if self.graph == "edge":
                x, sides = self._pad(x, sides, "edge", f"{name}.pad"), (0, 0)
            return self._interleave(name, self._conv2d(name, taps, bias, x, sides=sides), c_out, scale)
        x = self._interleave(name, self._conv2d(name, taps, bias, x, sides=(1, 1)), c_out, scale)
        left = self.config.crop_before(scale)
        self.too_long = self.too_long[0] * scale + left, self.too_long[1] * scale + scale - left
        return x if self.graph == "interior" else self.cropped(x, name)

    def cropped(self, x: str, name: str) -> str:
        """Take off what the upsamplings left over."""
        before, after = self.too_long
        self.too_long = 0, 0
        if not before and not after:
            return x
        end = -after or np.iinfo(np.int64).max
        start, stop = self.shape(f"crop{before}.start", [before]), self.shape(f"crop{after}.end", [end])
        return self.op("Slice", x, start, stop, self.shape("time_axis", [3]), name=f"{name}.crop")

    def filter_bank(self, name: str, x: str) -> str:
        """Zero insertion and filters as one convolution at the sub-bands' rate, one output channel per phase; in float32 always.

        Sample m·S + p of the output takes sub-band sample m + d through filter tap d·S - p + taps / 2.
        """
        filters = self.weights[f"{name}.weight"]  # (S, taps + 1)
        subbands, taps = len(filters), filters.shape[1] - 1
        first, last = -(taps // 2 // subbands), (subbands - 1 + taps // 2) // subbands
        weight = np.zeros((subbands, subbands, last - first + 1), np.float32)
        for phase in range(subbands):
            for d in range(first, last + 1):
                tap = d * subbands - phase + taps // 2
                if 0 <= tap <= taps:
                    weight[phase, :, d - first] = subbands * filters[:, tap]
        inputs = [x, self.constant(f"{name}.weight", weight[:, :, None])]
        attributes: dict[str, Any] = {"kernel_shape": [1, weight.shape[2]], "pads": [0, -first, 0, last]}
        return self._interleave(name, self.op("Conv", *inputs, name=name, **attributes), 1, subbands)

    def _interleave(self, name: str, x: str, channels: int, scale: int) -> str:
        """(B, C·scale, 1, T) to (B, C, 1, T·scale)."""
        x = self.op("Reshape", x, self.shape(f"phases{channels}x{scale}", [0, channels, scale, -1]), name=f"{name}.phases")
        x = self.op("Transpose", x, name=f"{name}.interleave", perm=[0, 1, 3, 2])
        return self.op("Reshape", x, self.shape(f"flat{channels}", [0, channels, 1, -1]), name=f"{name}.flat")

    def _conv2d(self, name: str, weight: np.ndarray, bias: np.ndarray | None, x: str, *, sides: tuple[int, int], dilation: int = 1) -> str:
        inputs = [x, self.constant(f"{name}.weight", weight[:, :, None].astype(self.dtype))]
        if bias is not None:
            inputs.append(self.constant(f"{name}.bias", bias.astype(self.dtype)))
        attributes: dict[str, Any] = {"kernel_shape": [1, weight.shape[-1]], "dilations": [1, dilation], "pads": [0, sides[0], 0, sides[1]]}
        return self.op("Conv", *inputs, name=name, **attributes)

    def _pad(self, x: str, sides: tuple[int, int], mode: str, name: str) -> str:
        left, right = sides
        amounts = self.shape(f"pad{left}_{right}", [0, 0, 0, left, 0, 0, 0, right])
        return self.op("Pad", x, amounts, name=name, mode=mode)


def _model(net: _Net, config: GeneratorConfig, metadata: Mapping[str, str]) -> onnx.ModelProto:
    mel = helper.make_tensor_value_info("mel", TensorProto.FLOAT, ["batch", config.in_channels, "frames"])
    audio = helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"])
    graph = helper.make_graph(net.nodes, "melgan", [mel], [audio], list(net.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="melrt")
    helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model, full_check=True)
    return model
