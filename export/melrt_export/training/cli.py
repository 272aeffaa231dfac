"""The `melrt train` command."""

from __future__ import annotations

import contextlib
import datetime
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from melrt.errors import TrainingError

if TYPE_CHECKING:
    from melrt_export.training.config import TrainingConfig
    from melrt_export.training.trainer import Trainer, TrainingResult
    from melrt_export.training.validation import Validation

console = Console(highlight=False, soft_wrap=True)
INTERRUPTED = 130
# Seconds between two lines of progress where stderr is not a terminal.
PLAIN_INTERVAL = 30


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="TOML file that describes the training; see docs/training.md.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this config from its saved state.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="VOICE.melrt", help="Export the best weights as a bundle when the training has finished.")
    ] = None,
) -> None:
    """Train a new voice, or fine-tune one from a checkpoint (`start_from` in the config).

    `melrt train lj.toml --export lj.melrt` trains a voice, keeps the weights with the smallest validation error in the run's `best/`
    folder, and exports them. Ctrl-C saves the state, and `melrt train lj.toml --resume` continues from it exactly. To use several GPUs:
    `torchrun --nproc-per-node 4 -m melrt train lj.toml`. `tensorboard --logdir RUN` shows losses, audio and spectrograms.
    """
    from melrt_export.training.config import read_config
    from melrt_export.training.distributed import init_distributed
    from melrt_export.training.trainer import Trainer

    settings = read_config(config)
    if export is not None:
        _check_export(settings, export)
    with init_distributed(settings.machine) as processes, _stop_signals() as stopped:
        with _status("Reading every recording once and building the networks.", show=processes.rank == 0):
            trainer = Trainer(settings, resume=resume, processes=processes)
        result = _run(trainer, stopped) if processes.rank == 0 else trainer.run(should_stop=stopped.is_set)
        teacher = trainer.teacher_error() if trainer.teacher is not None and result.finished else None
    if not result.finished:
        if processes.rank == 0:
            step, steps = result.history.step, settings.schedule.steps
            _say(f"The training stopped after {step} of {steps} steps and saved its state in {trainer.run_folder}.")
            _say(f"Continue with: melrt train {config} --resume")
        raise typer.Exit(INTERRUPTED)
    if processes.rank == 0:
        _finish(trainer, result, export, teacher)


def _check_export(settings: TrainingConfig, export: Path) -> None:
    if export.exists():
        raise TrainingError(f"{export} already exists. Choose another --export path.")
    if voice := settings.quantization.voice:
        raise TrainingError(
            "weights trained in INT8 cannot be exported, because in float they are worse than before. Train without --export, "
            f"and then run `melrt requantize {voice} {Path(settings.run) / 'best'} SPEECH` to put them into the INT8 graphs of {voice}."
        )


def _run(trainer: Trainer, stopped: threading.Event) -> TrainingResult:
    from melrt_export.training.tensorboard import TensorBoardLogger

    for reason in trainer.corpus.skipped:
        _say(f"Skipped: {reason}")
    log = TensorBoardLogger(trainer.run_folder, trainer.voice.spec, trainer.history.step)
    with contextlib.closing(log), TrainingProgress(trainer.history.step, trainer.config.schedule.steps) as progress:
        trainer.callbacks = [progress, log]
        return trainer.run(should_stop=stopped.is_set)


def _finish(trainer: Trainer, result: TrainingResult, export: Path | None, teacher: float | None) -> None:
    step, error = result.history.best
    _say(f"The training finished after {result.history.step} steps.")
    _say(f"The best weights are in {result.best}: step {step}, validation log-mel error {error:.4f}.")
    if teacher is not None:
        before = result.history.errors[0][1]
        share = (before - error) / (before - teacher) if before > teacher else 0.0
        recovered = f" The training removed {share:.0%} of the error that INT8 adds." if before > teacher else ""
        _say(f"Before the training, the error was {teacher:.4f} in float and {before:.4f} in INT8.{recovered}")
        _say(f"Next, put the weights into the bundle: melrt requantize {trainer.config.quantization.voice} {result.best} SPEECH")
    elif export is None:
        _say(f"Next, export the voice: melrt export {result.best} -o VOICE.melrt")
    else:
        _export(trainer, result, export)


def _export(trainer: Trainer, result: TrainingResult, export: Path) -> None:
    from melrt_export.export import ExportOptions, export_voice

    step, error = result.history.best
    facts = {
        "training_steps": str(step), "validation_log_mel_error": f"{error:.4f}",
        "validation_recordings": str(len(trainer.corpus.validation)), "training_recordings": str(len(trainer.corpus.train)),
    }  # fmt: skip
    export_voice(result.best, export, ExportOptions(provenance=facts))
    _say(f"Exported and verified {export}.")
    _say(f"Next, synthesize with it: melrt synth {export} recording.wav -o copy.wav")


class TrainingProgress:
    """Shows progress, mean losses and the time left: a bar on a terminal, otherwise a plain line every 30 seconds."""

    def __init__(self, step: int, steps: int) -> None:
        self.steps = steps
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("training", completed=step, total=steps)
        self._start = step, time.monotonic()
        self._next_line = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def on_step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def on_losses(self, step: int, values: Mapping[str, float]) -> None:
        losses = {name: value for name, value in values.items() if name not in ("learning_rate", "steps_per_second")}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
        self.bar.update(self.task, description=shown)
        now = time.monotonic()
        if not self.console.is_terminal and now >= self._next_line:
            self._next_line = now + PLAIN_INTERVAL
            left = (now - self._start[1]) / (step - self._start[0]) * (self.steps - step)
            speed = f"{values['steps_per_second']:.3g} steps per second, {datetime.timedelta(seconds=round(left))} left"
            self.console.print(f"step {step} of {self.steps}: {shown}; {speed}", markup=False)

    def on_validation(self, validation: Validation, best: bool) -> None:
        quality = validation.qualities[validation.chosen]
        pesq = f", PESQ {quality.pesq:.2f}" if math.isfinite(quality.pesq) else ""
        of = " of the average" if len(validation.qualities) > 1 and validation.chosen == "average" else ""
        facts = f"log-mel {quality.log_mel:.4f}, comb {quality.comb_db:+.1f} dB, level {quality.level_db:+.1f} dB{pesq}"
        mark = ", the best so far" if best else ""
        _say(f"step {validation.step} of {self.steps}: validation error{of} {quality.error:.2f} dB ({facts}){mark}")


def _say(text: str) -> None:
    console.print(text, markup=False)


@contextlib.contextmanager
def _status(text: str, show: bool) -> Iterator[None]:
    """Show a text while the block runs: with a spinner on a terminal, otherwise as a plain line."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not show)
    if errors.is_terminal:
        with errors.status(text):
            yield
    else:
        errors.print(text)
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets, so that the loop can stop. A second Ctrl-C interrupts at once."""
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
