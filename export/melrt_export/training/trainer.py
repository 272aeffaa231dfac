"""The loop: steps, losses in the log, validations, checkpoints; stopped at any step and resumed as if it had not been."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from melrt.bundle import Bundle
from melrt.errors import TrainingError
from melrt_export.checkpoints import native
from melrt_export.generator.network import Generator
from melrt_export.int8_plan import read_plan
from melrt_export.training.config import TrainingConfig
from melrt_export.training.distributed import Processes
from melrt_export.training.quantized import Distillation, quantize
from melrt_export.training.recordings import Corpus, find_corpus
from melrt_export.training.segments import Segments, Share, batches
from melrt_export.training.state import FILE, History, load_state, save_state
from melrt_export.training.step import AdversarialStep, ExtraLoss
from melrt_export.training.validation import Validation, validate
from melrt_export.training.voice import first_voice

BEST = "best"
# Steps between the questions of several processes whether one of them was told to stop: torchrun waits 30 s before it kills.
ASK_EVERY = 10


class TrainingCallback(Protocol):
    """Told of a training as it goes on, in the first process."""

    def on_step(self, step: int) -> None:
        """So many steps are done."""

    def on_losses(self, step: int, values: Mapping[str, float]) -> None:
        """The means of the losses since the last call."""

    def on_validation(self, validation: Validation, best: bool) -> None:
        """The voice was validated; it is the best so far, or not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended."""

    history: History
    best: Path
    """The checkpoint with the smallest validation error."""
    finished: bool
    """Whether all steps are done; otherwise it was stopped, and can be resumed."""


class Trainer:
    """A training run, from its config; a run's folder holds `training.safetensors`, `best/` and the log.

    Args:
        config: What to do.
        resume: Go on where the run's checkpoint is.
        processes: This process among the others.
        extra: More terms of the generator's objective, by name.

    Raises:
        TrainingError: A config that does not go together, files that cannot be used, a run that is there or is not.
        CheckpointError: A checkpoint to start from that cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        resume: bool = False,
        processes: Processes | None = None,
        extra: Mapping[str, ExtraLoss] | None = None,
    ) -> None:
        self.config = config
        self.run_folder = Path(config.run)
        self.processes = processes or Processes(torch.device("cpu"))
        self._check(resume)
        self.voice = first_voice(config)
        self.corpus: Corpus = self.processes.from_first(lambda: find_corpus(config.data, self.voice.spec.sample_rate))
        self.teacher = self._quantized()
        self.step = AdversarialStep(config, self.voice, self.processes, {**self._distillation(), **(extra or {})})
        self._shape = {"generator": self.voice.config.to_dict(), "mel": self.voice.spec.to_dict()}
        self.history = load_state(self.run_folder, self.step, self._shape) if resume else History()
        self.step.share()
        self.watchers: list[TrainingCallback] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._since = (self.history.step, time.perf_counter())

    def run(self, until: int | None = None, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train to the end, or until stopped; the state is saved in either case.

        Args:
            until: Stop after this many steps, counted from the run's beginning.
            should_stop: Asked after every step (of several processes: every tenth).

        Raises:
            TrainingError: A loss that is not finite, or a file that can be read no longer; the last checkpoint stays.
        """
        if self._is_first:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        if not self.history.errors:
            self._validate()
        steps = self.config.schedule.steps
        end = steps if until is None else min(until, steps)
        self._since = self.history.step, time.perf_counter()
        for batch in self._batches(end):
            self._advance(batch)
            self._tell(lambda watcher: watcher.on_step(self.history.step))
            self._keep_up(end)
            if self._stops(should_stop):
                break
        self._save()
        self.processes.wait()
        return Outcome(self.history, self.run_folder / BEST, self.history.step >= self.config.schedule.steps)

    @property
    def _is_first(self) -> bool:
        return self.processes.rank == 0

    def teacher_error(self) -> float:
        """Validation error of the float generator that a training in INT8 began with; every process takes part."""
        assert self.teacher is not None
        return validate(self.teacher, self.step.log_mel, self.corpus.validation, self.config.data.peak, self.processes)[0]

    def _quantized(self) -> Generator | None:
        quantization = self.config.quantization
        if not quantization.voice:
            return None
        return quantize(self.voice, read_plan(Bundle.open(Path(quantization.voice))), quantization.form).to(self.processes.device)

    def _distillation(self) -> dict[str, ExtraLoss]:
        if self.teacher is None:
            return {}
        return {"distillation": Distillation(self.teacher, self.config.quantization.distillation)}

    def _check(self, resume: bool) -> None:
        count, batch = self.processes.count, self.config.data.batch
        if batch % count:
            raise TrainingError(f"[data] batch is {batch}, shared by {count} processes; it is a multiple of {count}.")
        if not resume and (self.run_folder / FILE).exists():
            raise TrainingError(f"{self.run_folder} holds a training already; --resume goes on with it, or name another run.")

    def _batches(self, end: int) -> Iterator[Tensor]:
        config, processes = self.config, self.processes
        segments = Segments(self.corpus.train, config.data, self.voice.spec.sample_rate, config.seed)
        share = Share(config.data.batch, processes.rank, processes.count, self.history.step, end)
        return batches(segments, share, pinned=processes.device.type == "cuda")

    def _advance(self, batch: Tensor) -> None:
        try:
            values = self.step(batch.to(self.processes.device, non_blocking=True), self.history.step)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU's memory does not hold a step of {len(batch)} segments of {self.config.data.segment} samples; "
                'set a smaller batch or segment under [data], or precision = "bfloat16" under [machine].'
            ) from error
        self._add(values)
        self.history.step += 1

    def _keep_up(self, end: int) -> None:
        """Log, validate and save where the schedule says so, and at the end."""
        schedule, done = self.config.schedule, self.history.step
        if done % schedule.log_every == 0:
            self._log()
        if done % schedule.validate_every == 0 or done == schedule.steps:
            self._validate()
        if done % schedule.save_every == 0 and done != end:
            self._save()

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = total + value, count + 1

    def _log(self) -> None:
        means = self._means()
        step, now = self.history.step, time.perf_counter()
        speed = (step - self._since[0]) / (now - self._since[1])
        rate = self.config.optimizer.learning_rate * self.config.optimizer.factor(step)
        self._sums, self._since = {}, (step, now)
        self._tell(lambda watcher: watcher.on_losses(step, means | {"learning_rate": rate, "steps_per_second": speed}))

    def _means(self) -> dict[str, float]:
        """Each loss since the last log.

        Raises:
            TrainingError: One is not finite: these weights are not to be saved.
        """
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        if bad := {name: value for name, value in means.items() if not math.isfinite(value)}:
            name, value = next(iter(bad.items()))
            raise TrainingError(
                f"after {self.history.step} steps the {name} loss is {value}; {self.run_folder / FILE} is left as it was. "
                'Lower the learning rates, or set precision = "float32", and resume.'
            )
        return means

    def _validate(self) -> None:
        self._means()
        start = time.perf_counter()
        error, samples = validate(self.step.generator, self.step.log_mel, self.corpus.validation, self.config.data.peak, self.processes)
        self.history.errors.append((self.history.step, error))
        best = self.history.best[0] == self.history.step
        if best and self._is_first:
            self._keep_best()
        self._tell(lambda watcher: watcher.on_validation(Validation(self.history.step, error, samples), best))
        self._since = self._since[0], self._since[1] + time.perf_counter() - start

    def _keep_best(self) -> None:
        """Replace the best checkpoint file by file: its config never changes within a run, so that it is whole at every moment."""
        best, new = self.run_folder / BEST, self.run_folder / f"{BEST}-new"
        native.save(new, self.voice.checkpoint(self.config.name))
        if best.exists():
            for file in new.iterdir():
                file.replace(best / file.name)
            new.rmdir()
        else:
            new.rename(best)

    def _remove_leftovers(self) -> None:
        """Remove what killed processes had not finished writing."""
        for path in (*self.run_folder.glob(f".{Path(FILE).stem}-*"), *self.run_folder.glob(f"*{BEST}-new*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _save(self) -> None:
        self._means()
        if self._is_first:
            save_state(self.run_folder, self.step, self.history, self._shape)

    def _stops(self, should_stop: Callable[[], bool]) -> bool:
        if self.processes.count == 1:
            return should_stop()
        return self.history.step % ASK_EVERY == 0 and self.processes.sum(float(should_stop()))[0] > 0

    def _tell(self, say: Callable[[TrainingCallback], None]) -> None:
        if self._is_first:
            for watcher in self.watchers:
                say(watcher)
