"""Start-up times: import, load and first audio, measured in fresh processes."""

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
def used():  # MiB of the first GPU in use by all processes
    try:
        from cuda.bindings import nvml
        nvml.init_v2()
        return nvml.device_get_memory_info_v2(nvml.device_get_handle_by_index_v2(0)).used / 2**20
    except Exception:
        return 0.0
before = used()
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
first_audio = time.perf_counter()
taken = used() - before
again = load()
reloaded = time.perf_counter()
peak = int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([imported - begin, loaded - imported, reloaded - first_audio, first_audio - loaded, peak, taken]))
"""


def measure_start_up(voice: Path, backend: str, precision: str, threads: int) -> StartUp | None:
    """Return the medians of several starts; None if this backend cannot run the voice here."""
    runs = []
    for _ in range(PROCESSES):
        command = [sys.executable, "-c", _SCRIPT, str(voice), backend, precision, str(threads)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            return None
        runs.append(json.loads(process.stdout.splitlines()[-1]))
    imported, loaded, reloaded, first_audio, peak, taken = np.median(runs, axis=0)
    return StartUp(
        contender=f"melrt, {backend} {precision}", import_ms=round(1000 * imported, 1), load_ms=round(1000 * loaded, 1),
        reload_ms=round(1000 * reloaded, 1), first_audio_ms=round(1000 * first_audio, 1), peak_mib=round(peak, 1),
        device_mib=round(taken, 1),
    )  # fmt: skip
