"""The interface between an execution slot and the engines that it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from melrt.errors import BackendError

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes (B, M, T) that an engine takes."""

    smallest: tuple[int, ...]
    """Smallest batch, bands and frames."""
    largest: tuple[int, ...]
    """Largest batch, bands and frames."""

    @property
    def window(self) -> int | None:
        """Window length in frames if the engine takes only one; otherwise None."""
        return self.largest[2] if self.smallest[2] == self.largest[2] else None

    @property
    def spread(self) -> int:
        """Sum of the differences between the largest and the smallest size; 0 for a profile of one shape."""
        return sum(self.largest) - sum(self.smallest)

    def has(self, shape: tuple[int, ...]) -> bool:
        """Return whether a shape is within the profile."""
        return all(low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise BackendError for a shape outside the profile."""
        if not self.has(shape):
            raise BackendError(f"a mel of shape {shape} is outside this engine's profile, {self.smallest} to {self.largest}.")


def static_windows(profiles: Iterable[Profile]) -> dict[int, tuple[int, ...]]:
    """Return the batches of each window of an engine, both in rising order, by its length; none if a profile takes several lengths.

    A profile of one length for several batches gives the powers of two, and its smallest and largest batch.
    """
    windows: dict[int, set[int]] = {}
    for profile in profiles:
        if profile.window is None:
            return {}
        least, most = profile.smallest[0], profile.largest[0]
        powers = (1 << power for power in range(most.bit_length()))
        windows.setdefault(profile.window, set()).update((least, most), (batch for batch in powers if least < batch < most))
    return {frames: tuple(sorted(windows[frames])) for frames in sorted(windows)}


class Run(Protocol):
    """One shape of an engine, with all its addresses."""

    def enqueue(self) -> None:
        """Queue the run on the slot's stream.

        Raises:
            BackendError: The driver or TensorRT refuses.
        """
        ...

    def capturable(self) -> bool:
        """Return whether the run can be captured as a CUDA graph."""
        ...


class Engine(Protocol):
    """One graph of a voice on one device, as a slot sees it."""

    precision: str
    """Precision of its arithmetic."""
    profile: Profile
    """Shapes that it takes."""

    @property
    def windows(self) -> Mapping[int, tuple[int, ...]]:
        """Batches of each static window, both in rising order, by its length; empty for an engine that takes any length."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of a run, of which each slot has one block."""
        ...

    @property
    def lazy(self) -> bool:
        """True if the kernels of a new shape are compiled in the background."""
        ...

    def prepare(self, shape: Shape, samples: int, place: Place) -> Run:
        """Prepare runs of a shape (B, M, T) that give this many samples in all.

        Raises:
            BackendError: The engine does not take the shape.
        """
        ...

    def save_cache(self) -> None:
        """Store what was compiled for the next start."""
        ...


class Place(NamedTuple):
    """Memory and stream of a slot."""

    mel: int
    """Address of the input."""
    audio: int
    """Address of the output."""
    scratch: Any
    """Scratch memory, a buffer."""
    stream: Any
    """The stream."""
