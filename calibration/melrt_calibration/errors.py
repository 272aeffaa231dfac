"""The one error of calibration."""

from __future__ import annotations

from melrt.errors import MelrtError


class CalibrationError(MelrtError, ValueError):
    """Calibration data or settings from which no INT8 can be made."""
