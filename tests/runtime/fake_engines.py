"""Engines of the fake TensorRT for tests."""

from __future__ import annotations

from tests.runtime.fake_gpu import VERSION, engine_bytes

from melrt.bundle import Artifact, Bundle

WINDOW, BATCH = 48, 4
TARGET: dict[str, object] = {
    "refittable": False,
    "flavor": "tensorrt_rtx",
    "version": VERSION,
    "compute_capability": "9.0",
    "gpu": "Fake GPU",
}


def add_engines(bundle: Bundle, **facts: object) -> Bundle:
    """Add an FP32 engine of each graph. `facts` replace values of TARGET or of the engine's header."""
    for graph, smallest in (("edge", 4), ("interior", WINDOW)):
        (model,) = bundle.find("onnx", graph=graph, precision="fp32")
        target = TARGET | {key: value for key, value in facts.items() if key in TARGET}
        options = {key: value for key, value in facts.items() if key not in TARGET}
        data = engine_bytes(bundle.read(model), (1, 80, smallest), (BATCH, 80, WINDOW), **options)
        bundle.add(Artifact.of(f"{graph}.fp32.engine", data, "engine", graph=graph, precision="fp32", target=target), data)
    return Bundle.open(bundle.path)
