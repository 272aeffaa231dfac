"""Prove melrt's CUDA runtime on a GPU without TensorRT: `python -m melrt_benchmarks.sitting.stub VOICE.melrt --json stub.json`."""

from __future__ import annotations

import argparse
import faulthandler
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from melrt.backends.tensorrt.backend import open_device
from melrt.errors import BackendError, MissingExtraError
from melrt_benchmarks.sitting.rows import Row, Rows
from melrt_benchmarks.sitting.steps import SKIPPED
from melrt_benchmarks.sitting.stub import arrays, checks, faults
from melrt_benchmarks.sitting.stub.bundles import Bundles, stub_bundles

Check = Callable[[Bundles, dict[str, Any]], str]
# The most harmless ones first: a fault may spoil the device for the rest of the process.
CHECKS: tuple[Check, ...] = (*checks.CHECKS, *arrays.CHECKS, *faults.CHECKS)
LIMIT = 150


def main() -> int:
    """Run all checks on copies of a bundle; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("voice", type=Path, metavar="VOICE.melrt", help="A bundle; only its mel convention and receptive field are used.")
    parser.add_argument("--json", type=Path, help="Write the results to this file after each check.")
    parser.add_argument("--limit", type=int, default=LIMIT, help="Seconds after which the process prints its stacks and ends.")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="Run only the checks whose name contains one of these.")
    options = parser.parse_args()
    try:
        open_device(0)
    except (BackendError, MissingExtraError) as reason:
        print(reason)
        return SKIPPED
    faulthandler.dump_traceback_later(options.limit, exit=True)
    rows = Rows(options.json, _show)
    with stub_bundles(options.voice) as bundles:
        run_checks(bundles, rows, [check for check in CHECKS if any(words in _name(check) for words in options.only)])
    print(f"{len(rows.rows)} checks, {rows.failed} failed.")
    return 1 if rows.failed else 0


def run_checks(bundles: Bundles, rows: Rows, wanted: Sequence[Check] = CHECKS) -> None:
    """Run checks; one that fails does not stop the others."""
    for check in wanted:
        rows.check(_name(check), lambda check=check: check(bundles, rows.figures))  # type: ignore[misc]


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


def _show(row: Row) -> None:
    print(f"{row.outcome:8}{row.seconds:8.2f} s  {row.name}: {row.detail}", flush=True)
