"""Calibration data: real speech, checked, split into what is observed and what is held out, sampled over loud, quiet and silent windows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.bundle import Manifest
from melrt.errors import CalibrationError
from melrt.files.mels import read_mel
from melrt.mel.level_check import LevelCheck
from melrt.mel.spec import MelSpec
from melrt_calibration.metrics import silent_frames
from melrt_export.audio_features import mel_from_audio, read_audio

logger = logging.getLogger(__name__)
Frames = NDArray[np.float32]

AUDIO = (".wav", ".flac")
MELS = (".npy", ".npz", ".pt")
# Scales settle within a few tens of seconds of speech; a judgement of 1 % of the log-mel error needs some sentences too.
LEAST_SECONDS = 10.0
FEW_SECONDS = 60.0
# Utterances are cut into pieces of at most so many seconds, so that one long recording can be split too.
PIECE_SECONDS = 10.0
HELD_OUT = 0.2
# Frames of an observed window, and the shares of windows by loudness.
WINDOW = 64
SHARES = {"loud": 0.5, "quiet": 0.25, "silent": 0.25}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some seconds of one file."""

    name: str
    mel: Frames
    """(M, T)."""

    @property
    def digest(self) -> bytes:
        """Tells whether two pieces are the same."""
        return hashlib.sha256(self.mel.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class Data:
    """What calibration works on."""

    windows: tuple[Frames, ...]
    """Observed, (M, WINDOW) each or shorter."""
    held_out: tuple[Piece, ...]
    """Judged by; none of it is observed."""
    seconds: float
    """In all."""
    kinds: dict[str, int]
    """Number of windows by loudness."""
    digests: frozenset[bytes]
    """Of every piece, observed or held out."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How windows are taken."""

    windows: int = 96
    """Observed windows of 64 frames."""
    seed: int = 0
    """Of the split and of the windows' places: the same seed gives the same data."""
    peak: float | None = None
    """Scale each recording to this peak, as its training did; None leaves it as it is."""

    def __post_init__(self) -> None:
        if not 8 <= self.windows <= 10_000:
            raise CalibrationError(f"windows is {self.windows}; it lies between 8 and 10000.")
        if self.seed < 0:
            raise CalibrationError(f"seed is {self.seed}; it is 0 or above.")
        if self.peak is not None and not 0 < self.peak <= 1:
            raise CalibrationError(f"peak is {self.peak}; it lies above 0 and at most at 1, full scale.")


def load(paths: Sequence[Path], manifest: Manifest, sampling: Sampling, on_step: Callable[[], None] = lambda: None) -> Data:
    """Read, check, split and sample.

    Args:
        paths: Audio, mels, or folders of them.
        manifest: Of the voice: its convention and levels.
        sampling: How.
        on_step: Called after each file.

    Raises:
        CalibrationError: No file, too little speech, all silence, another convention, too low a rate.
        MelError: A mel that this voice cannot take.
        AudioError: A file that is no audio.
    """
    pieces = read(paths, manifest, sampling.peak, on_step)
    spec = manifest.spec
    seconds = sum(p.mel.shape[1] for p in pieces) * spec.hop / spec.sample_rate
    if seconds < LEAST_SECONDS or len(pieces) < 2:
        raise CalibrationError(f"{seconds:.1f} s of speech in {len(pieces)} piece(s); at least {LEAST_SECONDS:g} s in 2 are needed.")
    if seconds < FEW_SECONDS:
        logger.warning("only %.0f s of speech: scales will do, but a quality budget is judged on a fifth of it; give a minute", seconds)
    order = np.random.default_rng(sampling.seed).permutation(len(pieces))
    count = max(1, round(HELD_OUT * len(pieces)))
    held_out = tuple(pieces[i] for i in sorted(order[:count]))
    windows, kinds = _windows([pieces[i] for i in sorted(order[count:])], spec, sampling)
    return Data(windows, held_out, seconds, kinds, frozenset(piece.digest for piece in pieces))


def read(paths: Sequence[Path], manifest: Manifest, peak: float | None, on_step: Callable[[], None] = lambda: None) -> list[Piece]:
    """Every file's frames in pieces, each file checked; the same content twice counts once."""
    seen: dict[bytes, Path] = {}
    pieces: list[Piece] = []
    for path in files(paths):
        mel = _checked(path, manifest, peak)
        digest = hashlib.sha256(mel.tobytes()).digest()
        if digest in seen:
            logger.warning("%s is the same as %s; counted once", path, seen[digest])
        elif silent_frames(mel, manifest.spec).all():
            logger.warning("%s is all silence; left out", path)
        else:
            pieces.extend(_cut(path, mel, manifest))
        seen.setdefault(digest, path)
        on_step()
    if not pieces:
        raise CalibrationError("every file is silence: scales of silence would clip speech. Give recordings of the voice speaking.")
    return pieces


def files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in (*AUDIO, *MELS))
        if not inside:
            raise CalibrationError(f"{path} holds no audio or mel ({', '.join((*AUDIO, *MELS))}).")
        found.extend(inside)
    if not found:
        raise CalibrationError("no calibration data; give recordings (.wav, .flac) or mels (.npy) of the voice speaking.")
    return found


