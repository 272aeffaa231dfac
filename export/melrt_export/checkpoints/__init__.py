"""Checkpoints of MelGAN and HiFi-GAN projects, and of melrt itself."""

from melrt_export.checkpoints.checkpoint import Checkpoint
from melrt_export.checkpoints.load import load_checkpoint
from melrt_export.checkpoints.training_run import checkpoint_of

__all__ = ["Checkpoint", "checkpoint_of", "load_checkpoint"]
