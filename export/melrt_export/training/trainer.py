"""The training loop: steps, log, validations and saved states. A run can be stopped at any step and resumed exactly."""

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
from melrt_export.checkpoints import load_checkpoint, native
from melrt_export.generator.network import Generator
from melrt_export.int8_plan import Int8Plan, read_plan
from melrt_export.quality import SpeechQuality
from melrt_export.training.activation_ranges import PLAN_KEY, trained_plan
from melrt_export.training.config import TrainingConfig
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.quantized import DistillationLoss, quantize
from melrt_export.training.recordings import Corpus, find_corpus
from melrt_export.training.segments import BatchSampler, SegmentDataset, load_batches
from melrt_export.training.state import FILE, History, load_state, save_state
from melrt_export.training.step import AdversarialStep, ExtraLoss
from melrt_export.training.validation import Sample, Validation, validate
from melrt_export.training.voice import create_voice

BEST, LAST = "best", "last"
GENERATOR_ONLY = "best-generator-only"
"""Best checkpoint from before the discriminators' terms began, because `best` begins again with them."""
STEP = "step-"
# End of the name of a checkpoint that is not complete yet.
NEW = ".new"
# Steps after which several processes ask each other if one of them was told to stop. torchrun waits 30 s before it kills.
STOP_CHECK_EVERY = 10


class TrainingCallback(Protocol):
    """Receives the events of a training, in the process of rank 0."""

    def on_step(self, step: int) -> None:
        """Handle the end of a step; `step` is the number of steps done."""

    def on_losses(self, step: int, values: Mapping[str, float]) -> None:
        """Handle the mean losses since the last call, with learning rate and steps per second."""

    def on_validation(self, validation: Validation, best: bool) -> None:
        """Handle a validation; `best` is true if its error is the smallest since the discriminators' terms began."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of a training that ended or was stopped."""

    history: History
    """Steps done and validations."""
    best: Path
    """Checkpoint with the smallest validation error, as `[schedule] best` defines it."""
    finished: bool
    """True if all steps are done; otherwise the training was stopped and can be resumed."""


