"""Run steps one after another, each in a session of its own, within a time budget; every result is written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from melrt_benchmarks.sitting import junit
from melrt_benchmarks.sitting.steps import ROOT, SKIPPED, Step, command_of, filled

# pytest's exit code if no test was selected.
NO_TESTS = 5
# `melrt bench` of contenders of which none is here.
WRONG_INPUT, NO_CONTENDER = 2, "no contender runs here"
# Seconds between the interrupt of a step at its limit, after which `melrt bench` and pytest write what they have, and its end by force.
GRACE = 4
LAST_LINES = 15
MOST_LOG = 1 << 16
PACKAGES = ("benchmarks", "calibration", "export", "runtime", "")


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a step."""

    name: str
    title: str
    outcome: str
    """`passed`, `failed`, `skipped`, `timed out` or `not begun`."""
    reason: str = ""
    """The reason for an outcome other than `passed`."""
    seconds: float = 0.0
    limit: int = 0
    """Seconds that the step could take."""
    command: str = ""
    tail: tuple[str, ...] = ()
    """Last lines of its output."""
    data: dict[str, Any] = field(default_factory=dict)
    """The step's own JSON, or the tests of its report."""


@dataclass(frozen=True, slots=True)
class Sitting:
    """Settings of a sitting."""

    out: Path
    """Folder of the report; it has few files and no folders."""
    work: Path
    """Folder of everything else. A later sitting with the same folder resumes this one."""
    checkpoint: Path
    """Checkpoint of the voice that is measured."""
    budget: float
    """Seconds in all. A step whose limit does not fit into the rest is not begun."""
    again: tuple[str, ...] = ()
    """Names of steps that run although they have a result."""

    def paths(self, step: Step) -> dict[str, Path]:
        """Return the paths that replace the names in braces of a step's command."""
        own = {"json": self.work / f"{step.name}.json", "junit": self.work / f"{step.name}.xml"}
        return {**own, "voice": self.work / "voice.melrt", "checkpoint": self.checkpoint, "work": self.work}


def run_sitting(sitting: Sitting, steps: Sequence[Step], on_result: Callable[[Result], None]) -> list[Result]:
    """Run the steps that have no result yet.

    Args:
        sitting: Settings.
        steps: Steps, in order.
        on_result: Called with each result as soon as it is written.

    Returns:
        A result for each step; those of an earlier sitting as they were.
    """
    sitting.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results = []
    for step in steps:
        file = sitting.work / f"{step.name}.result.json"
        result = None if step.name in sitting.again else _read(file)
        if result is None:
            left = sitting.budget - (time.monotonic() - start)
            if step.limit > left:
                result = Result(
                    step.name, step.title, "not begun", f"{left:.0f} s were left, its limit is {step.limit} s", limit=step.limit
                )
            else:
                result = run_step(step, sitting)
                write_whole(file, json.dumps(asdict(result), indent=1))
        results.append(result)
        on_result(result)
    return results


def run_step(step: Step, sitting: Sitting) -> Result:
    """Run a step; its whole session of processes is gone afterwards."""
    paths = sitting.paths(step)
    command = command_of(step, paths)
    facts: dict[str, Any] = {"limit": step.limit, "command": " ".join(command)}
    missing = [path for path in (filled(need, paths) for need in step.needs) if not Path(path).exists()]
    if missing:
        return Result(step.name, step.title, "skipped", f"{step.because or 'a file is missing'} ({missing[0]})", **facts)
    if step.tool and shutil.which(step.tool[0]) is None:
        return Result(step.name, step.title, "skipped", f"{step.tool[0]} is not installed", **facts)
    if step.gpu and not has_driver():
        return Result(step.name, step.title, "skipped", "no NVIDIA driver (libcuda.so.1)", **facts)
    for name in ("json", "junit"):
        paths[name].unlink(missing_ok=True)
    log = sitting.work / f"{step.name}.log"
    start = time.monotonic()
    code = _run(command, log, step.limit, sitting.work)
    seconds = round(time.monotonic() - start, 2)
    lines = _tail(log).splitlines()
    data = _json(paths["json"]) or junit.read(paths["junit"])
    outcome, reason = _outcome(code, lines, data, step.limit)
    return Result(step.name, step.title, outcome, reason, seconds, tail=tuple(lines[-LAST_LINES:]), data=data, **facts)


def _outcome(code: int | None, lines: list[str], data: dict[str, Any], limit: int) -> tuple[str, str]:
    last = next((line for line in reversed(lines) if line.strip()), "")
    if code is None:
        return "timed out", f"stopped after {limit} s"
    if code == SKIPPED:
        return "skipped", last
    if code == WRONG_INPUT and NO_CONTENDER in last:
        return "skipped", last
    tests = data.get("tests", [])
    if code == NO_TESTS or (code == 0 and tests and all(test["outcome"] == "skipped" for test in tests)):
        reasons = dict.fromkeys(test["detail"] for test in tests)
        return "skipped", "; ".join(reasons) or "no test was selected"
    return ("passed", "") if code == 0 else ("failed", f"exit code {code}: {last}")


def _run(command: list[str], log: Path, limit: float, work: Path) -> int | None:
    """Run a command in a session of its own, and kill the whole session at the end; return its exit code, or None at the limit.

    At the limit the command alone is interrupted, as by Ctrl-C, and has a few seconds to write what it has.
    """
    path = os.pathsep.join([*(str(ROOT / package) for package in PACKAGES), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    private = {"MELRT_KEY": str(work / "engine.key"), "MELRT_CACHE": str(work / "cache"), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **private, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def has_driver() -> bool:
    """Return whether an NVIDIA driver is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it has its old or its new content at any time."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)


def joined_logs(sitting: Sitting, names: Iterable[str]) -> str:
    """Return the end of each step's output in one text."""
    logs = ((name, sitting.work / f"{name}.log") for name in names)
    return "\n".join(f"===== {name} =====\n{_tail(log)}" for name, log in logs if log.is_file())


def _tail(log: Path) -> str:
    with log.open("rb") as opened:
        opened.seek(max(log.stat().st_size - MOST_LOG, 0))
        return opened.read().decode(errors="replace")


def _read(file: Path) -> Result | None:
    data = _json(file)
    return Result(**{**data, "tail": tuple(data["tail"])}) if data else None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {"values": found}
