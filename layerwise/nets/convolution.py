"""Convolutions whose bias is added after them.

oneDNN, which convolves on CPUs, sums the gradient of a bias one number after another in float32. Over every position of
every patch of a batch that loses three to four digits, and the more the larger the batch: gradients of a batch and of
its micro-batches then differ by 1e-4. As an addition of its own, the same sum is taken pairwise. Parameters, their
names and their initial values are those of the base classes.

Letters: B batch, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn


class Convolution1d(nn.Conv1d):
    """(B, C, T) to (B, C', T')."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _with_bias(super()._conv_forward(input, weight, None), bias)


class Convolution2d(nn.Conv2d):
    """(B, C, h, w) to (B, C', h', w')."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _with_bias(super()._conv_forward(input, weight, None), bias)


def _with_bias(convolved: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return convolved
    # In place: a convolution does not keep its result for the way back.
    return convolved.add_(bias.view(-1, *[1] * (convolved.dim() - 2)))
