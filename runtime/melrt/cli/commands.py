"""Commands of the runtime: info, mel, synth, tune, doctor."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar, cast

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from melrt.backends.cpu_choice import cpu_choices
from melrt.backends.fused.tuning import Tuning
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Artifact, Bundle, Manifest
from melrt.bundle.trust import is_trusted, trust_engines
from melrt.cli.progress import Steps
from melrt.errors import BundleError, ConfigError, MelError, MissingExtraError
from melrt.files.atomic import atomic_write, check_writable
from melrt.files.audio import read_audio, write_audio
from melrt.files.mels import mel_pieces
from melrt.files.output import Output
from melrt.mel.convert import convert_mel
from melrt.mel.features import mel_from_audio
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Ends
from melrt.scheduling.policy_tuning import record
from melrt.scheduling.policy_tuning import tune as measure
from melrt.system import examine
from melrt.types import Audio, Mel
from melrt.vocoder import Options, Vocoder

console = Console(highlight=False, soft_wrap=True)
# Frames read at a time: twelve seconds, enough for every worker to have several windows.
PIECE_FRAMES = 1024
Item = TypeVar("Item")

Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The voice bundle.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: CUDA if it works, otherwise the CPU.")]
Precision = Annotated[str, typer.Option(help="fp32, tf32, fp16, bf16, int8, or auto: the fastest that keeps the voice's quality here.")]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="tensorrt, fused, onnxruntime, openvino, or auto: a TensorRT engine of the bundle for this GPU, then a fused engine on "
        "compute capability 9.0.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Number of CPU threads; the default is one for each usable core.")]
Format = Annotated[str, typer.Option("--format", help="int16, float32, mulaw or alaw (.wav); flac (.flac); opus (.opus).")]
Rate = Annotated[int | None, typer.Option("--rate", help="Sample rate in Hz; the default is the voice's own.")]
Memory = Annotated[int, typer.Option(help="MiB that loaded voices may take; others are unloaded first. 0 for no limit.", min=0)]
EndsOption = Annotated[
    str, typer.Option("--edges", help="Ends of an utterance: voice (frames added as its project does), or model (PyTorch's forward).")
]


def info(
    voice: Voice,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also show what GPUs could reach with fused kernels, by public figures.")
    ] = False,
) -> None:
    """Show the facts of a voice and check its files: mel convention, architecture, files, provenance.

    Look here first when a voice sounds wrong: in most cases its mels were made in another convention. If a file is missing or damaged,
    the command names it and ends with exit code 2.
    """
    bundle = Bundle.open(voice)
    for line in _facts(voice, bundle.manifest):
        _print(line)
    width = max((len(entry.file) for entry in bundle.manifest.artifacts), default=0)
    for entry in bundle.manifest.artifacts:
        for name, line in zip(itertools.chain([entry.file], itertools.repeat("")), _entry_lines(entry), strict=False):
            _print(f"{name:<{width}}  {line}")
    for way in cpu_choices(bundle):
        _print(f"on this CPU    {'auto may take' if way.usable else 'auto does not take'} {way}")
    if damage := list(_damage(bundle)):
        raise BundleError("\n".join(damage))
    if roofline:
        for table in _roofline_tables(bundle):
            console.print(table)


def _entry_lines(entry: Artifact) -> Iterator[str]:
    """Yield the facts about one file."""
    kind = " ".join(filter(None, (entry.kind, entry.graph, entry.precision)))
    yield f"{entry.size / 1e6:6.2f} MB  {kind}{_quality(entry.quality)}"
    if entry.kind == "engine" and not _is_vouched(entry):
        yield "not built by this user: its figures are unproven, and it is opened only after `melrt trust`"
    if tuning := Tuning.of(entry):
        yield from tuning.lines()


def _is_vouched(engine: Artifact) -> bool:
    try:
        return is_trusted(engine)
    except ConfigError:  # no key can be used, so no engine is opened
        return False


def _roofline_tables(bundle: Bundle) -> Iterator[Table]:
    try:
        report = importlib.import_module("melrt_export.fused.report")  # named, not imported: the runtime does not depend on it
    except ImportError as error:
        raise MissingExtraError("melrt info --roofline", error.name or "onnx", "export") from error
    tables: Iterator[Table] = report.roofline_tables(bundle)
    return tables


def _facts(voice: Path, manifest: Manifest) -> Iterator[str]:
    """Yield one line per fact. The texts were chosen by the author of the bundle, and are shown without interpreting markup in them."""
    spec, field = manifest.spec, manifest.receptive_field
    ms = 1000 * spec.hop / spec.sample_rate
    yield f"{manifest.name}  ({voice})"
    yield f"mel            {spec.describe()}, {spec.framing} framing, floor {spec.floor:g}, n_fft {spec.n_fft}, window {spec.win_length}"
    if manifest.normalization is not None:
        clip = manifest.normalization.clip
        limits = f", clipped to {clip[0]:g}..{clip[1]:g}" if clip else ""
        yield f"normalization  part of the graphs{limits}: give plain log-mels"
    if manifest.levels is not None:
        kind = "normalized as in training" if manifest.levels.normalized else "for speech"
        yield f"level          {manifest.levels.mean:.3g} ± {manifest.levels.deviation:.2g}, {kind}"
    yield f"frame          {ms:.2f} ms; an utterance has at least {field.smallest_input} frames"
    yield f"context        {field.left} frames before, {field.right} after ({field.right * ms:.0f} ms look-ahead)"
    edges = manifest.edges
    if edges.left or edges.right:
        value = "the first and last frame" if edges.value is None else f"{edges.value:g}"
        yield f"ends           its project adds {edges.left} frames before and {edges.right} after of {value}; so does synth"
    yield f"architecture   {', '.join(f'{k} {v}' for k, v in manifest.architecture.items())}"
    if manifest.parameters:
        yield f"size           {manifest.parameters / 1e6:.2f} M parameters, {manifest.flop_per_second / 1e9:.2f} GFLOP per second of audio"
    for key, value in manifest.provenance.items():
        yield f"{key:<14} {value}"


def _quality(quality: Mapping[str, float]) -> str:
    """Return the measured differences of an artifact in words, to be appended to its kind."""
    texts = {
        "max_abs": "largest difference from PyTorch {:.1e}", "snr_db": "SNR {:.1f} dB", "half_max_abs": "with FP16 layers {:.1e}",
        "half_snr_db": "SNR {:.1f} dB", "log_mel_above_fp32": "log-mel error {:+.1%} against FP32",
    }  # fmt: skip
    return "".join(", " + (texts[key].format(value) if key in texts else f"{key} {value:g}") for key, value in quality.items())


def _damage(bundle: Bundle) -> Iterator[str]:
    """Yield a sentence for each file whose size or hash differs from the manifest's."""
    for entry in bundle.manifest.artifacts:
        try:
            bundle.read(entry)
        except BundleError as error:
            yield str(error)


