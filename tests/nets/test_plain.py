"""Modules that were not made for this toolkit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.nets.module import Module, output_shapes
from layerwise.nets.plain import packed, plain_modules, unpacked
from layerwise.nets.split import chain, split
from tests.nets.test_split import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_hand_on_what_the_network_computes(name: str) -> None:
    make, at, example = NETWORKS[name]
    parts = split(make().eval(), at, example=example)
    modules = plain_modules(parts, example[0])
    with torch.no_grad():
        x = example
        for module in modules:
            encoded = module(x)
            assert encoded.z.ndim >= 3
            assert encoded.z.shape[1] == module.channels
            x = encoded.output
        assert torch.equal(x, chain(parts, example))


def test_maps_have_channels_first_and_tokens_last() -> None:
    convolutions = plain_modules([nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7)], torch.zeros(3, 4, 4))
    assert [module.channels for module in convolutions] == [5, 20, 7]
    assert convolutions[2](torch.zeros(2, 20)).z.shape == (2, 7, 1)
    (tokens,) = plain_modules([nn.Linear(6, 8)], torch.zeros(10, 6))
    assert tokens(torch.zeros(2, 10, 6)).z.shape == (2, 8, 10)
    assert tokens.channel_axis == 1
    (sound,) = plain_modules([nn.Conv1d(1, 8, 3)], torch.zeros(1, 10))
    assert sound(torch.zeros(2, 1, 10)).z.shape == (2, 8, 8)
    (told,) = plain_modules([nn.Linear(6, 8)], torch.zeros(10, 6), channels="first")
    assert told.channels == 10


def test_a_function_chooses_the_representation() -> None:
    modules = plain_modules([nn.Linear(6, 8)], torch.zeros(10, 6), represent=lambda output: output[:, 0])
    encoded = modules[0](torch.ones(2, 10, 6))
    assert encoded.z.shape == (2, 8, 1)
    assert encoded.output.shape == (2, 10, 8)


def test_several_tensors_are_stored_end_to_end() -> None:
    values = torch.rand(2, 3), torch.rand(2, 4, 5), torch.rand(2, 1)
    together = packed(values)
    assert together.shape == (2, 24)
    assert all(map(torch.equal, unpacked(together, ((3,), (4, 5), (1,))), values))
    alone = torch.rand(2, 3, 4)
    assert packed([alone]) is alone
    assert unpacked(alone, ((3, 4),))[0] is alone


def test_shapes_are_found_without_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torchvision.models.resnet18()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = plain_modules(split(network, ["layer2", "layer4"]), torch.zeros(3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    modules = [module.eval() for module in modules]
    assert output_shapes(lambda: modules, (3, 64, 64)) == [(64, 16, 16), (256, 4, 4), (1000,)]


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


def test_what_cannot_be_a_module_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"module 2 \(Linear\) fails on its input, \(batch, 5\)"):
        plain_modules([nn.Linear(3, 5), nn.Linear(4, 5)], torch.zeros(3))
    with pytest.raises(UsageError, match=r"module 1 \(Returns\) returns \{'a': "):
        plain_modules([Returns(lambda x: {"a": x})], torch.zeros(3))
    with pytest.raises(UsageError, match=r"returns a tensor of shape \(\) for a batch of 2"):
        plain_modules([Returns(lambda x: x.sum())], torch.zeros(3))
    (module,) = plain_modules([InPlace()], torch.zeros(3))
    with pytest.raises(UsageError, match="InPlace changes its input in place"):
        module(torch.ones(2, 3))


def test_modules_of_the_toolkit_stay_what_they_are() -> None:
    (plain,) = plain_modules([nn.Linear(3, 5)], torch.zeros(3))
    again = plain_modules([plain, nn.Linear(5, 2)], torch.zeros(3))
    assert again[0] is plain
    assert isinstance(again[1], Module)


def test_patches_are_encoded_one_by_one() -> None:
    network = torchvision.models.resnet18().eval()
    parts = split(network, ["layer2", "layer4"])
    images = torch.rand(2, 3, 40, 48)
    modules = plain_modules(parts, images[0], patches=(16, 8))
    with torch.no_grad():
        x = images
        for module in modules:
            encoded = module.eval()(x)
            assert encoded.z.shape == (2, module.channels, 4, 5)
            x = encoded.output
        patch = images[1:, :, 8:24, 16:32]  # row 1, column 2
        torch.testing.assert_close(encoded.z[1, :, 1, 2], network(patch)[0], rtol=1e-4, atol=1e-5)
        alone = chain(parts[:2], patch)
        torch.testing.assert_close(modules[1](modules[0](images).output).output[1, 7], alone[0], rtol=1e-4, atol=1e-5)


def test_patches_are_of_images() -> None:
    with pytest.raises(UsageError, match=r"patches of 16x16 .* these samples have shape \(3, 8, 8\)"):
        plain_modules([nn.Conv2d(3, 4, 3)], torch.zeros(3, 8, 8), patches=(16, 8))
