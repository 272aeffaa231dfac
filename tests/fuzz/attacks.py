"""Attack melrt with damaged and hostile files and arrays: `make fuzz`. Each case depends on its seed alone.

Usage: python -m tests.fuzz.attacks [BUNDLES CHECKPOINTS ARCHIVES RECORDS HDF5 MELS ARRAYS]

A case fails if it raises anything but a MelrtError, takes more than 10 s of processor time, or leaves a file outside its folder. A kind
fails if it makes the process more than 1 GiB larger.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tests.fuzz import honest
from tests.fuzz.records import RECORDS

from melrt import Vocoder
from melrt.bundle import MANIFEST, Bundle
from melrt.bundle.manifest import Artifact
from melrt.errors import MelrtError
from melrt.files.mels import read_mel
from melrt.mel.spec import MelSpec

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "bundles" / "tiny.melrt"
# Of processor time: other processes may use the machine as well. The second limit finds what waits without end.
MAX_SECONDS, LONGEST_SECONDS = 10, 120
MAX_KILOBYTES = 1 << 20
MAKE_FUZZ = {
    "bundles": 10_000, "checkpoints": 5_000, "archives": 2_000, "records": 5_000, "hdf5": 1_000, "mels": 5_000, "arrays": 5_000,
}  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**400, 1e308, float("nan"), float("-inf"), "", "x" * 5000, "\x1b[31m", "../../x", "\ud800", [], {}, [[]],
    [None], {"a": 1}, "1e999", 2**63,
)  # fmt: skip


def bundle_case(noise: np.random.Generator, folder: Path) -> None:
    """Damage a manifest or a file, make the hashes agree in half of the cases, and load, synthesize and add."""
    path = folder / "x.melrt"
    shutil.copytree(TINY, path)
    names = sorted(file.name for file in TINY.iterdir())
    if noise.random() < 0.5:
        name = MANIFEST
        values = json.loads((path / name).read_text())
        _change(values, noise)
        (path / name).write_text(json.dumps(values))
    else:
        name = names[noise.integers(len(names))]
        (path / name).write_bytes(honest.damaged((path / name).read_bytes(), noise))
        if name != MANIFEST and noise.random() < 0.7:
            values = json.loads((path / MANIFEST).read_text())
            entry = next(entry for entry in values["artifacts"] if entry["file"] == name)
            entry |= {key: getattr(Artifact.of(name, (path / name).read_bytes(), "x"), key) for key in ("size", "sha256")}
            (path / MANIFEST).write_text(json.dumps(values))
    bundle = Bundle.open(path)
    bundle.manifest.dumps()
    bundle.probe()
    with Vocoder.load(bundle, device="cpu", backend="onnxruntime", threads=1) as vocoder:
        vocoder(np.zeros((bundle.manifest.spec.n_mels, 20), np.float32))
    bundle.add(Artifact.of("new.json", b"{}", "plan"), b"{}")


def checkpoint_case(noise: np.random.Generator, folder: Path) -> None:
    """Damage one file of a checkpoint of a random project, or exchange a value in its settings."""
    from melrt_export.checkpoints import load_checkpoint

    source = honest.checkpoints()[noise.integers(len(honest.checkpoints()))]
    path = Path(shutil.copytree(source, folder / "checkpoint"))
    files = sorted(path.iterdir())
    file = files[noise.integers(len(files))]
    file.chmod(0o600)
    data = file.read_bytes()
    if file.suffix == ".json" and noise.random() < 0.7:
        values = json.loads(data)
        _change(values, noise)
        data = json.dumps(values).encode("utf-8", "surrogatepass")
    else:
        data = honest.damaged(data, noise)
    file.write_bytes(data)
    load_checkpoint(path if noise.random() < 0.8 else file)


def archive_case(noise: np.random.Generator, folder: Path) -> None:
    """Damage an archive that holds a checkpoint."""
    from melrt_export.checkpoints import load_checkpoint

    packed = honest.archives()[noise.integers(len(honest.archives()))]
    path = folder / packed.name
    data = packed.read_bytes()
    path.write_bytes(honest.damaged(data, noise) if noise.random() < 0.8 else data)
    load_checkpoint(path)


def record_case(noise: np.random.Generator, folder: Path) -> None:
    """Exchange a value in a record, or damage its text."""
    name = list(RECORDS)[noise.integers(len(RECORDS))]
    text, read = RECORDS[name]
    if name != "training" and noise.random() < 0.7:
        values = json.loads(text)
        _change(values, noise)
        text = json.dumps(values).encode()
    else:
        text = honest.damaged(text, noise)
    read(text, folder)


def mel_case(noise: np.random.Generator, folder: Path) -> None:
    """Damage a file that holds a mel, or a recording, whose mel is computed."""
    kinds = honest.mels() if noise.random() < 0.5 else honest.recordings()
    suffix, data = kinds[noise.integers(len(kinds))]
    file = folder / f"mel{suffix}"
    file.write_bytes(honest.damaged(data, noise))
    np.asarray(read_mel(file, MelSpec()))


def hdf5_case(noise: np.random.Generator, folder: Path) -> None:
    """Overwrite bytes of an HDF5 file: weights, statistics, or what a user takes for a mel."""
    from melrt_export.checkpoints.hdf5 import read_hdf5

    file = folder / "x.h5"
    file.write_bytes(honest.overwritten(honest.hdf5()[noise.integers(len(honest.hdf5()))], noise))
    if noise.random() < 0.1:
        read_mel(file, MelSpec())
    read_hdf5(file)


_vocoder: list[Vocoder] = []


def array_case(noise: np.random.Generator, _folder: Path) -> None:
    """Pass an array of an odd shape, type or content to a vocoder."""
    if not _vocoder:
        _vocoder.append(Vocoder.load(TINY, device="cpu", backend="onnxruntime", precision="fp32", threads=1))
    shape = tuple(int(size) for size in noise.choice([0, 1, 2, 3, 20, 79, 80, 81], noise.integers(0, 5)))
    types = [np.float32, np.float64, np.float16, np.int64, np.uint8, np.bool_, np.complex64, object, "U3", "S2", "M8[s]", "V4", ">f4"]
    mels: list[Any] = [
        np.zeros((80, 20), np.float32) - 3, np.full((80, 5), np.nan), np.full((80, 5), 1e38),
        np.ma.masked_array(np.zeros((80, 5)), mask=True), [[1.0], [2.0, 3.0]], None, "mel", b"mel", {},
        np.broadcast_to(np.float32(0), (80, 1000)), np.zeros((80, 20), np.float32).T,
    ]  # fmt: skip
    choice = noise.integers(2 * len(mels))
    mel = mels[choice] if choice < len(mels) else np.zeros(shape, types[noise.integers(len(types))])  # type: ignore[call-overload]
    calls: list[Callable[[], Any]] = [
        lambda: _vocoder[0](mel), lambda: _vocoder[0].submit(mel).result(), lambda: list(_vocoder[0].stream(iter([mel, mel]))),
    ]  # fmt: skip
    calls[noise.integers(3)]()


CASES: dict[str, Callable[[np.random.Generator, Path], None]] = {
    "bundles": bundle_case, "checkpoints": checkpoint_case, "archives": archive_case, "records": record_case, "hdf5": hdf5_case,
    "mels": mel_case, "arrays": array_case,
}  # fmt: skip


def attack(kind: str, count: int) -> tuple[collections.Counter[str], list[str]]:
    """Run the cases with seeds 0 to `count` - 1, and return the number of each result and the failures."""
    results: collections.Counter[str] = collections.Counter()
    failures = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handlers = {number: signal.signal(number, _too_long) for number in (signal.SIGPROF, signal.SIGALRM)}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = Path(name)
        for seed in range(count):
            folder = home / "case"
            folder.mkdir()
            _limit(MAX_SECONDS, LONGEST_SECONDS)
            try:
                CASES[kind](np.random.default_rng(seed), folder)
                results["accepted"] += 1
            except MelrtError as error:
                results[type(error).__name__] += 1
            except Exception as error:
                failures.append(f"{kind}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                _limit(0, 0)
            shutil.rmtree(folder)
            if outside := [str(file) for file in home.rglob("*")]:
                failures.append(f"{kind}, seed {seed}: wrote {outside}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if used > MAX_KILOBYTES:
        failures.append(f"{kind}: {used >> 10} MiB more than before")
    return results, failures


def _limit(processor: float, total: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, total)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {MAX_SECONDS} s of processor time, or {LONGEST_SECONDS} s")


def _change(values: Any, noise: np.random.Generator) -> None:
    """Exchange one value somewhere in a JSON document, or remove it."""
    places = list(_places(values))
    container, key = places[noise.integers(len(places))]
    if noise.random() < 0.15:
        del container[key]
    else:
        container[key] = _ODD[noise.integers(len(_ODD))]


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from _places(values[key])


def main() -> int:
    counts = dict(zip(CASES, map(int, sys.argv[1:]), strict=True)) if sys.argv[1:] else MAKE_FUZZ
    failed = 0
    with tempfile.TemporaryDirectory() as home:
        os.environ["MELRT_CACHE"], os.environ["MELRT_KEY"] = f"{home}/cache", f"{home}/engine.key"
        for kind, count in counts.items():
            results, failures = attack(kind, count)
            print(f"{kind}: {count} cases, {len(failures)} failures; {dict(results)}", flush=True)
            print("\n".join(failures[:40]), flush=True)
            failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
