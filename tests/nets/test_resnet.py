"""The paper's network: parameter counts and shapes, counted by hand from the paper's description."""

from __future__ import annotations

import pytest
import torch

from layerwise.errors import RecipeError
from layerwise.nets.resnet import Group, PatchResNet

PAPER = PatchResNet(
    groups=(
        Group(channels=256, blocks=3),
        Group(channels=512, blocks=4, stride=2),
        Group(channels=1024, blocks=6, stride=2),
    )
)


def convolution(inputs, outputs, kernel):
    return inputs * outputs * kernel**2 + outputs


def group(inputs, outputs, blocks):
    inner, count = outputs // 4, convolution(inputs, outputs, 1)  # the projection of the first block
    for block in range(blocks):
        count += (
            convolution(inputs if block == 0 else outputs, inner, 1)
            + convolution(inner, inner, 3)
            + convolution(inner, outputs, 1)
        )
    return count


def test_the_papers_parameters():
    modules = PAPER.modules((1, 64, 64))
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert counts == [convolution(1, 64, 5) + group(64, 256, 3), group(256, 512, 4), group(512, 1024, 6)]


def test_the_papers_shapes():
    x = torch.randn(2, 1, 64, 64)
    found = []
    with torch.no_grad():
        for module in PAPER.modules((1, 64, 64)):
            z, c, x = module(x)
            assert c is z
            found.append((tuple(z.shape), tuple(x.shape)))
    assert found == [
        ((2, 256, 7, 7), (2, 49, 256, 16, 16)),
        ((2, 512, 7, 7), (2, 49, 512, 8, 8)),
        ((2, 1024, 7, 7), (2, 49, 1024, 4, 4)),
    ]


def small(cuts=None):
    return PatchResNet(
        patch=8,
        patch_stride=4,
        stem_channels=4,
        groups=(Group(channels=8, blocks=2), Group(channels=16, blocks=2, stride=2)),
        cuts=cuts,
    )


def through(modules, x):
    for module in modules:
        z, _, x = module(x)
    return z


@pytest.mark.parametrize("cuts", [(4,), (1, 3), (1, 1, 1, 1), (2, 2), (3, 1)])
def test_where_it_is_cut_changes_no_value(cuts):
    x = torch.randn(2, 1, 16, 16)
    torch.manual_seed(0)
    whole = through(small((4,)).modules((1, 16, 16)), x)
    torch.manual_seed(0)
    assert torch.equal(through(small(cuts).modules((1, 16, 16)), x), whole)


def test_a_patch_is_encoded_on_its_own():
    module = small().modules((1, 16, 16))[0]
    x = torch.randn(1, 1, 16, 16)
    changed = x.clone()
    changed[..., :4, :4] += 1  # lies in the first patch alone: the next ones begin at pixel 4
    difference = (module(x).z - module(changed).z).abs().sum(1)[0]
    assert difference[0, 0] > 0
    assert difference.flatten()[1:].eq(0).all()


def test_what_is_handed_on_is_all_that_the_next_module_reads():
    first, second = small().modules((1, 16, 16))
    output = first(torch.randn(2, 1, 16, 16)).output
    assert (output >= 0).all()  # relu(x): the next block has a projection shortcut
    before = output.clone()
    second(output)
    assert torch.equal(output, before)


def test_growing_does_not_change_the_modules_below():
    shallow = PatchResNet(
        patch=8,
        patch_stride=4,
        stem_channels=4,
        groups=(Group(channels=8, blocks=2), Group(channels=16, blocks=1, stride=2)),
    )
    assert shallow.identity_through(1) == small().identity_through(1)
    assert small().identity_through(2) != shallow.identity_through(2)


def test_a_patch_larger_than_the_image_is_a_clear_error():
    with pytest.raises(RecipeError, match="patch is 16 pixels, larger than the dataset's images of 8x8"):
        PAPER.modules((1, 8, 8))
