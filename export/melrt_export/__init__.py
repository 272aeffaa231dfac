"""Reading and training of voices: this package reads checkpoints, exports and verifies bundles, and builds engines. It needs PyTorch."""
