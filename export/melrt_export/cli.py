"""Commands that make and check voices and engines: export, verify, build, refit, demo."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from melrt.backends.cpu_choice import LOG_MEL
from melrt.bundle import Artifact, Bundle
from melrt.cli.progress import Steps
from melrt.errors import ConfigError

if TYPE_CHECKING:
    from melrt_export.parity import VerifiedArtifact
    from melrt_export.tensorrt.build import BuiltEngine
    from melrt_export.tensorrt.options import EngineOptions
    from melrt_export.tensorrt.variant_search import VariantTrial

console = Console(highlight=False, soft_wrap=True)

Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The voice bundle.")]


def export(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A checkpoint file, the folder that contains it, or the folder of a training.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="VOICE.melrt", help="The bundle to write.")],
    kept: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="Checkpoint of a training: best, last, last-average, or the step N of step-N."),
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, fp16 or bf16; once for each. The default is fp32 and fp16.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the voice. The default is the checkpoint's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint as a verified bundle with ONNX graphs in FP32 and FP16, and in bfloat16 if asked.

    `melrt export runs/best_netG.pt -o voice.melrt` reads the config file next to the checkpoint. If there is none, it finds the shape of
    the network from the weights. It folds weight norm and compares every graph with PyTorch. If a graph's output differs too much, it
    writes nothing and the exit code is 1. `melrt export runs/lj --from best -o voice.melrt` takes a checkpoint that `melrt train` kept.
    """
    from melrt_export.checkpoints import checkpoint_of
    from melrt_export.export import DEFAULT_PRECISIONS, ExportOptions, export_voice

    options = ExportOptions(tuple(precision or DEFAULT_PRECISIONS), name, force)  # type: ignore[arg-type]  # ExportOptions checks them
    with Steps(options.steps) as steps:
        bundle = export_voice(checkpoint_of(source, kept) if kept else source, out, options, steps)
    _print(f'Exported the voice "{bundle.manifest.name}" to {out}. Each graph was compared with PyTorch:')
    for entry in bundle.find("onnx"):
        _print(f"  {entry.file} ({entry.size / 1e6:.2f} MB) {_quality(entry)}.")
    _print(f"Next: synthesize speech with `melrt synth {out} MEL.npy -o speech.wav`.")


def _quality(entry: Artifact) -> str:
    def difference(prefix: str) -> str:
        return f"by at most {entry.quality[f'{prefix}max_abs']:.1e} of full scale (SNR {entry.quality[f'{prefix}snr_db']:.1f} dB)"

    half = f"; if every layer rounds to FP16, as on a GPU, {difference('half_')}" if "half_snr_db" in entry.quality else ""
    speech = f"; log-mel error on speech {entry.quality[LOG_MEL]:+.1%} against FP32" if LOG_MEL in entry.quality else ""
    return f"differs {difference('')}{half}{speech}"


def verify(
    voice: Voice,
    checkpoint: Annotated[Path | None, typer.Option(help="Compare with PyTorch's output for this checkpoint.")] = None,
) -> None:
    """Check the hash of every file, and compare the output of every model with PyTorch's.

    `melrt verify voice.melrt` compares with the output that the export stored in the bundle, and does not need PyTorch. With
    `--checkpoint best_netG.pt`, PyTorch computes it again. If a model is out of tolerance, the exit code is 1.
    """
    from melrt_export.checkpoints import load_checkpoint
    from melrt_export.parity import verify as verify_bundle

    bundle = Bundle.open(voice)
    with Console(stderr=True).status("comparing every model with PyTorch"):
        rows = list(verify_bundle(bundle, load_checkpoint(checkpoint) if checkpoint else None))
    for row in rows:
        console.print(_verify_line(row))
    if any(row.difference and row.precision.startswith("int8") for row in rows):
        _print(
            "The SNR of INT8 graphs is measured on a synthetic probe, where it is lower than on speech. Their quality on speech is in the "
            f"report of `melrt calibrate {voice} SPEECH --report report.html`."
        )
    if failed := [row.file for row in rows if not row.passed]:
        _print(f"{', '.join(failed)} differ too much from PyTorch. Export the voice again and replace {voice}.")
        raise typer.Exit(1)
    _print(f"Every file of {voice} is intact, and every model that runs on this machine is within its limit.")


def _verify_line(row: VerifiedArtifact) -> str:
    if row.difference is None:
        return f"intact  {escape(row.file)}: it runs on a GPU only, so its output was not compared."
    result = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
    difference = f"largest difference {row.difference.max_abs:.1e} of full scale, SNR {row.difference.snr_db:.1f} dB"
    return f"{result}    {escape(row.file)}: {difference}; limit: {row.limit}"


