"""A network that somebody brings along: torchvision's ResNet-18, unchanged, as five modules."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet18

from layerwise.data.digits import Digits
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.recipe import CacheSettings, NetworkSettings, Recipe, Shape, Training


class Part(Module):
    """Some of the network's layers."""

    def __init__(self, layers: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.layers, self.channels, self.target_channels = layers, channels, channels

    def forward(self, x: Tensor) -> Encoded:
        made = self.layers(x)
        return Encoded(made, made, made)


class ResNet18(NetworkSettings):
    def modules(self, sample_shape: Shape) -> list[Module]:
        net = resnet18()
        net.conv1 = nn.Conv2d(sample_shape[0], 64, 7, stride=2, padding=3, bias=False)
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        parts = [(stem, 64), (net.layer1, 64), (net.layer2, 128), (net.layer3, 256), (net.layer4, 512)]
        return [Part(layers, channels) for layers, channels in parts]


recipe = Recipe(
    name="resnet18",
    dataset=Digits(samples=100, side=36, crop=32),
    network=ResNet18(),
    objective=CrossEntropy(),
    training=Training(batch_size=16, epochs=1),
    cache=CacheSettings(dtype="float32", budget=None),
)
