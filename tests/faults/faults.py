"""Kill every command that writes, and fill its disk, at moments that depend on a seed alone: `make faults`.

Usage: python -m tests.faults.faults [COUNT [KIND ...]]

The results of a command must be whole or absent afterwards, those of an earlier run unchanged or replaced whole, and the same command
must then work and leave no temporary file. A killed process ends before an operation on a file, in the middle of a write, or at any
time. Where the disk is full, the command must name a path of its own and must not print a traceback.
"""

from __future__ import annotations

import collections
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from melrt.bundle import Bundle
from melrt.bundle.manifest import Artifact
from melrt.cli.main import main as melrt
from melrt.errors import MelrtError
from melrt.files.atomic import is_temporary
from melrt_export.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "bundles" / "tiny.melrt"
LONGEST = 300
FAULTS = ("file", "write", "time", "full")


@dataclass(frozen=True)
class Kind:
    """A command that writes."""

    prepare: Callable[[Path], None]
    """Makes the files that the command reads, in an empty folder."""
    run: Callable[[Path], None]
    """Runs the command."""
    check: Callable[[Path], bool]
    """Raises if a result is not whole; returns whether all are there."""


def _command(*arguments: object) -> None:
    sys.argv = ["melrt", *map(str, arguments)]
    melrt()


def _voice(folder: Path) -> None:
    shutil.copytree(TINY, folder / "x.melrt")


def _whole_bundle(folder: Path) -> bool:
    if not (folder / "x.melrt").exists():
        return False
    bundle = Bundle.open(folder / "x.melrt")
    for entry in bundle.manifest.artifacts:
        bundle.read(entry)
    return True


def _checkpoint(folder: Path) -> None:
    from tests.torch_voices import random_voice

    from melrt_export.generator.config import GeneratorConfig

    random_voice(GeneratorConfig(8, channels=16, upsample_scales=(4, 2), stacks=2), folder, ("fp32", "fp16"))


def _export(folder: Path) -> None:
    _command("export", folder / "checkpoint", "-o", folder / "x.melrt", "--force")


def _calibrated(folder: Path) -> None:
    _checkpoint(folder)
    (folder / "speech").mkdir()
    from melrt_export.parity import probe_mel

    spec = Bundle.open(folder / "x.melrt").manifest.spec
    for seed in range(6):
        np.save(folder / "speech" / f"{seed}.npy", probe_mel(spec, 1000, seed) - np.float32(2))


def _calibrate(folder: Path) -> None:
    _command(
        "calibrate", folder / "x.melrt", folder / "speech", "--force", "--budget", 10, "--silence-budget", 100, "--windows", 8,
        "--report", folder / "int8.html",
    )  # fmt: skip


def _planned(folder: Path) -> None:
    _calibrated(folder)
    _calibrate(folder)


def _requantize(folder: Path) -> None:
    """Give the INT8 graphs the weights of FP32, which are not within the budget: INT8 is written because it must be."""
    _command("requantize", folder / "x.melrt", folder / "checkpoint", folder / "speech", "--force")


def _engine(*arguments: object) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        os.environ["MELRT_CACHE"] = str(folder / "cache")
        _command("build", folder / "x.melrt", *arguments)

    return run


def _add(folder: Path) -> None:
    """Add two files to a bundle, one of them in place of an earlier one, as `melrt build` adds engines."""
    noise = np.random.default_rng(time.monotonic_ns())
    bundle = Bundle.open(folder / "x.melrt")
    try:
        bundle.add_all([(Artifact.of(f"{name}.plan", data, "plan"), data) for name in "ab" for data in [noise.bytes(200_000)]])
    except OSError as error:  # a command prints it
        raise SystemExit(str(error)) from error


def _speech(folder: Path) -> None:
    _voice(folder)
    (folder / "mels").mkdir()
    spec = Bundle.open(folder / "x.melrt").manifest.spec
    for i in range(8):
        np.save(folder / "mels" / f"{i}.npy", np.full((spec.n_mels, 30 + 20 * i), -4 + i / 4, np.float32))


