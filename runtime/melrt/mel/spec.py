"""The mel convention: what exactly a voice's input frames are, and whether given frames can be that."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melrt.errors import BundleError, MelError
from melrt.mel.arrays import on_gpu
from melrt.mel.normalization import Normalization

Log = Literal["log10", "ln", "log2", "dB", "linear"]
# Each logarithm's value for a magnitude of e.
_UNITS = {"ln": 1.0, "log10": 1 / np.log(10), "log2": 1 / np.log(2), "dB": 20 / np.log(10)}
Framing = Literal["same", "center"]


@dataclass(frozen=True, slots=True)
class MelSpec:
    """How log-mel frames are made from audio; the defaults are those of melgan-neurips (`mel2wav/modules.py`, Audio2Mel)."""

    sample_rate: int = 22050
    """Hz."""
    n_fft: int = 1024
    """Length of the Fourier transform, samples."""
    hop: int = 256
    """Samples between frames, and samples of audio per frame."""
    win_length: int = 1024
    """Length of the window, samples, at most n_fft."""
    window: Literal["hann"] = "hann"
    """Window, periodic."""
    n_mels: int = 80
    """Mel bands M."""
    f_min: float = 0.0
    """Lower edge of the lowest band, Hz."""
    f_max: float = 11025.0
    """Upper edge of the highest band, Hz."""
    scale: Literal["slaney", "htk"] = "slaney"
    """Formula from Hz to mel."""
    norm: Literal["slaney"] | None = "slaney"
    """Area normalization of the triangular filters."""
    power: float = 1.0
    """Power of the magnitude spectrum before the filters: 1 magnitude, 2 energy."""
    epsilon: float = 0.0
    """Added to the squared magnitude before its root is taken."""
    log: Log = "log10"
    """Logarithm; dB is 20·log10, linear is none."""
    gain: float = 1.0
    """Multiplies the logarithm."""
    floor: float = 1e-5
    """Smallest value before the logarithm: silence is its logarithm."""
    framing: Framing = "same"
    """`same`: padding of (n_fft - hop)/2, so T = N/hop; `center`: n_fft/2, so T = N/hop + 1."""
    padding: Literal["reflect", "constant"] = "reflect"
    """How the signal is extended at both ends: mirrored, or with zeros."""
    preemphasis: float = 0.0
    """Coefficient c of y[n] = x[n] - c·x[n - 1] before the transform; 0: none."""
    normalization: Normalization | None = None
    """Applied to the log-mel last; None for a plain log-mel, which is what every exported voice takes."""

    def __post_init__(self) -> None:
        types_of = typing.get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not _fits(value, types_of[field.name]):
                raise BundleError(f"mel convention: {field.name} is {value!r:.60}; it is {_words(types_of[field.name])}.")
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("sample_rate", "n_fft", "hop", "win_length", "n_mels", "power", "floor", "gain"):
            if not 0 < getattr(self, name) < 1e7:
                raise BundleError(f"mel convention: {name} is {getattr(self, name)}; it lies above 0 and below 10 million.")
        if self.win_length > self.n_fft:
            raise BundleError(f"mel convention: win_length {self.win_length} is longer than n_fft {self.n_fft}.")
        if not 0 <= self.epsilon < 1:
            raise BundleError(f"mel convention: epsilon is {self.epsilon}; it lies in [0, 1).")
        if not 0 <= self.preemphasis < 1:
            raise BundleError(f"mel convention: preemphasis is {self.preemphasis}; it lies in [0, 1).")
        if self.normalization is not None and len(self.normalization.mean) != self.n_mels:
            raise BundleError(f"mel convention: normalization of {len(self.normalization.mean)} bands for a mel of {self.n_mels}.")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise BundleError(
                f"mel convention: bands from {self.f_min} to {self.f_max} Hz do not lie within 0 to {self.sample_rate / 2} Hz."
            )

    @property
    def silence(self) -> float:
        """The value of a silent frame, before a normalization."""
        return float(self.logarithm(np.array(self.floor)))

    @property
    def unit(self) -> float:
        """What one step of the natural logarithm is in this convention; 0 if it has no logarithm."""
        return float(self.gain * _UNITS.get(self.log, 0.0))

    def logarithm(self, bands: NDArray[np.floating]) -> NDArray[np.floating]:
        """The convention's logarithm of these magnitudes, none below the floor."""
        bands = np.maximum(bands, self.floor)
        if self.log != "linear":
            bands = {"ln": np.log, "log2": np.log2}.get(self.log, np.log10)(bands) * (20 if self.log == "dB" else 1)
        return np.asarray(bands * self.gain)

    def convert(self, mel: ArrayLike, source: MelSpec) -> NDArray[np.float32]:
        """Frames of another convention in this one: another logarithm, floor, gain or normalization, exactly.

        `vocoder.spec.convert(mel, replace(vocoder.spec, log="ln"))` mends natural logarithms given to a log10 voice.

        Args:
            mel: Frames in the convention `source`, shape (M, T) or (B, M, T).
            source: What they are.

        Returns:
            The same frames in this convention, float32.

        Raises:
            MelError: The two differ in more than a map of single values can mend, or values were cut off that this convention tells apart.
        """
        from melrt.mel.convert import convert

        return convert(self, source.check_frames(mel, axes=(2, 3)), source)

    def describe(self) -> str:
        """One line for people and error messages."""
        gain = "" if self.gain == 1 else f"{self.gain:g} x "
        normalized = ", normalized" if self.normalization else ""
        return f"{self.n_mels} bands, {self.f_min:g}-{self.f_max:g} Hz, {gain}{self.log}, {self.sample_rate} Hz, hop {self.hop}{normalized}"

    def check(self, mel: ArrayLike, smallest: int = 1) -> NDArray[np.float32]:
        """Validate frames once, at the door.

        Args:
            mel: Shape (M, T) or (B, M, T), any real dtype.
            smallest: The fewest frames that the network takes.

        Returns:
            The frames as C-contiguous float32 of the same shape; the caller's array if it is that already.

        Raises:
            MelError: Wrong number of axes or bands, too few frames, or a value that is not finite.
        """
        frames = self.check_frames(mel, axes=(2, 3))
        self.check_shape(frames.shape, smallest)
        return frames

    def check_shape(self, shape: tuple[int, ...], smallest: int = 1) -> None:
        """Raise MelError if a mel of this shape has another number of bands, or too few frames."""
        if 0 in shape:
            raise MelError(f"mel is empty, shape {shape}; give at least {smallest} frame{'s' * (smallest > 1)}.")
        if shape[-2] != self.n_mels:
            raise self.wrong_bands(shape)
        if shape[-1] < smallest:
            raise self.too_short(shape[-1], smallest)

    def wrong_bands(self, shape: tuple[int, ...]) -> MelError:
        """The error for a wrong number of bands."""
        turned = " It looks transposed: pass mel.T." if shape[-1] == self.n_mels else ""
        return MelError(f"mel has {shape[-2]} bands; this voice takes {self.n_mels} ({self.describe()}).{turned}")

    def too_short(self, frames: int, smallest: int) -> MelError:
        """The error for too few frames."""
        return MelError(
            f"mel has {frames} frames; this network needs at least {smallest}. Extend it with frames of silence ({self.silence:g})."
        )

    def wrong_axes(self, shape: tuple[int, ...], axes: tuple[int, ...] = (2,)) -> MelError:
        """The error for a wrong number of axes."""
        forms = {2: "(bands, frames)", 3: "(batch, bands, frames)"}
        return MelError(f"mel has shape {shape}; expected {' or '.join(forms[n] for n in axes)}.")

    def check_frames(self, mel: ArrayLike, axes: tuple[int, ...] = (2,)) -> NDArray[np.float32]:
        """As `check`, for a piece of an utterance: any number of frames, none too."""
        if on_gpu(mel):
            raise MelError("mel is on a GPU and is taken from the host here; only a call, `vocoder(mel)`, of an engine takes it there.")
        frames = np.asarray(mel)
        if frames.dtype.kind not in "fiu":
            raise MelError(f"mel has dtype {frames.dtype}; it holds real numbers, best float32.")
        if frames.ndim not in axes:
            raise self.wrong_axes(frames.shape, axes)
        if frames.shape[-2] != self.n_mels:
            raise self.wrong_bands(frames.shape)
        with np.errstate(over="ignore"):  # what overflows float32 is reported below
            frames = np.ascontiguousarray(frames, dtype=np.float32)
        finite = np.isfinite(frames)
        if not finite.all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise MelError(f"mel holds {frames[where]} at {where}; every value must be finite (silence is {self.silence:g}).")
        return frames

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"normalization": self.normalization.to_dict() if self.normalization else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MelSpec:
        """Read `to_dict`'s form.

        Raises:
            BundleError: A missing or unknown field, or a value out of its range.
        """
        known = {field.name for field in fields(cls)}
        if not known - _LATER <= set(values) <= known:
            missing = sorted(known - _LATER - set(values))
            raise BundleError(f"mel convention: missing fields {missing}, unknown fields {sorted(set(values) - known)}.")
        numbers: dict[str, Any] = {key: _real(v) if key in _REAL else v for key, v in values.items()}
        if numbers.get("normalization") is not None:
            numbers["normalization"] = Normalization.from_dict(numbers["normalization"])
        return cls(**numbers)


def _real(value: Any) -> Any:
    """A whole number as a float; one of hundreds of digits, which no float holds, stays and is refused by its type."""
    return float(value) if type(value) is int and abs(value) < 1e15 else value


_REAL = {"f_min", "f_max", "power", "floor", "gain", "preemphasis", "epsilon"}
# Fields that bundles of the first versions do not have.
_LATER = {"gain", "padding", "preemphasis", "normalization", "epsilon"}


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in get_args(kind))
    return type(value) is kind


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_words(option) for option in get_args(kind))
    return {int: "a whole number", float: "a number", type(None): "null"}.get(kind, str(kind))
