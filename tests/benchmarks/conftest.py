"""Voices that need PyTorch."""

from tests.torch_voices import *  # noqa: F403
