"""Progress of a calibration: numbered steps, some of which count their measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Progress:
    """Position of a run."""

    step: int
    """Number of the step, from 1."""
    steps: int
    """Number of steps in the run."""
    text: str
    """Name of the step."""
    done: int = 0
    """Finished measurements of the step."""
    total: int = 0
    """Measurements of the step; 0 if it does not count them."""


OnProgress = Callable[[Progress], None]


class ProgressReporter:
    """Numbers the steps of a run and reports each of them."""

    def __init__(self, count: int, on_progress: OnProgress) -> None:
        self._progress = Progress(0, count, "")
        self._on_progress = on_progress

    def begin(self, text: str, total: int = 0) -> None:
        """Report that the next step begins, with the number of its measurements if that is known."""
        self._report(Progress(self._progress.step + 1, self._progress.steps, text, 0, total))

    def advance(self, count: int = 1) -> None:
        """Report that one more measurement of the step is finished, or several."""
        if count:
            self._report(replace(self._progress, done=self._progress.done + count))

    def _report(self, progress: Progress) -> None:
        self._progress = progress
        self._on_progress(progress)
