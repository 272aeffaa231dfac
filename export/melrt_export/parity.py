"""Parity: the difference of an artifact's output from PyTorch's, and the limits for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import PROBE_AUDIO, PROBE_MEL, Artifact, Bundle
from melrt.errors import BundleError
from melrt.mel.spec import MelSpec
from melrt.planning.windows import ReceptiveField
from melrt.types import FloatAudio, Mel
from melrt_export.checkpoints import Checkpoint
from melrt_export.generator.config import GeneratorConfig
from melrt_export.int8_plan import check_int8

# A different order of summation changes a sample of a trained voice by about 2e-6. A graph that differs ten times as much is wrong.
FP32_MAX_ABS = 2e-5
# Trained voices have 50 to 62 dB in half precision on the probe. Below 45 dB, the noise becomes audible in pauses.
FP16_MIN_SNR_DB = 45.0
# bfloat16 has 8 significant bits where FP16 has 11, so its noise is 18 dB higher; the trained voices have 40 to 45 dB.
BF16_MIN_SNR_DB = 30.0
# Samples of the pieces whose median may stand for the whole, and how much lower the whole may then be. The demo voice has 40 dB on a
# recording in half precision and 57 in the median; a wrong tile, weight or bias is below 20 dB in nearly every piece.
PIECE, PLACES_DB = 2048, 20.0
# INT8 was chosen by its quality on speech. Here it must be as good as it was then. The kernels of two CPUs round alike, except for the
# order of the sums before a rounding. Without VNNI, products saturate, and that costs far more than this.
INT8_SLACK_DB = 1.0
# Limit for INT8 without an earlier measurement. The chosen layers of a trained voice had 13 dB on the probe, with 0.7 % more log-mel error
# on speech, because phases differ. A wrong scale or zero point gives less than this limit.
INT8_MIN_SNR_DB = 6.0
PROBE_FRAMES = 96


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference between an output and its reference."""

    max_abs: float
    """Largest absolute difference of a sample."""
    snr_db: float
    """Signal-to-noise ratio in dB: energy of the reference over energy of the difference; 999 if they are equal."""
    peak: float = 1.0
    """Largest absolute sample of the reference."""
    typical_snr_db: float = -999.0
    """Median of the signal-to-noise ratios of pieces of `PIECE` samples."""

    @classmethod
    def between(cls, reference: FloatAudio, output: FloatAudio) -> Difference:
        """Compare two outputs of the same shape."""
        if reference.shape != output.shape:
            raise ValueError(f"the reference has shape {reference.shape}, the output has shape {output.shape}")
        difference = output.astype(np.float64) - reference
        snr_db, typical = _snr_db(reference, difference), _typical_snr_db(reference, difference)
        return cls(float(np.abs(difference).max()), snr_db, float(np.abs(reference).max()), typical)

    def passes(self, precision: str) -> bool:
        """Return True if the difference is finite and within the limit of the precision."""
        return self.max_abs <= self._max_abs_limit if precision == "fp32" else self.reaches(_min_snr_db(precision))

    def reaches(self, snr_db: float) -> bool:
        """Return True if the signal-to-noise ratio is at least this, in dB, or is so in most pieces and at most 20 dB lower in all.

        In a voice that was trained on spectra alone, a few frames have a phase that the last bits of the mel decide. Any rounding can
        change it there, which no measure of the spectrum finds, and these frames are all of the noise.
        """
        return self.snr_db >= snr_db or (self.typical_snr_db >= snr_db and self.snr_db >= snr_db - PLACES_DB)

    @property
    def _max_abs_limit(self) -> float:
        """Limit of `max_abs`: rounding grows with the signal, and the sum of a filter bank may exceed full scale."""
        return FP32_MAX_ABS * max(self.peak, 1.0)

    def limit(self, precision: str) -> str:
        """Return the limit of the precision as text."""
        return f"largest difference <= {self._max_abs_limit:.2g}" if precision == "fp32" else f"SNR >= {_min_snr_db(precision):g} dB"

    def facts(self) -> dict[str, float]:
        """Return the values for the manifest, rounded so that they are the same in every run."""
        return {"max_abs": float(f"{self.max_abs:.1e}"), "snr_db": round(self.snr_db, 1)}


def _min_snr_db(precision: str) -> float:
    if precision.startswith("int8"):
        return INT8_MIN_SNR_DB
    return BF16_MIN_SNR_DB if precision == "bf16" else FP16_MIN_SNR_DB


def _snr_db(reference: FloatAudio, difference: NDArray[np.float64]) -> float:
    noise = float((difference**2).sum())
    if not noise:
        return 999.0
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / noise)) if np.isfinite(noise) else -999.0