def _checked(path: Path, manifest: Manifest, peak: float | None) -> Frames:
    spec = manifest.spec
    recorded = path.suffix.lower() in AUDIO and path.is_file()
    mel = mel_from_audio(_recording(path, spec, peak), spec) if recorded else read_mel(path, spec)
    frames = spec.check(mel, manifest.receptive_field.smallest_input)
    if complaint := LevelCheck(spec, manifest.levels, manifest.normalization).judge(frames):
        raise CalibrationError(f"{path}: {complaint}")
    return frames


def _recording(path: Path, spec: MelSpec, peak: float | None) -> NDArray[np.float32]:
    import soundfile

    audio = read_audio(path, spec.sample_rate)  # complains of what is no audio
    rate = soundfile.info(path).samplerate
    if rate < spec.sample_rate:
        raise CalibrationError(
            f"{path} has {rate} Hz; this voice has {spec.sample_rate} Hz, and what lies above {rate / 2:g} Hz is missing."
        )
    if not np.isfinite(audio).all():
        raise CalibrationError(f"{path} holds samples that are not finite.")
    loudest = float(np.abs(audio).max())
    return audio * np.float32(peak / loudest) if peak and loudest else audio


def _cut(path: Path, mel: Frames, manifest: Manifest) -> list[Piece]:
    longest = int(PIECE_SECONDS * manifest.spec.sample_rate / manifest.spec.hop)
    count = -(-mel.shape[1] // longest)
    parts = np.array_split(mel, count, axis=1)
    if count == 1:
        return [Piece(path.stem, mel)]
    return [Piece(f"{path.stem} {i + 1}/{count}", np.ascontiguousarray(part)) for i, part in enumerate(parts)]


def _windows(pieces: Sequence[Piece], spec: MelSpec, sampling: Sampling) -> tuple[tuple[Frames, ...], dict[str, int]]:
    """Windows by loudness: silence is where the hiss of rounding is heard, and a random choice would hold little of it."""
    noise = np.random.default_rng(sampling.seed)
    all_windows = [
        np.ascontiguousarray(p.mel[:, at : at + WINDOW])
        for p in pieces
        for at in range(0, max(p.mel.shape[1] - WINDOW, 0) + 1, WINDOW // 4)
    ]
    silence = np.array([silent_frames(w, spec).mean() for w in all_windows])
    level = np.array([w.mean() for w in all_windows])
    silent = silence >= max(0.25, float(np.quantile(silence, 0.9)))
    loud = ~silent & (level >= np.median(level))
    groups = {"loud": np.flatnonzero(loud), "quiet": np.flatnonzero(~silent & ~loud), "silent": np.flatnonzero(silent)}
    chosen: list[int] = []
    kinds = {}
    for kind, group in groups.items():
        picked = noise.permutation(group)[: round(SHARES[kind] * sampling.windows)]
        kinds[kind] = len(picked)
        chosen.extend(int(i) for i in picked)
    return tuple(all_windows[i] for i in chosen), kinds