def mel(
    voice: Voice,
    audio: Annotated[Path, typer.Argument(metavar="RECORDING", help="An audio file (.wav, .flac, .ogg, .mp3, ...) of any sample rate.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MEL.npy", help="The mel to write.")],
) -> None:
    """Compute the mel of a recording in the convention of a voice.

    `melrt mel voice.melrt recording.wav -o mel.npy`
    """
    _check_outputs([audio], [out])
    if out.suffix.lower() != ".npy":
        raise ConfigError(f"--out is {out}, but a mel is a .npy file. Give a name with that ending, such as {out.with_suffix('.npy')}.")
    spec = Bundle.open(voice).manifest.spec
    frames = mel_from_audio(read_audio(audio, spec.sample_rate), spec)
    with atomic_write(out) as temporary, temporary.open("xb") as stream:
        np.save(stream, frames)
    _print(f"Wrote {out}: {frames.shape[0]} bands, {frames.shape[1]} frames ({frames.shape[1] * spec.hop / spec.sample_rate:.2f} s).")
    _print(f"Next: synthesize it with `melrt synth {voice} {out} -o speech.wav`.")


def synth(
    voice: Voice,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Mels (.npy, .npz, .pt), or recordings (.wav, .mp3, ...).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A file for one input, or a folder.")],
    encoding: Format = "int16",
    sample_rate: Rate = None,
    mel_log: Annotated[str | None, typer.Option(help="Logarithm of the mels, if not the voice's: ln, log10, log2, dB, linear.")] = None,
    mel_gain: Annotated[float | None, typer.Option(help="Factor of that logarithm; the default is 1.")] = None,
    mel_normalized: Annotated[bool, typer.Option("--mel-normalized", help="The mels are normalized as in the voice's training.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    edges: EndsOption = "voice",
) -> None:
    """Synthesize audio files from mels, and print the real-time factor (compute time / audio time).

    `melrt synth voice.melrt mels/*.npy -o speech/` writes one file for each mel. `melrt synth voice.melrt recording.wav -o copy.wav`
    computes the mel of the recording first. Memory does not grow with the length of an utterance.
    """
    bundle = Bundle.open(voice)
    given = _given_convention(bundle.manifest, mel_log, mel_gain, normalized=mel_normalized)
    options = Options(edges=cast(Ends, edges))
    output = Output(sample_rate, encoding)  # type: ignore[arg-type]  # Output checks it
    output.check(bundle.manifest.spec.sample_rate)
    samples = Output(sample_rate)  # the file's writer encodes
    rate = sample_rate or bundle.manifest.spec.sample_rate
    targets, clipped = _targets(inputs, out, output.file_kind.suffix), 0
    vocoder = Vocoder.load(bundle, device=device, precision=precision, backend=backend, threads=threads, options=options)
    with vocoder, Steps(len(inputs)) as steps:
        clock = _Clock(lambda count: steps.on_phase(f"{count / rate:.0f} s of audio"))
        for source, target in zip(inputs, targets, strict=True):
            steps(f"synthesizing {source.name}")
            # A long utterance is read, synthesized and written piece by piece, so that memory does not grow with it.
            mels = clock.reading(convert_mel(piece, given, vocoder.spec) for piece in mel_pieces(source, given, PIECE_FRAMES))
            try:
                pieces = clock.synthesis(vocoder.stream(mels, output=samples))
                clipped += write_audio(target, pieces, rate, output.encoding)
            except MelError as error:
                raise MelError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    engine, audio = vocoder.backend, clock.samples / rate
    _print(
        f"Wrote {targets[0] if len(targets) == 1 else f'{len(targets)} files to {out}'}: {audio:.2f} s of audio in {clock.seconds:.2f} s, "
        f"{audio / clock.seconds:.1f} times real time (real-time factor {clock.seconds / audio:.4f}), "
        f"with {engine.name} {engine.precision} on {engine.device}."
    )
    if clipped:
        _print(f"{clipped} of {clock.samples} samples were clipped to full scale. --format float32 keeps them.")


def _given_convention(manifest: Manifest, log: str | None, gain: float | None, *, normalized: bool) -> MelSpec:
    """Return the convention of the mels that the options describe; without options that of the voice."""
    spec = manifest.spec
    if log is not None or gain is not None:
        spec = replace(spec, log=log or spec.log, gain=1.0 if gain is None else gain)  # type: ignore[arg-type]  # MelSpec checks it
    if normalized and manifest.normalization is None:
        raise ConfigError(
            f"--mel-normalized needs the statistics of the training, and {manifest.name} has none. Undo the normalization with the "
            "statistics of the code that made the mels, or compute them with `melrt mel`."
        )
    return replace(spec, normalization=manifest.normalization) if normalized else spec


def _targets(inputs: list[Path], out: Path, suffix: str) -> list[Path]:
    """Return the audio file for each input."""
    if out.is_dir() or not out.suffix:
        targets = [out / f"{source.stem}{suffix}" for source in inputs]
    elif out.suffix.lower() != suffix:
        raise ConfigError(
            f"--out is {out}, but this --format makes {suffix} files. Give a name that ends in {suffix} for one input, or a folder. "
            "A folder with a dot in its name must exist already."
        )
    elif len(inputs) > 1:
        raise ConfigError(f"{len(inputs)} inputs cannot go to one file {out}; give a folder.")
    else:
        targets = [out]
    if len(set(targets)) < len(targets):
        raise ConfigError("two inputs have the same name and would overwrite each other; synthesize them into different folders.")
    _check_outputs(inputs, targets)
    return targets


def _check_outputs(inputs: list[Path], targets: list[Path]) -> None:
    """Raise ConfigError if an output would replace an input, or cannot be written; all outputs are in one folder."""
    sources = {source.resolve() for source in inputs}
    if overwritten := [str(target) for target in targets if target.resolve() in sources]:
        raise ConfigError(f"{', '.join(overwritten)} would be overwritten by the output; give another name or folder.")
    for target in targets[:1] + [target for target in targets[1:] if target.is_dir()]:
        check_writable(target)


class _Clock:
    """Adds up the samples of a synthesis and its compute time; the time for reading or computing mels is not counted."""

    def __init__(self, on_samples: Callable[[int], None]) -> None:
        self.seconds = 0.0
        self.samples = 0
        self._on_samples = on_samples

    def reading(self, mels: Iterator[Mel]) -> Iterator[Mel]:
        """Yield mels, which `synthesis` pulls, and subtract the time that they take."""
        return self._timed(mels, -1)

    def synthesis(self, pieces: Iterator[Audio]) -> Iterator[Audio]:
        """Yield pieces of audio, and count them and their time."""
        for piece in self._timed(pieces, 1):
            self.samples += len(piece)
            self._on_samples(self.samples)
            yield piece

    def _timed(self, items: Iterator[Item], sign: int) -> Iterator[Item]:
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += sign * (time.perf_counter() - start)
            yield item


def trust(voice: Voice) -> None:
    """Vouch for the TensorRT engines of a voice that someone else built.

    An engine is executable code, and is opened only if the user who runs it built it or vouches for it. Do this only for a voice from an
    origin that you trust: `melrt trust voice.melrt`
    """
    engines = trust_engines(Bundle.open(voice))
    for entry in engines:
        console.print(f"{voice / entry.file} is trusted by this user now.", markup=False)
    if not engines:
        console.print(f"{voice} has no engines, so there is nothing to trust. `melrt build` makes them.", markup=False)


def tune(
    voice: Voice,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each candidate.", min=1)] = 7,
) -> None:
    """Measure window lengths and batch sizes on this machine, and store the fastest in the bundle.

    Run it once on each kind of machine, while the machine is otherwise idle. It takes about a minute per backend. A voice that is loaded
    on such a machine uses the stored windows. The audio is the same with any of them.
    """
    bundle = Bundle.open(voice)
    with Steps(2) as steps:
        steps("loading the voice")
        engine = open_backend(bundle, BackendChoice(device, precision, backend, threads))
        steps(f"measuring {len(engine.candidates)} candidates {rounds} times each, about a minute")
        measured = itertools.count(1)
        total = len(engine.candidates) * rounds
        timings = measure(bundle, engine, rounds, lambda: steps.on_phase("measuring", next(measured), total))
    entry = record(bundle, engine, timings)
    table = Table("window, frames", "batch", "workers", "µs per frame", "times real time", "")
    frame = 1e6 * bundle.manifest.spec.hop / bundle.manifest.spec.sample_rate
    for timing in sorted(timings, key=lambda timing: (timing.policy.frames, timing.policy.batch)):
        policy, cost = timing.policy, timing.microseconds
        mark = "chosen" if timing is timings[0] else ""
        table.add_row(str(policy.frames), str(policy.batch), str(policy.workers), f"{cost:.0f}", f"{frame / cost:.1f}", mark)
    console.print(table, soft_wrap=False)
    _print(
        f"Wrote the chosen windows to {voice / entry.file}. From now on they are used by {engine.name} {engine.precision} on "
        f"{engine.device} of such a machine ({engine.machine})."
    )


def doctor() -> None:
    """Show what this machine can run, and how to install what is missing."""
    table = Table("ready", "purpose", "found", Column("what to do", no_wrap=True))
    for finding in examine():
        remedy = "" if finding.ready else escape(finding.remedy)
        table.add_row("[green]yes[/]" if finding.ready else "no", finding.purpose, finding.found, remedy)
    console.print(table, soft_wrap=False)


def _print(text: str) -> None:
    console.print(text, markup=False)
