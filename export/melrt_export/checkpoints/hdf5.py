"""HDF5 files (Keras weights, statistics), read in a process of their own, `hdf5_reader`, with limits of time and memory.

libhdf5 hangs, crashes or fills the memory for about one in 300 damaged files of 10 kB, and cannot be interrupted within a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import DEVNULL
from typing import IO

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.checkpoints import hdf5_reader
from melrt_export.checkpoints.limits import MAX_WEIGHTS_BYTES, check_file_size

PROGRAM = hdf5_reader.__file__
# Processor time. 17 MB of Keras weights take 0.05 s.
SECONDS = 1.0
BYTES_PER_SECOND = 64 << 20
# Time in all, also where another process uses the processors or the disk, and where processor time cannot be limited.
LONGEST_SECONDS = 60.0


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Return every array of real numbers in an HDF5 file by its path, in the order in which Keras saved them.

    Links to other files, external storage and virtual storage are refused.

    Raises:
        CheckpointError: The file is not HDF5, is damaged or too large, or refers to data outside itself.
    """
    check_file_size(path, MAX_WEIGHTS_BYTES)
    seconds = SECONDS + path.stat().st_size / BYTES_PER_SECOND
    command = [sys.executable, "-P", PROGRAM, str(path), str(seconds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as answer:
        try:
            subprocess.run(
                command, stdin=DEVNULL, stdout=answer, stderr=DEVNULL, env=environment, timeout=LONGEST_SECONDS, check=False
            )  # fmt: skip
            answer.seek(0)
            return _arrays(answer, path)
        except CheckpointError:
            raise
        except (ValueError, OSError, subprocess.TimeoutExpired) as error:
            raise CheckpointError(
                f"{path} cannot be read as HDF5: libhdf5 crashed, or needed more than {seconds:.0f} s or "
                f"{hdf5_reader.memory(path) >> 20} MiB. It is damaged; copy it again."
            ) from error


def _arrays(answer: IO[bytes], path: Path) -> dict[str, np.ndarray]:
    """Read what the process wrote: one line of JSON, then the arrays.

    Raises:
        ValueError: The process ended before it had written all.
    """
    head = json.loads(answer.readline())
    if "refused" in head:
        raise CheckpointError(f"{path} {head['refused']}")
    return {name: np.lib.format.read_array(answer, allow_pickle=False) for name in head["names"]}
