"""The steps of a sitting, in their order: what shows most comes first, and what takes longest last."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# Exit code of a step that this machine cannot run; its last line of output is the reason.
SKIPPED = 77
ROOT = Path(__file__).parents[3]
SIZES = ("--seconds", "1,10", "--batch", "1,8", "--rounds", "7")
STUB_VOICE = ROOT / "tests/data/bundles/tiny.melrt"


@dataclass(frozen=True, slots=True)
class Step:
    """One command, run in a process and a session of its own."""

    name: str
    title: str
    """Sentence for the report."""
    command: tuple[str, ...]
    """Arguments of Python. `{json}`, `{junit}`, `{voice}` and `{checkpoint}` are replaced by paths."""
    limit: int
    """Seconds after which the whole session of processes is killed."""
    needs: tuple[str, ...] = ()
    """Paths without which the step is skipped, with the same replacements."""
    because: str = ""
    """The reason that the report gives if one of `needs` is missing."""
    tool: tuple[str, ...] = ()
    """Program and options that run Python; the step is skipped where it is not installed."""
    gpu: bool = False
    """Skipped without an NVIDIA driver, because it would measure the processor."""


def _pytest(name: str, title: str, limit: int, *arguments: str) -> Step:
    """Return a step that runs tests. Warnings of the host's versions of packages are no errors there."""
    command = ("-m", "pytest", "-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--junitxml={junit}", *arguments)
    files = tuple(argument for argument in arguments if argument.startswith("tests/"))
    return Step(name, title, command, limit, tuple(str(ROOT / file) for file in files), "the tests are not here; run from a checkout")


def _bench(name: str, title: str, limit: int, only: str, *arguments: str) -> Step:
    """Return a step that runs the contenders whose name contains `only`; so one failure does not hide the others."""
    common = ("--no-profile", "--no-start-up", "--json", "{json}", "--only", only)
    needs = ("{voice}",)
    return Step(
        name, title, ("-m", "melrt", "bench", "{voice}", *common, *arguments), limit, needs, "the step `voice` made no bundle", gpu=True
    )


def _contenders(name: str, only: str, limit: int = 60) -> Step:
    options = ("--checkpoint", "{checkpoint}", "--backends", "fused", "--precisions", "fp16")
    return _bench(name, f"Benchmark: {only}", limit, only, *SIZES, *options)


def _ours(backend: str, precisions: str, limit: int = 60) -> Step:
    options = ("--checkpoint", "{checkpoint}", "--backends", backend, "--precisions", precisions, "--concurrency", "16")
    return _bench(f"bench-{backend}", f"Benchmark: melrt, {backend}", limit, backend, *SIZES, *options)


ENGINES, FUSED, TRAINING = "tests/gpu/test_engine_on_gpu.py", "tests/gpu/test_fused_on_gpu.py", "tests/gpu/test_training_on_gpu.py"

STEPS: tuple[Step, ...] = (
    Step("versions", "GPU, driver, CUDA and packages", ("-m", "melrt_benchmarks.sitting.versions", "{json}"), 30),
    Step("ceilings", "Speed limits of this GPU: copies and matrix products", ("-m", "melrt_benchmarks.sitting.ceilings", "{json}"), 60),
    Step("stub", "melrt's CUDA runtime around an engine whose audio numpy computes",
         ("-m", "melrt_benchmarks.sitting.stub", str(STUB_VOICE), "--json", "{json}", "--limit", "110"), 120, (str(STUB_VOICE),)),
    Step("voice", "Voice for the benchmarks, with the engines that can be built here",
         ("-m", "melrt_benchmarks.sitting.voice", "{checkpoint}", "{voice}"), 120),
    _pytest("fused", "Fused engine against the CPU", 90, FUSED),
    Step("fused-timing", "Time of each fused kernel", ("-m", "melrt_benchmarks.sitting.fused_timing", "{voice}", "{json}"), 60,
         ("{voice}",), "the step `voice` made no bundle"),
    _ours("fused", "fp16"),
    _contenders("bench-pytorch", "PyTorch GPU"),
    _contenders("bench-torch-compile", "torch.compile GPU", 120),
    _contenders("bench-onnxruntime-plain", "ONNX Runtime GPU"),
    _contenders("bench-tensorrt", "TensorRT"),
    _ours("onnxruntime", "fp32,tf32,fp16"),
    _bench("streams", "Real-time streams through the fused engine", 100, "fused", "--backends", "fused", "--precisions", "fp16",
           "--seconds", "1", "--rounds", "3", "--streams"),
    Step("sanitizer", "Memory accesses of melrt's kernels under compute-sanitizer",
         ("-m", "melrt_benchmarks.sitting.stub", str(STUB_VOICE), "--json", "{json}", "--limit", "140", "--only", "calls", "of torch"), 150,
         (str(STUB_VOICE),), tool=("compute-sanitizer", "--error-exitcode", "9")),
    _pytest("tests-rest", "Tests on a GPU, others", 90, "tests/gpu", f"--ignore={ENGINES}", f"--ignore={FUSED}", f"--ignore={TRAINING}"),
    _pytest("training", "Training on a GPU", 120, TRAINING),
    _pytest("tests-tensorrt", "Tests on a GPU, TensorRT", 120, ENGINES, "-k", "tensorrt- and not rewrite"),
    _pytest("tests-rtx", "Tests on a GPU, TensorRT-RTX", 120, ENGINES, "-k", "tensorrt_rtx- and not rewrite"),
    _pytest("rewrites", "All rewrites of the graph as TensorRT engines", 240, ENGINES, "-k", "rewrite"),
)  # fmt: skip


def filled(text: str, paths: dict[str, Path]) -> str:
    """Replace `{name}` by a path."""
    for name, path in paths.items():
        text = text.replace("{" + name + "}", str(path))
    return text


def command_of(step: Step, paths: dict[str, Path]) -> list[str]:
    """Return the step's command line."""
    return [*step.tool, sys.executable, *(filled(argument, paths) for argument in step.command)]
