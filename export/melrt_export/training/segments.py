"""Random segments of the recordings.

A segment depends on the seed and its number alone. The number of processes and the step at which a run resumes do not change it.
"""

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


class SegmentDataset(Dataset[Tensor]):
    """Training segments, each of shape (N,).

    Segment i comes from recording i of an endless sequence of shuffled passes over the recordings. Position and scale are random.
    """

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
        scale = recording.scale(self.config.peak) * noise.uniform(*self.config.gain)
        audio, _, _ = read_recording(recording.path, self.sample_rate, start, self.config.segment)
        if len(audio) != self.config.segment:
            raise AudioError(f"{recording.path} is shorter than when the training began.")
        return torch.from_numpy(np.asarray(audio * scale, np.float32))

    def _recording_of(self, number: int) -> int:
        epoch, position = divmod(number, len(self.recordings))
        if self._shuffle[0] != epoch:
            self._shuffle = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.recordings))
        return int(self._shuffle[1][position])


@dataclass(frozen=True, slots=True)
class BatchSampler:
    """Yields, for each step, the numbers of the segments that one process trains on."""

    batch: int
    """Segments in one step, over all processes."""
    rank: int
    """Rank of the process."""
    world_size: int
    """Number of processes."""
    start: int
    """First step."""
    stop: int
    """Step after the last one."""

    def __iter__(self) -> Iterator[list[int]]:
        own = self.batch // self.world_size
        for step in range(self.start, self.stop):
            begin = step * self.batch + self.rank * own
            yield list(range(begin, begin + own))


def load_batches(segments: SegmentDataset, sampler: BatchSampler, pinned: bool) -> Iterator[Tensor]:
    """Yield a batch (B, N) for each step. The config's worker processes read ahead.

    Raises:
        TrainingError: A recording can no longer be read.
    """
    loader: DataLoader[Tensor] = DataLoader(
        segments,
        batch_sampler=sampler,
        num_workers=segments.config.workers,
        pin_memory=pinned,
        worker_init_fn=_leave_signals_to_parent,
    )
    try:
        yield from loader
    except AudioError as error:
        reason = str(error).strip().splitlines()[-1]  # the message of a worker's error begins with its traceback
        raise TrainingError(f"{reason.partition('AudioError: ')[2] or reason} Restore the file and resume with --resume.") from error


def _leave_signals_to_parent(_worker: int) -> None:
    """Ignore Ctrl-C, which the terminal sends to every process: the parent saves the state first, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
