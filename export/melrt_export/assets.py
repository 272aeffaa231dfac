"""Files that ship with melrt: the demo voice and a recording of its speaker."""

from __future__ import annotations

from pathlib import Path

DEMO_VOICE = Path(__file__).parent / "demo_voice"
# Held out of the demo voice's training.
RECORDING = DEMO_VOICE / "LJ001-0032.wav"
