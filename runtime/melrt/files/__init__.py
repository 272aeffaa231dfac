"""Reading and writing files: atomic replacement, WAV, mels."""
