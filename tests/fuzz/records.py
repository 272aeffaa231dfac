"""Honest records that melrt reads besides models and mels, and what reads each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from melrt.backends.base import Backend
from melrt.backends.fused.program import MAGIC, Argument, CompiledKernel, Launch, Program
from melrt.backends.fused.tuning import KEY, TunedKernel, Tuning
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.bundle.manifest import MANIFEST, Artifact
from melrt.scheduling.policy_tuning import PolicyTiming, record, recorded_policy
from melrt.serving.triton.voice import ServingConfig

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "bundles" / "tiny.melrt"


def _plan() -> bytes:
    from melrt_export.int8_plan import Int8Plan, LayerPlan, Range

    given = Range(-1.0, 2.0, "minmax")
    layers = LayerPlan("first", given, given, (1.0, 0.5)), LayerPlan("last", given, given, (1.0,), (2.0,), (3.0,))
    return Int8Plan(layers).dumps().encode()


def _read_plan(text: bytes, _folder: Path) -> None:
    from melrt_export.int8_plan import Int8Plan

    plan = Int8Plan.loads(text)
    assert Int8Plan.loads(plan.dumps()) == plan
    for layer in plan.layers:
        layer.quantize(np.ones((len(layer.weight_scales), 2)))


def _read_policy(text: bytes, folder: Path) -> None:
    bundle = Bundle.open(shutil.copytree(TINY, folder / "x.melrt"))
    entry = record(bundle, _backend(), [PolicyTiming(_backend().policy, 1.0)])
    bundle.add(Artifact.of(entry.file, text, "policy", precision=entry.precision, target=entry.target), text)
    recorded_policy(bundle, _backend())


@cache
def _backend() -> Backend:
    return open_backend(Bundle.open(TINY), BackendChoice("cpu", backend="onnxruntime", threads=1))


def _fused() -> bytes:
    kernel = CompiledKernel("first_0", 64, 32, 128, 1024, 64, 1, 40, 0, 0)
    launch = Launch("first", "first", (Argument("mel"), Argument("weights", 0), Argument("buffer", 0), Argument("steps")), 1)
    program = Program(80, 256, (1024,), 64, (launch,), {"9.0": {"first": kernel}}, {"9.0": (96, 32)}, "0" * 64, bytes(128))
    return program.dumps()[len(MAGIC) + 4 : -128]


def _read_fused(header: bytes, _folder: Path) -> None:
    program = Program.loads(MAGIC + len(header).to_bytes(4, "little") + header + bytes(128), "x.fused")
    program.dumps()
    program.places(1, 100)
    for kernels in program.gpus.values():
        for launch in program.launches:
            program.cubin(kernels[launch.kernel])
            launch.grid(kernels[launch.kernel], 1, 100)


def _tuning() -> bytes:
    kernels = {"first": TunedKernel("64 rows", ((2.5, 2.0),)), "last": TunedKernel("32 rows", ((1.0, 1.0),))}
    record = Tuning("9.0", "NVIDIA H200", "580.82.07", "2026-11-26", ("1 x 86", "16 x 256"), 40, 3, 0, ((300.0, 200.0),), kernels)
    return json.dumps(record.to_dict()).encode()


def _read_tuning(text: bytes, folder: Path) -> None:
    bundle = Bundle.open(shutil.copytree(TINY, folder / "x.melrt"))
    values = json.loads((bundle.path / MANIFEST).read_bytes())
    entry = asdict(Artifact.of("x.fused", b"", "engine")) | {"target": {KEY: None}}
    values["artifacts"].append(entry)
    (bundle.path / MANIFEST).write_bytes(json.dumps(values).encode().replace(b'{"tuning": null}', b'{"tuning": ' + text + b"}"))
    (read,) = Bundle.open(bundle.path).find("engine")
    if found := Tuning.of(read):
        assert all(line.isprintable() for line in found.lines())


def _read_training(text: bytes, folder: Path) -> None:
    from melrt_export.training.config import read_config

    (folder / "x.toml").write_bytes(text)
    read_config(folder / "x.toml")


RECORDS: dict[str, tuple[bytes, Callable[[bytes, Path], object]]] = {
    "plan": (_plan(), _read_plan),
    "policy": (json.dumps({"chosen": asdict(_backend().policy), "measured": []}).encode(), _read_policy),
    "triton": (ServingConfig().dumps().encode(), lambda text, _folder: ServingConfig.loads(text)),
    "fused": (_fused(), _read_fused),
    "tuning": (_tuning(), _read_tuning),
    "training": ((ROOT / "docs" / "recipes" / "melgan-neurips.toml").read_bytes(), _read_training),
}
"""The text of a record and the function that reads it, by kind."""
