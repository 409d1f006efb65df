"""The count of live bytes, against tensors whose lives are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerwise.memory.count import REST, LiveBytes


def test_counts_what_lives_and_forgets_what_dies() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 4000
        second.add_(1)
        assert live.now == 4000
    assert live.peak == 8000


def test_views_share_their_storage() -> None:
    with LiveBytes() as live:
        whole = torch.zeros(10, 100)
        part = whole[3].view(10, 10)
        del whole
        assert live.now == 4000  # the view holds all of it
        assert part.shape == (10, 10)


def test_a_graph_holds_what_its_backward_needs() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight.exp() * 3).sum()
        assert live.now >= 400 + 400  # the weight itself, and exp's result kept for its derivative
        loss.backward()
        del loss
        assert live.now == 800  # the weight and its gradient


def test_parts_are_those_of_the_peak() -> None:
    with LiveBytes() as live:
        weight = torch.zeros(100)
        live.claim([weight], "parameters")
        host = torch.zeros(5000)
        live.claim([host], None)
        temporary = torch.zeros(200)
        assert (live.peak, live.parts) == (20_000 + 400, {"parameters": 400, REST: 20_000})
        live.reset_peak()
        del temporary
        torch.zeros(10)
    assert (live.peak, live.parts) == (1200, {"parameters": 400, REST: 800})


@pytest.mark.parametrize("shape", [(64, 64), (3, 1000)])
def test_fake_tensors_count_like_real_ones(shape: tuple[int, int]) -> None:
    def work() -> float:
        layer = torch.nn.Linear(shape[1], 16)
        loss = layer(torch.zeros(shape)).relu().square().mean()
        loss.backward()
        return loss.item()

    with LiveBytes() as real:
        work()
    with FakeTensorMode(), LiveBytes() as fake:
        assert math.isfinite(work())
    assert fake.peak == real.peak > 0
