"""The deploy graph: an ONNX graph that computes the trained generator's function in a form that suits an inference engine.

The graph is written node by node and not traced: every tensor has a readable name, the same checkpoint always gives the same bytes, and
a half-precision graph has half precision in every layer. It differs from the trained network in these points, all of them exact:

- A transposed convolution becomes a 2-tap convolution to scale·C channels, a reshape and a crop (polyphase form).
- Tensors are 2-D with height 1, (B, C, 1, T), which is the layout of the engines' blocked kernels.
- The `interior` graph for windows (`melrt.planning.windows`) has no padding nodes, and crops once, at its end. The samples that it
  keeps until then change only output within the receptive field of the window's ends, which is discarded.
- The mean at the end of a HiFi-GAN stage becomes a sum. Its factor is folded into the next convolution, because LeakyReLU commutes with a
  positive factor.
- Normalization of the mel was folded into the first convolution when the checkpoint was read (`melrt_export.checkpoints`).
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
from melrt_export.graph.bfloat16 import to_bfloat16

Weights = Mapping[str, np.ndarray]
GraphPrecision = Literal["fp32", "fp16", "bf16"]

# Opset 19 is the first with half-precision Q/DQ scales. TensorRT 10.12, ONNX Runtime 1.17 and later versions can read it.
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
        precision: `fp16` computes in half precision between float32 input and output; the tanh stays in float32. `bf16` computes in
            bfloat16 except for a few layers (`melrt_export.graph.bfloat16`).
        graph: `edge` pads like the trained network. `interior` pads with zeros inside the convolutions, and is exact except for the
            receptive field at both ends.
        metadata: Entries for `metadata_props`, so that a single file still states its mel convention.

    Returns:
        A checked model from `mel` (batch, M, frames) float32 to `audio` (batch, frames·hop) float32.
    """
    if graph == "interior":
        config = replace(config, padding_mode="zeros")
    builder = _GraphBuilder(config, _fold_branch_means(config, weights), graph, np.dtype(np.float16 if precision == "fp16" else np.float32))
    x = builder.node("Unsqueeze", builder.normalize("mel"), builder.integers("height_axis", [2]), name="mel_2d")
    if precision == "fp16":
        x = builder.cast(x, TensorProto.FLOAT16, "mel_half")
    x = builder.conv("first", x, padding=config.kernel_size - 1)
    for i, scale in enumerate(config.upsample_scales):
        x = builder.upsample(f"stages.{i}.upsample", builder.leaky_relu(x, f"stages.{i}.lrelu"), scale)
        blocks = f"stages.{i}.blocks"
        x = builder.mrf_branches(blocks, x, config.mrf) if config.mrf else builder.residual_stack(blocks, x)
    x = builder.conv("last", builder.leaky_relu(x, "last.lrelu", config.resolved_last_slope), padding=config.kernel_size - 1)
    x = builder.crop(x, "last")
    if precision == "fp16":
        x = builder.cast(x, TensorProto.FLOAT, "audio_single")
    if config.final_tanh:
        x = builder.node("Tanh", x, name="tanh")
    if config.pqmf_taps:
        x = builder.filter_bank("pqmf", x)
    builder.node("Reshape", x, builder.integers("audio_shape", [0, -1]), name="audio", output="audio")
    model = _model(builder, config, metadata or {})
    return to_bfloat16(model, config) if precision == "bf16" else model


def initializer(name: str, value: np.ndarray) -> onnx.TensorProto:
    """Make a constant of a graph. A scalar stays a scalar: TensorRT takes a scale of shape (1,) for one per channel, not per tensor."""
    return numpy_helper.from_array(np.asarray(value, order="C"), name)  # np.ascontiguousarray would give a scalar the shape (1,)


def _fold_branch_means(config: GeneratorConfig, weights: Weights) -> Weights:
    """Return the weights with those of the convolutions after an MRF stage divided by the number of branches."""
    if not config.mrf:
        return weights
    after_stage = [f"stages.{i}.upsample.weight" for i in range(1, len(config.upsample_scales))] + ["last.weight"]
    return {**weights, **{name: weights[name] / len(config.mrf.kernel_sizes) for name in after_stage}}


