"""Check of a voice's ONNX graph before an inference engine reads it.

An engine runs whatever a graph says: endless loops, constants of any size, weights from other files. melrt's exporter writes 16 kinds
of nodes, whose output shapes follow from their input shapes. Everything else is refused, and so is a graph that needs too much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from melrt.bundle.graph_shapes import KINDS, Shape
from melrt.bundle.protobuf import fields, integers, message, text
from melrt.errors import BundleError

# The published generator has 110 nodes and 17 MB; quantized it has 500 nodes.
MAX_GRAPH_BYTES = 512 << 20
MAX_PARTS = 20_000
MAX_PART_BYTES = 64 << 10
# Per frame the published generator multiplies 46 million times, and needs 25,000 values at once.
MAX_MULTIPLICATIONS = 2_000_000_000
MAX_VALUES = 1 << 19
_FRAMES = 128
# Field numbers of onnx.proto that the exporter writes.
_MODEL = {1, 2, 7, 8, 14}  # IR version, producer, graph, opset, metadata
_GRAPH = {1, 2, 5, 11, 12}  # nodes, name, initializers, input, output
_NODE = {1, 2, 3, 4, 5}  # inputs, outputs, name, type, attributes
_ATTRIBUTE = {1, 2, 3, 4, 8, 20}  # name, float, integer, text, integers, type
_TENSOR = {1, 2, 8, 9}  # dimensions, type, name, bytes
_OPSET = {1, 2}
_INT64 = 7
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, _INT64: 8, 10: 2, 16: 2}
_MAX_SHAPE = 8  # values of a constant that is a shape, an amount of padding or an axis


def check_graph(data: bytes, bands: int, hop: int) -> None:
    """Check that an ONNX model is one that melrt's exporter can have written, and what one run of it needs.

    Args:
        data: The serialized model.
        bands: Number of mel bands M.
        hop: Samples per frame.

    Raises:
        BundleError: The model is damaged, does not turn (B, M, T) into (B, T * hop), has other parts, or needs too much.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise BundleError(f"the graph has {len(data)} bytes; at most {MAX_GRAPH_BYTES} are read")
    graph = _Graph()
    for number, value in fields(memoryview(data), _MODEL, "the model"):
        if number == 7:
            graph.read(message(value))
        elif number == 8 and any(n == 1 and text(domain) for n, domain in fields(message(value), _OPSET, "the opset")):
            raise BundleError("the graph uses operators that are not ONNX's own")
    graph.run(bands, hop)