def _bulk(folder: Path) -> None:
    _command("bulk", folder / "x.melrt", "--input", folder / "mels", "-o", folder / "out", "--backend", "onnxruntime")


def _parquet(folder: Path) -> None:
    _command("bulk", folder / "x.melrt", "--input", folder / "mels", "-o", folder / "out", "--to", "parquet", "--backend", "onnxruntime")


def _synth(folder: Path) -> None:
    _command("synth", folder / "x.melrt", folder / "mels" / "7.npy", "-o", folder / "out" / "7.wav", "--backend", "onnxruntime")


def _whole_audio(count: int) -> Callable[[Path], bool]:
    def check(folder: Path) -> bool:
        files = list((folder / "out").glob("[!.]*.wav"))
        hop = Bundle.open(folder / "x.melrt").manifest.spec.hop
        for file in files:
            assert soundfile.info(file).frames == np.load(folder / "mels" / f"{file.stem}.npy").shape[1] * hop, f"{file.name} is cut"
        return len(files) == count

    return check


def _whole_tables(folder: Path) -> bool:
    import pyarrow.parquet

    names = [name for file in (folder / "out").glob("[!.]*.parquet") for name in pyarrow.parquet.read_table(file)["name"].to_pylist()]
    assert len(names) == len(set(names)), "an utterance is there twice"
    return len(names) == 8


def _recordings(folder: Path) -> None:
    from tests.export.training.runs import write_config, write_recordings

    write_recordings(folder, seconds=0.5)
    often = ("log_every = 5", "log_every = 1"), ("validate_every = 10", "validate_every = 2"), ("save_every = 10", "save_every = 1")
    write_config(folder, 3, ("mel = 5.0\n", ""), *often)


def _train(folder: Path) -> None:
    resume = ["--resume"] if (folder / "run" / "training.safetensors").exists() else []
    _command("train", folder / "x.toml", *resume)


def _whole_run(folder: Path) -> bool:
    found = [path.parent for path in (folder / "run").glob("[!.]*/model.safetensors")]
    for checkpoint in found:
        load_checkpoint(checkpoint)
    state = folder / "run" / "training.safetensors"
    if state.exists():
        load_checkpoint(state)
    return state.exists() and {"best", "last"} <= {path.name for path in found}


KINDS = {
    "export": Kind(_checkpoint, _export, _whole_bundle), "add": Kind(_voice, _add, _whole_bundle),
    "synth": Kind(_speech, _synth, _whole_audio(1)), "bulk": Kind(_speech, _bulk, _whole_audio(8)),
    "parquet": Kind(_speech, _parquet, _whole_tables), "train": Kind(_recordings, _train, _whole_run),
    "calibrate": Kind(_calibrated, _calibrate, _whole_bundle), "requantize": Kind(_planned, _requantize, _whole_bundle),
    "tensorrt": Kind(_voice, _engine("--flavor", "tensorrt_rtx"), _whole_bundle),
    "fused": Kind(_voice, _engine("--engine", "fused", "--gpus", "9.0"), _whole_bundle),
}  # fmt: skip


