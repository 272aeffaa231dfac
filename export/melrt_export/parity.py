"""Parity: how far an artifact's output is from PyTorch's, and how far it may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError
from melrt.mel.spec import MelSpec
from melrt.planning.windows import ReceptiveField
from melrt_export.checkpoints import Checkpoint
from melrt_export.generator.config import GeneratorConfig

Audio = NDArray[np.float32]

# Summing in another order moves a sample of a trained voice by about 2e-6; ten times that is a wrong graph.
FP32_MAX_ABS = 2e-5
# The half-precision voice of the trained sample has 55 dB; under 45 dB its noise begins to be heard in pauses.
FP16_MIN_SNR_DB = 45.0
# INT8 is chosen by what it does to speech; here it has to be as good as it was when it was chosen. Two CPUs' kernels round alike, but for
# the order of sums before a rounding; without VNNI products saturate, and that costs far more than this.
INT8_SLACK_DB = 1.0
# Of INT8 on any frames: the chosen layers of the trained sample leave 13 dB on the probe, at +0.7 % of log-mel error on speech (phases
# differ); a wrong scale or zero point leaves less than this.
INT8_MIN_SNR_DB = 6.0
PROBE_FRAMES = 96
REFERENCE_MEL = "reference.mel.npy"
REFERENCE_AUDIO = "reference.audio.npy"


@dataclass(frozen=True, slots=True)
class Difference:
    """Between an output and its reference."""

    max_abs: float
    """Largest absolute difference of a sample."""
    snr_db: float
    """Energy of the reference over energy of the difference, dB; 999 if they are equal."""
    peak: float = 1.0
    """Largest absolute sample of the reference."""

    @classmethod
    def between(cls, reference: Audio, output: Audio) -> Difference:
        """Compare two outputs of one shape."""
        if reference.shape != output.shape:
            raise ValueError(f"reference of shape {reference.shape}, output of shape {output.shape}")
        difference = output.astype(np.float64) - reference
        return cls(float(np.abs(difference).max()), _snr_db(reference, difference), float(np.abs(reference).max()))

    def passes(self, precision: str) -> bool:
        """Whether this is within the limit of the precision; a value that is not finite is not."""
        return self.max_abs <= self._largest if precision == "fp32" else self.snr_db >= _least_snr_db(precision)

    @property
    def _largest(self) -> float:
        """Rounding grows with the signal, and what a filter bank sums up may exceed full scale."""
        return FP32_MAX_ABS * max(self.peak, 1.0)

    def limit(self, precision: str) -> str:
        """The limit, in words."""
        return f"max abs <= {self._largest:.2g}" if precision == "fp32" else f"SNR >= {_least_snr_db(precision):g} dB"

    def facts(self) -> dict[str, float]:
        """For the manifest: rounded, so that it is the same on every run."""
        return {"max_abs": float(f"{self.max_abs:.1e}"), "snr_db": round(self.snr_db, 1)}


def _least_snr_db(precision: str) -> float:
    return INT8_MIN_SNR_DB if precision.startswith("int8") else FP16_MIN_SNR_DB


def _snr_db(reference: Audio, difference: NDArray[np.float64]) -> float:
    noise = float((difference**2).sum())
    if not noise:
        return 999.0
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / noise)) if np.isfinite(noise) else -999.0


def probe_mel(spec: MelSpec, frames: int = PROBE_FRAMES, seed: int = 0) -> NDArray[np.float32]:
    """Frames like speech, in any convention: a falling spectrum, three moving formants, pauses.

    A network's parity and half-precision noise depend on realistic levels; white noise drives it where speech never does.

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
    # A recording's pauses stand at 1e-5 and little below, however low the floor: frames of 1e-10 are nothing that a training saw.
    level = np.where(voiced, level, -5.2)
    return np.asarray(spec.logarithm(10.0 ** (level * spec.power)), np.float32)


