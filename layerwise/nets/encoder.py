"""Frozen modules as one network, which is what a probe reads and what leaves the run.

Letters: B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from layerwise.nets.module import Module


class Encoder(nn.Module):
    """Frozen modules, one after another: from inputs to the representation of the last, (B, C, *positions)."""

    def __init__(self, modules: Sequence[Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(modules)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.stages:
            encoded = module(x)
            x = encoded.output
        found: Tensor = encoded.c
        return found
