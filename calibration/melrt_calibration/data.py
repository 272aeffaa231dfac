"""Calibration data: speech that is checked, divided into an observed and a held-out part, and sampled by loudness."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.bundle import Manifest
from melrt.checks import check_fields, number, optional, whole
from melrt.errors import CalibrationError
from melrt.files.audio import read_audio
from melrt.files.mels import read_mel
from melrt.mel.features import mel_from_audio
from melrt.mel.level_check import LevelCheck
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio, Mel
from melrt_calibration.metrics import silent_frames

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac")
MEL_SUFFIXES = (".npy", ".npz", ".pt")
# Scales settle within a few tens of seconds of speech. To measure 1 % of the log-mel error takes some sentences as well.
MIN_SECONDS = 10.0
RECOMMENDED_SECONDS = 60.0
# Utterances are cut into pieces of at most this length, so that one long recording can be divided as well.
PIECE_SECONDS = 10.0
HELD_OUT_SHARE = 0.2
# Frames of an observed window, and the share of windows for each loudness.
WINDOW_FRAMES = 64
WINDOW_SHARES = {"loud": 0.5, "quiet": 0.25, "silent": 0.25}


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of one file, at most 10 s."""

    name: str
    mel: Mel
    """Log-mel frames, (M, T)."""
    recording: str
    """Path of the file."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the frames; equal for pieces with the same content."""
        return hashlib.sha256(self.mel.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Speech for one calibration."""

    windows: tuple[Mel, ...]
    """Observed windows, (M, 64) each or shorter."""
    held_out: tuple[Piece, ...]
    """Pieces for measuring quality. Nothing of their recordings is observed."""
    seconds: float
    """Duration of all pieces in seconds."""
    kinds: dict[str, int]
    """Number of windows by loudness."""
    digests: frozenset[bytes]
    """Digests of all pieces, observed and held out."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the calibration data."""

    windows: int = 96
    """Number of observed windows of 64 frames, from 8 to 10000."""
    seed: int = 0
    """Seed of the division and of the windows' positions; the same seed gives the same data."""
    peak: float | None = None
    """Peak to which each recording is scaled, as in the voice's training; 1 is full scale, None leaves recordings unchanged."""

    def __post_init__(self) -> None:
        check_fields(self, {"windows": whole(8, 10_000), "seed": whole(0, 2**63 - 1)}, "calibration data")
        rule = optional(number(0, 1, above=True))
        check_fields(self, {"peak": rule}, "calibration data, where a peak of 1 is full scale")


def load_data(paths: Sequence[Path], manifest: Manifest, sampling: Sampling) -> CalibrationData:
    """Read speech, check it, hold a fifth of it out, and sample windows from the remaining pieces.

    Args:
        paths: Recordings, mels, or folders of them.
        manifest: Manifest of the voice, with its mel convention and levels.
        sampling: Settings of the windows.

    Raises:
        CalibrationError: The paths hold no file or too little speech, all of it is silent, or it has another convention or too low a rate.
        MelError: The voice cannot take a mel.
        AudioError: A file cannot be read as audio.
    """
    pieces = read_pieces(paths, manifest, sampling.peak)
    spec = manifest.spec
    seconds = sum(piece.mel.shape[1] for piece in pieces) * spec.hop / spec.sample_rate
    if seconds < MIN_SECONDS or len(pieces) < 2:
        raise CalibrationError(
            f"The speech has {seconds:.1f} s in {len(pieces)} piece(s); at least {MIN_SECONDS:g} s in 2 are needed. Give more recordings."
        )
    if seconds < RECOMMENDED_SECONDS:
        logger.warning(
            "The speech has only %.0f s. That is enough for the scales, but quality is measured on a fifth of it; give at least a minute.",
            seconds,
        )
    held_out, observed = _divide(pieces, sampling.seed)
    windows, kinds = _sample_windows(observed, spec, sampling)
    return CalibrationData(windows, held_out, seconds, kinds, frozenset(piece.digest for piece in pieces))


def _divide(pieces: Sequence[Piece], seed: int) -> tuple[tuple[Piece, ...], list[Piece]]:
    """Return the held-out fifth and the other pieces. No recording is in both parts, unless there is only one recording."""
    whole = {piece.recording for piece in pieces}
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.recording if len(whole) > 1 else piece.name, []).append(piece)
    order = np.random.default_rng(seed).permutation(list(groups))
    count = max(1, round(HELD_OUT_SHARE * len(groups)))
    held_out = {id(piece) for name in order[:count] for piece in groups[str(name)]}
    return tuple(p for p in pieces if id(p) in held_out), [p for p in pieces if id(p) not in held_out]


