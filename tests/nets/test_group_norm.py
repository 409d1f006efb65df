"""Networks with batch statistics, converted so that samples do not depend on each other."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from layerwise.nets.group_norm import group_norm


def test_each_sample_is_encoded_on_its_own() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    converted = group_norm(network).train()
    images = torch.rand(3, 3, 64, 64)
    alone = torch.cat([converted(image[None]) for image in images])
    torch.testing.assert_close(converted(images), alone, rtol=1e-4, atol=1e-5)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())  # the given one stays
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in converted.modules())


def test_scale_shift_and_channels_are_kept() -> None:
    norm = nn.BatchNorm2d(48, eps=1e-3)
    nn.init.constant_(norm.weight, 2.0)
    found = group_norm(nn.Sequential(norm))[0]
    assert isinstance(found, nn.GroupNorm)
    assert (found.num_groups, found.num_channels, found.eps) == (16, 48, 1e-3)
    assert torch.equal(found.weight, torch.full((48,), 2.0))
    (plain,) = group_norm(nn.Sequential(nn.BatchNorm1d(6, affine=False)))
    assert isinstance(plain, nn.GroupNorm)
    assert plain.weight is None
