"""Output shapes of the node types that melrt writes into a voice's graph.

None of them can grow without saying so in its constants: values are repeated (broadcast) only up to the shape of another input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Settings = list[list[int]]
"""Values of the inputs after the first, which are constants: a shape, amounts of padding, or axes."""
Attributes = Mapping[str, list[int]]


class Kind(NamedTuple):
    """One type of node."""

    shape: Callable[[list[Shape], Settings, Attributes], Shape]
    """Shape of the output. It raises ValueError or IndexError if the inputs do not fit."""
    attributes: frozenset[str] = frozenset()
    """Attributes that the exporter writes."""
    settings: bool = False
    """True if the inputs after the first are constants that the shape depends on."""


def _elementwise(shapes: list[Shape], _settings: Settings, _attributes: Attributes) -> Shape:
    result = np.broadcast_shapes(*shapes)
    if math.prod(result) > max(map(math.prod, shapes)):
        raise ValueError("two inputs are repeated along each other")
    return result


def _conv(shapes: list[Shape], _settings: Settings, attributes: Attributes) -> Shape:
    (batch, channels, *size), (features, inputs, *kernel) = shapes[0], shapes[1]
    dilations, pads = attributes.get("dilations", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
    if len(size) != 2 or len(kernel) != 2 or channels != inputs or min(pads) < 0 or min(dilations) < 1:
        raise ValueError("not a convolution of (B, C, 1, T)")
    height, length = (size[i] + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) for i in (0, 1))
    return batch, features, _size(height), _size(length)


def _reshape(shapes: list[Shape], settings: Settings, _attributes: Attributes) -> Shape:
    shape = [shapes[0][i] if size == 0 else size for i, size in enumerate(settings[0])]
    if -1 in shape:
        shape[shape.index(-1)] = math.prod(shapes[0]) // math.prod(size for size in shape if size != -1)
    if math.prod(map(_size, shape)) != math.prod(shapes[0]):
        raise ValueError("another number of values")
    return tuple(shape)


def _transpose(shapes: list[Shape], _settings: Settings, attributes: Attributes) -> Shape:
    if sorted(attributes["perm"]) != list(range(len(shapes[0]))):
        raise ValueError("not a permutation")
    return tuple(shapes[0][axis] for axis in attributes["perm"])


def _unsqueeze(shapes: list[Shape], settings: Settings, _attributes: Attributes) -> Shape:
    (axis,) = settings[0]
    return (*shapes[0][: _size(axis)], 1, *shapes[0][axis:])


def _slice(shapes: list[Shape], settings: Settings, _attributes: Attributes) -> Shape:
    shape = list(shapes[0])
    (start,), (end,), (axis,) = settings
    shape[_size(axis)] = len(range(*slice(start, end).indices(shape[axis])))
    return tuple(shape)


def _pad(shapes: list[Shape], settings: Settings, _attributes: Attributes) -> Shape:
    amounts, rank = [_size(amount) for amount in settings[0]], len(shapes[0])
    return tuple(size + amounts[i] + amounts[i + rank] for i, size in enumerate(shapes[0]))


def _concat(shapes: list[Shape], _settings: Settings, attributes: Attributes) -> Shape:
    (axis,) = attributes["axis"]
    ends = {(shape[: _size(axis)], shape[axis + 1 :]) for shape in shapes}
    if len(ends) > 1:
        raise ValueError("the inputs differ in other axes")
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _size(value: int) -> int:
    if value < 0:
        raise ValueError("below zero")
    return value


KINDS = {
    **{name: Kind(_elementwise) for name in ("Add", "Sub", "Div", "Clip", "Tanh", "Identity")},
    "LeakyRelu": Kind(_elementwise, frozenset({"alpha"})),
    "Cast": Kind(_elementwise, frozenset({"to"})),
    "QuantizeLinear": Kind(lambda shapes, _settings, _attributes: shapes[0], frozenset({"axis"})),
    "DequantizeLinear": Kind(lambda shapes, _settings, _attributes: shapes[0], frozenset({"axis"})),
    "Conv": Kind(_conv, frozenset({"kernel_shape", "dilations", "pads"})),
    "Reshape": Kind(_reshape, settings=True),
    "Transpose": Kind(_transpose, frozenset({"perm"})),
    "Unsqueeze": Kind(_unsqueeze, settings=True),
    "Slice": Kind(_slice, settings=True),
    "Pad": Kind(_pad, frozenset({"mode"}), settings=True),
    "Concat": Kind(_concat, frozenset({"axis"})),
}
