"""Progress of a measurement on stderr: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Number of the current step and its text. Calling it begins the next step."""

    def __init__(self, total: int, show: Callable[[str], None]) -> None:
        self._total = total
        self._show = show
        self._number = 0

    def __call__(self, text: str) -> None:
        """Begin the next step."""
        self._number += 1
        self.detail(text)

    def detail(self, text: str) -> None:
        """Change the text of the current step."""
        self._show(f"step {self._number} of {self._total}: {text}")


@contextlib.contextmanager
def show_steps(total: int) -> Iterator[Steps]:
    """Show progress while the block runs.

    Args:
        total: Number of steps.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield Steps(total, lambda text: console.print(text, markup=False))
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield Steps(total, lambda text: bar.update(task, description=text))
