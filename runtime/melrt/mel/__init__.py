"""Mel conventions: specification, conversion, features from audio, level check."""

from melrt.mel.convert import convert_mel
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec

__all__ = ["MelSpec", "Normalization", "convert_mel"]
