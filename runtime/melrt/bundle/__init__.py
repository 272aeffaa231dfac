"""The voice bundle: its manifest and its folder."""

from melrt.bundle.folder import PROBE_AUDIO, PROBE_MEL, Bundle
from melrt.bundle.manifest import MANIFEST, Artifact, Manifest

__all__ = ["MANIFEST", "PROBE_AUDIO", "PROBE_MEL", "Artifact", "Bundle", "Manifest"]