GraphName = Annotated[str, typer.Option(help="interior (windows of one length), edge (ends of utterances and short utterances), or both.")]
Compatible = Annotated[
    str,
    typer.Option(
        help="With tensorrt: exact (this GPU model and TensorRT), hardware (also other GPUs from Ampere on), "
        "version (also later TensorRT of the same major version)."
    ),
]
Portable = Annotated[
    bool, typer.Option("--portable/--this-gpu", help="With tensorrt_rtx: build for every GPU, or for the GPU of this machine.")
]
Frames = Annotated[str | None, typer.Option(help="Smallest,best,largest length in frames. The default depends on graph and network.")]
TimingCache = Annotated[
    Path | None, typer.Option(help="File that stores kernel timings between builds. The default is in the user's cache.")
]
Cached = Annotated[
    bool, typer.Option("--cached/--rebuild", help="Take an engine from the user's cache if it was built before, or build it again.")
]
TryVariants = Annotated[
    bool, typer.Option("--try-variants", help="Measure exact rewrites of the graph and several windows on this GPU, and keep the fastest.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Add an INT8 engine even if it is not 5 % faster than FP16 on this GPU, without comparing them.")
]
EngineKind = Annotated[str, typer.Option(help="tensorrt, or fused: kernels of melrt that need no TensorRT, measured on an H100.")]
Gpus = Annotated[
    str | None,
    typer.Option(metavar="CAPABILITIES", help="With fused: compute capabilities to compile for. The default is 8.0,8.6,8.9,9.0,10.0,12.0."),
]
Interpret = Annotated[
    bool, typer.Option("--interpret", help="With fused: first compare the kernels with FP32 on speech, in an interpreter on the CPU.")
]
TuneTiles = Annotated[
    bool, typer.Option("--tune", help="With fused: time about 600 candidate tiles on this machine's GPU, and keep the fastest.")
]
# Options that only `--engine fused` takes.
_FUSED_OPTIONS = {"gpus", "interpret", "tune"}


