"""Activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import copy

import torch
from torch import nn

from layerwise.memory.count import LiveBytes
from layerwise.nets.checkpointing import checkpoint_blocks
from layerwise.nets.resnet import Group, PatchResNet

NETWORK = PatchResNet(patch=8, patch_stride=4, stem_channels=8, groups=(Group(channels=32, blocks=4),))


def test_same_bits_and_less_memory() -> None:
    plain = NETWORK.modules((1, 16, 16))[0]
    held = copy.deepcopy(plain)
    assert checkpoint_blocks(held) == 4
    assert held.state_dict().keys() == plain.state_dict().keys()
    x, peaks = torch.randn(4, 1, 16, 16), []
    for module in (plain, held):
        with LiveBytes() as live:
            module(x).z.square().sum().backward()
        peaks.append(live.peak)
    for found, expected in zip(held.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None
        assert torch.equal(found.grad, expected.grad)
    assert peaks[1] < 0.9 * peaks[0]


def test_random_layers_are_replayed_and_batches_are_counted_once() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))])

    plain, held = make(), make()
    checkpoint_blocks(held)
    x = torch.randn(8, 5)
    for module in (plain, held):
        torch.manual_seed(1)
        module[0](x).square().sum().backward()  # type: ignore[index]
    for found, expected in zip(held.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(held.state_dict()[name], value), name
