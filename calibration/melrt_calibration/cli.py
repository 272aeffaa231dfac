"""The commands `melrt calibrate` and `melrt requantize`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress as Spinner
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from melrt.bundle import Bundle
from melrt.errors import ConfigError
from melrt.files.atomic import atomic_write
from melrt_calibration.progress import OnProgress, Progress

if TYPE_CHECKING:
    from melrt_calibration.calibrate import CalibrationOptions, CalibrationResult
    from melrt_calibration.training import TrainingOptions

console = Console(highlight=False, soft_wrap=True)
# Seconds between two lines about the same step where the output is not a terminal.
LINE_INTERVAL = 30.0

Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle of the voice.")]
Speech = Annotated[list[Path], typer.Argument(metavar="SPEECH...", help="Recordings (.wav, .flac), mels (.npy, .npz, .pt), or folders.")]
LogMelBudget = Annotated[
    float, typer.Option("--budget", help="Largest increase of the log-mel error over FP32's, as a share: 0.02 is 2 %.")
]
SilenceBudget = Annotated[float, typer.Option(help="Largest increase of the level of silence over FP32's, in dB.")]
Peak = Annotated[float | None, typer.Option(help="Scale each recording to this peak, as the voice's training did. 1 is full scale.")]
Force = Annotated[bool, typer.Option("--force", help="Write INT8 even if it does not pay.")]
EvaluationSpeech = Annotated[
    list[Path] | None,
    typer.Option("--evaluate", help="Other speech for the final evaluation. The default is the held-out fifth of SPEECH."),
]
Windows = Annotated[int, typer.Option(help="Number of observed windows of 64 frames, from 8 to 10000.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of held-out speech and of windows.")]
Train = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT", help="Train weights and ranges to the rounding, from the checkpoint that the voice was exported from."
    ),
]
Run = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder of the training, which continues there. Default: VOICE.int8-run.")]
Steps = Annotated[int, typer.Option(help="Steps of the training, and of its control in FP32, from 10 to 1000000.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Device of the training: auto, cpu or cuda. auto takes a GPU if there is one.")
]
ReportPath = Annotated[Path | None, typer.Option(metavar="OUT.html", help="Write a report here, and its figures to OUT.json.")]


def calibrate(
    voice: Voice,
    speech: Speech,
    budget: LogMelBudget = 0.02,
    silence_budget: SilenceBudget = 1.0,
    evaluation_speech: EvaluationSpeech = None,
    peak: Peak = None,
    windows: Windows = 96,
    seed: Seed = 0,
    report: ReportPath = None,
    force: Force = False,
    train: Train = None,
    run: Run = None,
    steps: Steps = 1400,
    device: Device = "auto",
) -> None:
    """Choose INT8 layer by layer, by quality and by time, and add it to the bundle if it is faster within the budget.

    Example: `melrt calibrate voice.melrt recordings/ --report int8.html`. Afterwards `melrt synth --precision int8` uses it.
    For three minutes of speech it takes 10 to 25 minutes on two cores. If INT8 does not pay, nothing is written and the exit code is 1.

    `melrt calibrate voice.melrt recordings/ --train best_netG.pt` puts whole stages into INT8 and trains weights and ranges to the
    rounding, which takes longer and makes INT8 faster. The same command continues an interrupted training.
    """
    from melrt_calibration.calibrate import CalibrationOptions
    from melrt_calibration.calibrate import calibrate as measure
    from melrt_calibration.data import Sampling
    from melrt_calibration.evaluation import Budget

    options = CalibrationOptions(Budget(budget, silence_budget), Sampling(windows, seed, peak), force)
    if train is not None:
        if report:
            raise ConfigError("--report shows how layers were chosen, and --train chooses whole stages; leave one of them out.")
        from melrt_calibration.training import TrainingOptions

        settings = TrainingOptions(train, run or voice.with_suffix(".int8-run"), steps, device=device, calibration=options)
        _train(voice, speech, settings, evaluation_speech or ())
        return
    bundle = Bundle.open(voice)
    with _progress() as on_progress:
        result = measure(bundle, speech, options, evaluation_speech or (), on_progress)
        if report:
            _write_report(report, result, options, bundle.manifest.name)
    if report:
        console.print(f"Wrote the report {report} and its figures {report.with_suffix('.json')}.", markup=False)
    layers = f"{len(result.chosen.names)} of {len(result.layers)} convolutions are in INT8"
    remedy = "A larger --budget allows more layers; --force writes INT8 anyway."
    _finish(voice, result.verdict, layers, remedy, written=result.written)


def requantize(
    voice: Voice,
    weights: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a training in INT8 with this voice's plan.")],
    speech: Speech,
    budget: LogMelBudget = 0.02,
    silence_budget: SilenceBudget = 1.0,
    peak: Peak = None,
    force: Force = False,
) -> None:
    """Give the INT8 graphs of a voice the weights that were trained in INT8, if INT8 is then within the budget.

    Example: `melrt requantize lj.melrt runs/lj-int8/best recordings/`. Layers and ranges remain those of the voice's plan, and FP32
    and FP16 keep their weights. SPEECH evaluates the result and should not have been in the training. If INT8 does not pay, nothing
    is written and the exit code is 1.
    """
    from melrt_calibration.calibrate import CalibrationOptions
    from melrt_calibration.data import Sampling
    from melrt_calibration.evaluation import Budget
    from melrt_calibration.requantize import requantize as run

    options = CalibrationOptions(Budget(budget, silence_budget), Sampling(peak=peak), force)
    with _progress() as on_progress:
        result = run(Bundle.open(voice), weights, speech, options, on_progress)
    _finish(voice, result.verdict, f"{len(result.names)} convolutions are in INT8", "--force writes INT8 anyway.", written=result.written)


def _train(voice: Path, speech: list[Path], settings: TrainingOptions, others: Sequence[Path]) -> None:
    from melrt_calibration.training import calibrate_and_train

    with _progress() as on_progress:
        result = calibrate_and_train(Bundle.open(voice), speech, settings, others, on_progress)
    remedy = "The same command with --force writes INT8 anyway, without training again."
    _finish(voice, result.verdict, f"{len(result.names)} convolutions are in INT8", remedy, written=result.written)


def _write_report(path: Path, result: CalibrationResult, options: CalibrationOptions, name: str) -> None:
    from melrt_calibration.report import figures_json, report_html

    for target, text in ((path, report_html(result, options, name)), (path.with_suffix(".json"), figures_json(result, options))):
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _progress() -> Iterator[OnProgress]:
    """Show the current step: as a spinner on a terminal, otherwise as lines on stderr."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    step = _StepText()
    if not stderr.is_terminal:
        yield lambda progress: _print_line(stderr, step, progress)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Spinner(*columns, console=stderr, transient=True) as spinner:
        task = spinner.add_task("starting", total=None)
        yield lambda progress: spinner.update(task, description=step.describe(progress))


