"""Random segments of the recordings: a function of seed and number alone, whatever processes read them and wherever a run resumes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from melrt.errors import AudioError, TrainingError
from melrt_export.training.config import DataConfig
from melrt_export.training.recordings import Recording, read_recording


class Segments(Dataset[Tensor]):
    """Segment number i, shape (N,): of recording i of an endless row of shuffles, cut and scaled at random."""

    def __init__(self, recordings: Sequence[Recording], config: DataConfig, sample_rate: int, seed: int) -> None:
        self.recordings = recordings
        self.config = config
        self.sample_rate = sample_rate
        self.seed = seed
        self._shuffle = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Tensor:
        recording = self.recordings[self._recording_of(number)]
        noise = np.random.default_rng((self.seed, 1, number))
        start = int(noise.integers(recording.samples - self.config.segment + 1))
        scale = self.config.peak / recording.peak * noise.uniform(*self.config.gain)
        audio, _, _ = read_recording(recording.path, self.sample_rate, start, self.config.segment)
        if len(audio) != self.config.segment:
            raise AudioError(f"{recording.path} became shorter since the training began.")
        return torch.from_numpy(np.asarray(audio * scale, np.float32))

    def _recording_of(self, number: int) -> int:
        turn, position = divmod(number, len(self.recordings))
        if self._shuffle[0] != turn:
            self._shuffle = turn, np.random.default_rng((self.seed, 0, turn)).permutation(len(self.recordings))
        return int(self._shuffle[1][position])


@dataclass(frozen=True, slots=True)
class Share:
    """The numbers of the segments that one of several processes takes, step by step."""

    batch: int
    """Segments of a step, over all processes."""
    rank: int
    count: int
    first: int
    """Step to begin with."""
    steps: int
    """Step to end before."""

    def __iter__(self) -> Iterator[list[int]]:
        own = self.batch // self.count
        for step in range(self.first, self.steps):
            begin = step * self.batch + self.rank * own
            yield list(range(begin, begin + own))


def batches(segments: Segments, share: Share, pinned: bool) -> Iterator[Tensor]:
    """A batch (B, N) for each step, read ahead by the config's worker processes.

    Raises:
        TrainingError: A recording that could be read when the training began can be no longer.
    """
    loader: DataLoader[Tensor] = DataLoader(
        segments,
        batch_sampler=share,
        num_workers=segments.config.workers,
        pin_memory=pinned,
        worker_init_fn=_leave_signals_to_parent,
    )
    try:
        yield from loader
    except AudioError as error:
        reason = str(error).strip().splitlines()[-1]  # a worker's error carries its traceback above its own text
        raise TrainingError(f"{reason.partition('AudioError: ')[2] or reason} Bring it back and resume.") from error


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C goes to every process of the terminal; the workers go on until the parent, which saves first, is done with them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
