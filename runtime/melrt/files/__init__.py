"""Files: atomic replacement, audio, mels."""
