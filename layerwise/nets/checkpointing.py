"""Activation checkpointing (Chen et al. 2016): keep a module's activations between its blocks only, and compute those
inside a block again when the backward pass comes to it.

Same gradients, to the bit, for about one more forward pass. It helps where micro-batches cannot: under batch
statistics, or where a single sample is too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(module: nn.Module) -> int:
    """Checkpoint each member of every sequence of blocks (`nn.Sequential`) in the module; returns their number."""
    found = 0
    for child in module.children():
        if isinstance(child, nn.Sequential):
            for block in child:
                # The block stays what it is, and so do the names of its weights: only its forward goes another way.
                block.forward = _checkpointed(block)
                found += 1
        else:
            found += checkpoint_blocks(child)
    return found


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    """The block's forward, checkpointed.

    Its input is all that is kept, so the block must not write over it, as an in-place ReLU does: the first call works
    on a copy, and so do the others if that copy was written over.
    """
    forward, overwrites = block.forward, True

    def on_copies(*inputs: Any) -> Any:
        nonlocal overwrites
        copies = [each.clone() if isinstance(each, Tensor) else each for each in inputs]
        given = forward(*copies)
        overwrites = any(copy._version > 0 for copy in copies if isinstance(copy, Tensor))
        return given

    def through(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        run = on_copies if overwrites else forward
        return checkpoint(run, *inputs, use_reentrant=False, context_fn=partial(_contexts, block))

    return through


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_held(block)


@contextmanager
def _statistics_held(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not count a batch twice in its running statistics."""
    norms = [layer for layer in block.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    before = [(layer, layer.momentum) for layer in norms if layer.training and layer.num_batches_tracked is not None]
    for layer, _ in before:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.sub_(1)
