"""The generator: its configuration, the PyTorch network and its receptive field."""
