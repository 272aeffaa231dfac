"""The house: folders, import direction, what the README promises, what the wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
    files = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", ".gitignore"}
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
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_s_python_makes_a_wav(demo_bundle, tmp_path: Path) -> None:
    import numpy as np

    from melrt_export.parity import probe_mel

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "lj.melrt").symlink_to(demo_bundle.path)
    np.save(tmp_path / "mel.npy", probe_mel(demo_bundle.manifest.spec, 40))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "speech.wav").stat().st_size > 40 * 256 * 2


def test_the_readme_s_commands_exist(melrt) -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        commands = set(tomllib.load(stream)["project"]["entry-points"]["melrt.commands"])
    names = {command.partition(" ")[0] for command in commands}
    text = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    assert set(re.findall(r"^melrt (\w+)", text, re.MULTILINE)) <= names
    for target in set(re.findall(r"^make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for command in sorted(commands):
        assert melrt(*command.split(), "--help")[0] == 0


def test_nothing_names_the_machine_it_was_made_on() -> None:
    private = re.compile(r"/work/|/root/|/tmp/v\b|\.library|pypi-more")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".yml", "") and path != Path(__file__):
            assert not private.search(path.read_text(errors="ignore")), path


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
