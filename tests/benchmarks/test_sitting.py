"""The runner of a sitting: limits, failures, resuming, budget, and files that are whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from melrt_benchmarks.sitting import cli, runner
from melrt_benchmarks.sitting.html import page
from melrt_benchmarks.sitting.runner import Result, Sitting, has_driver, run_sitting
from melrt_benchmarks.sitting.steps import STEPS, Step

HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print("grandchild", child.pid, flush=True)
time.sleep(100)
"""
INTERRUPTED = """
import sys, time
try:
    time.sleep(100)
except KeyboardInterrupt:
    open(sys.argv[1], "w").write('{"figure": 2.5}')
"""
WRITES = """
import json, sys
from pathlib import Path
json_file = Path(sys.argv[1])
json_file.write_text(json.dumps({"figure": 1.5, "rows": [{"name": "one", "outcome": "failed", "detail": "<b>", "seconds": 0.1}]}))
with open(sys.argv[2], "a") as count:
    count.write("x")
"""


def step(name: str, code: str, *arguments: str, limit: int = 20, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, f"Step {name}", ("-c", code, *arguments), limit, needs)


def sit(folder: Path, *steps: Step, budget: float = 100, again: tuple[str, ...] = ()) -> dict[str, Result]:
    sitting = Sitting(folder / "out", folder / "work", folder / "checkpoint", budget, again)
    return {result.name: result for result in run_sitting(sitting, steps, lambda _: None)}


def test_a_step_beyond_its_limit_is_interrupted_and_then_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.5)
    start = time.monotonic()
    steps = step("hangs", HANGS, limit=2), step("interrupted", INTERRUPTED, "{json}", limit=1), step("after", "print('here')")
    results = sit(tmp_path, *steps)
    assert time.monotonic() - start < 15
    assert [result.outcome for result in results.values()] == ["timed out", "timed out", "passed"]
    assert 2.5 <= results["hangs"].seconds < 4.5
    assert results["interrupted"].data == {"figure": 2.5}
    (line,) = results["hangs"].tail
    assert line.startswith("grandchild")
    assert not is_running(int(line.split()[1]))
    assert results["after"].tail == ("here",)


def test_a_sitting_that_is_terminated_leaves_no_process(tmp_path: Path) -> None:
    code = f"from melrt_benchmarks.sitting import cli, steps; cli.STEPS = (steps.Step('hangs', '', ('-c', {HANGS!r}), 60),); cli.main()"
    process = subprocess.Popen([sys.executable, "-c", code, "--out", str(tmp_path / "out")])
    log = tmp_path / "out.work" / "hangs.log"
    while not (log.is_file() and log.read_text().endswith("\n")):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(10) == cli.TERMINATED
    assert not is_running(int(log.read_text().split()[1]))


def test_steps_of_a_background_job_can_be_interrupted(tmp_path: Path) -> None:
    """A shell starts background jobs with SIGINT ignored, and programs inherit that."""
    steps = f"(steps.Step('one', '', ('-c', {INTERRUPTED!r}, '{{json}}'), 1),)"
    code = f"from melrt_benchmarks.sitting import cli, steps; cli.STEPS = {steps}; cli.main()"
    program = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{code}"
    subprocess.run([sys.executable, "-c", program, "--out", str(tmp_path / "out")], check=True)
    (one,) = json.loads((tmp_path / "out" / "sitting.json").read_text())["steps"]
    assert (one["outcome"], one["data"]) == ("timed out", {"figure": 2.5})


