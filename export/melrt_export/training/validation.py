"""Validation: the quality of the voice on recordings that are kept from training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from melrt_export.quality import SpeechQuality
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
    qualities: Mapping[str, SpeechQuality]
    """Mean quality over all recordings of `weights` and, if there is one, of their `average`."""
    samples: tuple[Sample, ...]
    """First few utterances of the process of rank 0, of the average if there is one."""

    @property
    def chosen(self) -> str:
        """Name of the quality with the smallest error."""
        return min(self.qualities, key=lambda name: self.qualities[name].error)


def validate(
    generator: nn.Module, log_mel: LogMel, recordings: Sequence[Recording], peak: float, processes: ProcessGroup
) -> tuple[SpeechQuality, tuple[Sample, ...]]:
    """Synthesize whole recordings from their mels, and compare. The processes share the work.

    Args:
        generator: Generator to validate.
        log_mel: Mel computation of the voice.
        recordings: Recordings for validation.
        peak: Peak to which each recording is scaled; 0 to leave it as it is.
        processes: Process group; every process must call this function.

    Returns:
        Mean quality, to which every recording contributes by its length, and samples of this process's first few.
    """
    totals, length = np.zeros(len(fields(SpeechQuality))), 0
    samples: list[Sample] = []
    for recording in recordings[processes.rank :: processes.world_size]:
        sample = _sample(generator, log_mel, recording, peak, processes)
        quality = SpeechQuality.between(sample.recording.numpy(), sample.synthesis.numpy(), log_mel.spec)
        totals += np.array(astuple(quality)) * len(sample.recording)
        length += len(sample.recording)
        if len(samples) < MAX_SAMPLES:
            samples.append(sample)
    *sums, counted = processes.sum(*totals, length)
    return SpeechQuality(*(total / counted for total in sums)), tuple(samples)


@torch.no_grad()
def _sample(generator: nn.Module, log_mel: LogMel, recording: Recording, peak: float, processes: ProcessGroup) -> Sample:
    spec = log_mel.spec
    audio, _, _ = read_recording(recording.path, spec.sample_rate)
    samples = len(audio) // spec.hop * spec.hop
    target = torch.from_numpy(audio[:samples] * recording.scale(peak))[None].to(processes.device)
    mel = log_mel.frames(target)
    synthesis = generator.forward(mel).squeeze(1).float()  # without torch.compile, which would recompile for every length
    mels = mel, log_mel.frames(synthesis)
    return Sample(recording.path.stem, *(value[0].cpu() for value in (target, synthesis, *mels)))
