"""The steps of a sitting, in their order: what shows most comes first, and what takes longest last."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# Exit code of a step that this machine cannot run; its last line of output is the reason.
SKIPPED = 77
ROOT = Path(__file__).parents[3]
FUSED_ENGINE = "{voice}/fused.fp16.engine"
NO_ENGINE = "the step `voice` built no fused engine"
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


def _fused_timing(name: str, title: str, limit: int, *options: str) -> Step:
    command = ("-m", "melrt_benchmarks.sitting.fused_timing", "{voice}", "{json}", *options)
    return Step(name, title, command, limit, (FUSED_ENGINE,), NO_ENGINE)


def _bench(name: str, title: str, limit: int, *arguments: str) -> Step:
    """Return a step that runs `melrt bench` on the GPU."""
    command = ("-m", "melrt", "bench", "{voice}", "--json", "{json}", *arguments)
    return Step(name, title, command, limit, (FUSED_ENGINE,), NO_ENGINE, gpu=True)


def _times(name: str, limit: int, shape: str, only: str, backends: str = "fused", precisions: str = "fp16") -> Step:
    """Return a step that times contenders whose name contains one of `only` at one shape, such as `64 x 10` for 64 utterances of 10 s.

    cuDNN's search for kernels at one long shape can take most of a minute, for every contender that runs it. So a shape has a step of its
    own, and long ones have only the fastest contenders.
    """
    batch, _, seconds = shape.partition(" x ")
    chosen = ("--only", only, "--backends", backends, "--precisions", precisions)
    options = ("--seconds", seconds, "--batch", batch, "--rounds", "5", "--checkpoint", "{checkpoint}", "--threads", "8")
    return _bench(name, f"Benchmark of {shape} s: {only.replace(',', ', ')}", limit, "--measure", "time", *chosen, *options)


ENGINES, FUSED = "tests/gpu/test_engine_on_gpu.py", "tests/gpu/test_fused_on_gpu.py"
RUNTIME, TRAINING = "tests/gpu/test_onnxruntime_cuda.py", "tests/gpu/test_training_on_gpu.py"

STREAMS = ("--measure", "streams", "--backends", "fused", "--precisions", "fp16")
FASTEST = "CUDA graph,plain FP32,melrt GPU"

STEPS: tuple[Step, ...] = (
    Step("versions", "GPU, driver, CUDA and packages", ("-m", "melrt_benchmarks.sitting.versions", "{json}"), 20),
    Step("ceilings", "Speed limits of this GPU: copies and matrix products", ("-m", "melrt_benchmarks.sitting.ceilings", "{json}"), 30),
    Step("stub", "melrt's CUDA runtime around an engine whose audio numpy computes",
         ("-m", "melrt_benchmarks.sitting.stub", str(STUB_VOICE), "--json", "{json}", "--limit", "55"), 60, (str(STUB_VOICE),)),
    Step("voice", "Voice for the benchmarks, with the engines that can be built here",
         ("-m", "melrt_benchmarks.sitting.voice", "{checkpoint}", "{voice}"), 60),
    _fused_timing("fused-timing", "Time of each fused kernel", 30),
    _times("bench-1s", 45, "1 x 1", "PyTorch GPU,Runtime GPU,melrt GPU", "fused,onnxruntime", "fp32,tf32,fp16"),
    _times("bench-1s-64", 35, "64 x 1", FASTEST),
    _times("bench-10s", 35, "1 x 10", FASTEST),
    _times("bench-10s-64", 40, "64 x 10", "CUDA graph,melrt GPU"),
    _bench("streams", "Real-time streams through the fused engine", 45, *STREAMS),
    _pytest("fused", "Fused engine against the CPU", 40, FUSED),
    _pytest("onnxruntime", "ONNX Runtime on the GPU against the CPU", 40, RUNTIME),
    _times("bench-compile", 60, "1 x 1", "torch.compile GPU,CUDA graph,melrt GPU"),
    _fused_timing("fused-tune", "Time of each fused kernel after tuning", 120, "--tune"),
    _times("bench-tensorrt", 90, "1 x 1", "TensorRT,melrt GPU", "tensorrt,fused"),
    Step("sanitizer", "Memory accesses of melrt's kernels under compute-sanitizer",
         ("-m", "melrt_benchmarks.sitting.stub", str(STUB_VOICE), "--json", "{json}", "--limit", "140", "--only", "calls", "of torch"), 150,
         (str(STUB_VOICE),), tool=("compute-sanitizer", "--error-exitcode", "9")),
    _pytest("tests-rest", "Tests on a GPU, others", 60, "tests/gpu", *(f"--ignore={file}" for file in (ENGINES, FUSED, RUNTIME, TRAINING))),
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
