"""The command that trains: `melrt train`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from melrt.errors import TrainingError

if TYPE_CHECKING:
    from melrt_export.training.trainer import Outcome, Trainer
    from melrt_export.training.validation import Validation

console = Console(highlight=False, soft_wrap=True)
INTERRUPTED = 130


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="What to train, on what, for how long.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run of this config was stopped.")] = False,
    export: Annotated[Path | None, typer.Option(metavar="VOICE.melrt", help="At the end, export the best weights as a bundle.")] = None,
) -> None:
    """Train a voice, or fine-tune one from a checkpoint (`start_from` in the config).

    `melrt train lj.toml --export lj.melrt` trains, keeps the best weights by validation error in the run's `best/`, and exports them.
    Ctrl-C saves; `melrt train lj.toml --resume` goes on as if nothing had been. Several GPUs:
    `torchrun --nproc-per-node 4 -m melrt train lj.toml`. Curves, sound and spectrograms: `tensorboard --logdir RUN`.
    """
    from melrt_export.training.config import read_config
    from melrt_export.training.distributed import init_distributed
    from melrt_export.training.trainer import Trainer

    settings = read_config(config)
    if export is not None and export.exists():
        raise TrainingError(f"{export} exists; give --export another name, so that the training does not end in vain.")
    if export is not None and settings.quantization.voice:
        voice = settings.quantization.voice
        raise TrainingError(
            f"weights trained in INT8 are worth nothing in float, so that there is no voice to --export; afterwards, "
            f"melrt requantize {voice} {Path(settings.run) / 'best'} SPEECH gives them to the INT8 of {voice}."
        )
    with init_distributed(settings.machine) as processes, _stop_signals() as stopped:
        with Console(stderr=True).status("reading every recording once, building the networks"):
            trainer = Trainer(settings, resume=resume, processes=processes)
        outcome = _run(trainer, stopped) if processes.rank == 0 else trainer.run(should_stop=stopped.is_set)
        teacher = trainer.teacher_error() if trainer.teacher is not None and outcome.finished else None
    if not outcome.finished:
        if processes.rank == 0:
            console.print(f"stopped after {outcome.history.step} steps and saved; go on with: melrt train {config} --resume", markup=False)
        raise typer.Exit(INTERRUPTED)
    if processes.rank == 0:
        _finish(trainer, outcome, export, teacher)


def _run(trainer: Trainer, stopped: threading.Event) -> Outcome:
    from melrt_export.training.tensorboard import TensorBoardLogger

    for reason in trainer.corpus.skipped:
        console.print(f"skipped: {reason}", markup=False)
    board = TensorBoardLogger(trainer.run_folder, trainer.voice.spec, trainer.history.step)
    with contextlib.closing(board), Bar(trainer.history.step, trainer.config.schedule.steps) as bar:
        trainer.watchers = [bar, board]
        return trainer.run(should_stop=stopped.is_set)


def _finish(trainer: Trainer, outcome: Outcome, export: Path | None, teacher: float | None) -> None:
    from melrt_export.export import ExportOptions, export_voice

    step, error = outcome.history.best
    console.print(f"{outcome.best}: best after {step} steps, validation log-mel error {error:.4f}", markup=False)
    if teacher is not None:
        before = outcome.history.errors[0][1]
        mended = f"; {(before - error) / (before - teacher):.0%} of what rounding cost is mended" if before > teacher else ""
        console.print(f"in float it began with {teacher:.4f}, in INT8 with {before:.4f}{mended}", markup=False)
        console.print(f"next: melrt requantize {trainer.config.quantization.voice} {outcome.best} SPEECH", markup=False)
    if export is None:
        return
    facts = {
        "training_steps": str(step), "validation_log_mel_error": f"{error:.4f}",
        "validation_recordings": str(len(trainer.corpus.validation)), "training_recordings": str(len(trainer.corpus.train)),
    }  # fmt: skip
    export_voice(outcome.best, export, ExportOptions(provenance=facts))
    console.print(f"{export}: exported and verified", markup=False)


class Bar:
    """Progress with the time left, the last losses, and a line for each validation."""

    def __init__(self, step: int, steps: int) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task("training", completed=step, total=steps)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_step(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def on_losses(self, step: int, values: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.3g}" for name, value in values.items() if name != "learning_rate")
        self.progress.update(self.task, description=shown)

    def on_validation(self, validation: Validation, best: bool) -> None:
        mark = "  best so far" if best else ""
        console.print(f"step {validation.step}: validation log-mel error {validation.error:.4f}{mark}", markup=False)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and a scheduler's SIGTERM ask the loop to stop; a second Ctrl-C interrupts at once."""
    stopped = threading.Event()
    default = signal.getsignal(signal.SIGINT)

    def stop(_number: int, _frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, default)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
