from __future__ import annotations

import torch

from layerwise.nets.merged import Merged
from layerwise.nets.pixelcnn import PixelCNN
from layerwise.nets.resnet import Group, PatchResNet

NETWORK = PatchResNet(
    patch=8,
    patch_stride=4,
    stem_channels=4,
    groups=(Group(channels=8, blocks=1), Group(channels=16, blocks=1, stride=2)),
)
SHAPE = (1, 20, 20)


def test_merged_modules_give_what_the_stack_gives() -> None:
    torch.manual_seed(1)
    stack = NETWORK.modules(SHAPE)
    torch.manual_seed(1)
    (merged,) = Merged(network=NETWORK).modules(SHAPE)
    x = torch.randn(3, *SHAPE)
    first = stack[0](x)
    second = stack[1](first.output)
    together = merged(x)
    assert torch.equal(together.z, second.z)
    assert together.c is together.z
    assert torch.equal(together.output, second.output)
    assert [
        torch.equal(a.weight, b.weight)
        for a, b in zip(merged.parts()[0].stem.children(), stack[0].stem.children(), strict=True)
    ] == [True]


def test_the_gradient_of_the_top_reaches_the_bottom_through_target_and_context() -> None:
    (merged,) = Merged(network=NETWORK, context=PixelCNN(channels=12, layers=1)).modules(SHAPE)
    encoded = merged(torch.randn(2, *SHAPE))
    assert (encoded.z.shape[1], encoded.c.shape[1]) == (16, 12) == (merged.target_channels, merged.channels)
    weight = merged.parts()[0].stem.convolution.weight
    for representation in (encoded.z, encoded.c):
        (gradient,) = torch.autograd.grad(representation.sum(), weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_a_context_is_reported_so_that_none_is_added_twice() -> None:
    assert not NETWORK.has_context
    assert not Merged(network=NETWORK).has_context
    assert Merged(network=NETWORK, context=PixelCNN()).has_context
