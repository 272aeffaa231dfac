"""The house: folders, import direction, what the README promises, what the wheel holds."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.mutants import MUTANTS

from melrt_benchmarks.report.results import Report

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "export": "melrt_export", "runtime": "melrt", "calibration": "melrt_calibration", "benchmarks": "melrt_benchmarks",
}  # fmt: skip
# What each package may import of the others.
MAY_IMPORT = {
    "melrt": set(),
    "melrt_export": {"melrt"},
    "melrt_calibration": {"melrt", "melrt_export"},
    "melrt_benchmarks": {"melrt", "melrt_export"},
}
ABOVE_ALL = 400


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def sources() -> list[Path]:
    return [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]


def test_folders_hold_one_package_each() -> None:
    for folder, package in PACKAGES.items():
        expected = {package, "results"} if folder == "benchmarks" else {package}
        assert {path.name for path in (ROOT / folder).iterdir()} - {"__pycache__"} == expected
        assert (ROOT / folder / package / "py.typed").is_file()
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    files = {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        ".gitignore",
        "CONTRIBUTING.md",
        ".pre-commit-config.yaml",
    }
    assert top == {*PACKAGES, "tests", "docs", ".ci", *files}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_point_one_way() -> None:
    for path in sources():
        package = path.relative_to(ROOT).parts[1]
        ours = imported(path) & set(MAY_IMPORT) - {package}
        assert ours <= MAY_IMPORT[package], path
        if package == "melrt":
            assert not imported(path) & {"torch", "onnx", "librosa", "matplotlib", "scipy"}, path


def test_files_and_functions_stay_readable() -> None:
    for path in sources():
        text = path.read_text()
        assert text.count("\n") < ABOVE_ALL, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"


def test_prose_wraps_at_120() -> None:
    """A table's row cannot wrap, and a link cannot be broken."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|") and "](" not in line]
        assert not long, f"{page.name}: {long[0]}"


def test_only_the_command_line_prints() -> None:
    for path in sources():
        if path.name not in ("cli.py", "main.py"):
            calls = {
                node.func.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert "print" not in calls, path


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="session")
def after_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after `melrt demo`, with the repository's packages beside it; the tests add no file."""
    pytest.importorskip("torch", reason="the demo exports a checkpoint, which needs the extra `export`")
    folder = tmp_path_factory.mktemp("after-demo")
    subprocess.run([Path(sys.executable).parent / "melrt", "demo"], cwd=folder, check=True, timeout=200, capture_output=True)
    (folder / "export").symlink_to(ROOT / "export")
    return folder


def run_in(folder: Path, *command: object) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(list(map(str, command)), cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_readme_code_runs_as_pasted(after_demo: Path) -> None:
    (usage,) = [block for block in blocks("README.md", "sh") if "melrt mel " in block]
    for _ in range(2):  # a block may be pasted again
        run_in(after_demo, "bash", "-euc", usage)
    (code,) = blocks("README.md", "python")
    run_in(after_demo, sys.executable, "-c", code)
    assert (after_demo / "demo" / "speech.wav").stat().st_size > 600 * 256 * 2
    assert (after_demo / "demo" / "copy.wav").stat().st_size > 600 * 256 * 2


@pytest.mark.slow
@pytest.mark.parametrize("page", ["python-api", "voices"])
def test_pages_of_python_code_run(after_demo: Path, page: str) -> None:
    run_in(after_demo, sys.executable, "-W", "error", "-c", "\n".join(blocks(f"docs/{page}.md", "python")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_convert.sh", "02_synthesize.py", "03_stream.py", "04_batch.py", "07_bulk.sh"])
def test_examples_run(after_demo: Path, name: str) -> None:
    """05_http_client.py and 06_triton_client.py are run by tests/runtime/serving."""
    run_in(after_demo, "bash" if name.endswith(".sh") else sys.executable, ROOT / "docs" / "examples" / name)
    assert {path.name for path in after_demo.iterdir()} == {"demo", "export"}, "an example writes outside demo/"


def test_documented_commands_exist(melrt) -> None:
    from melrt.cli.main import COMMANDS

    text = "".join(blocks("README.md", "sh"))
    assert set(re.findall(r"^melrt (\w+)", text, re.MULTILINE)) <= {command.partition(" ")[0] for command in COMMANDS}
    for target in set(re.findall(r"^make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for command in COMMANDS:
        assert melrt(*command.split(), "--help")[0] == 0


def test_nothing_names_the_machine_it_was_made_on() -> None:
    private = re.compile(r"/work/|/root/|/tmp/v\b|\.library|pypi-more")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".yml", "") and path != Path(__file__):
            assert not private.search(path.read_text(errors="ignore")), path


@pytest.mark.slow
def test_what_the_wheel_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(PACKAGES.values())
    for package in PACKAGES.values():
        assert f"{package}/py.typed" in names
    assert "melrt_export/demo_voice/model.safetensors" in names
    assert "melrt/serving/http/page.html" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 10 << 20


def test_the_readme_s_figures_are_the_measured_ones() -> None:
    """Each row of its table comes from the committed result file; the message of a failure is what the README should say."""
    report = Report.load(ROOT / "benchmarks" / "results" / "cpu.json")
    lengths: dict[float, dict[str, float]] = {}
    for row in report.latencies:
        assert row.correct, row
        lengths.setdefault(round(row.seconds), {})[row.contender] = row.times_real_time
    table = []
    for seconds, times in lengths.items():
        eager, plain, ours = (times[name] for name in ("PyTorch eager", "ONNX Runtime, plain export", "melrt, onnxruntime fp32"))
        table.append(f"| {seconds} s | {eager:.1f} x real time | {plain:.1f} x | **{ours:.1f} x** |")
    assert "\n".join(table) in (ROOT / "README.md").read_text(), "\n".join(table)


def test_the_gpu_s_figures_are_the_measured_ones() -> None:
    """The rows of the H200's tables come from its result files."""
    results, page = ROOT / "benchmarks" / "results", (ROOT / "docs" / "fused.md").read_text().replace("**", "")
    rows = []
    for row in Report.load(results / "h200-latency.json").latencies:
        if "fused" not in row.contender:
            times = (row.p50_ms, row.loop_ms, row.device_ms)
            rows.append(f"| {row.contender.replace(' GPU', '')} | " + "| ".join(f"{time:.3f} " if time else " " for time in times) + "|")
    for row in Report.load(results / "h200-fused.json").latencies:
        times = " | ".join(f"{time:.2f}" for time in (row.p50_ms, row.loop_ms, row.device_ms) if time)
        rows.append(f"| {row.batch} x {row.seconds:.0f} s | {row.contender.replace(' GPU', '')} | {times} |")
    (before,) = (step["data"] for step in json.loads((results / "h200.json").read_text())["steps"] if step["name"] == "fused-timing")
    for mels, now in json.loads((results / "h200-kernels.json").read_text())["timing"].items():
        earlier = before["shapes"][mels]["us"]
        rows.append(f"| {mels} frames | {earlier:,.0f} | {now['us']:,.0f} | {round(now['times_real_time'], -2):,.0f} |")
    missing = [row for row in rows if row not in page]
    assert len(rows) == 12 + 11 + 4
    assert not missing, "\n".join(missing)


def test_each_planted_fault_has_its_line() -> None:
    lost = [f"{file}: {old}" for file, old, *_ in MUTANTS if old not in (ROOT / file).read_text()]
    assert not lost, "change the table of tests/mutants.py:\n" + "\n".join(lost)