def read_pieces(paths: Sequence[Path], manifest: Manifest, peak: float | None) -> list[Piece]:
    """Read and check every file and cut it into pieces; a file with the same content as an earlier one is skipped."""
    first_path: dict[bytes, Path] = {}
    pieces: list[Piece] = []
    for path in list_files(paths):
        mel = _checked_mel(path, manifest, peak)
        digest = hashlib.sha256(mel.tobytes()).digest()
        if digest in first_path:
            logger.warning("%s has the same content as %s and is skipped.", path, first_path[digest])
        elif silent_frames(mel, manifest.spec).all():
            logger.warning("%s is silent throughout and is skipped.", path)
        else:
            pieces.extend(_cut(path, mel, manifest))
        first_path.setdefault(digest, path)
    if not pieces:
        raise CalibrationError(
            "Every file is silent throughout. Scales that are chosen on silence would clip speech; give recordings of the voice's speech."
        )
    return pieces


def list_files(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the audio and mel files of the given folders.

    Raises:
        CalibrationError: There is none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (*AUDIO_SUFFIXES, *MEL_SUFFIXES))
        if not files:
            raise CalibrationError(f"{path} holds no audio or mel file ({', '.join((*AUDIO_SUFFIXES, *MEL_SUFFIXES))}).")
        found.extend(files)
    if not found:
        raise CalibrationError("There is no calibration data; give recordings (.wav, .flac) or mels (.npy) of the voice's speech.")
    return found


def _checked_mel(path: Path, manifest: Manifest, peak: float | None) -> Mel:
    spec = manifest.spec
    is_audio = path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()
    mel = mel_from_audio(_recording(path, spec, peak), spec) if is_audio else read_mel(path, spec)
    frames = spec.check(mel, manifest.receptive_field.smallest_input)
    if warning := LevelCheck(spec, manifest.levels, manifest.normalization).warning(frames):
        raise CalibrationError(f"{path}: {warning}")
    return frames


def _recording(path: Path, spec: MelSpec, peak: float | None) -> FloatAudio:
    import soundfile

    audio = read_audio(path, spec.sample_rate)  # raises AudioError if the file is not audio
    rate = soundfile.info(path).samplerate
    if rate < spec.sample_rate:
        raise CalibrationError(
            f"{path} has {rate} Hz; this voice has {spec.sample_rate} Hz, and everything above {rate / 2:g} Hz is missing. "
            "Give recordings with at least the voice's sample rate."
        )
    if not np.isfinite(audio).all():
        raise CalibrationError(f"{path} holds samples that are not finite; give another recording.")
    loudest = float(np.abs(audio).max())
    return audio * np.float32(peak / loudest) if peak and loudest else audio


def _cut(path: Path, mel: Mel, manifest: Manifest) -> list[Piece]:
    longest = int(PIECE_SECONDS * manifest.spec.sample_rate / manifest.spec.hop)
    count = -(-mel.shape[1] // longest)
    parts = np.array_split(mel, count, axis=1)
    if count == 1:
        return [Piece(path.stem, mel, str(path))]
    return [Piece(f"{path.stem} {i + 1}/{count}", np.ascontiguousarray(part), str(path)) for i, part in enumerate(parts)]


def _sample_windows(pieces: Sequence[Piece], spec: MelSpec, sampling: Sampling) -> tuple[tuple[Mel, ...], dict[str, int]]:
    """Sample windows by loudness: rounding noise is audible in silence, of which a uniform sample would hold little."""
    noise = np.random.default_rng(sampling.seed)
    windows = [
        np.ascontiguousarray(piece.mel[:, at : at + WINDOW_FRAMES])
        for piece in pieces
        for at in range(0, max(piece.mel.shape[1] - WINDOW_FRAMES, 0) + 1, WINDOW_FRAMES // 4)
    ]
    silence = np.array([silent_frames(window, spec).mean() for window in windows])
    level = np.array([window.mean() for window in windows])
    silent = silence >= max(0.25, float(np.quantile(silence, 0.9)))
    loud = ~silent & (level >= np.median(level))
    groups = {"loud": np.flatnonzero(loud), "quiet": np.flatnonzero(~silent & ~loud), "silent": np.flatnonzero(silent)}
    chosen: list[int] = []
    kinds = {}
    for kind, group in groups.items():
        picked = noise.permutation(group)[: round(WINDOW_SHARES[kind] * sampling.windows)]
        kinds[kind] = len(picked)
        chosen.extend(int(i) for i in picked)
    return tuple(windows[i] for i in chosen), kinds
