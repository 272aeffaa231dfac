"""Weight norm on a network under training, and off it again."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from melrt_export.checkpoints.checkpoint import fold_weight_norm

Network = TypeVar("Network", bound=nn.Module)


def add_weight_norm(network: Network) -> Network:
    """Split the weight of every convolution into magnitude and direction, in place; the network's function stays the same.

    The first weights are PyTorch's own. melgan-neurips draws them from a normal distribution with deviation 0.02 after the norm was
    added, but there the hook of the norm computes them anew from magnitude and direction, so that its networks too start from PyTorch's.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            weight_norm(layer)
    return network


def folded_weights(network: nn.Module) -> dict[str, np.ndarray]:
    """The network's tensors with the norm folded into plain weights, float32, under their plain names."""
    return fold_weight_norm({name: value.detach().float().cpu().numpy() for name, value in network.state_dict().items()})
