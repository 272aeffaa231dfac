"""Read pytest's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

MOST_DETAIL = 600


def read(file: Path) -> dict[str, Any]:
    """Return the tests of a JUnit file by name, outcome, detail and seconds; nothing if there is no whole file."""
    try:
        cases = list(ElementTree.parse(file).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}
    return {"tests": [_test(case) for case in cases]}


def _test(case: ElementTree.Element) -> dict[str, Any]:
    outcome, detail = "passed", ""
    for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(kind)) is not None:
            outcome, detail = name, found.get("message", "")[-MOST_DETAIL:]
    return {"name": case.get("name", ""), "outcome": outcome, "detail": detail, "seconds": float(case.get("time", "0"))}