class _StepText:
    """Describes the current step and estimates its remaining time from its finished measurements."""

    def __init__(self) -> None:
        self._started = self.last_line = 0.0

    def describe(self, progress: Progress) -> str:
        now = time.monotonic()
        if not progress.done:
            self._started = now
        text = f"step {progress.step} of {progress.steps}: {progress.text}"
        if progress.done:
            minutes = (now - self._started) / progress.done * (progress.total - progress.done) / 60
            left = f"{minutes:.0f} min" if minutes >= 1.5 else f"{60 * minutes:.0f} s"
            return f"{text}, {progress.done} of {progress.total} done, about {left} left in this step"
        return f"{text} ({progress.total} measurements)" if progress.total else text


def _print_line(stderr: Console, step: _StepText, progress: Progress) -> None:
    text = step.describe(progress)
    now = time.monotonic()
    if not progress.done or now - step.last_line >= LINE_INTERVAL:
        stderr.print(text, markup=False)
        step.last_line = now


def _finish(voice: Path, verdict: str, layers: str, remedy: str, *, written: bool) -> None:
    console.print(verdict, markup=False)
    if not written:
        console.print(f"Nothing was written. {remedy}")
        raise typer.Exit(1)
    console.print(f"Wrote INT8 to {voice}: {layers}. Use it with `melrt synth {voice} MEL -o OUT.wav --precision int8`.", markup=False)
