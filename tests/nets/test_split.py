"""Networks that were not made for this toolkit, cut into modules that compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.nets.split import chain, crossing, split
from layerwise.nets.split.even import even_starts, training_bytes
from layerwise.nets.split.parts import cut


class TwoStreams(nn.Module):
    """Two tensors between its blocks, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        left, right = self.a(x) * self.scale, torch.relu(self.b(x))
        mixed = self.c(left) + right
        found: Tensor = self.d(mixed + left if mask is None else mask * mixed)
        return found


class Tokens(nn.Module):
    """Characters to a vector for each, through a plain transformer encoder, which asks for shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.encoder(self.embedding(tokens))
        return found


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str], Tensor]] = {
    "resnet18": (torchvision.models.resnet18, ["layer2", "layer3", "layer4"], images(32)),
    "convnext_tiny": (torchvision.models.convnext_tiny, ["features.2", "features.5.3"], images(32)),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, ["features.3", "features.5"], images(32)),
    "vit_b_16": (
        lambda: torchvision.models.VisionTransformer(32, 16, 4, 4, 32, 64, num_classes=5),
        ["encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_3"],
        images(32),
    ),
    "tokens": (Tokens, ["encoder.layers.1", "encoder.layers.3"], torch.arange(14).reshape(2, 7)),
    "two streams": (TwoStreams, ["c"], torch.ones(3, 4)),
}


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[str], Tensor]:
    make, at, example = NETWORKS[request.param]
    torch.manual_seed(0)
    return make(), at, example


def test_modules_compute_what_the_network_does_with_its_own_weights(case: tuple[nn.Module, list[str], Tensor]) -> None:
    network, at, example = case
    modules = split(network, at, example=example)
    assert len(modules) == len(at) + 1
    for training in (False, True):
        network.train(training)
        modules = [module.train(training) for module in modules]
        twin = copy.deepcopy(network)  # batch statistics move
        torch.manual_seed(1)
        wanted = twin(example)
        torch.manual_seed(1)
        torch.testing.assert_close(chain(modules, example), wanted, rtol=1e-5, atol=1e-6)
    own = [{id(weight) for weight in module.parameters()} for module in modules]
    assert set.union(*own) == {id(weight) for weight in network.parameters()}
    assert sum(map(len, own)) == len(set.union(*own))
    names = [name for module in modules for name in module.state_dict()]
    assert sorted(names) == sorted(network.state_dict())


def test_each_module_ends_where_the_next_is_named() -> None:
    modules = split(torchvision.models.resnet18(), ["layer2", "layer3", "layer4"])
    assert [crossing(module) for module in modules[:3]] == [["layer1"], ["layer2"], ["layer3"]]
    assert modules[1](torch.zeros(1, 64, 8, 8)).shape == (1, 128, 4, 4)


def test_several_tensors_cross_under_their_names() -> None:
    first, second = split(TwoStreams(), ["c"])
    assert crossing(first) == ["mul", "relu"]
    given = first(torch.ones(3, 4))
    assert isinstance(given, tuple)
    assert second(*given).shape == (3, 2)


def test_a_module_does_not_change_what_it_reads_in_place() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)))
    _, second = split(network, ["1"])
    read = torch.tensor([[-1.0, 2.0, -3.0]])
    second(read)
    assert read.tolist() == [[-1.0, 2.0, -3.0]]


def test_splitting_leaves_the_network_as_it_was() -> None:
    network = torchvision.models.resnet18().train()
    network.layer3.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    split(network, ["layer2"], example=images(32))
    assert network.training
    assert not network.layer3.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (torchvision.models.resnet18, images(224, 8)),
        (lambda: torchvision.models.VisionTransformer(224, 16, 12, 12, 768, 3072), images(224, 8)),
    ],
    ids=["resnet18", "vit_b_16"],
)
def test_even_modules_take_about_the_same_memory(make: Callable[[], nn.Module], example: Tensor) -> None:
    with torch.device("meta"):
        network = make()
    modules = cut(network, *even_starts(network, 4, [example]))
    costs = training_bytes(modules, [example])
    assert len(costs) == 4
    assert max(costs) <= 1.25 * sum(costs) / 4


def test_even_modules_compute_what_the_network_does() -> None:
    network = torchvision.models.resnet18().eval()
    example = images(32)
    modules = split(network, modules=3, example=example)
    assert len(modules) == 3
    assert torch.equal(chain(modules, example), network(example))


def test_the_memory_that_evens_modules_out_is_what_backward_keeps_and_the_weights_four_times() -> None:
    layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
    kept = 8 * 10 + 8 * 20  # the input for the weight's gradient, the output for the ReLU's
    assert training_bytes([layers], [torch.zeros(8, 10)]) == [4 * kept + 4 * 4 * (10 * 20 + 20)]


class WithConstant(TwoStreams):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.d(self.a(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]))
        return found


@pytest.mark.parametrize("example", [None, torch.ones(3, 4)])
def test_a_tensor_that_the_forward_makes_itself_goes_with_the_module_that_needs_it(example: Tensor | None) -> None:
    network = WithConstant()
    modules = split(network, ["d"], example=example)
    assert torch.equal(chain(modules, torch.ones(3, 4)), network(torch.ones(3, 4)))
    assert not any("constant" in name for module in modules for name in module.state_dict())
    assert not any("constant" in name for name, _ in network.named_buffers())


class Sized(TwoStreams):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        count = x.shape[0]
        return self.d(self.c(self.a(x)).reshape(count, 4))


class Reused(TwoStreams):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.d(self.a(self.b(self.a(x))))


class Dropping(TwoStreams):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.d(nn.functional.dropout(self.a(x), 0.5, self.training))


class FixedBatch(TwoStreams):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.d(self.a(x) + torch.zeros(int(x.shape[0]), 4))


class Branching(TwoStreams):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.d(self.a(x)) if x.sum() > 0 else self.d(self.b(x))


@pytest.mark.parametrize(
    ("network", "at", "example", "message"),
    [
        (TwoStreams, ["q"], None, "no child 'q' to cut at: its children are a, b, c, d"),
        (torchvision.models.resnet18, ["layer22"], None, "did you mean 'layer2'"),
        (TwoStreams, ["d", "c"], None, "in the order c, d"),
        (TwoStreams, ["c", "c"], None, "'c' is named twice"),
        (TwoStreams, [], None, "name at least one child"),
        (TwoStreams, ["a", "c"], None, "'a' is the first thing that the forward calls"),
        (Sized, ["b"], None, "never reaches 'b'"),
        (Sized, ["c"], None, "module 1 would have to hand on getitem, which is not a tensor"),
        (Sized, ["c"], torch.ones(3, 4), "module 1 would have to hand on getitem, which is not a tensor"),
        (Reused, ["b"], None, "a.weight is used in module 2 and in module 1"),
        (Dropping, ["d"], None, "differs between training and evaluation"),
        (FixedBatch, ["d"], torch.ones(3, 4), "fixes the size of the batch"),
        (Tokens, ["encoder.layers.1"], None, "Pass example="),
        (Branching, ["d"], torch.ones(3, 4), "cannot be followed"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(
    network: Callable[[], nn.Module], at: Sequence[str], example: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as found:
        split(network(), at, example=example)
    assert "\n" not in str(found.value)


def test_even_modules_are_refused_where_there_are_too_few_pieces() -> None:
    with pytest.raises(UsageError, match="too few for modules=9"):
        split(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), modules=9, example=torch.ones(1, 2))
    with pytest.raises(UsageError, match="or modules=2 or more with example="):
        split(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), modules=2)
