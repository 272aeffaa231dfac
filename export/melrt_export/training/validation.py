"""Validation: the log-mel error of the voice on recordings that are kept from training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.mel import LogMel
from melrt_export.training.recordings import Recording, read_recording

# Utterances that are logged as audio and spectrogram.
MAX_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """Recording of a validation utterance, and its synthesis from the recording's mel."""

    name: str
    """File name without suffix."""
    recording: Tensor
    """Samples of the recording, (N,)."""
    synthesis: Tensor
    """Samples of the synthesis, (N,)."""
    recording_mel: Tensor
    """Log-mel of the recording, (M, T)."""
    synthesis_mel: Tensor
    """Log-mel of the synthesis, (M, T)."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of one validation."""

    step: int
    """Number of training steps done."""
    error: float
    """Mean absolute difference of the log-mels over all bands and frames, in units of the convention's logarithm."""
    samples: tuple[Sample, ...]
    """First few utterances of the process of rank 0."""


def validate(
    generator: nn.Module, log_mel: LogMel, recordings: Sequence[Recording], peak: float, processes: ProcessGroup
) -> tuple[float, tuple[Sample, ...]]:
    """Synthesize whole recordings from their mels, and measure the log-mel error. The processes share the work.

    Args:
        generator: Generator to validate.
        log_mel: Mel computation of the voice.
        recordings: Recordings for validation.
        peak: Peak to which each recording is scaled.
        processes: Process group; every process must call this function.

    Returns:
        Log-mel error over all recordings, and samples of this process's first few.
    """
    total, values = 0.0, 0
    samples: list[Sample] = []
    for recording in recordings[processes.rank :: processes.world_size]:
        sample = _sample(generator, log_mel, recording, peak, processes)
        total += float((sample.recording_mel - sample.synthesis_mel).abs().sum())
        values += sample.recording_mel.numel()
        if len(samples) < MAX_SAMPLES:
            samples.append(sample)
    total, counted = processes.sum(total, values)
    return total / counted, tuple(samples)


@torch.no_grad()
def _sample(generator: nn.Module, log_mel: LogMel, recording: Recording, peak: float, processes: ProcessGroup) -> Sample:
    spec = log_mel.spec
    audio, _, _ = read_recording(recording.path, spec.sample_rate)
    samples = len(audio) // spec.hop * spec.hop
    target = torch.from_numpy(audio[:samples] * (peak / recording.peak))[None].to(processes.device)
    mel = log_mel.frames(target)
    synthesis = generator.forward(mel).squeeze(1).float()  # without torch.compile, which would recompile for every length
    mels = mel, log_mel.frames(synthesis)
    return Sample(recording.path.stem, *(value[0].cpu() for value in (target, synthesis, *mels)))
