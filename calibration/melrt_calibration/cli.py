"""The command `melrt calibrate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from melrt.bundle import Bundle
from melrt.files.atomic import atomic_write

console = Console(highlight=False)


Voice = Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")]
Speech = Annotated[list[Path], typer.Argument(metavar="SPEECH...", help="Recordings (.wav, .flac), mels (.npy, .npz, .pt), or folders.")]
LogMelBudget = Annotated[float, typer.Option("--budget", help="Share by which the log-mel error may be above FP32's.")]
SilenceBudget = Annotated[float, typer.Option(help="dB by which silence may be louder than FP32's.")]
Peak = Annotated[float | None, typer.Option(help="Scale each recording to this peak, as the voice's training did.")]
Force = Annotated[bool, typer.Option("--force", help="Write INT8 even if it does not pay.")]


def calibrate(
    voice: Voice,
    speech: Speech,
    budget: LogMelBudget = 0.02,
    silence_budget: SilenceBudget = 1.0,
    judge: Annotated[list[Path] | None, typer.Option(help="Other speech for the last judgement; default: a held-out fifth.")] = None,
    peak: Peak = None,
    windows: Annotated[int, typer.Option(help="Observed windows of 64 frames.")] = 96,
    seed: Annotated[int, typer.Option(help="Of the split and the sampling.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Write a report here, and OUT.json beside it.")] = None,
    force: Force = False,
) -> None:
    """Choose INT8 layer by layer, by quality and by time, and add it to the bundle if it is faster within the budget.

    `melrt calibrate voice.melrt recordings/ --report int8.html`; afterwards `melrt synth --precision int8` uses it. It takes minutes.
    If INT8 does not pay, nothing is written and the exit code is 1.
    """
    from melrt_calibration.calibrate import Options
    from melrt_calibration.calibrate import calibrate as run
    from melrt_calibration.data import Sampling
    from melrt_calibration.evaluation import Budget
    from melrt_calibration.report import dumps, figures, page

    options = Options(Budget(budget, silence_budget), Sampling(windows, seed, peak), force)
    bundle = Bundle.open(voice)
    with _steps() as on_step:
        result = run(bundle, speech, options, judge or (), on_step)
        if report:
            on_step("writing the report")
            for path, text in ((report, page(result, options, bundle.manifest.name)),
                               (report.with_suffix(".json"), dumps(figures(result, options)))):  # fmt: skip
                with atomic_write(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    _tell(result.verdict, f"{len(result.chosen.names)} of {len(result.layers)} convolutions in INT8", written=result.written)


def requantize(
    voice: Voice,
    weights: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="What a training in INT8 with this voice's plan left.")],
    speech: Speech,
    budget: LogMelBudget = 0.02,
    silence_budget: SilenceBudget = 1.0,
    peak: Peak = None,
    force: Force = False,
) -> None:
    """Give a voice's INT8 the weights that were trained in it, if it is then within the budget.

    `melrt requantize lj.melrt runs/lj-int8/best recordings/`: layers and ranges stay those of the voice's plan, FP32 and FP16 keep
    the weights they have, and SPEECH, which should be none that was trained on, judges. If INT8 does not pay, nothing is written and
    the exit code is 1.
    """
    from melrt_calibration.calibrate import Options
    from melrt_calibration.data import Sampling
    from melrt_calibration.evaluation import Budget
    from melrt_calibration.requantize import requantize

    options = Options(Budget(budget, silence_budget), Sampling(peak=peak), force)
    with _steps() as on_step:
        result = requantize(Bundle.open(voice), weights, speech, options, on_step)
    _tell(result.verdict, f"{len(result.names)} convolutions in INT8", written=result.written)


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Shows the step that is under way, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("beginning", total=None)
        yield lambda step: bar.update(task, description=step)


def _tell(verdict: str, layers: str, *, written: bool) -> None:
    console.print(verdict, markup=False)
    console.print(f"{layers}; {'written' if written else 'nothing written'}")
    if not written:
        raise typer.Exit(1)
