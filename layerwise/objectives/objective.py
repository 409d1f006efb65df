"""What every local objective is: a per-sample part and a part that couples the batch.

The cut between them is what makes exact training under a memory budget possible: `represent` may run in
micro-batches, `loss` needs the representations of the whole batch at once, and these are small.

Letters: B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layerwise.nets.module import Encoded


@dataclass(frozen=True)
class Context:
    """What a loss may know beside the representations."""

    generator: torch.Generator
    """For every random draw; seeded by module and step, on the CPU."""
    labels: dict[str, Tensor] = field(default_factory=dict)
    """Name to (B, ...) labels of the batch, on the device; empty for self-supervised objectives."""


def at_least_float32(values: Tensor) -> Tensor:
    """Sums and logarithms are not taken in the half precision that autocast gives."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class Objective(nn.Module, ABC):
    """A local loss with parameters of its own, thrown away after training."""

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """Each (B, ...): all that `loss` needs of a micro-batch. Sample by sample, and view by view where the settings
        ask for several (B is then their number times that of the samples); the default is `(z, c)`.
        """
        return (encoded.z,) if encoded.c is encoded.z else (encoded.z, encoded.c)

    @abstractmethod
    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        """Scalar mean over the batch, in nats. The representations are (B, V, ...) where the settings ask for V > 1
        views of each sample.
        """
