"""What the losses that compare two views of an image have in common: pooled representations and a projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwise.nets.module import Encoded
from layerwise.objectives.objective import at_least_float32


class Standardised(nn.Module):
    """(B, C) to mean 0 and deviation 1 over the batch, in training and validation alike; then scaled and shifted."""

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        standard = (x - x.mean(0)) * torch.rsqrt(x.var(0, correction=0) + 1e-5)
        return standard if self.weight is None or self.bias is None else standard * self.weight + self.bias


def projector(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Layers of these widths on (B, channels), standardised over the batch and rectified between them."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip([channels, *widths], widths, strict=False)):
        if number:
            layers += [Standardised(inputs), nn.ReLU()]
        layers.append(nn.Linear(inputs, outputs, bias=False))
    return nn.Sequential(*layers)


def pooled(encoded: Encoded) -> tuple[Tensor, ...]:
    """The mean of z over its positions, (B, C)."""
    z = encoded.z
    return (at_least_float32(z.flatten(2).mean(2) if z.ndim > 2 else z),)