@dataclass
class _GraphBuilder:
    """Collects nodes and weights; each method that adds nodes returns the name of their output tensor."""

    config: GeneratorConfig
    weights: Weights
    graph: GraphKind
    dtype: np.dtype[np.floating]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    excess: tuple[int, int] = (0, 0)
    """Samples of the newest tensor before and after those that belong to the input's frames; they are not cropped yet."""

    def node(self, kind: str, *inputs: str, name: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = initializer(name, value)
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        return self.constant(name, np.array(values, np.int64))

    def cast(self, x: str, to: int, name: str) -> str:
        return self.node("Cast", x, name=name, to=to)

    def leaky_relu(self, x: str, name: str, slope: float | None = None) -> str:
        return self.node("LeakyRelu", x, name=name, alpha=self.config.negative_slope if slope is None else slope)

    def normalize(self, x: str) -> str:
        """Add the part of the mel's normalization that is not folded into the first convolution, always in float32."""
        if self.config.input_clip:
            low, high = (np.array(limit, np.float32) for limit in self.config.input_clip)
            x = self.node("Clip", x, self.constant("input.low", low), self.constant("input.high", high), name="input.clip")
        if self.config.input_affine:
            mean, scale = (self.constant(f"input.{name}", self.weights[f"input.{name}"][:, None]) for name in ("mean", "scale"))
            x = self.node("Div", self.node("Sub", x, mean, name="input.centered"), scale, name="input.scaled")
        return x

    def conv(self, name: str, x: str, padding: int, dilation: int = 1) -> str:
        """Add a convolution over time; `padding` is the total padding, half on each side, or all on the left if causal."""
        left = padding if self.config.causal else padding // 2
        sides = (left, padding - left)
        if self.config.padding_mode != "zeros" and padding:
            x, sides = self._pad(x, sides, _ONNX_PAD[self.config.padding_mode], f"{name}.pad"), (0, 0)
        return self._conv2d(name, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), x, sides=sides, dilation=dilation)

    def residual_stack(self, name: str, x: str) -> str:
        for j, dilation in enumerate(self.config.dilations):
            x = self.residual_block(f"{name}.{j}", x, dilation)
        return x

    def mrf_branches(self, name: str, x: str, mrf: MrfConfig) -> str:
        """Add the sum of the branches; `_fold_branch_means` turns the sum into their mean."""
        total = ""
        for i, (kernel, dilations) in enumerate(zip(mrf.kernel_sizes, mrf.dilations, strict=True)):
            branch = x
            for j, dilation in enumerate(dilations):
                branch = self.mrf_block(f"{name}.{i}.{j}", branch, kernel, dilation)
            total = self.node("Add", total, branch, name=f"{name}.{i}.sum") if total else branch
        return total

    def mrf_block(self, name: str, x: str, kernel: int, dilation: int) -> str:
        h = self.conv(f"{name}.dilated", self.leaky_relu(x, f"{name}.lrelu0"), padding=(kernel - 1) * dilation, dilation=dilation)
        if f"{name}.plain.weight" in self.weights:
            h = self.conv(f"{name}.plain", self.leaky_relu(h, f"{name}.lrelu1"), padding=kernel - 1)
        return self.node("Add", h, x, name=f"{name}.add")

    def residual_block(self, name: str, x: str, dilation: int) -> str:
        h = self.conv(f"{name}.dilated", self.leaky_relu(x, f"{name}.lrelu0"),
                      padding=(self.config.stack_kernel_size - 1) * dilation, dilation=dilation)  # fmt: skip
        h = self.conv(f"{name}.pointwise", self.leaky_relu(h, f"{name}.lrelu1"), padding=0)
        return self.node("Add", h, self.conv(f"{name}.shortcut", x, padding=0), name=f"{name}.add")

    def upsample(self, name: str, x: str, scale: int) -> str:
        """Add a transposed convolution of kernel size 2·scale and stride `scale` as a convolution, a reshape and a crop.

        Output sample t·scale + p of the uncropped result is x[t]·W[p] + x[t-1]·W[p+scale]: two taps, and one output channel for each
        phase p.
        """
        weight = self.weights[f"{name}.weight"]  # (C_in, C_out, 2·scale)
        c_in, c_out, _ = weight.shape
        taps = weight.reshape(c_in, c_out, 2, scale)[:, :, ::-1]  # tap 0 multiplies x[t-1], tap 1 multiplies x[t]
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
        self.excess = self.excess[0] * scale + left, self.excess[1] * scale + scale - left
        return x if self.graph == "interior" else self.crop(x, name)

    def crop(self, x: str, name: str) -> str:
        """Remove the excess samples of all upsamplings so far."""
        before, after = self.excess
        self.excess = 0, 0
        if not before and not after:
            return x
        end = -after or np.iinfo(np.int64).max
        start, stop = self.integers(f"crop{before}.start", [before]), self.integers(f"crop{after}.end", [end])
        return self.node("Slice", x, start, stop, self.integers("time_axis", [3]), name=f"{name}.crop")

    def filter_bank(self, name: str, x: str) -> str:
        """Add zero insertion and filters as one convolution at the rate of the sub-bands, always in float32.

        There is one output channel for each phase p: output sample m·S + p takes sub-band sample m + d through filter tap
        d·S - p + taps / 2.
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
        return self._interleave(name, self.node("Conv", *inputs, name=name, **attributes), 1, subbands)

    def _interleave(self, name: str, x: str, channels: int, scale: int) -> str:
        """Interleave the phases: (B, C·scale, 1, T) to (B, C, 1, T·scale)."""
        x = self.node("Reshape", x, self.integers(f"phases{channels}x{scale}", [0, channels, scale, -1]), name=f"{name}.phases")
        x = self.node("Transpose", x, name=f"{name}.interleave", perm=[0, 1, 3, 2])
        return self.node("Reshape", x, self.integers(f"flat{channels}", [0, channels, 1, -1]), name=f"{name}.flat")

    def _conv2d(self, name: str, weight: np.ndarray, bias: np.ndarray | None, x: str, *, sides: tuple[int, int], dilation: int = 1) -> str:
        inputs = [x, self.constant(f"{name}.weight", weight[:, :, None].astype(self.dtype))]
        if bias is not None:
            inputs.append(self.constant(f"{name}.bias", bias.astype(self.dtype)))
        attributes: dict[str, Any] = {"kernel_shape": [1, weight.shape[-1]], "dilations": [1, dilation], "pads": [0, sides[0], 0, sides[1]]}
        return self.node("Conv", *inputs, name=name, **attributes)

    def _pad(self, x: str, sides: tuple[int, int], mode: str, name: str) -> str:
        left, right = sides
        amounts = self.integers(f"pad{left}_{right}", [0, 0, 0, left, 0, 0, 0, right])
        return self.node("Pad", x, amounts, name=name, mode=mode)


def _model(builder: _GraphBuilder, config: GeneratorConfig, metadata: Mapping[str, str]) -> onnx.ModelProto:
    mel = helper.make_tensor_value_info("mel", TensorProto.FLOAT, ["batch", config.in_channels, "frames"])
    audio = helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"])
    graph = helper.make_graph(builder.nodes, "melgan", [mel], [audio], list(builder.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="melrt")
    helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model, full_check=True)
    return model
