"""A gated recurrent unit (Cho et al. 2014) in forms that an exported graph can run on sequences of any length.

torch.export unrolls `nn.GRU` to the length that it was traced with. Both forms here compute the same states.

Letters: B batch, T steps, C inputs, H hidden units.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from layerwise.nets.speech import gru_step


class ScannedGRU(nn.Module):
    """As a loop that is part of the graph."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.hidden_size = gru.hidden_size
        self.weight_input, self.weight_state, self.bias_input, self.bias_state = gru.all_weights[0]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(B, T, C) to the states (B, T, H)."""
        inputs = F.linear(x.transpose(0, 1), self.weight_input, self.bias_input)  # (T, B, 3 H)

        def step(before: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            state = gru_step(at, F.linear(before, self.weight_state, self.bias_state), before)
            return state, state.clone()

        first = inputs.new_zeros(x.shape[0], self.hidden_size)
        states = cast(Tensor, scan(step, first, inputs)[1])
        return (states.transpose(0, 1),)


class OnnxGRU(nn.Module):
    """As ONNX's operator GRU, which orders the gates update, reset, new, where torch has reset, update, new."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.hidden_size = gru.hidden_size
        self.weight_input: Tensor
        self.weight_state: Tensor
        self.bias: Tensor
        weight_input, weight_state, bias_input, bias_state = (_reordered(w.detach()) for w in gru.all_weights[0])
        self.register_buffer("weight_input", weight_input.unsqueeze(0))
        self.register_buffer("weight_state", weight_state.unsqueeze(0))
        self.register_buffer("bias", torch.cat([bias_input, bias_state]).unsqueeze(0))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(B, T, C) to the states (B, T, H)."""
        steps = x.transpose(0, 1)  # ONNX runtime has the time first
        states = torch.onnx.ops.symbolic(
            "GRU",
            (steps, self.weight_input, self.weight_state, self.bias),
            {"hidden_size": self.hidden_size, "linear_before_reset": 1},
            dtype=x.dtype,
            shape=(steps.shape[0], 1, steps.shape[1], self.hidden_size),
        )
        return (states.squeeze(1).transpose(0, 1),)


def _reordered(values: Tensor) -> Tensor:
    reset, update, new = values.chunk(3)
    return torch.cat([update, reset, new])
