"""Progress of a command on stderr."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Numbered steps of a command: a bar on a terminal, and one plain line for each step elsewhere. A call begins the next step."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0
        self._title = ""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, text: str) -> None:
        """Begin the next step."""
        self._number += 1
        self.detail(text)

    def detail(self, text: str) -> None:
        """Change the text of the current step."""
        self._title = f"step {self._number} of {self._total}: {text}"
        self._bar.update(self._task, description=self._title)
        if not self._console.is_terminal:
            self._console.print(self._title, markup=False)

    def on_phase(self, phase: str, done: int = 0, total: int | None = None) -> None:
        """Show the progress of a phase within the step, on a terminal only."""
        self._bar.update(self._task, description=f"{self._title}: {phase}", completed=done, total=total)
