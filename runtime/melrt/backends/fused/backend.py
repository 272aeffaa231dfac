"""Fused engines as a backend: everything but the launches is that of TensorRT's engines."""

from __future__ import annotations

from collections.abc import Mapping

from melrt.backends.fused.engine import FusedEngine, LoadedProgram
from melrt.backends.fused.program import Program
from melrt.backends.tensorrt.backend import EngineBackend
from melrt.backends.tensorrt.gpu_arrays import current_device
from melrt.backends.tensorrt.interface import Profile, static_windows
from melrt.backends.tensorrt.kernels import Kernels
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError
from melrt.planning.windows import GraphKind, short_windows

# An H100 is as fast per window with 16 windows as with 64 (docs/fused.md). The kernels take any length and batch: these limit the
# memory of a slot.
WINDOW = 256
BATCH = 16
# Batches of a short window. Its runs cost little more than their launches, so that places may stay empty.
SHORT_BATCHES = (1, 4)
# The window has at least this many times the frames of its context, which is computed and discarded.
_CONTEXTS = 4


class Fused(EngineBackend):
    """A voice's fused engine on one GPU."""

    name = "fused"
    extra = "fused"
    _loaded: LoadedProgram | None = None

    def _open_engines(self, bundle: Bundle, artifacts: Mapping[GraphKind, Artifact]) -> None:
        artifact = artifacts["edge"]
        program = Program.loads(bundle.read(artifact), artifact.file)
        spec, field = bundle.manifest.spec, bundle.manifest.receptive_field
        if (program.bands, program.hop) != (spec.n_mels, spec.hop):
            raise BackendError(
                f"{artifact.file} takes {program.bands} bands and gives {program.hop} samples for each frame; this voice has {spec.n_mels} "
                f"and {spec.hop}. Build it again: melrt build {bundle.path} --engine fused"
            )
        self._loaded = LoadedProgram(program, self._device, self.gpu.compute_capability, artifact.file)
        window = max(WINDOW, _CONTEXTS * field.context, field.edge)
        largest = (BATCH, program.bands, window)
        profile = Profile((1, program.bands, max(field.smallest_input, 1)), largest)
        few = (*(batch for batch in SHORT_BATCHES if batch < BATCH), BATCH)
        windows = dict.fromkeys(short_windows(field, window), few) | static_windows([Profile((1, program.bands, window), largest)])
        self.engines |= {"edge": FusedEngine(self._loaded, profile), "interior": FusedEngine(self._loaded, profile, windows)}

    def _load_kernels(self) -> Kernels:
        assert self._loaded
        return Kernels(self._device, self._loaded.around)

    def close(self) -> None:
        super().close()
        if self._loaded:
            with current_device(self._device):
                self._loaded.close()
