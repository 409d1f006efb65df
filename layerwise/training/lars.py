"""LARS: a learning rate for each weight tensor (You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional
Networks", algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum descent whose step on a tensor w with gradient g is scaled by trust * |w| / (|g| + weight_decay * |w|).

    Where |w| or the divisor is 0 the scale is 1, so that weights that begin at zero can leave it. A group with
    `adapted=False` always has the scale 1, and then is plain momentum descent.

    Args:
        lr: the global learning rate, no unit.
        momentum: decay of the sum of the steps, each step.
        weight_decay: times the weight, added to its gradient.
        trust: by how much of its norm a weight may change in a step at lr 1 (the paper's eta).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        adapted: bool = True,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapted": adapted}
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. `closure` is not called: it is there for torch's signature."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        step = weight.grad.add(weight, alpha=decay) if decay else weight.grad.clone()  # type: ignore[union-attr]
        if group["adapted"]:
            norm = weight.norm()
            divisor = weight.grad.norm() + decay * norm  # type: ignore[union-attr]
            scale = torch.where((norm > 0) & (divisor > 0), group["trust"] * norm / divisor, torch.ones_like(norm))
            step.mul_(scale)
        step.mul_(group["lr"])
        if group["momentum"]:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            step = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
        weight.sub_(step)
