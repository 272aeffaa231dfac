"""The run's log for TensorBoard: losses as curves, validation utterances to hear and to see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.mel.spec import MelSpec
from melrt_export.training.validation import Validation


class TensorBoardLogger:
    """Writes event files into the run's folder; `tensorboard --logdir` shows them."""

    def __init__(self, run: Path, spec: MelSpec, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        # What a killed run wrote after its last checkpoint is about to be written again: hidden from here on.
        self.writer = SummaryWriter(str(run), purge_step=first_step or None)
        self.spec = spec

    def on_step(self, step: int) -> None:
        """Nothing to log."""

    def on_losses(self, step: int, values: Mapping[str, float]) -> None:
        """Means since the last call, learning rate, speed."""
        for name, value in values.items():
            self.writer.add_scalar(f"training/{name}", value, step)

    def on_validation(self, validation: Validation, best: bool) -> None:
        """The error; sound and spectrogram of some utterances, recording above synthesis."""
        step, spec = validation.step, self.spec
        self.writer.add_scalar("validation/log_mel_error", validation.error, step)
        for sample in validation.samples:
            both = np.concatenate([sample.recording_mel.numpy(), sample.synthesis_mel.numpy()])
            self.writer.add_image(f"{sample.name}/recording_above_synthesis", _picture(both, spec), step, dataformats="HWC")
            self.writer.add_audio(f"{sample.name}/synthesis", sample.synthesis.numpy()[:, None], step, sample_rate=spec.sample_rate)
            if not step:
                self.writer.add_audio(f"{sample.name}/recording", sample.recording.numpy()[:, None], step, sample_rate=spec.sample_rate)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def _picture(mels: NDArray[np.float32], spec: MelSpec) -> NDArray[np.uint8]:
    """Two log-mels (2·M, T), one after the other, as colors (2·M, T, 3): low bands at the bottom of each, silence dark."""
    from matplotlib import colormaps

    top = max(float(mels[: spec.n_mels].max()), spec.silence + 1e-3)
    scaled = np.clip((mels - spec.silence) / (top - spec.silence), 0, 1)
    upright = np.concatenate([scaled[: spec.n_mels][::-1], scaled[spec.n_mels :][::-1]])
    return np.asarray(colormaps["magma"](upright)[..., :3] * 255, np.uint8)