def _typical_snr_db(reference: FloatAudio, difference: NDArray[np.float64]) -> float:
    """Return the median over pieces that are not 60 dB or more below the loudest one."""
    pieces = [np.resize(one, (-(-one.size // PIECE), PIECE)) for one in (reference.astype(np.float64).ravel(), difference.ravel())]
    signal, noise = ((one**2).sum(axis=1) for one in pieces)
    loud = signal > 1e-6 * signal.max()
    if not np.isfinite(noise).all() or not loud.any():
        return -999.0
    return float(np.median(10 * np.log10(signal[loud] / np.maximum(noise[loud], 1e-99 * signal[loud]))))


def probe_mel(spec: MelSpec, frames: int = PROBE_FRAMES, seed: int = 0) -> Mel:
    """Synthesize mel frames that resemble speech, in any convention: a falling spectrum, three moving formants, and pauses.

    A network's parity and half-precision noise depend on realistic levels. White noise would give levels that speech never has.

    Returns:
        Log-mel frames, shape (M, frames).
    """
    noise = np.random.default_rng(seed)
    band = np.linspace(0, 1, spec.n_mels)[:, None]
    time = np.arange(frames)[None] + 40 * seed
    level = -0.6 - 1.8 * band + 0.25 * noise.standard_normal((spec.n_mels, frames))  # log10 of magnitude
    for center, drift, period in ((0.12, 0.06, 31), (0.35, 0.12, 47), (0.6, 0.1, 23)):
        level += 0.9 * np.exp(-(((band - center - drift * np.sin(time / period * 2 * np.pi)) / 0.06) ** 2))
    voiced = np.sin(time / 37 * 2 * np.pi) > -0.7
    # Pauses of recordings have magnitudes of 1e-5 and slightly below, even if the floor is lower: no training contains frames of 1e-10.
    level = np.where(voiced, level, -5.2)
    return np.asarray(spec.logarithm(10.0 ** (level * spec.power)), np.float32)


def exact_samples(graph: str, audio: FloatAudio, field: ReceptiveField, hop: int) -> FloatAudio:
    """Return the samples (B, n) that a graph computes exactly: all for the edge graph, those inside its context for the interior graph."""
    left, right = (field.left, field.right) if graph == "interior" else (0, 0)
    return audio[:, left * hop : audio.shape[1] - right * hop]


def reference_files(mel: Mel, audio: FloatAudio) -> Iterator[tuple[Artifact, bytes]]:
    """Yield the probe mel and PyTorch's output as files of a bundle, so that a machine without PyTorch can verify it."""
    for name, values in ((PROBE_MEL, mel), (PROBE_AUDIO, audio)):
        stream = BytesIO()
        np.save(stream, values, allow_pickle=False)
        yield Artifact.of(name, stream.getvalue(), "reference"), stream.getvalue()


def runnable(model: bytes, precision: str) -> OnnxModel:
    """Load a graph in ONNX Runtime on the CPU. bfloat16, which ONNX Runtime does not compute there, is emulated in float32."""
    if precision != "bf16":
        return OnnxModel(model)
    import onnx

    from melrt_export.graph.bfloat16 import emulate_bfloat16

    return OnnxModel(emulate_bfloat16(onnx.load_from_string(model)).SerializeToString())


@dataclass(frozen=True, slots=True)
class VerifiedArtifact:
    """Result of `melrt verify` for one artifact."""

    file: str
    """File name within the bundle."""
    precision: str
    """Precision of the artifact."""
    difference: Difference | None
    """Difference from PyTorch; None if the file is intact but cannot run on this machine."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """Quality that the manifest states for it."""

    @property
    def passed(self) -> bool:
        """True if the artifact is within its limit, or cannot run on this machine."""
        if self.difference is None:
            return True
        least = int8_limit(self.precision, self.quality)
        return self.difference.passes(self.precision) if least is None else self.difference.snr_db >= least

    @property
    def limit(self) -> str:
        """The limit as text."""
        if self.difference is None:
            return "-"
        least = int8_limit(self.precision, self.quality)
        return self.difference.limit(self.precision) if least is None else f"SNR >= {least:.1f} dB"


def int8_limit(precision: str, quality: Mapping[str, float]) -> float | None:
    """Return the smallest allowed SNR of an INT8 graph on the probe: its SNR at calibration less a slack, in dB. None if not INT8."""
    return quality.get("snr_db", np.inf) - INT8_SLACK_DB if precision.startswith("int8") else None


def verify(bundle: Bundle, checkpoint: Checkpoint | None = None) -> Iterator[VerifiedArtifact]:
    """Check every file's hash, and compare every model with PyTorch on the bundle's probe.

    Args:
        bundle: The bundle to verify.
        checkpoint: Weights from which PyTorch computes the reference again; None for the reference in the bundle.

    Raises:
        BundleError: A file is missing or altered, or the checkpoint has another generator.
        CalibrationError: The bundle has INT8 of an older melrt.
    """
    manifest = bundle.manifest
    mel, reference = bundle.probe()
    if checkpoint is not None:
        from melrt_export.generator.reference import PyTorchReference

        _check_same_generator(bundle, checkpoint)
        reference = PyTorchReference(checkpoint.config, checkpoint.weights).audio(mel)
    for artifact in manifest.artifacts:
        data = bundle.read(artifact)
        if artifact.precision.startswith("int8"):
            check_int8(bundle)
        if artifact.kind == "onnx":
            output = runnable(data, artifact.precision).run(mel)
            kept = (exact_samples(artifact.graph, audio, manifest.receptive_field, manifest.spec.hop) for audio in (reference, output))
            yield VerifiedArtifact(artifact.file, artifact.precision, Difference.between(*kept), artifact.quality)
        elif artifact.kind == "engine":
            yield VerifiedArtifact(artifact.file, artifact.precision, None)


def _check_same_generator(bundle: Bundle, checkpoint: Checkpoint) -> None:
    given, exported = checkpoint.config.to_dict(), GeneratorConfig.from_dict(bundle.manifest.architecture).to_dict()
    different = [
        f"{name} is {given.get(name)} in the checkpoint and {exported.get(name)} in the bundle"
        for name in {**exported, **given}
        if given.get(name) != exported.get(name)
    ]
    if different:
        raise BundleError(f"{checkpoint.source} has another generator than {bundle.path}: {'; '.join(different)}.")