class Trainer:
    """Trains a voice. The run's folder holds `training.safetensors`, the checkpoints `best`, `last` and `step-N`, and the log.

    Args:
        config: Configuration of the run.
        resume: Continue from the run's saved state.
        processes: Process group; by default a single process on the CPU.
        extra: Additional terms of the generator's objective, by name.

    Raises:
        TrainingError: Settings do not fit together, recordings cannot be used, the run already has a state (or none to resume).
        CheckpointError: The checkpoint to start from cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        resume: bool = False,
        processes: ProcessGroup | None = None,
        extra: Mapping[str, ExtraLoss] | None = None,
    ) -> None:
        self.config = config
        self.run_folder = Path(config.run)
        self.processes = processes or ProcessGroup(torch.device("cpu"))
        self._check(resume)
        self.voice = create_voice(config)
        self.corpus: Corpus = self.processes.broadcast(lambda: find_corpus(config.data, self.voice.spec.sample_rate))
        self.plan: Int8Plan | None = None
        self.teacher = self._quantize_generator()
        self.train_step = AdversarialStep(config, self.voice, self.processes, {**self._distillation(), **(extra or {})})
        self._identity = self.voice.identity() | {"int8": self.teacher is not None}
        self.history = load_state(self.run_folder, self.train_step, self._identity) if resume else History()
        self.history.begin = config.losses.adversarial_from if config.losses.uses_discriminator else 0
        self.train_step.parallelize()
        self.callbacks: list[TrainingCallback] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._last_log = (self.history.step, time.perf_counter())

    def run(self, until: int | None = None, should_stop: Callable[[], bool] = lambda: False) -> TrainingResult:
        """Train until all steps are done or the training is stopped. The state is saved in either case.

        Args:
            until: Step after which to stop, counted from the beginning of the run; None for no limit.
            should_stop: Function that is called after every step (with several processes after every tenth) and returns true to stop.

        Raises:
            TrainingError: A loss is not finite, or a recording can no longer be read. The last saved state stays.
        """
        if self._is_first:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        if not self.history.errors:
            self._validate()
        steps = self.config.schedule.steps
        end = steps if until is None else min(until, steps)
        self._last_log = self.history.step, time.perf_counter()
        for batch in self._batches(end):
            self._advance(batch)
            self._notify(lambda callback: callback.on_step(self.history.step))
            self._follow_schedule(end)
            if self._must_stop(should_stop):
                break
        self._save()
        self.processes.barrier()
        return TrainingResult(self.history, self.run_folder / BEST, self.history.step >= self.config.schedule.steps)

    def teacher_error(self) -> float:
        """Return the validation error of the float generator that a training in INT8 began with. Every process must call this."""
        assert self.teacher is not None
        return self._measure(self.teacher)[0].log_mel

    @property
    def _is_first(self) -> bool:
        return self.processes.rank == 0

    def _quantize_generator(self) -> Generator | None:
        quantization = self.config.quantization
        if not quantization.voice:
            return None
        path = Path(quantization.voice)
        self.plan = Int8Plan.loads(path.read_bytes(), path) if path.is_file() else read_plan(Bundle.open(path))
        teacher = quantize(self.voice, self.plan, quantization.form, learn_ranges=quantization.learn_ranges)
        return teacher.to(self.processes.device)

    def _distillation(self) -> dict[str, ExtraLoss]:
        if self.teacher is None:
            return {}
        return {"distillation": DistillationLoss(self.teacher, self.config.quantization.distillation)}

    def _check(self, resume: bool) -> None:
        count, batch = self.processes.world_size, self.config.data.batch
        if batch % count:
            raise TrainingError(f"[data] batch is {batch}, divided among {count} processes; it must be a multiple of {count}.")
        if not resume and (self.run_folder / FILE).exists():
            raise TrainingError(f"{self.run_folder} already holds a training. Continue it with --resume, or name another run folder.")

    def _batches(self, end: int) -> Iterator[Tensor]:
        config, processes = self.config, self.processes
        segments = SegmentDataset(self.corpus.train, config.data, self.voice.spec.sample_rate, config.seed)
        sampler = BatchSampler(config.data.batch, processes.rank, processes.world_size, self.history.step, end)
        return load_batches(segments, sampler, pinned=processes.device.type == "cuda")

    def _advance(self, batch: Tensor) -> None:
        # All steps have the same shapes, so timing cuDNN's algorithms once pays, as in melgan-neurips. In validations, each recording has
        # a shape of its own.
        torch.backends.cudnn.benchmark = True
        try:
            values = self.train_step(batch.to(self.processes.device, non_blocking=True), self.history.step)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the GPU's memory does not hold a step of {len(batch)} segments of {self.config.data.segment} samples; "
                'set a smaller batch or segment under [data], or precision = "bfloat16" under [machine].'
            ) from error
        for name, value in values.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = total + value, count + 1
        self.history.step += 1

    def _follow_schedule(self, end: int) -> None:
        """Log, validate and save if it is time to; validate at the end of the training too."""
        schedule, done = self.config.schedule, self.history.step
        if done % schedule.log_every == 0:
            self._log()
        if done % schedule.validate_every == 0 or done == schedule.steps:
            self._validate()
        if schedule.keep_every and done % schedule.keep_every == 0 and self._is_first:
            self._keep_step()
        if done == self.history.begin:
            self._keep_generator_only()
        elif done % schedule.save_every == 0 and done != end:
            self._save()

    def _log(self) -> None:
        means = self._mean_losses()
        step, now = self.history.step, time.perf_counter()
        speed = (step - self._last_log[0]) / (now - self._last_log[1])
        rate = self.config.optimizer.learning_rate * self.config.optimizer.rate_factor(step)
        self._sums, self._last_log = {}, (step, now)
        self._notify(lambda callback: callback.on_losses(step, means | {"learning_rate": rate, "steps_per_second": speed}))

    def _mean_losses(self) -> dict[str, float]:
        """Return the mean of each loss since the last log.

        Raises:
            TrainingError: A mean is not finite, so these weights must not be saved.
        """
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        if bad := {name: value for name, value in means.items() if not math.isfinite(value)}:
            name, value = next(iter(bad.items()))
            raise TrainingError(
                f"after {self.history.step} steps the {name} loss is {value}; {self.run_folder / FILE} was not overwritten. "
                'Lower the learning rates, or set precision = "float32", and resume.'
            )
        return means

    def _validate(self) -> None:
        self._mean_losses()
        start = time.perf_counter()
        measured = {name: self._measure(network) for name, network in self.train_step.generators.items()}
        validation = Validation(self.history.step, {name: quality for name, (quality, _) in measured.items()}, [*measured.values()][-1][1])
        chosen = validation.qualities[validation.chosen]
        error = chosen.log_mel if self.config.schedule.best == "log_mel" else chosen.error
        self.history.validations.append((self.history.step, chosen.log_mel, error))
        best = self.history.best[0] == self.history.step
        if best and self._is_first:
            self._keep(BEST, self.train_step.generators[validation.chosen])
        self._notify(lambda callback: callback.on_validation(validation, best))
        # the time of a validation does not count in the logged speed
        self._last_log = self._last_log[0], self._last_log[1] + time.perf_counter() - start

    def _measure(self, generator: Generator) -> tuple[SpeechQuality, tuple[Sample, ...]]:
        torch.backends.cudnn.benchmark = False
        return validate(generator, self.train_step.log_mel, self.corpus.validation, self.config.data.peak, self.processes)

    def _keep(self, name: str, generator: Generator) -> None:
        """Replace a checkpoint file by file. Its config never changes within a run, so the checkpoint is complete at any moment."""
        kept, new = self.run_folder / name, self.run_folder / f"{name}{NEW}"
        metadata = {PLAN_KEY: trained_plan(generator, self.plan).dumps()} if self.plan is not None else None
        native.save(new, self.voice.checkpoint(self.config.name, generator), metadata=metadata)
        if kept.exists():
            for file in new.iterdir():
                file.replace(kept / file.name)
            new.rmdir()
        else:
            new.rename(kept)

    def _keep_all(self, name: str) -> None:
        """Keep the weights and, if there is one, their average."""
        for kind, generator in self.train_step.generators.items():
            self._keep(name if kind == "weights" else f"{name}-{kind}", generator)

    def _keep_step(self) -> None:
        """Keep the current weights as `step-N`, and remove the oldest such checkpoints if there are too many."""
        self._keep_all(f"{STEP}{self.history.step}")
        steps = {path: int(path.name.split("-")[1]) for path in self.run_folder.glob(f"{STEP}[0-9]*")}
        newest = sorted(set(steps.values()))[-self.config.schedule.keep :]
        for path in (path for path, step in steps.items() if step not in newest):
            shutil.rmtree(path)

    def _keep_generator_only(self) -> None:
        """Copy the best checkpoint before `best` begins again, and save the state, so that a resumed run does not come here again."""
        if self._is_first:
            native.save(self.run_folder / GENERATOR_ONLY, load_checkpoint(self.run_folder / BEST))
        self._save()

    def _remove_leftovers(self) -> None:
        """Remove files that a killed process did not finish writing."""
        for path in (*self.run_folder.glob(f".{Path(FILE).stem}-*"), *self.run_folder.glob(f"*{NEW}*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _save(self) -> None:
        self._mean_losses()
        if self._is_first:
            self._keep_all(LAST)
            save_state(self.run_folder, self.train_step, self.history, self.config.name, self._identity)

    def _must_stop(self, should_stop: Callable[[], bool]) -> bool:
        if self.processes.world_size == 1:
            return should_stop()
        return self.history.step % STOP_CHECK_EVERY == 0 and self.processes.sum(float(should_stop()))[0] > 0

    def _notify(self, event: Callable[[TrainingCallback], None]) -> None:
        if self._is_first:
            for callback in self.callbacks:
                event(callback)
