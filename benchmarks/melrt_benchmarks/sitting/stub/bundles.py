"""Copies of a voice whose engines are the stub's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import sign
from melrt.planning.windows import short_windows
from melrt_benchmarks.sitting.stub import engine

WINDOW, BATCH = 256, 16


class Bundles:
    """Copies of a voice with stub engines."""

    def __init__(self, voice: Path, folder: Path) -> None:
        from cuda.core import Device

        self._voice, self._folder = voice, folder
        device = Device(0)
        self._arch = device.arch
        self._capability = f"{device.compute_capability.major}.{device.compute_capability.minor}"
        self._made: dict[str, Path] = {}

    def make(self, name: str = "plain", **faults: object) -> Path:
        """Return the bundle of this name with engines that have these faults; it is made once."""
        if name not in self._made:
            path = self._folder / f"{name}.melrt"
            bundle = Bundle.open(shutil.copytree(self._voice, path))
            for graph in ("edge", "interior"):
                self._add(bundle, graph, faults)
            self._made[name] = path
        return self._made[name]

    def _add(self, bundle: Bundle, graph: str, faults: dict[str, object]) -> None:
        spec, field = bundle.manifest.spec, bundle.manifest.receptive_field
        (model,) = bundle.find("onnx", graph=graph, precision="fp32")
        target = {
            "flavor": "tensorrt", "version": engine.VERSION, "compute_capability": self._capability, "source": model.sha256,
            "gpu": "", "refittable": False,
        }  # fmt: skip
        if graph == "edge":
            profiles = [_profile((1, spec.n_mels, field.smallest_input), (BATCH, spec.n_mels, WINDOW))]
        else:
            shapes = [(1 << power, WINDOW) for power in range(5)]
            shapes += [(batch, length) for length in short_windows(field, WINDOW) for batch in (1, 4, BATCH)]
            profiles = [_profile(shape, shape) for shape in ((batch, spec.n_mels, frames) for batch, frames in shapes)]
        data = engine.plan_bytes(
            bands=spec.n_mels, hop=spec.hop, left=field.left, right=field.right, edge=int(graph == "edge"), profiles=profiles,
            arch=self._arch, **faults,
        )  # fmt: skip
        entry = Artifact.of(f"{graph}.fp32.engine", data, "engine", graph=graph, precision="fp32", target=target)
        bundle.add(sign(entry), data)


def _profile(smallest: tuple[int, ...], largest: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return smallest, largest, largest


@contextmanager
def stub_bundles(voice: Path) -> Iterator[Bundles]:
    """Install the stub in this process, with a cache and a key of its own, and yield bundles with stub engines."""
    engine.install()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MELRT_CACHE"], os.environ["MELRT_KEY"] = f"{folder}/cache", f"{folder}/key"
        yield Bundles(voice, Path(folder))