def pytorch_audio(checkpoint: Checkpoint, mel: NDArray[np.float32], *, half: bool = False) -> Audio:
    """What PyTorch's generator makes of these frames.

    Args:
        checkpoint: Weights and shape.
        mel: (B, M, T).
        half: Compute every layer in half precision.

    Returns:
        (B, N) float32.
    """
    import torch

    from melrt_export.generator.network import Generator

    generator = Generator.from_weights(checkpoint.config, {k: torch.from_numpy(v) for k, v in checkpoint.weights.items()})
    frames = torch.from_numpy(mel)
    with torch.inference_mode(), _one_thread():
        audio = generator.half()(frames.half()) if half else generator(frames)
    return np.ascontiguousarray(audio[:, 0].float().numpy(), dtype=np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch's rounding depends on its number of threads; what goes into a bundle must not."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inside(graph: str, audio: Audio, field: ReceptiveField, hop: int) -> Audio:
    """The samples (B, n) that a graph must have right: all of the edge graph's, the interior's inside its context."""
    left, right = (field.left, field.right) if graph == "interior" else (0, 0)
    return audio[:, left * hop : audio.shape[1] - right * hop]


def reference_files(mel: NDArray[np.float32], audio: Audio) -> Iterator[tuple[Artifact, bytes]]:
    """The probe and PyTorch's output as files of a bundle, so that a machine without PyTorch can verify."""
    for name, values in ((REFERENCE_MEL, mel), (REFERENCE_AUDIO, audio)):
        stream = BytesIO()
        np.save(stream, values, allow_pickle=False)
        yield Artifact.of(name, stream.getvalue(), "reference"), stream.getvalue()


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact of `melrt verify`."""

    file: str
    precision: str
    difference: Difference | None
    """None if it is intact but cannot run on this machine."""

    measured: Mapping[str, float] = field(default_factory=dict)
    """Its quality in the manifest."""

    @property
    def passed(self) -> bool:
        if self.difference is None:
            return True
        least = int8_limit(self.precision, self.measured)
        return self.difference.passes(self.precision) if least is None else self.difference.snr_db >= least

    @property
    def limit(self) -> str:
        """In words."""
        least = int8_limit(self.precision, self.measured)
        return "-" if self.difference is None else self.difference.limit(self.precision) if least is None else f"SNR >= {least:.1f} dB"


def int8_limit(precision: str, measured: Mapping[str, float]) -> float | None:
    """The least SNR of an INT8 graph on the probe, dB: what was measured when it was chosen, less the slack; None for other precisions."""
    return measured.get("snr_db", np.inf) - INT8_SLACK_DB if precision.startswith("int8") else None


def verify(bundle: Bundle, checkpoint: Checkpoint | None = None) -> Iterator[Row]:
    """Check every file's hash, and run every model against PyTorch.

    Args:
        bundle: What to verify.
        checkpoint: Compute the reference anew from these weights, rather than take the one in the bundle.

    Raises:
        BundleError: A missing or altered file, or a checkpoint of another generator.
    """
    manifest = bundle.manifest
    mel, reference = reference_pair(bundle)
    if checkpoint is not None:
        if checkpoint.config != GeneratorConfig.from_dict(manifest.architecture):
            raise BundleError(f"{checkpoint.source} is another generator than the one in {bundle.path}: {checkpoint.config}.")
        reference = pytorch_audio(checkpoint, mel)
    for artifact in manifest.artifacts:
        data = bundle.read(artifact)
        if artifact.kind == "onnx":
            output = OnnxModel(data).run(mel)
            kept = (inside(artifact.graph, audio, manifest.receptive_field, manifest.spec.hop) for audio in (reference, output))
            yield Row(artifact.file, artifact.precision, Difference.between(*kept), artifact.quality)
        elif artifact.kind == "engine":
            yield Row(artifact.file, artifact.precision, None)


def reference_pair(bundle: Bundle) -> tuple[NDArray[np.float32], Audio]:
    """The bundle's probe mel (B, M, T), and what PyTorch made of it (B, N).

    Raises:
        BundleError: They are missing, altered, or not this voice's.
    """
    mel = _load(bundle, REFERENCE_MEL)
    reference = _load(bundle, REFERENCE_AUDIO)
    bands, hop = bundle.manifest.spec.n_mels, bundle.manifest.spec.hop
    if mel.ndim != 3 or mel.shape[1] != bands or reference.shape != (mel.shape[0], mel.shape[2] * hop) or not mel.size:
        raise BundleError(
            f"{bundle.path} holds a probe mel of shape {mel.shape} and audio of shape {reference.shape}; "
            f"this voice's are (B, {bands}, T) and (B, T * {hop}). Export it anew."
        )
    return mel, reference


def _load(bundle: Bundle, name: str) -> NDArray[np.float32]:
    entry = next((a for a in bundle.find("reference") if a.file == name), None)
    if entry is None:
        raise BundleError(f"{bundle.path} has no {name}; export it anew.")
    try:
        values: Any = np.load(BytesIO(bundle.read(entry)), allow_pickle=False)
        return np.asarray(values, np.float32)
    except (ValueError, EOFError, MemoryError, SyntaxError) as error:
        raise BundleError(f"{bundle.path / name} is no numpy array: {error}") from error
