"""The mel convention: the exact form of a voice's input frames, and the check of given frames against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melrt.checks import Rule, all_finite, check_fields, number, one_of, optional, whole
from melrt.errors import ConfigError, MelError
from melrt.mel.arrays import on_gpu
from melrt.mel.normalization import Normalization
from melrt.types import Mel

Log = Literal["log10", "ln", "log2", "dB", "linear"]
Framing = Literal["same", "center"]
_REMEDY = "Compute it with `melrt mel VOICE.melrt in.wav -o mel.npy`, or check the acoustic model's settings."
# Value of each logarithm for a magnitude of e.
_UNITS = {"ln": 1.0, "log10": 1 / np.log(10), "log2": 1 / np.log(2), "dB": 20 / np.log(10)}
_SIZE = whole(1, 10_000_000)
_POSITIVE = number(0, 1e7, above=True)
_REAL = {
    "f_min": number(0), "f_max": _POSITIVE, "power": _POSITIVE, "epsilon": number(0, 1, below=True), "gain": _POSITIVE, "floor": _POSITIVE,
    "preemphasis": number(0, 1, below=True),
}  # fmt: skip
_RULES = {
    **dict.fromkeys(("sample_rate", "n_fft", "hop", "win_length", "n_mels"), _SIZE), **_REAL,
    "window": one_of("hann"), "scale": one_of("slaney", "htk"), "norm": optional(one_of("slaney")), "log": one_of(*get_args(Log)),
    "framing": one_of(*get_args(Framing)), "padding": one_of("reflect", "constant"),
    "normalization": optional(Rule(lambda value: isinstance(value, Normalization), "a Normalization")),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MelSpec:
    """Definition of log-mel frames; the defaults are those of melgan-neurips (`mel2wav/modules.py`, Audio2Mel)."""

    sample_rate: int = 22050
    """Sample rate in Hz."""
    n_fft: int = 1024
    """Length of the Fourier transform in samples."""
    hop: int = 256
    """Samples between frames, and samples of audio per frame."""
    win_length: int = 1024
    """Length of the window in samples, at most n_fft."""
    window: Literal["hann"] = "hann"
    """Window function, periodic."""
    n_mels: int = 80
    """Number of mel bands M."""
    f_min: float = 0.0
    """Lower edge of the lowest band in Hz."""
    f_max: float = 11025.0
    """Upper edge of the highest band in Hz."""
    scale: Literal["slaney", "htk"] = "slaney"
    """Formula that converts Hz to mel."""
    norm: Literal["slaney"] | None = "slaney"
    """Area normalization of the triangular filters; None for a height of 1."""
    power: float = 1.0
    """Power of the magnitude spectrum before the filters: 1 for magnitude, 2 for energy."""
    epsilon: float = 0.0
    """Constant added to the squared magnitude before its root is taken."""
    log: Log = "log10"
    """Logarithm; dB is 20·log10, linear is no logarithm."""
    gain: float = 1.0
    """Factor of the logarithm."""
    floor: float = 1e-5
    """Smallest magnitude before the logarithm: silence is the logarithm of it."""
    framing: Framing = "same"
    """`same`: padding of (n_fft - hop)/2, so T = N/hop; `center`: n_fft/2, so T = N/hop + 1."""
    padding: Literal["reflect", "constant"] = "reflect"
    """Extension of the signal at both ends: mirrored, or with zeros."""
    preemphasis: float = 0.0
    """Coefficient c of y[n] = x[n] - c·x[n - 1] before the transform; 0 for none."""
    normalization: Normalization | None = None
    """Normalization of the log-mel, the last step; None for a plain log-mel, which every exported voice takes."""

    def __post_init__(self) -> None:
        check_fields(self, _RULES, "mel convention")
        for name in _REAL:
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.win_length > self.n_fft:
            raise ConfigError(f"mel convention: win_length is {self.win_length}; it must be at most n_fft, {self.n_fft}.")
        if self.normalization is not None and len(self.normalization.mean) != self.n_mels:
            raise ConfigError(f"mel convention: normalization has {len(self.normalization.mean)} bands; n_mels is {self.n_mels}.")
        if not self.f_min < self.f_max <= self.sample_rate / 2:
            raise ConfigError(
                f"mel convention: bands from {self.f_min:g} to {self.f_max:g} Hz; f_max must be above f_min, and at most half the sample "
                f"rate, {self.sample_rate / 2:g} Hz."
            )

    @property
    def silence(self) -> float:
        """Value of a silent frame before normalization."""
        return float(self.logarithm(np.array(self.floor)))

    @property
    def unit(self) -> float:
        """Value in this convention of one step of the natural logarithm; 0 without a logarithm."""
        return float(self.gain * _UNITS.get(self.log, 0.0))

    def logarithm(self, bands: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the convention's logarithm of these magnitudes, which are raised to the floor first."""
        bands = np.maximum(bands, self.floor)
        if self.log != "linear":
            bands = {"ln": np.log, "log2": np.log2}.get(self.log, np.log10)(bands) * (20 if self.log == "dB" else 1)
        return np.asarray(bands * self.gain)

    def describe(self) -> str:
        """Return one line for reports and error messages."""
        return f"{self.n_mels} bands, {self._describe_bands()}"

    def _describe_bands(self) -> str:
        gain = "" if self.gain == 1 else f"{self.gain:g} x "
        normalized = ", normalized" if self.normalization else ""
        return f"{self.f_min:g}-{self.f_max:g} Hz, {gain}{self.log}, {self.sample_rate} Hz, hop {self.hop}{normalized}"

    def check(self, mel: ArrayLike, smallest: int = 1) -> Mel:
        """Check one or more utterances, and convert them to float32.

        Args:
            mel: Shape (M, T) or (B, M, T), any real dtype.
            smallest: Fewest frames that the network takes.

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
        """Return the error for a wrong number of bands."""
        remedy = "It looks transposed: pass mel.T." if shape[-1] == self.n_mels else _REMEDY
        return MelError(f"mel has {shape[-2]} bands; this voice takes {self.n_mels} ({self._describe_bands()}). {remedy}")

    def too_short(self, frames: int, smallest: int) -> MelError:
        """Return the error for too few frames."""
        return MelError(
            f"mel has {frames} frames; this network needs at least {smallest}. Extend it with frames of silence ({self.silence:g})."
        )

    def wrong_axes(self, shape: tuple[int, ...], axes: tuple[int, ...] = (2,)) -> MelError:
        """Return the error for a wrong number of axes."""
        forms = {2: "(bands, frames)", 3: "(batch, bands, frames)"}
        remedy = "Pass the utterances of a batch one at a time." if len(shape) == 3 else _REMEDY
        return MelError(f"mel has shape {shape}; expected {' or '.join(forms[n] for n in axes)}. {remedy}")

    def check_frames(self, mel: ArrayLike, axes: tuple[int, ...] = (2,)) -> Mel:
        """Check a piece of an utterance like `check`, but allow any number of frames, including none."""
        if on_gpu(mel):
            raise MelError(
                "mel is on a GPU, and this call reads arrays in host memory. Copy it to the host, or pass it to `vocoder(mel)` of a voice "
                "with a TensorRT engine."
            )
        try:
            frames = np.asarray(mel)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; PyTorch refuses tensors that require gradients
            raise MelError(f"mel cannot be read as an array: {error} Pass an array of float32, or mel.detach() of a tensor.") from error
        if np.ma.is_masked(mel):
            raise MelError("mel is a masked array with masked values, which numpy would turn into numbers. Fill them: mel.filled(value).")
        if frames.dtype.kind not in "fiu":
            raise MelError(f"mel has dtype {frames.dtype}; it must hold real numbers, preferably float32.")
        if frames.ndim not in axes:
            raise self.wrong_axes(frames.shape, axes)
        if frames.shape[-2] != self.n_mels:
            raise self.wrong_bands(frames.shape)
        with np.errstate(over="ignore"):  # values that overflow float32 are reported below
            frames = np.ascontiguousarray(frames, dtype=np.float32)
        if not all_finite(frames):
            position = tuple(int(i) for i in np.argwhere(~np.isfinite(frames))[0])
            raise MelError(f"mel holds {frames[position]} at {position}; every value must be finite (silence is {self.silence:g}).")
        return frames

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"normalization": self.normalization.to_dict() if self.normalization else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MelSpec:
        """Read the values that `to_dict` returns.

        Raises:
            ConfigError: A missing or unknown field, or a value outside what is allowed.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
            raise ConfigError(f"mel convention: missing fields {missing}, unknown fields {unknown}.")
        given = values["normalization"]
        return cls(**{**values, "normalization": None if given is None else Normalization.from_dict(given)})
