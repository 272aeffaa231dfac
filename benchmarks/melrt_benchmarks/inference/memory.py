"""Peak memory of a synthesis, measured in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from melrt.bundle import Bundle
from melrt.errors import BackendError
from melrt_export.parity import probe_mel

# The kernel's high-water mark of the process. A parent's getrusage would also count the parent's memory at the time of the fork.
_REPORT = """
import atexit, pathlib
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text()))
"""
# Seconds of audio: in windows, and in one run over the whole utterance.
LENGTHS = {"windows": (30.0, 1800.0), "whole": (30.0, 60.0, 120.0)}
_WINDOWED = "from melrt.cli.main import main; import sys; sys.argv = ['melrt', 'synth', {voice!r}, {mel!r}, '-o', {wav!r}]; main()"
_WHOLE = """
import numpy as np
from melrt import Bundle, write_wav
from melrt.backends.onnxruntime import OnnxModel
bundle = Bundle.open({voice!r})
audio = OnnxModel(bundle.read(bundle.find("onnx", graph="edge", precision="fp32")[0])).run(np.load({mel!r})[None])[0]
write_wav({wav!r}, audio, bundle.manifest.spec.sample_rate)
"""


def measure_memory(voice: Path, on_step: Callable[[str], None]) -> tuple[dict[str, Any], ...]:
    """Return `seconds`, `kind` (`windows` or `whole`) and `peak_mib` of each length, for JSON."""
    rows = []
    for kind, lengths in LENGTHS.items():
        for seconds in lengths:
            on_step(f"memory of {seconds:g} s of audio, {kind}")
            rows.append({"seconds": seconds, "kind": kind, "peak_mib": round(peak_memory(voice, seconds, whole=kind == "whole"), 1)})
    return tuple(rows)


def peak_memory(voice: Path, seconds: float, *, whole: bool) -> float:
    """Return the peak resident memory of one synthesis in MiB.

    Args:
        voice: The bundle.
        seconds: Length of the audio.
        whole: Run the graph once over the whole utterance; otherwise run `melrt synth`, which works in windows.

    Raises:
        BackendError: The process failed; a whole utterance of some minutes needs more memory than many machines have.
    """
    spec = Bundle.open(voice).manifest.spec
    frames = round(seconds * spec.sample_rate / spec.hop)
    with tempfile.TemporaryDirectory() as folder:
        mel, wav = Path(folder) / "mel.npy", Path(folder) / "out.wav"
        piece = probe_mel(spec, 1000)
        np.save(mel, np.tile(piece, (1, -(-frames // 1000)))[:, :frames])
        code = _REPORT + (_WHOLE if whole else _WINDOWED).format(voice=str(voice), mel=str(mel), wav=str(wav))
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if process.returncode:
            kind = "in one run" if whole else "in windows"
            raise BackendError(f"the synthesis of {seconds:g} s {kind} ended with exit code {process.returncode}. Is there enough memory?")
        return int(process.stdout.rpartition("VmHWM:")[2].split()[0]) / 1024