@dataclass(slots=True)
class _Node:
    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Graph:
    """Nodes and constants of a model, and the shapes that its tensors have for one mel of 128 frames."""

    nodes: list[_Node] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    constants: dict[str, list[int]] = field(default_factory=dict)
    """Values of short 64-bit integer constants."""
    ends: dict[int, list[str]] = field(default_factory=lambda: {11: [], 12: []})
    """Names of the inputs (field 11) and outputs (field 12)."""

    def read(self, data: memoryview) -> None:
        for count, (number, value) in enumerate(fields(data, _GRAPH, "the graph")):
            part = message(value)
            if count >= MAX_PARTS or (number != 5 and len(part) > MAX_PART_BYTES):
                raise BundleError(f"the graph has more than {MAX_PARTS} parts, or a node of more than {MAX_PART_BYTES} bytes")
            if number == 1:
                self.nodes.append(_read_node(part))
            elif number == 5:
                self._read_constant(part)
            elif number in self.ends:
                self.ends[number] += [text(name) for n, name in fields(part, {1, 2}, "an end of the graph") if n == 1]

    def _read_constant(self, data: memoryview) -> None:
        shape: list[int] = []
        kind, name, content = 0, "", memoryview(b"")
        for number, value in fields(data, _TENSOR, "a constant"):
            if number == 1:
                shape += integers(value)
            elif number == 2:
                kind = integers(value)[0]
            elif number == 8:
                name = text(value)
            else:
                content = message(value)
        if kind not in _ITEM_BYTES or min(shape, default=0) < 0 or math.prod(shape) * _ITEM_BYTES[kind] != len(content):
            raise BundleError(f"the constant {name!r:.60} has type {kind}, shape {shape!r:.60} and {len(content)} bytes, which do not fit")
        self._define(name, tuple(shape))
        if kind == _INT64 and len(content) <= 8 * _MAX_SHAPE:
            self.constants[name] = np.frombuffer(content, "<i8").tolist()

    def _define(self, name: str, shape: Shape) -> None:
        if not name or name in self.shapes:
            raise BundleError(f"two tensors are named {name!r:.60}")
        self.shapes[name] = shape

    def run(self, bands: int, hop: int) -> None:
        """Follow the shapes through the graph, and add up what a run needs."""
        if self.ends[11] != ["mel"] or len(self.ends[12]) != 1:
            raise BundleError(f"the graph has inputs {self.ends[11]!r:.60} and outputs {self.ends[12]!r:.60}; a voice has mel and audio")
        self._define("mel", (1, bands, _FRAMES))
        last_use = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        last_use[self.ends[12][0]] = len(self.nodes)
        live, multiplications = {"mel": bands * _FRAMES}, 0
        for i, node in enumerate(self.nodes):
            shape = self._shape(node)
            self._define(node.outputs[0], shape)
            live[node.outputs[0]] = math.prod(shape)
            if node.kind == "Conv":
                multiplications += math.prod(shape) * math.prod(self.shapes[node.inputs[1]][1:])
            if sum(live.values()) > MAX_VALUES * _FRAMES or multiplications > MAX_MULTIPLICATIONS * _FRAMES:
                raise BundleError(
                    f"the graph needs more than {MAX_VALUES} values at once, or {MAX_MULTIPLICATIONS} multiplications, for each frame"
                )
            for name in {*node.inputs, *node.outputs}:
                if last_use.get(name, i) == i:
                    live.pop(name, None)  # constants are not in it: the size of the file bounds them
        if self.shapes.get(self.ends[12][0]) != (1, _FRAMES * hop):
            raise BundleError(
                f"the graph turns {_FRAMES} frames into shape {self.shapes.get(self.ends[12][0])}; this voice has {hop} samples per frame"
            )

    def _shape(self, node: _Node) -> Shape:
        """Return the shape of a node's output."""
        kind = KINDS.get(node.kind)
        if kind is None:
            raise BundleError(f"the graph has a node of type {node.kind!r:.40}; melrt writes {', '.join(sorted(KINDS))}")
        missing = [name for name in node.inputs if name not in self.shapes]
        if missing or not node.inputs or len(node.outputs) != 1 or not node.attributes.keys() <= kind.attributes:
            raise BundleError(f"a {node.kind} has inputs {node.inputs!r:.80} or attributes that melrt does not write")
        shapes = [self.shapes[name] for name in node.inputs]
        try:
            settings = [self.constants[name] for name in node.inputs[1:]] if kind.settings else []
            return kind.shape(shapes, settings, node.attributes)
        except (IndexError, KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise BundleError(f"the {node.kind} {node.outputs[0]!r:.60} does not fit its inputs {shapes!r:.120}") from error


def _read_node(data: memoryview) -> _Node:
    node = _Node()
    for number, value in fields(data, _NODE, "a node"):
        if number == 5:
            name, values = _read_attribute(message(value))
            node.attributes[name] = values
        elif number == 4:
            node.kind = text(value)
        elif number != 3:
            (node.inputs if number == 1 else node.outputs).append(text(value))
    return node


def _read_attribute(data: memoryview) -> tuple[str, list[int]]:
    """Return an attribute's name and its integers; a number that is not whole, or a text, changes no shape."""
    name, values = "", []
    for number, value in fields(data, _ATTRIBUTE, "an attribute"):
        if number == 1:
            name = text(value)
        elif number in (3, 8):
            values += integers(value)
    return name, values
