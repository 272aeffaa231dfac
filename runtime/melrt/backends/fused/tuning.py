"""Tiles of a fused engine that were measured on a GPU: the record in the engine's entry, which `melrt info` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from melrt.bundle import Artifact
from melrt.checks import Rule, check_fields, flag, list_of, number, text, whole
from melrt.errors import BundleError

KEY = "tuning"
_TIME = number(0, 1e9)
_PAIR = Rule(lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_TIME.accepts, value)), "two times")
_COUNT = whole(0, 1 << 20)


@dataclass(frozen=True, slots=True)
class TunedKernel:
    """One kernel: its tile and its times."""

    tile: str
    """Tile that was the fastest."""
    us: tuple[tuple[float, float], ...]
    """Microseconds of all its launches in one run, for each mel: of the default tile, and of this one."""

    def __post_init__(self) -> None:
        check_fields(self, {"tile": text(), "us": list_of(_PAIR, 1, 16)}, "tuned kernel", BundleError)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Result of tuning an engine for one GPU."""

    compute_capability: str
    """Compute capability that the tiles are for."""
    gpu: str
    """Model name of the GPU that they were measured on."""
    driver: str
    """Version of its driver."""
    date: str
    """Day of the measurement, such as `2026-11-26`."""
    mels: tuple[str, ...]
    """Batch and frames of each mel, such as `16 x 256`."""
    timed: int
    """Number of candidates that were timed."""
    skipped: int
    """Number of candidates that do not compile, spill registers, or cannot be launched."""
    different: int
    """Number of candidates that were dropped because they give other bits than the default."""
    us: tuple[tuple[float, float], ...]
    """Microseconds of the network for each mel: with the default tiles, and with the fastest ones."""
    kernels: Mapping[str, TunedKernel]
    """Kernels by name."""
    kept: bool = True
    """True if the engine has the fastest tiles; false if it has the default ones, because the network was not faster."""

    def __post_init__(self) -> None:
        texts = dict.fromkeys(("compute_capability", "gpu", "driver", "date"), text())
        counts = dict.fromkeys(("timed", "skipped", "different"), _COUNT)
        lists = {"mels": list_of(text(), 1, 16), "us": list_of(_PAIR, 1, 16)}
        check_fields(self, {**texts, **counts, **lists, "kept": flag()}, "tuning", BundleError)

    @classmethod
    def of(cls, entry: Artifact) -> Tuning | None:
        """Return the record of an engine; None if it was not tuned.

        Raises:
            BundleError: The record is damaged.
        """
        values = entry.target.get(KEY)
        if values is None:
            return None
        try:
            kernels = {name: TunedKernel(**kernel) for name, kernel in values["kernels"].items()}
            return cls(**{**values, "kernels": kernels})
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{entry.file}: the record of its tuning is damaged ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the record as text: one line for the network, and one for each kernel."""
        tiles = "tiles" if self.kept else "default tiles kept, the network was not faster with the fastest tile of each kernel; tiles"
        yield (
            f"{tiles} for compute capability {self.compute_capability} measured on {self.gpu}, driver {self.driver}, {self.date}: "
            f"{self._times(self.us)}; {self.timed} candidates timed, {self.skipped} skipped, {self.different} dropped for other bits"
        )
        for name, kernel in self.kernels.items():
            yield f"  {name}: {kernel.tile}: {self._times(kernel.us)}"

    def _times(self, pairs: tuple[tuple[float, float], ...]) -> str:
        named = zip(self.mels, pairs, strict=False)
        return ", ".join(f"{mel} frames {before:,.1f} -> {after:,.1f} µs" for mel, (before, after) in named)
