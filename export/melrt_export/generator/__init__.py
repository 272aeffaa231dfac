"""The generator: its configuration, the PyTorch network, the PyTorch reference and the receptive field."""