def attack(name: str, count: int) -> tuple[collections.Counter[str], list[str]]:
    """Run a command with the faults of the seeds 0 to `count` - 1, and return the number of each end and the failures."""
    kind, ends, failures = KINDS[name], collections.Counter[str](), []
    with tempfile.TemporaryDirectory() as home:
        prepared, folder = Path(home) / "prepared", Path(home) / "case"
        prepared.mkdir()
        assert not _in_child(lambda: kind.prepare(prepared)), "the files of the test cannot be made"
        shutil.copytree(prepared, folder)
        started, begin = time.time(), time.monotonic()
        error = _in_child(lambda: kind.run(folder), _Fault(folder))
        assert not error, f"{name} fails without a fault: {error}"
        seconds = time.monotonic() - begin
        largest = max(found.st_size for path in folder.rglob("*") if path.is_file() and (found := path.stat()).st_mtime >= started)
        most = {"file": int(operations(folder).read_text()), "write": largest, "time": seconds, "full": largest}
        for seed in range(count):
            noise = np.random.default_rng(seed)
            if noise.random() < 0.5:  # without an earlier result
                shutil.rmtree(folder)
                shutil.copytree(prepared, folder)
            fault = FAULTS[seed % len(FAULTS)]
            point = noise.uniform(0, most[fault])
            end = _in_child(lambda: kind.run(folder), _Fault(folder, fault, point))
            ends[f"{fault}: {'done' if not end else 'killed' if end == 'killed' else 'refused'}"] += 1
            failures += [f"{name}, seed {seed}, {fault} {point:.2f}: {text}" for text in _examine(kind, folder, fault, end)]
    return ends, failures


def _examine(kind: Kind, folder: Path, fault: str, end: str) -> list[str]:
    """Return the faults of a result after a command ended, and of the same command run again."""
    wrong = []
    if fault == "full" and end and ("Traceback" in end or tempfile.gettempdir() not in end or end == "killed"):
        wrong.append(f"a full disk gives {end[-300:]!r}")
    try:
        kind.check(folder)
        error = _in_child(lambda: kind.run(folder))
        if error:
            wrong.append(f"the next run fails: {error[-300:]!r}")
        elif not kind.check(folder):
            wrong.append("the next run leaves something undone")
    except (MelrtError, AssertionError, OSError, ValueError) as damage:
        wrong.append(f"not whole: {damage}")
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*") if is_temporary(path.name)]
    return wrong + ([f"left behind: {left}"] if left else [])


class _Fault:
    """A fault that happens at a point: an operation on a file, a size of a file in bytes, or a time in seconds."""

    def __init__(self, folder: Path, kind: str = "none", point: float = 0) -> None:
        self._folder, self._kind, self._point, self._count = str(folder), kind, point, 0

    def install(self) -> None:
        """Let it happen in this process."""
        if self._kind == "time":
            signal.setitimer(signal.ITIMER_REAL, max(self._point, 1e-3))
        elif self._kind in ("write", "full"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self._kind == "write" else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self._point), resource.RLIM_INFINITY))
        else:
            sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and arguments and str(arguments[0]).startswith(self._folder):
            self._count += 1
            if self._kind == "file" and self._count > self._point:
                os.kill(os.getpid(), signal.SIGKILL)

    def save(self) -> None:
        """Write down the number of operations on files, for the process that started this one."""
        operations(Path(self._folder)).write_text(str(self._count))


def operations(folder: Path) -> Path:
    """Return the file with the number of operations of a run without a fault."""
    return folder.with_name("operations")


def _in_child(run: Callable[[], None], fault: _Fault | None = None) -> str:
    """Run in a process of its own. Return nothing if it succeeds, `killed`, or what it printed."""
    with tempfile.TemporaryFile("w+") as printed:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(run, fault, printed.fileno())
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        text = printed.read()
    if os.WIFSIGNALED(status):
        return "killed"
    return "" if os.WEXITSTATUS(status) == 0 else text or f"exit code {os.WEXITSTATUS(status)}"


def _child(run: Callable[[], None], fault: _Fault | None, output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(LONGEST)
    code = 1
    try:
        if fault:
            fault.install()
        run()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        print(stop.code)
    except BaseException:
        traceback.print_exc()
    if fault and not code:
        fault.save()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    count = int(sys.argv[1]) if sys.argv[1:] else 60
    failed = 0
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"MELRT_CACHE": f"{home}/cache", "MELRT_KEY": f"{home}/engine.key", "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        for name in sys.argv[2:] or KINDS:
            ends, failures = attack(name, count)
            print(f"{name}: {count} faults, {len(failures)} failures; {dict(sorted(ends.items()))}", flush=True)
            print("\n".join(failures[:40]), end="\n" if failures else "", flush=True)
            failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
