"""Exact rewrites of a deploy graph: the same function with other operations. `melrt build --try-variants` measures which is fastest.

The speed of an operation in an engine differs between GPUs and between TensorRT versions, so no variant is the fastest everywhere. The
graph in the bundle has the first value of each choice; docs/engines.md gives the reasons and the times of all variants on a CPU.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import helper, numpy_helper

from melrt.checks import check_fields, one_of
from melrt.errors import ConfigError
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.deploy import initializer

Upsampling = Literal["polyphase", "cropped", "transposed"]
Shortcut = Literal["separate", "merged"]
TimeAxis = Literal["width", "height"]


@dataclass(frozen=True, slots=True)
class Variant:
    """Form of the network's graph; every variant computes the same samples."""

    upsampling: Upsampling = "polyphase"
    """Form of the upsamplings. `polyphase`: a 2-tap convolution and an interleaving, with one crop at the end of the interior graph;
    `cropped`: the same with a crop after each stage; `transposed`: a transposed convolution, as trained."""
    shortcut: Shortcut = "separate"
    """Form of the shortcuts. `separate`: as trained; `merged`: one convolution over the inputs of a residual block's pointwise convolution
    and of its shortcut replaces both and their addition."""
    time_axis: TimeAxis = "width"
    """Axis of time. `width`: tensors are (B, C, 1, T); `height`: (B, C, T, 1)."""

    def __post_init__(self) -> None:
        check_fields(self, {name: one_of(*values) for name, values in CHOICES.items()}, "graph variant")

    def to_dict(self) -> dict[str, str]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Variant:
        """Create a variant from the values that `to_dict` returns.

        Raises:
            ConfigError: A field or a value is unknown.
        """
        if not isinstance(values, dict) or set(values) - set(CHOICES):
            raise ConfigError(f"graph variant is {values!r:.80}; it must be an object with the fields {', '.join(CHOICES)}.")
        return cls(**values)


# The values of each choice; the first is the form of the bundle's graph.
CHOICES: dict[str, tuple[str, ...]] = {
    "upsampling": get_args(Upsampling), "shortcut": get_args(Shortcut), "time_axis": get_args(TimeAxis),
}  # fmt: skip


def rewrite_graph(model: bytes, variant: Variant, config: GeneratorConfig) -> bytes:
    """Write a deploy graph in another form; convolutions with quantized weights keep their form.

    Args:
        model: A model of `deploy_graph`, also with quantized convolutions.
        variant: The form to write.
        config: The generator's shape.

    Returns:
        A checked model with the same input and output. It is `model` itself if there is nothing to change.
    """
    if variant == Variant():
        return model
    rewriter = _Rewriter(onnx.load_from_string(model), config)
    if variant.upsampling != "polyphase":
        rewriter.crop_each_stage()
    if variant.upsampling == "transposed":
        rewriter.transpose_upsamplings()
    if variant.shortcut == "merged":
        rewriter.merge_shortcuts()
    if variant.time_axis == "height":
        rewriter.swap_height_and_time()
    if not rewriter.changed:
        return model
    return bytes(rewriter.finished().SerializeToString(deterministic=True))


