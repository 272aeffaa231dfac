"""Types of the convolutions in a TensorRT-RTX plan, read from the plan's own text; no GPU is needed.

A plan holds its program as text: `tensor={ ... name="x" ... type=int8 }` for every tensor, `corrltn={ name="first" input={"x" "w"} ... }`
for every convolution, and `function={ ... layers="[ONNX Layer: ...]" }` for every other kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Blocks in braces nest at most twice inside these.
_BODY = r"((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)"
_TENSOR = re.compile(rf"tensor=\{{{_BODY}\}}")
_CONVOLUTION = re.compile(rf"corrltn=\{{{_BODY}\}}")
_FUNCTION = re.compile(rf"\n  function=\{{{_BODY}\}}")
_WEIGHT_DEQUANTIZATION = re.compile(r"\[ONNX Layer: ([\w.]+\.weight\.dequantize)\]")


@dataclass(frozen=True, slots=True)
class PlanText:
    """Facts that the text of a plan states."""

    weight_types: dict[str, str]
    """Type of the weight of each convolution, by name: `float`, `half` or `int8`."""
    weight_dequantizations: tuple[str, ...]
    """ONNX nodes that dequantize constant weights in kernels of their own, in every run."""

    @classmethod
    def read(cls, plan: bytes) -> PlanText:
        """Read a plan; one without such text, as of another version, gives no convolutions."""
        text = plan.decode("latin-1")
        types = {name: kind for body in _bodies(_TENSOR, text) if (name := _field(body, "name")) and (kind := _field(body, "type"))}
        weights = {}
        for body in _bodies(_CONVOLUTION, text):
            inputs = re.findall(r'"([^"]*)"', (re.search(r" input=\{([^}]*)\}", body) or [""])[0])
            weights[_field(body, "name")] = types.get(inputs[1], "unknown") if len(inputs) > 1 else "unknown"
        found = (name for body in _bodies(_FUNCTION, text) for name in _WEIGHT_DEQUANTIZATION.findall(body))
        return cls(weights, tuple(dict.fromkeys(found)))


def _bodies(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    return (match[1] for match in pattern.finditer(text))


def _field(body: str, name: str) -> str:
    found = re.search(rf' {name}="?([^"\s]+)', body)
    return found[1] if found else ""