def build(
    context: typer.Context,
    voice: Voice,
    engine: EngineKind = "tensorrt",
    gpus: Gpus = None,
    interpret: Interpret = False,
    tune: TuneTiles = False,
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, or int8. The last needs `melrt calibrate` first.")] = "fp16",
    flavor: Annotated[str, typer.Option(help="tensorrt, tensorrt_rtx, or auto for the first that is installed.")] = "auto",
    portable: Portable = True,
    graph: GraphName = "both",
    batch: Annotated[str, typer.Option(help="Smallest,best,largest batch.")] = "1,4,16",
    frames: Frames = None,
    optimization_level: Annotated[int | None, typer.Option(help="Effort of the builder, 0 (fast build) to 5 (fast engine).")] = None,
    timing_cache: TimingCache = None,
    workspace: Annotated[int | None, typer.Option(help="Largest scratch memory of a kernel in MiB.")] = None,
    compatible: Compatible = "exact",
    refittable: Annotated[bool, typer.Option("--refittable", help="Build engines whose weights `melrt refit` can exchange.")] = False,
    cached: Cached = True,
    try_variants: TryVariants = False,
    force: Force = False,
) -> None:
    """Build TensorRT engines from the bundle's ONNX graphs, check their precision, and add them to the bundle.

    `melrt build voice.melrt --precision fp16` builds one engine for each graph. With `tensorrt`, run it on the GPU that the engines are
    for. With `tensorrt_rtx`, it also runs without a GPU and builds portable engines. `--try-variants` needs the GPU: it builds, checks and
    times about eight engines for each graph, adds the fastest, and stores all times in the bundle.

    `--engine fused` compiles melrt's own kernels for several GPUs at once, without a GPU and without TensorRT. They run on NVIDIA GPUs,
    on compute capability 9.0 by themselves and elsewhere with `--backend fused`; H100 and H200 have run them. `--tune` needs a GPU.
    """
    if _checked_engine(context, engine) == "fused":
        return _build_fused(voice, gpus, interpret=interpret, tune=tune)
    from melrt_export.tensorrt.engines import build_engines
    from melrt_export.tensorrt.options import EngineOptions

    options = EngineOptions(
        precision=precision, flavor=flavor, portable=portable, batch=_sizes("batch", batch),
        frames=None if frames is None else _sizes("frames", frames), optimization_level=optimization_level, timing_cache=timing_cache,
        workspace=workspace, compatible=compatible, refittable=refittable, cached=cached,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip
    graphs = ("interior", "edge") if graph == "both" else (graph,)
    with Steps(len(graphs)) as steps:
        wanted = _begin_each(options, graphs, steps)
        for built, trials in build_engines(Bundle.open(voice), wanted, steps.on_phase, try_variants=try_variants, force=force):
            if trials:
                console.print(_trials_table(built.entry.graph, trials))
            for line in _engine_lines(voice, built):
                _print(line)
    _print(f"Next: synthesize speech on the GPU with `melrt synth {voice} MEL.npy -o speech.wav --backend tensorrt`.")


def _checked_engine(context: typer.Context, engine: str) -> str:
    """Return the kind of engine, after refusing options of the other kind."""
    if engine not in ("tensorrt", "fused"):
        raise ConfigError(f"engine is {engine!r}; it must be one of tensorrt, fused.")
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    others = [name for name in given if name not in ("voice", "engine") and (name in _FUSED_OPTIONS) != (engine == "fused")]
    if others:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ConfigError(f"--engine {engine} does not take {names}. Leave it out, or choose the other engine.")
    return engine


def _build_fused(voice: Path, gpus: str | None, *, interpret: bool, tune: bool) -> None:
    from melrt.backends.fused.tuning import Tuning
    from melrt_export.fused.build import FusedOptions, build_fused
    from melrt_export.fused.report import kernel_table

    options = FusedOptions(interpret=interpret, tune=tune)
    if gpus is not None:
        options = replace(options, gpus=tuple(gpus.replace(" ", "").split(",")))
    with Steps(options.steps) as steps:
        entry, program = build_fused(Bundle.open(voice), options, steps.on_phase, steps)
        console.print(kernel_table(program))
    tuning = Tuning.of(entry)
    for line in tuning.lines() if tuning else ():
        _print(line)
    if entry.quality:
        _print(f"On recorded speech, its signal-to-noise ratio is {entry.quality['snr_db']:.1f} dB ({entry.target['compared_on']}).")
    _print(f"Built {voice / entry.file} ({entry.size / 1e6:.2f} MB). `auto` takes it on compute capability 9.0.")
    _print(f"Next: synthesize speech on a GPU with `melrt synth {voice} MEL.npy -o speech.wav --backend fused`.")


def _begin_each(options: EngineOptions, graphs: tuple[str, ...], steps: Steps) -> Iterator[EngineOptions]:
    """Yield the options of each engine, and begin its step when the builder asks for it."""
    for graph in graphs:
        wanted = replace(options, graph=graph)  # type: ignore[arg-type]  # checked there
        steps(f"building the {graph} engine in {options.precision.upper()}")
        yield wanted


def _engine_lines(voice: Path, built: BuiltEngine) -> Iterator[str]:
    entry = built.entry
    size = f"{entry.size / 1e6:.2f} MB"
    if built.cached:
        yield f"Added {voice / entry.file} ({size}) from the cache: it was built before with the same settings. --rebuild builds it again."
    else:
        yield f"Built {voice / entry.file} ({size})."
    if entry.target["audited"] == "engine":
        yield f"  The engine inspector confirmed that its convolutions compute in {entry.precision.upper()}."
    elif entry.target["audited"] == "plan":
        yield f"  The text of the engine confirms that its convolutions compute in {entry.precision.upper()}."
    else:
        yield f"  Its network computes in {entry.precision.upper()}. The engine itself states no types, and can be inspected on a GPU only."
    if "against_fp16" in entry.target:
        gain = entry.target["against_fp16"]
        yield f"  It was {gain} with FP16." if isinstance(gain, str) else f"  It is {gain:.2f} times as fast as FP16 on this GPU."
    if "snr_db" in entry.quality:
        yield f"  On recorded speech, its signal-to-noise ratio against FP32 on the CPU is {entry.quality['snr_db']:.1f} dB."


def _trials_table(graph: str, trials: list[VariantTrial]) -> Table:
    table = Table(
        "upsampling", "shortcut", "time axis", "batch", "frames", "µs per frame", "result", title=f"Variants of the {graph} graph"
    )
    for trial in trials:
        table.add_row(*(escape(str(value)) for value in trial.to_dict().values()))
    return table


def refit(
    voice: Voice,
    original: Annotated[Path, typer.Option("--engines-of", metavar="VOICE.melrt", help="The voice that this one was fine-tuned from.")],
) -> None:
    """Give a fine-tuned voice the engines of the voice it was fine-tuned from, with its own weights.

    Exchanging the weights takes milliseconds instead of a build. The engines must have been built with `melrt build --refittable`, and the
    command needs the GPU that they are for.
    """
    from melrt_export.tensorrt.refit import refit_engines

    for entry in refit_engines(Bundle.open(voice), Bundle.open(original)):
        _print(
            f"Added {voice / entry.file} with the weights of {voice}. On recorded speech, its signal-to-noise ratio against FP32 on the "
            f"CPU is {entry.quality['snr_db']:.1f} dB."
        )


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the demo's files.")] = Path("demo"),
) -> None:
    """Export and verify the demo voice, synthesize a WAV, and compare it with the recording and with Griffin-Lim in a page to listen to."""
    from melrt_export.demo import MEL, STEPS, VOICE, run_demo

    with Steps(STEPS) as steps:
        result = run_demo(out, steps)
    for line in result.lines():
        _print(line)
    command = f"synthesize speech yourself with `melrt synth {out / VOICE} {out / MEL} -o speech.wav`."
    if shutil.which("melrt") is None:
        environment, here = Path(sys.prefix), Path.cwd()
        environment = environment.relative_to(here) if environment.is_relative_to(here) else environment
        command = f"activate the environment with `source {environment / 'bin' / 'activate'}`, then {command}"
    _print(f"Next: {command}")


def _sizes(name: str, text: str) -> tuple[int, int, int]:
    try:
        low, best, high = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} is {text!r}; it must be three whole numbers smallest,best,largest, such as 1,4,16.") from None
    return low, best, high


def _print(line: str) -> None:
    console.print(line, markup=False)
