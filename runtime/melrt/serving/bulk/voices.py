"""The voices of a bulk run: one for all utterances, or one for each row of a list or parquet file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from melrt.bundle import MANIFEST, Bundle
from melrt.checks import check_fields
from melrt.errors import BundleError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import ENDS, Ends
from melrt.residency import Residency
from melrt.vocoder import Options, Vocoder
from melrt.voices import SUFFIX, Voices

# Seconds between two looks at a bundle on disk: a run keeps the voices with which it began.
NEVER = 1e9


@dataclass(frozen=True, slots=True)
class VoiceSettings:
    """The voices of a run, and how they are loaded, in this process or in each actor."""

    bundles: Mapping[str, Bundle]
    """Bundle of each voice, as it is when the run begins; under the same path on every node."""
    by_row: bool = False
    """True if rows name their voices; False for one voice that the command names."""
    edges: Ends = "voice"
    """Ends of an utterance."""
    device: str = "auto"
    """Device, see `Vocoder.load`."""
    precision: str = "auto"
    """Precision, see `Vocoder.load`."""
    backend: str = "auto"
    """Backend, see `Vocoder.load`."""
    threads: int | None = None
    """CPU threads, see `Vocoder.load`."""
    memory: int | None = None
    """Limit in bytes for the loaded voices, see `Residency`."""

    def __post_init__(self) -> None:
        check_fields(self, {"edges": ENDS}, "bulk (--edges)")

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of each voice's graphs, which stays the same when engines or windows are added to its bundle."""
        return {name: _fingerprint(bundle) for name, bundle in self.bundles.items()}


class LoadedVoices:
    """The voices of a run. Each is loaded for its first utterance."""

    def __init__(self, settings: VoiceSettings) -> None:
        """Load the first voice, so that a device or backend that cannot run here is reported before any utterance.

        Raises:
            MelrtError: The voice cannot be loaded.
        """
        self.limited = settings.memory is not None
        """True if a voice may need the memory of others."""
        self._fingerprints = settings.fingerprints
        self._specs = {name: bundle.manifest.spec for name, bundle in settings.bundles.items()}
        paths = [bundle.path for bundle in settings.bundles.values()]
        self._voices = Voices(
            paths, device=settings.device, precision=settings.precision, backend=settings.backend,
            threads=settings.threads, options=Options(edges=settings.edges), residency=Residency(settings.memory, check_seconds=NEVER),
        )  # fmt: skip
        try:
            self[next(iter(settings.bundles))]
        except BaseException:
            self._voices.close(drain=False)
            raise

    def __getitem__(self, name: str) -> Vocoder:
        """Return a voice.

        Raises:
            MelrtError: It cannot be loaded, or is another one than at the beginning of the run.
        """
        vocoder = self._voices[name]
        if _fingerprint(vocoder.bundle) != self._fingerprints[name]:
            raise BundleError(f"the voice {name} was replaced during the run. Give another --output for the new voice.")
        return vocoder

    def spec(self, name: str) -> MelSpec:
        """Return the mel convention of a voice, without loading it."""
        return self._specs[name]

    def __enter__(self) -> LoadedVoices:
        return self

    def __exit__(self, *_: object) -> None:
        self._voices.close()


def find_voices(path: Path) -> dict[str, Path]:
    """Return the paths of bundles by the names of their voices: those in a folder, or the one at `path`.

    Raises:
        BundleError: Neither is a bundle.
    """
    path = path.absolute()
    found = [] if (path / MANIFEST).exists() else [manifest.parent for manifest in sorted(path.glob(f"*{SUFFIX}/{MANIFEST}"))]
    return {bundle.name.removesuffix(SUFFIX): bundle for bundle in found or [Bundle.open(path).path]}


def _fingerprint(bundle: Bundle) -> str:
    graphs = sorted(artifact.sha256 for artifact in bundle.manifest.artifacts if artifact.kind == "onnx")
    return hashlib.sha256("".join(graphs).encode()).hexdigest()
