"""Adding weight norm to a network in training, and folding it into plain weights."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from melrt_export.checkpoints.checkpoint import fold_weight_norm

Network = TypeVar("Network", bound=nn.Module)


def add_weight_norm(network: Network) -> Network:
    """Split the weight of every convolution into magnitude and direction, in place. The output of the network does not change.

    The initial weights are PyTorch's default. melgan-neurips draws weights from a normal distribution with deviation 0.02 after it has
    added the norm, but the norm's hook overwrites them with weights computed from magnitude and direction, so its networks start from
    PyTorch's default too.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            weight_norm(layer)
    return network


def folded_weights(network: nn.Module) -> dict[str, np.ndarray]:
    """Return the network's tensors in float32 under their plain names, with the norm folded into the weights."""
    return fold_weight_norm({name: value.detach().float().cpu().numpy() for name, value in network.state_dict().items()})