def is_running(pid: int) -> bool:
    """Wait a moment for a killed process, which its new parent may not have reaped."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.02)
    return True


def test_failures_do_not_stop_the_rest_and_results_are_kept(tmp_path: Path) -> None:
    counter = tmp_path / "count"
    steps = (
        step("fails", "raise SystemExit('the reason')"), step("elsewhere", "print('no GPU'); raise SystemExit(77)"),
        step("lacks", "", needs=("{work}/missing",)), step("writes", WRITES, "{json}", str(counter)),
    )  # fmt: skip
    results = sit(tmp_path, *steps)
    assert {name: result.outcome for name, result in results.items()} == {
        "fails": "failed", "elsewhere": "skipped", "lacks": "skipped", "writes": "passed",
    }  # fmt: skip
    assert results["fails"].reason == "exit code 1: the reason"
    assert results["elsewhere"].reason == "no GPU"
    assert results["writes"].data["figure"] == 1.5
    assert sit(tmp_path, *steps) == results, "nothing runs a second time"
    assert counter.read_text() == "x"
    sit(tmp_path, *steps, again=("writes",))
    assert counter.read_text() == "xx"
    text = page(list(results.values()), "today")
    assert "<b>" not in text
    assert "the reason" in text


def test_a_step_that_does_not_fit_is_not_begun_and_runs_later(tmp_path: Path) -> None:
    steps = step("slow", "import time; time.sleep(1.5)", limit=8), step("long", "", limit=9), step("short", "", limit=5)
    results = sit(tmp_path, *steps, budget=10)
    assert [result.outcome for result in results.values()] == ["passed", "not begun", "passed"]
    assert "its limit is 9 s" in results["long"].reason
    assert sit(tmp_path, *steps)["long"].outcome == "passed"


def test_results_are_whole_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from melrt_benchmarks.sitting.runner import write_whole\n"
        "while True:\n  for n in range(9): write_whole(Path(sys.argv[1]), '[' + '1,' * 100_000 * (n % 3 + 1) + '1]')"
    )
    file = tmp_path / "a.json"
    for delay in (0.0, 0.013, 0.029):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)])
        while not file.exists():
            time.sleep(0.001)
        for _ in range(20):
            assert json.loads(file.read_text())
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert json.loads(file.read_text())


@pytest.mark.skipif(has_driver(), reason="would measure on the GPU")
def test_the_command_line_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--only", "versions,stub,bench-1s,training", "--budget", "300"]
    monkeypatch.setattr(sys, "argv", ["sitting", *arguments])
    assert cli.main() == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["sitting.html", "sitting.json", "sitting.log"]
    steps = {one["name"]: one for one in json.loads((tmp_path / "out" / "sitting.json").read_text())["steps"]}
    assert {name: one["outcome"] for name, one in steps.items()} == {
        "versions": "passed", "stub": "skipped", "bench-1s": "skipped", "training": "skipped",
    }  # fmt: skip
    assert steps["versions"]["data"]["packages"]["numpy"]
    assert "step 4 of 4" in capsys.readouterr().out


def test_the_report_has_a_column_for_each_shape_and_a_row_for_each_measurement() -> None:
    layer = {"us": 51.15, "bound_us": 21.7}
    shapes = {"1 x 86": {"us": 203.04, "times_real_time": 4918.6, "layers": {"first": layer, "last": {"us": 5.5, "bound_us": None}}}}
    timing = Result("fused-timing", "Kernels", "passed", data={"shapes": shapes, "gpu": "a GPU"})
    stub = Result("stub", "Stub", "passed", data={"arrays": {"1 s": {"p50_ms": 0.41}, "10 s": {"p50_ms": 0.99}}, "call": [0.28, 0.32]})
    cells = re.findall(r"<t[dh]>(.*?)</t[dh]>", page([timing, stub], "today").partition("<h2>Kernels")[2])
    kernels = "", "1 x 86", "network", "203.0", "times real time", "4,919", "first", "51.1 (21.7)", "last", "5.5"
    assert cells[: len(kernels) + 4] == [*kernels, "figure", "value", "gpu", "a GPU"]
    assert cells[len(kernels) + 4 :] == ["", "p50 ms", "1 s", "0.41", "10 s", "0.99", "figure", "value", "call", "0.28, 0.32"]


def test_every_step_can_be_found() -> None:
    assert len({one.name for one in STEPS}) == len(STEPS)
    code = "import sys; sys.modules.update(numpy=None, melrt=None); import melrt_benchmarks.sitting.cli"
    subprocess.run([sys.executable, "-c", code], check=True)
