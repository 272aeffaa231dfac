"""Build the fused engine of a bundle: for several GPUs at once, on a machine that needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from melrt.backends.fused.program import FORMAT, CompiledKernel, Program
from melrt.backends.fused.tuning import KEY
from melrt.backends.tensorrt.kernels import SOURCE_SHA256
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import sign
from melrt.checks import check_fields, flag, list_of, one_of
from melrt.errors import BundleError, MissingExtraError
from melrt.system import find_gpu
from melrt_export.fused.accuracy_check import check_on_gpu
from melrt_export.fused.compile import CAPABILITIES, compile_around, compile_kernel
from melrt_export.fused.interpret import INTERPRETER, check_accuracy
from melrt_export.fused.lower import Lowered, lower
from melrt_export.fused.tiles import default_tile
from melrt_export.fused.tuning import Code, Codes, Target, check_gpu, compiled_kernel, tune
from melrt_export.generator.config import GeneratorConfig

FILE = "fused.fp16.engine"
OnKernel = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class FusedOptions:
    """Options of a build."""

    gpus: tuple[str, ...] = tuple(CAPABILITIES)
    """Compute capabilities to compile for, such as `9.0`."""
    interpret: bool = False
    """Run the kernels on recorded speech in Triton's interpreter first; about 20 s for a voice of 256 channels."""
    tune: bool = False
    """Time candidate tiles on this machine's GPU, and keep the fastest for its compute capability."""

    def __post_init__(self) -> None:
        gpus = list_of(one_of(*CAPABILITIES), 1, len(CAPABILITIES))
        check_fields(self, {"gpus": gpus, "interpret": flag(), "tune": flag()}, "fused engine")

    @property
    def steps(self) -> int:
        """Number of steps of a build."""
        return 3 if self.tune else 1


def build_fused(
    bundle: Bundle, options: FusedOptions, on_kernel: OnKernel = lambda *_: None, on_step: Callable[[str], None] = lambda _: None
) -> tuple[Artifact, Program]:
    """Compile the kernels, and add the engine to the bundle. The bundle does not change if the build fails.

    If this machine has a GPU that the engine is for, its audio is compared with FP32 first.

    Args:
        bundle: Bundle with the edge graph in FP32 or FP16.
        options: Options of the build.
        on_kernel: Called with the name of each kernel, the number of kernels that are done, and their number in all.
        on_step: Called with the name of each of `options.steps`.

    Returns:
        The new entry of the bundle, and its content.

    Raises:
        EngineBuildError: The kernels cannot compute this generator, are inaccurate, or the compiler refuses one.
        BackendError: This machine's GPU is one of `options.gpus`, and cannot run the engine.
        BundleError: The bundle lacks the graph or is damaged.
        ConfigError: Tiles are to be tuned, and this machine's GPU is not one of `options.gpus`.
        MissingExtraError: Triton is not installed.
    """
    gpu, gpus = find_gpu(), tuple(dict.fromkeys(options.gpus))
    if options.tune:
        check_gpu(gpu, gpus)
    triton = _triton_version()
    source = source_graph(bundle)
    lowered = lower(GeneratorConfig.from_dict(bundle.manifest.architecture), bundle.read(source))
    on_step(f"compiling the kernels for compute capability {', '.join(gpus)}")
    quality, compared_on = {}, ""
    if options.interpret:
        on_kernel("interpreting the kernels on recorded speech", 0, 1)
        quality, compared_on = check_accuracy(bundle, lowered), INTERPRETER
    made = _compile_all(lowered, gpus, on_kernel)
    assemble = partial(_assemble, lowered, (bundle.manifest.spec.n_mels, bundle.manifest.spec.hop))
    tuned = {}
    if options.tune:
        made, record = tune(Target(bundle, lowered.kernels, made, check_gpu(gpu, gpus), assemble), on_step, on_kernel)
        tuned = {KEY: record.to_dict()}
    program = assemble(made)
    if gpu is not None and gpu.compute_capability in gpus:
        on_kernel("comparing with FP32 on recorded speech", 0, 1)
        quality, compared_on = check_on_gpu(bundle, program, FILE), gpu.name
    data = program.dumps()
    facts = {"flavor": "fused", "version": str(FORMAT), "compute_capability": ", ".join(gpus), "triton": triton}
    target = {**facts, "source": source.sha256, "compared_on": compared_on, **tuned}
    entry = Artifact.of(FILE, data, "engine", graph="both", precision="fp16", target=target, quality=quality)
    return bundle.add(sign(entry), data, made_from=source), program


def source_graph(bundle: Bundle) -> Artifact:
    """Return the graph that has the weights.

    Raises:
        BundleError: The bundle has no edge graph in FP32 or FP16.
    """
    for precision in ("fp32", "fp16"):
        if found := bundle.find("onnx", graph="edge", precision=precision):
            return found[0]
    raise BundleError(f"{bundle.path} has no edge graph in fp32 or fp16, which has the weights. Export the voice again.")


def _compile_all(lowered: Lowered, gpus: tuple[str, ...], on_kernel: OnKernel) -> Codes:
    total = len(gpus) * len(lowered.kernels)
    made: dict[str, dict[str, Code]] = {}
    for capability in gpus:
        made[capability] = {}
        for name, kernel in lowered.kernels.items():
            on_kernel(f"{name} for {capability}", sum(map(len, made.values())), total)
            tile = default_tile(kernel, capability)
            made[capability][name] = tile, compile_kernel(kernel, tile, CAPABILITIES[capability])
    return made


def _assemble(lowered: Lowered, voice: tuple[int, int], made: Codes) -> Program:
    payload = bytearray(lowered.weights)
    gpus: dict[str, dict[str, CompiledKernel]] = {}
    for capability, kernels in made.items():
        gpus[capability] = {}
        for name, (tile, code) in kernels.items():
            gpus[capability][name] = compiled_kernel(lowered.kernels[name], tile, code, len(payload))
            payload += code.cubin
    around = {}
    for capability in made:
        cubin = compile_around(CAPABILITIES[capability])
        around[capability] = len(payload), len(cubin)
        payload += cubin
    return Program(*voice, lowered.buffers, len(lowered.weights), lowered.launches, gpus, around, SOURCE_SHA256, bytes(payload))


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError as error:
        raise MissingExtraError("building a fused engine", "triton", "fused-build") from error
