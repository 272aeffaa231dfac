"""How close the voice is to recordings that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from melrt_export.training.distributed import Processes
from melrt_export.training.mel import LogMel
from melrt_export.training.recordings import Recording, read_recording

# Utterances that are kept to be heard and seen.
SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """An utterance of the validation: the recording, and what the voice makes of its mel."""

    name: str
    recording: Tensor
    """Shape (N,)."""
    synthesis: Tensor
    """Shape (N,)."""
    recording_mel: Tensor
    """Shape (M, T)."""
    synthesis_mel: Tensor
    """Shape (M, T)."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The voice after so many steps."""

    step: int
    error: float
    """Mean absolute difference of the log-mels, over all bands and frames, in the convention's logarithm."""
    samples: tuple[Sample, ...]
    """The first few utterances; all of them the first process's."""


def validate(
    generator: nn.Module, log_mel: LogMel, recordings: Sequence[Recording], peak: float, processes: Processes
) -> tuple[float, tuple[Sample, ...]]:
    """Synthesize whole recordings from their mels; the work is shared among the processes.

    Args:
        generator: As it is trained.
        log_mel: The mel convention.
        recordings: Whole utterances.
        peak: Each is scaled to this one.
        processes: All of them take part.

    Returns:
        The log-mel error over all recordings, and the first few of this process's.
    """
    total, values = 0.0, 0
    samples: list[Sample] = []
    for recording in recordings[processes.rank :: processes.count]:
        sample = _sample(generator, log_mel, recording, peak, processes)
        total += float((sample.recording_mel - sample.synthesis_mel).abs().sum())
        values += sample.recording_mel.numel()
        if len(samples) < SAMPLES:
            samples.append(sample)
    total, counted = processes.sum(total, values)
    return total / counted, tuple(samples)


@torch.no_grad()
def _sample(generator: nn.Module, log_mel: LogMel, recording: Recording, peak: float, processes: Processes) -> Sample:
    spec = log_mel.spec
    audio, _, _ = read_recording(recording.path, spec.sample_rate)
    samples = len(audio) // spec.hop * spec.hop
    target = torch.from_numpy(audio[:samples] * (peak / recording.peak))[None].to(processes.device)
    mel = log_mel.frames(target)
    synthesis = generator.forward(mel).squeeze(1).float()  # not compiled: that would be done anew for every length
    pictures = mel, log_mel.frames(synthesis)
    return Sample(recording.path.stem, *(value[0].cpu() for value in (target, synthesis, *pictures)))
