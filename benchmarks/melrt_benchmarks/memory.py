"""Peak memory of a synthesis, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from melrt.bundle import Bundle
from melrt.errors import BackendError
from melrt_export.parity import probe_mel

_WINDOWED = "from melrt.__main__ import main; import sys; sys.argv = ['melrt', 'synth', {voice!r}, {mel!r}, '-o', {wav!r}]; main()"
_WHOLE = """
import numpy as np
from melrt import Bundle, write_wav
from melrt.backends.onnxruntime import OnnxModel
bundle = Bundle.open({voice!r})
audio = OnnxModel(bundle.read(bundle.find("onnx", graph="edge", precision="fp32")[0])).run(np.load({mel!r})[None])[0]
write_wav({wav!r}, audio, bundle.manifest.spec.sample_rate)
"""


def peak_memory(voice: Path, seconds: float, *, whole: bool) -> float:
    """Peak resident memory of `melrt synth`, or of one run over the whole utterance, in MiB.

    Raises:
        BackendError: The process failed (a whole utterance of some minutes needs more memory than there is).
    """
    spec = Bundle.open(voice).manifest.spec
    frames = round(seconds * spec.sample_rate / spec.hop)
    with tempfile.TemporaryDirectory() as folder:
        mel, wav = Path(folder) / "mel.npy", Path(folder) / "out.wav"
        piece = probe_mel(spec, 1000)
        np.save(mel, np.tile(piece, (1, -(-frames // 1000)))[:, :frames])
        code = (_WHOLE if whole else _WINDOWED).format(voice=str(voice), mel=str(mel), wav=str(wav))
        # wait4 gives the peak of that child alone
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise BackendError(f"synthesis of {seconds:g} s {'whole' if whole else 'in windows'} ended with code {child.returncode}.")
        return usage.ru_maxrss / 1024
