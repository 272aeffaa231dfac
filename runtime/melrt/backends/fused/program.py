"""The file of a fused engine: the launches of one run, the weights, and the compiled kernels for each GPU.

The file is a magic line, the length of the header, the header in JSON, and a payload: the weights, and then the cubins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from melrt.checks import Rule, check_fields, list_of, text, whole
from melrt.errors import BackendError

# The number changes with every change of the header or of the kernels' arguments.
FORMAT = 1
MAGIC = b"melrt fused engine\n"
# Buffers and weights begin at multiples of this address, in bytes; the kernels are compiled for multiples of 16.
ALIGNMENT = 256
# Triton passes two pointers after a kernel's own arguments: scratch memory of the grid, and that of its profiler. The kernels use neither.
HIDDEN_POINTERS = 2
KINDS = ("mel", "audio", "weights", "buffer", "steps", "integer")
_MOST = 1 << 31
_ANY_SIZE = whole(0, _MOST)
_NAMED = Rule(lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value), "an object")


class Argument(NamedTuple):
    """One argument of a kernel."""

    kind: str
    """`mel` and `audio`: addresses in the slot. `weights`: an address in the weights. `buffer`: the address of a buffer of activations.
    `steps`: the time steps of the input, a 32-bit integer. `integer`: a 32-bit integer."""
    value: int = 0
    """Offset into the weights in bytes, index of the buffer, or the integer."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a run."""

    kernel: str
    """Name of the kernel."""
    layer: str
    """Layer of the generator that it computes, such as `stages.0.blocks.1`."""
    arguments: tuple[Argument, ...]
    """The kernel's arguments, in order."""
    rate: int
    """Time steps of its input for each mel frame."""
    extra: int = 0
    """Rows that it computes beyond the steps of its input."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", tuple(Argument(*argument) for argument in self.arguments))
        argument = Rule(lambda value: value.kind in KINDS and _ANY_SIZE.accepts(value.value), f"one of {', '.join(KINDS)}, and a number")
        rules = {"kernel": text(), "layer": text(), "arguments": list_of(argument, 1, 16), "rate": whole(1, _MOST), "extra": whole(0, 1)}
        check_fields(self, rules, "launch", BackendError)

    def grid(self, kernel: CompiledKernel, batch: int, frames: int) -> tuple[int, int, int]:
        """Return the blocks of threads for a mel (batch, M, frames)."""
        return -(-(self.rate * frames + self.extra) // kernel.rows), kernel.tiles, batch


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel, compiled for one GPU."""

    symbol: str
    """Name of its function in the cubin."""
    offset: int
    """Place of the cubin in the payload, in bytes."""
    size: int
    """Size of the cubin in bytes."""
    threads: int
    """Threads of a block."""
    shared: int
    """Dynamic shared memory of a block in bytes."""
    rows: int
    """Rows that a block computes."""
    tiles: int
    """Blocks that share the output channels of these rows."""
    registers: int
    """Registers of a thread."""
    stack: int
    """Bytes of a thread's stack, where registers are spilled."""
    columns: int
    """Columns of tensor memory of a block; 0 where the GPU has none."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("rows", "tiles"), whole(1, _MOST))
        sizes = dict.fromkeys(("offset", "size", "shared", "registers", "stack", "columns"), _ANY_SIZE)
        check_fields(self, {"symbol": text(), "threads": whole(32, 1024), **counts, **sizes}, "compiled kernel", BackendError)


@dataclass(frozen=True, slots=True)
class Program:
    """The content of a fused engine."""

    bands: int
    """Mel bands."""
    hop: int
    """Samples for each mel frame."""
    buffers: tuple[int, ...]
    """Bytes of each buffer of activations for each mel frame."""
    weights: int
    """Bytes of the weights, which begin the payload."""
    launches: tuple[Launch, ...]
    """Launches of a run, in order."""
    gpus: Mapping[str, Mapping[str, CompiledKernel]]
    """Compiled kernels by compute capability, such as `9.0`, and by name."""
    around: Mapping[str, tuple[int, int]]
    """Place and size in the payload of the compiled kernels around an engine (`melrt.backends.tensorrt.kernels`), for each GPU."""
    around_source: str
    """SHA-256 of the source of these kernels: another version of melrt compiles its own."""
    payload: bytes
    """Weights, cubins, and the compiled kernels around an engine."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("bands", "hop"), whole(1, _MOST))
        rules = {
            **counts,
            "buffers": list_of(whole(1, _MOST), 1, 16),
            "weights": whole(1, len(self.payload)),
            "gpus": _NAMED,
            "around": _NAMED,
            "around_source": text(),
        }
        check_fields(self, rules, "fused engine", BackendError)
        for launch in self.launches:
            for kind, value in launch.arguments:
                limit = {"weights": self.weights, "buffer": len(self.buffers)}.get(kind, _MOST)
                if value >= limit:
                    raise BackendError(f"fused engine: {launch.layer} has {kind} {value}; it must be below {limit}.")
        for capability, kernels in self.gpus.items():
            if missing := {launch.kernel for launch in self.launches} - set(kernels):
                raise BackendError(f"fused engine: compute capability {capability} lacks the kernels {sorted(missing)}.")
            places = [(kernel.offset, kernel.size) for kernel in kernels.values()]
            if any(offset + size > len(self.payload) for offset, size in [*places, self.around[capability]]):
                raise BackendError(f"fused engine: the kernels for compute capability {capability} are longer than the file.")

    def cubin(self, kernel: CompiledKernel) -> bytes:
        """Return the code of a kernel."""
        return self.payload[kernel.offset : kernel.offset + kernel.size]

    def places(self, batch: int, frames: int) -> list[int]:
        """Return the offset in bytes of each buffer in scratch memory for a mel (batch, M, frames), and the end of the last one."""
        offsets = [0]
        for size in self.buffers:
            offsets.append(offsets[-1] + -(-size * batch * frames // ALIGNMENT) * ALIGNMENT)
        return offsets

    def dumps(self) -> bytes:
        """Return the file's content. Equal programs give equal bytes."""
        values = asdict(self)
        del values["payload"]
        header = json.dumps({"format": FORMAT} | values).encode()
        return MAGIC + len(header).to_bytes(4, "little") + header + self.payload

    @classmethod
    def loads(cls, data: bytes, file: str) -> Program:
        """Read the content that `dumps` returns.

        Args:
            data: Content of the file.
            file: Its name, for messages.

        Raises:
            BackendError: Not a fused engine, of another format, or damaged.
        """
        start = len(MAGIC) + 4
        if not data.startswith(MAGIC) or len(data) < start:
            raise BackendError(f"{file} is not a fused engine; build it again with `melrt build VOICE.melrt --engine fused`.")
        end = start + int.from_bytes(data[len(MAGIC) : start], "little")
        try:
            values = json.loads(data[start:end])
            if (found := values.pop("format")) != FORMAT:
                raise BackendError(f"{file} has format {found!r}; this melrt runs format {FORMAT}: melrt build VOICE.melrt --engine fused")
            return cls(**_fields(values), payload=data[end:])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BackendError(f"{file} is damaged ({error}); build it again with `melrt build VOICE.melrt --engine fused`.") from error


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Turn a header's JSON values into the fields of `Program`."""
    gpus = {
        capability: {name: CompiledKernel(**facts) for name, facts in kernels.items()} for capability, kernels in values["gpus"].items()
    }
    return values | {"launches": tuple(Launch(**launch) for launch in values["launches"]), "gpus": gpus}