def merge_shortcuts(model: onnx.ModelProto, blocks: Collection[str] | None = None) -> onnx.ModelProto:
    """Return a float deploy graph in which `BLOCK.merged`, one convolution over [h; x], replaces a block's two and their sum.

    Args:
        model: Graph of `deploy_graph`; it is not changed.
        blocks: Names of the residual blocks, such as `stages.0.blocks.1`; None for all of them.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    rewriter = _Rewriter(copy, GeneratorConfig())  # merging does not depend on the config
    rewriter.merge_shortcuts(blocks)
    return rewriter.finished()


class _Rewriter:
    """Rewrites a model; it finds nodes by the names that `deploy_graph` gives them."""

    def __init__(self, model: onnx.ModelProto, config: GeneratorConfig) -> None:
        self.model = model
        self.config = config
        self.nodes: dict[str, onnx.NodeProto] = {node.name: node for node in model.graph.node}
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.changed = False

    def crop_each_stage(self) -> None:
        """Replace the crop after the last convolution by a crop after each upsampling."""
        if "last.crop" not in self.nodes:
            return
        for i, scale in enumerate(self.config.upsample_scales):
            name, before = f"stages.{i}.upsample", self.config.crop_before(scale)
            start, end = f"crop{before}.start", f"crop{scale - before}.end"
            self.values |= {start: np.array([before]), end: np.array([-(scale - before) or np.iinfo(np.int64).max])}
            flat = self.nodes[f"{name}.flat"]
            crop = helper.make_node("Slice", [f"{name}.long", start, end, "time_axis"], list(flat.output), name=f"{name}.crop")
            flat.output[0] = f"{name}.long"
            self._replace(f"{name}.flat", [flat, crop])
        crop = self.nodes["last.crop"]
        self._replace("last.crop", [])
        for node in self.nodes.values():
            node.input[:] = [crop.input[0] if name == crop.output[0] else name for name in node.input]

    def transpose_upsamplings(self) -> None:
        """Replace convolution, interleaving and crop of each upsampling by the transposed convolution that they compute."""
        for i, scale in enumerate(self.config.upsample_scales):
            name = f"stages.{i}.upsample"
            conv, parts = self.nodes[name], [f"{name}.{part}" for part in ("phases", "interleave", "flat", "crop")]
            if not self._has_weights(conv):
                continue
            c_in, c_out = self.values[f"{name}.weight"].shape[1], self.values[f"{name}.weight"].shape[0] // scale
            taps = self.values[f"{name}.weight"].reshape(c_out, scale, c_in, 2).transpose(2, 0, 3, 1)[:, :, ::-1]
            self.values[f"{name}.transposed"] = np.ascontiguousarray(taps).reshape(c_in, c_out, 1, 2 * scale)
            inputs = [conv.input[0], f"{name}.transposed"]
            if len(conv.input) > 2:
                self.values[f"{name}.bias"] = self.values[f"{name}.bias"][::scale]
                inputs.append(f"{name}.bias")
            last = next(self.nodes[part] for part in reversed(parts) if part in self.nodes)
            self._replace(name, [helper.make_node(
                "ConvTranspose", inputs, list(last.output), name=name, kernel_shape=[1, 2 * scale], strides=[1, scale],
                pads=self._cropped_samples(conv, f"{name}.crop", scale),
            )])  # fmt: skip
            for part in parts:
                self._replace(part, [])

    def _cropped_samples(self, conv: onnx.NodeProto, crop: str, scale: int) -> list[int]:
        """Return the transposed convolution's `pads`: its samples beyond the convolution's padding, and those that the crop removes."""
        _, before, _, after = _ints(conv, "pads")
        left, right = (1 - before) * scale, (1 - after) * scale
        if crop in self.nodes:
            start, end = (int(self.values[name][0]) for name in self.nodes[crop].input[1:3])
            left, right = left + start, right - min(end, 0)
        return [0, left, 0, right]

    def merge_shortcuts(self, blocks: Collection[str] | None = None) -> None:
        """Replace pointwise(h) + shortcut(x) by one convolution over the channels of h and x."""
        found = [name.removesuffix(".shortcut") for name in self.nodes if name.endswith(".shortcut")]
        for block in [name for name in found if blocks is None or name in blocks]:
            pointwise, shortcut, add = (self.nodes[f"{block}.{part}"] for part in ("pointwise", "shortcut", "add"))
            if not (self._has_weights(pointwise) and self._has_weights(shortcut)):
                continue
            weights = [self.values[f"{block}.{part}.weight"] for part in ("pointwise", "shortcut")]
            self.values[f"{block}.merged.weight"] = np.concatenate(weights, axis=1)
            inputs = [f"{block}.joined", f"{block}.merged.weight"]
            if len(pointwise.input) > 2:
                biases = [self.values[f"{block}.{part}.bias"] for part in ("pointwise", "shortcut")]
                self.values[f"{block}.merged.bias"] = np.sum(biases, axis=0, dtype=np.float64).astype(biases[0].dtype)
                inputs.append(f"{block}.merged.bias")
            self._replace(add.name, [
                helper.make_node("Concat", [pointwise.input[0], shortcut.input[0]], [inputs[0]], name=inputs[0], axis=1),
                helper.make_node("Conv", inputs, list(add.output), name=f"{block}.merged", kernel_shape=[1, 1]),
            ])  # fmt: skip
            self._replace(pointwise.name, [])
            self._replace(shortcut.name, [])

    def swap_height_and_time(self) -> None:
        """Swap the axes of height and time."""
        self.changed = True
        for name, value in self.values.items():
            if value.ndim == 4:
                self.values[name] = value.swapaxes(2, 3)
            elif name in ("height_axis", "time_axis"):
                self.values[name] = 5 - value
            elif name.startswith(("pad", "flat")):  # pads have values for both ends of four axes, flat is a shape of four axes
                self.values[name] = value.reshape(-1, 4)[:, [0, 1, 3, 2]].reshape(-1)
        for node in self.nodes.values():
            for attribute in node.attribute:
                if attribute.name in ("kernel_shape", "dilations", "strides", "pads"):
                    attribute.ints[:] = [size for pair in zip(attribute.ints[1::2], attribute.ints[::2], strict=True) for size in pair]

    def finished(self) -> onnx.ModelProto:
        graph = self.model.graph
        used = {name for node in self.nodes.values() for name in node.input}
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes.values())
        graph.initializer.extend(initializer(name, value) for name, value in self.values.items() if name in used)
        onnx.checker.check_model(self.model, full_check=True)
        return self.model

    def _has_weights(self, conv: onnx.NodeProto) -> bool:
        return conv.input[1] in self.values

    def _replace(self, name: str, nodes: list[onnx.NodeProto]) -> None:
        self.changed = True
        self.nodes = {node.name: node for old in self.nodes for node in (nodes if old == name else [self.nodes[old]])}


def _ints(node: onnx.NodeProto, attribute: str) -> list[int]:
    return list(next(one for one in node.attribute if one.name == attribute).ints)
