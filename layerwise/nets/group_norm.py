"""Batch normalisation to group normalisation (Wu & He 2018), which looks at one sample at a time.

So a network may go through its batches in micro-batches, with the gradients of the whole batch.
"""

from __future__ import annotations

import copy
import math

from torch import nn


def group_norm(network: nn.Module, groups: int = 32) -> nn.Module:
    """A copy of the network with each batch normalisation replaced by a group normalisation of as many channels.

    Scale and shift are taken over; running statistics have no part in it any more, so a trained network has to be
    trained again.

    Args:
        groups: of channels that are normalised together; where the channels cannot be divided by it, as many as divide
            both.
    """
    return _converted(copy.deepcopy(network), groups)


def _converted(module: nn.Module, groups: int) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        count = module.num_features
        found = nn.GroupNorm(math.gcd(groups, count), count, eps=module.eps, affine=module.affine)
        if module.affine:
            found.weight, found.bias = module.weight, module.bias
        return found.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _converted(child, groups))
    return module
