"""Checkpoints of MelGAN and HiFi-GAN projects, and of melrt itself."""

from melrt_export.checkpoints.checkpoint import Checkpoint
from melrt_export.checkpoints.load import load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]
