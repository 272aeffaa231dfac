"""The command `melrt calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from melrt.bundle import Bundle
from melrt.files import whole_file

console = Console(highlight=False)


def calibrate(
    voice: Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")],
    speech: Annotated[
        list[Path], typer.Argument(metavar="SPEECH...", help="Recordings (.wav, .flac), mels (.npy, .npz, .pt), or folders.")
    ],
    budget: Annotated[float, typer.Option(help="Share by which the log-mel error may be above FP32's.")] = 0.02,
    silence_budget: Annotated[float, typer.Option(help="dB by which silence may be louder than FP32's.")] = 1.0,
    judge: Annotated[list[Path] | None, typer.Option(help="Other speech for the last judgement; default: a held-out fifth.")] = None,
    peak: Annotated[float | None, typer.Option(help="Scale each recording to this peak, as the voice's training did.")] = None,
    windows: Annotated[int, typer.Option(help="Observed windows of 64 frames.")] = 96,
    seed: Annotated[int, typer.Option(help="Of the split and the sampling.")] = 0,
    report: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Write a report here, and OUT.json beside it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write INT8 even if it does not pay.")] = False,
) -> None:
    """Choose INT8 layer by layer, by quality and by time, and add it to the bundle if it is faster within the budget.

    `melrt calibrate voice.melrt recordings/ --report int8.html`; afterwards `melrt synth --precision int8` uses it. It takes minutes.
    If INT8 does not pay, nothing is written and the exit code is 1.
    """
    from melrt_calibration.calibrate import Options
    from melrt_calibration.calibrate import calibrate as run
    from melrt_calibration.data import Sampling
    from melrt_calibration.judge import Budget
    from melrt_calibration.report import dumps, figures, page

    options = Options(Budget(budget, silence_budget), Sampling(windows, seed, peak), force)
    bundle = Bundle.open(voice)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("calibrating", total=None)
        result = run(bundle, speech, options, judge or (), lambda step: bar.update(task, description=step))
        if report:
            bar.update(task, description="writing the report")
            for path, text in ((report, page(result, options, bundle.manifest.name)),
                               (report.with_suffix(".json"), dumps(figures(result, options)))):  # fmt: skip
                with whole_file(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    console.print(result.verdict, markup=False)
    console.print(
        f"{len(result.chosen.names)} of {len(result.layers)} convolutions in INT8; " + ("written" if result.written else "nothing written")
    )
    if not result.written:
        raise typer.Exit(1)
