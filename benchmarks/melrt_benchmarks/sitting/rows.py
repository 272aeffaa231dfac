"""Named checks: each one's result is written as soon as it is known."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melrt.files.atomic import atomic_write

# Enough of a traceback to find the line.
LAST_LINES = 12


class NotHereError(Exception):
    """The check needs something that this machine does not have."""


@dataclass(frozen=True, slots=True)
class Row:
    """Result of a check."""

    name: str
    outcome: str
    """`passed`, `failed` or `skipped`."""
    detail: str
    """Measured figures, the reason for skipping, or the end of the traceback."""
    seconds: float
    """Duration of the check."""


class Rows:
    """Results of the checks so far, in a JSON file that is whole at any time."""

    def __init__(self, file: Path | None, on_row: Callable[[Row], None] = lambda _: None) -> None:
        self._file, self._on_row = file, on_row
        self.rows: list[Row] = []
        self.figures: dict[str, Any] = {}

    def check(self, name: str, run: Callable[[], str]) -> None:
        """Run a check, which returns a detail or raises; and write its result."""
        start = time.perf_counter()
        try:
            outcome, detail = "passed", run()
        except NotHereError as reason:
            outcome, detail = "skipped", str(reason)
        except Exception:
            outcome, detail = "failed", "\n".join(traceback.format_exc().splitlines()[-LAST_LINES:])
        row = Row(name, outcome, detail, round(time.perf_counter() - start, 3))
        self.rows.append(row)
        self._on_row(row)
        self.save()

    def save(self) -> None:
        """Write the file."""
        if self._file is not None:
            with atomic_write(self._file) as temporary:
                temporary.write_text(json.dumps({"rows": [asdict(row) for row in self.rows], **self.figures}, indent=1))

    @property
    def failed(self) -> int:
        """Number of failed checks."""
        return sum(row.outcome == "failed" for row in self.rows)
