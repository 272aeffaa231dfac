"""melrt runs MelGAN voices: `Vocoder.load("voice.melrt")(mel)` gives the waveform."""

from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.files.wav import write_wav
from melrt.mel.spec import MelSpec
from melrt.vocoder import Vocoder

__all__ = ["Bundle", "MelSpec", "MelrtError", "Vocoder", "write_wav"]
__version__ = "0.1.0"
