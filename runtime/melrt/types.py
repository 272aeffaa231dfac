"""Array types that the packages share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Mel = NDArray[np.float32]
"""Log-mel frames, (M, T) or (B, M, T)."""
Audio = NDArray[Any]
"""Samples, (N,) or (B, N): float32, or int16 where a vocoder was loaded so."""
FloatAudio = NDArray[np.float32]
"""Samples in [-1, 1], (N,) or (B, N)."""
