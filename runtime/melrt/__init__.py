"""Runtime of melrt: `Vocoder.load("voice.melrt")(mel)` turns log-mel frames into a waveform."""

from melrt.bundle import Bundle
from melrt.errors import (
    AudioError,
    BackendError,
    BundleError,
    ClosedError,
    ConfigError,
    MelError,
    MelrtError,
    MissingExtraError,
    OverdueError,
    QueueFullError,
)  # fmt: skip
from melrt.files.audio import read_audio, write_wav
from melrt.files.output import Output
from melrt.mel import MelSpec, Normalization
from melrt.mel.convert import convert_mel
from melrt.mel.features import mel_from_audio
from melrt.planning.edges import Edges
from melrt.planning.windows import Policy
from melrt.residency import Residency, VoiceStats
from melrt.scheduling.limits import Limits
from melrt.scheduling.stats import Stats
from melrt.scheduling.stream import Stream, StreamPace
from melrt.vocoder import Options, Vocoder
from melrt.voices import Voices

__all__ = [
    "AudioError",
    "BackendError",
    "Bundle",
    "BundleError",
    "ClosedError",
    "ConfigError",
    "Edges",
    "Limits",
    "MelError",
    "MelSpec",
    "MelrtError",
    "MissingExtraError",
    "Normalization",
    "Options",
    "Output",
    "OverdueError",
    "Policy",
    "QueueFullError",
    "Residency",
    "Stats",
    "Stream",
    "StreamPace",
    "Vocoder",
    "VoiceStats",
    "Voices",
    "convert_mel",
    "mel_from_audio",
    "read_audio",
    "write_wav",
]  # fmt: skip
__version__ = "0.1.0"
