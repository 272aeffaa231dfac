"""From nothing to sound: import, load and first audio, each time in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from melrt_benchmarks.report.results import StartUp

PROCESSES = 3
_SCRIPT = """
import json, pathlib, sys, time
def used():  # MiB of the first GPU that are taken, by all its users
    try:
        from cuda.bindings import nvml
        nvml.init_v2()
        return nvml.device_get_memory_info_v2(nvml.device_get_handle_by_index_v2(0)).used / 2**20
    except Exception:
        return 0.0
free = used()
begin = time.perf_counter()
import numpy
from melrt import Vocoder
imported = time.perf_counter()
voice, backend, precision, threads = sys.argv[1:]
load = lambda: Vocoder.load(voice, backend=backend, precision=precision, threads=int(threads))
vocoder = load()
loaded = time.perf_counter()
spec = vocoder.spec
vocoder(numpy.full((spec.n_mels, spec.sample_rate // spec.hop), spec.silence, numpy.float32))
spoken = time.perf_counter()
taken = used() - free
again = load()
reloaded = time.perf_counter()
peak = int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([imported - begin, loaded - imported, reloaded - spoken, spoken - loaded, peak, taken]))
"""


def start_up(voice: Path, backend: str, precision: str, threads: int) -> StartUp | None:
    """Median of some starts; None where this backend cannot run the voice."""
    measured = []
    for _ in range(PROCESSES):
        command = [sys.executable, "-c", _SCRIPT, str(voice), backend, precision, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    imported, loaded, reloaded, spoken, peak, taken = np.median(measured, axis=0)
    return StartUp(
        contender=f"melrt, {backend} {precision}", import_ms=round(1000 * imported, 1), load_ms=round(1000 * loaded, 1),
        reload_ms=round(1000 * reloaded, 1), first_audio_ms=round(1000 * spoken, 1), peak_mib=round(peak, 1), device_mib=round(taken, 1),
    )  # fmt: skip
