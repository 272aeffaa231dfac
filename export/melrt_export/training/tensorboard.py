"""Log of a run for TensorBoard: loss curves, and audio and spectrograms of validation utterances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.mel.spec import MelSpec
from melrt.types import Mel
from melrt_export.training.validation import Validation


class TensorBoardLogger:
    """Training callback that writes event files into the run's folder for `tensorboard --logdir`."""

    def __init__(self, run: Path, spec: MelSpec, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        # A killed run may have logged steps after its last saved state. They are logged again now, so the old entries are hidden.
        self.writer = SummaryWriter(str(run), purge_step=first_step or None)
        self.spec = spec

    def on_step(self, step: int) -> None:
        """Do nothing; single steps are not logged."""

    def on_losses(self, step: int, values: Mapping[str, float]) -> None:
        """Log mean losses, learning rate and speed."""
        for name, value in values.items():
            self.writer.add_scalar(f"training/{name}", value, step)

    def on_validation(self, validation: Validation, best: bool) -> None:
        """Log the qualities, and audio and spectrogram of some utterances. The spectrogram shows the recording above the synthesis."""
        step, spec = validation.step, self.spec
        for weights, quality in validation.qualities.items():
            for name, value in quality.values().items():
                self.writer.add_scalar(f"validation/{weights}/{name}", value, step)
        for sample in validation.samples:
            both = np.concatenate([sample.recording_mel.numpy(), sample.synthesis_mel.numpy()])
            self.writer.add_image(f"{sample.name}/recording_above_synthesis", _spectrogram(both, spec), step, dataformats="HWC")
            self.writer.add_audio(f"{sample.name}/synthesis", sample.synthesis.numpy()[:, None], step, sample_rate=spec.sample_rate)
            if not step:
                self.writer.add_audio(f"{sample.name}/recording", sample.recording.numpy()[:, None], step, sample_rate=spec.sample_rate)
        self.writer.flush()

    def close(self) -> None:
        """Write all pending entries and close the file."""
        self.writer.close()


def _spectrogram(mels: Mel, spec: MelSpec) -> NDArray[np.uint8]:
    """Turn two stacked log-mels (2·M, T) into an RGB image (2·M, T, 3), with low bands at the bottom of each and silence dark."""
    from matplotlib import colormaps

    top = max(float(mels[: spec.n_mels].max()), spec.silence + 1e-3)
    scaled = np.clip((mels - spec.silence) / (top - spec.silence), 0, 1)
    upright = np.concatenate([scaled[: spec.n_mels][::-1], scaled[spec.n_mels :][::-1]])
    return np.asarray(colormaps["magma"](upright)[..., :3] * 255, np.uint8)
