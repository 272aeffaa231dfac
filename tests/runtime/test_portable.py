"""The CPU runtime on systems without Linux's own functions: Windows and macOS lack them; here they are taken away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.reference import FP32_MAX_ABS, speech_mel, whole_audio

from melrt.bundle import Bundle

ROOT = Path(__file__).parents[2]
TAKE_AWAY = """
import ctypes, fcntl, os, pathlib, stat, sys
flags, fsync = fcntl.fcntl, os.fsync
TAKEN = ("fcntl", "resource", "pwd", "grp", "termios")
sys.modules.update(dict.fromkeys(TAKEN))
for name in ("sched_getaffinity", "geteuid", "getuid", "getpgid", "killpg", "register_at_fork", "fork", "mkfifo", "O_NONBLOCK"):
    delattr(os, name)
def windows_fsync(handle):
    if stat.S_ISREG(os.fstat(handle).st_mode) and flags(handle, 3) & os.O_ACCMODE == os.O_RDONLY:  # 3 is F_GETFL
        raise OSError(9, "Bad file descriptor")
    fsync(handle)
os.fsync = windows_fsync
read_text, cdll = pathlib.Path.read_text, ctypes.CDLL
def without_proc(path, *args, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return read_text(path, *args, **options)
def without_none(name, *args, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return cdll(name, *args, **options)
pathlib.Path.read_text, ctypes.CDLL = without_proc, without_none
"""


def run(program: str, *arguments: str) -> str:
    """Run a program in a process without these functions."""
    command = [sys.executable, "-c", TAKE_AWAY + program, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_voice_runs_and_streams_without_functions_of_linux(tiny_bundle_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    mel = speech_mel(bundle, 300)
    np.save(tmp_path / "mel.npy", mel)
    run(
        "import numpy as np, melrt\n"
        "mel = np.load(sys.argv[2])\n"
        "with melrt.Vocoder.load(sys.argv[1], device='cpu', precision='fp32') as vocoder:\n"
        "    streamed = np.concatenate(list(vocoder.stream([mel[:, :100], mel[:, 100:]])))\n"
        "    np.save(sys.argv[3], np.stack([vocoder(mel), streamed]))\n",
        str(tiny_bundle_path), str(tmp_path / "mel.npy"), str(tmp_path / "audio.npy"),
    )  # fmt: skip
    assert np.abs(np.load(tmp_path / "audio.npy") - whole_audio(bundle, mel)).max() < FP32_MAX_ABS


def test_every_module_imports_without_functions_of_linux() -> None:
    """Packages that are not installed may be missing, but not those that Windows lacks."""
    names = run(
        "import importlib, pkgutil, melrt\n"
        "for module in pkgutil.walk_packages(melrt.__path__, 'melrt.'):\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except ImportError as error:\n"
        "        if error.name in TAKEN:\n"
        "            raise\n"
        "    else:\n"
        "        print(module.name)\n"
    ).split()
    assert {"melrt.vocoder", "melrt.voices", "melrt.files.locks", "melrt.cli.commands", "melrt.serving.bulk.run"} <= set(names)


def test_commands_write_and_lock_without_functions_of_linux(tiny_bundle_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("filelock", reason="takes the place of fcntl")
    bundle = Bundle.open(tiny_bundle_path)
    for name in ("a", "b"):
        (tmp_path / "mels").mkdir(exist_ok=True)
        np.save(tmp_path / "mels" / f"{name}.npy", speech_mel(bundle, 30))
    program = "from melrt.cli.main import main\nsys.argv[0] = 'melrt'\nmain()"
    assert f"of {os.cpu_count()} cores usable" in run(program, "doctor")
    run(program, "bulk", str(tiny_bundle_path), "--input", str(tmp_path / "mels"), "--output", str(tmp_path / "wavs"), "--device", "cpu")
    assert sorted(file.name for file in (tmp_path / "wavs").glob("*.wav")) == ["a.wav", "b.wav"]
    lock = "import pathlib\nfrom melrt.files.locks import locked_file, locked_folder\npath = pathlib.Path(sys.argv[1])\n"
    lock += "with locked_file(path), locked_folder(path.parent):\n    try:\n        with locked_file(path):\n            print('twice')\n"
    lock += "    except OSError:\n        print('refused')\n"
    assert run(lock, str(tmp_path / "wavs" / "x.lock")) == "refused\n"
