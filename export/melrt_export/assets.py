"""Files that ship with melrt: the demo voice and a recording of its speaker."""

from __future__ import annotations

from pathlib import Path

DEMO_VOICE = Path(__file__).parent / "demo_voice"
# This recording was held out of the training of the demo voice.
RECORDING = DEMO_VOICE / "LJ001-0032.wav"
