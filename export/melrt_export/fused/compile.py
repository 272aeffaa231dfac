"""Compile the kernels of a fused engine for a GPU that need not be in this machine, with Triton's compiler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from melrt.backends.fused.program import HIDDEN_POINTERS, CompiledKernel
from melrt.backends.tensorrt.kernels import compile_source
from melrt.errors import EngineBuildError, MissingExtraError
from melrt_export.fused.lower import POINTERS, Kernel
from melrt_export.fused.tiles import Tile

WARP = 32
_REGISTERS = 65536
# Registers are given to a warp in units of this many for each thread.
_REGISTER_UNIT = 8
# Shared memory that the driver takes for itself in each block, in bytes.
_RESERVED = 1024
# Columns of a multiprocessor's tensor memory (PTX ISA, tensor memory of tcgen05), where the GPU has one: compute capability 10.0.
_COLUMNS = 512
_KIB = 1024
# A base pointer or buffer is aligned better than this, in bytes; the compiler makes wide loads of it.
_DIVISIBLE = 16
_POINTER_TYPES = {"float16": "*fp16", "float32": "*fp32"}


@dataclass(frozen=True, slots=True)
class Capability:
    """Limits of a compute capability (CUDA C++ Programming Guide, table of technical specifications)."""

    name: str
    """Compute capability, such as `9.0`."""
    shared_kib: int
    """Shared memory of a multiprocessor in KiB; a block can have all but one."""
    warps: int
    """Warps that a multiprocessor holds."""

    @property
    def number(self) -> int:
        """Number that Triton calls it by, such as 90."""
        return int(self.name.replace(".", ""))


CAPABILITIES = {
    one.name: one
    for one in (
        Capability("8.0", 164, 64), Capability("8.6", 100, 48), Capability("8.9", 100, 48), Capability("9.0", 228, 64),
        Capability("10.0", 228, 64), Capability("12.0", 100, 48),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel, compiled for one compute capability."""

    cubin: bytes
    """Its code."""
    symbol: str
    """Name of its function in the cubin."""
    threads: int
    """Threads of a block."""
    shared: int
    """Dynamic shared memory of a block in bytes."""
    registers: int
    """Registers of a thread."""
    stack: int
    """Bytes of a thread's stack, where registers are spilled."""
    columns: int
    """Columns of tensor memory of a block; 0 where the GPU has none."""


def blocks_per_multiprocessor(capability: Capability, kernel: Compiled | CompiledKernel) -> int:
    """Return how many blocks of a kernel a multiprocessor holds at the same time."""
    registers = -(-kernel.registers // _REGISTER_UNIT) * _REGISTER_UNIT * kernel.threads
    limits = [
        _REGISTERS // registers,
        capability.shared_kib * _KIB // (kernel.shared + _RESERVED),
        capability.warps * WARP // kernel.threads,
    ]
    return min([*limits, _COLUMNS // kernel.columns] if kernel.columns else limits)


def compile_kernel(kernel: Kernel, tile: Tile, capability: Capability) -> Compiled:
    """Compile one kernel.

    Raises:
        EngineBuildError: The compiler refuses it, or it needs what the runtime does not give.
        MissingExtraError: Triton is not installed.
    """
    made = _compile(kernel, tile, capability)
    facts = made.metadata
    if facts.global_scratch_size or facts.profile_scratch_size or facts.num_ctas != 1 or facts.launch_cooperative_grid:
        raise EngineBuildError(f"{kernel.name} for compute capability {capability.name} needs scratch memory or a cluster of blocks.")
    if facts.shared > (capability.shared_kib - 1) * _KIB:
        raise EngineBuildError(
            f"{kernel.name} needs {facts.shared / _KIB:.0f} KiB of shared memory; compute capability {capability.name} has "
            f"{capability.shared_kib - 1}."
        )
    _check_parameters(kernel, made.asm["ptx"], len(made.src.signature) - len(made.src.constants))
    cubin = made.asm["cubin"]
    registers, stack = _resources(cubin)
    return Compiled(cubin, facts.name, facts.num_warps * WARP, facts.shared, registers, stack, facts.tmem_size)


def compile_around(capability: Capability) -> bytes:
    """Compile the runtime's kernels around an engine, so that nothing is compiled where it runs.

    Raises:
        EngineBuildError: NVIDIA's compiler is missing, or refuses them.
        MissingExtraError: cuda-core is not installed.
    """
    try:
        code: bytes = compile_source(str(capability.number)).code
    except ImportError as error:
        raise MissingExtraError("building a fused engine", "cuda-core", "fused-build") from error
    except Exception as error:  # NVRTC's exceptions have no common base
        raise EngineBuildError(f"the kernels around an engine do not compile ({type(error).__name__}: {error}).") from error
    return code


def _compile(kernel: Kernel, tile: Tile, capability: Capability) -> Any:
    try:
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from melrt_export.fused import kernels
    except ImportError as error:
        raise MissingExtraError("building a fused engine", "triton", "fused-build") from error
    function = getattr(kernels, kernel.function)
    constants = tile.constants(kernel)
    pointers = iter(POINTERS[kernel.function])
    # capital letters are integers and constants, the others pointers
    kinds = {name: "constexpr" if name in constants else "i32" if name.isupper() else _POINTER_TYPES[next(pointers)]
             for name in function.arg_names}  # fmt: skip
    aligned = {(i,): [["tt.divisibility", _DIVISIBLE]] for i, kind in enumerate(kinds.values()) if kind.startswith("*")}
    source = ASTSource(fn=function, signature=kinds, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability.number, WARP)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True, "maxnreg": tile.registers}
    try:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # a third of the cubin, and paths of this machine
            return triton.compile(source, target=target, options=options)
    except Exception as error:  # the passes of the compiler and ptxas raise exceptions without a common base
        raise EngineBuildError(
            f"{kernel.name} does not compile for compute capability {capability.name} ({type(error).__name__}: {str(error)[:500]})."
        ) from error


def _check_parameters(kernel: Kernel, ptx: str, own: int) -> None:
    """Raise EngineBuildError unless a kernel takes its own arguments and the hidden ones, which the runtime passes."""
    declared = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    found = declared[1].count(".param") if declared else 0
    if found != own + HIDDEN_POINTERS:
        raise EngineBuildError(
            f"Triton's compiler gave {kernel.name} {found} parameters; the runtime passes {own} and {HIDDEN_POINTERS} hidden pointers. "
            'Install the Triton that melrt was made for: pip install "melrt[fused-build]"'
        )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return found["REG"], found["STACK"]
