"""A whole network as one module, so that the stage runner trains it end to end.

An end-to-end method is no second trainer: it is the same stack merged into a single module, with another objective or
a context network on top. Its parts stay what they were, and can be probed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from layerwise.nets.module import Encoded, Module
from layerwise.nets.pixelcnn import PixelCNN, PixelCNNContext
from layerwise.nets.settings import NetworkSettings
from layerwise.settings.base import Shape


class Merged(NetworkSettings):
    """Another network's modules without the borders between them."""

    network: SerializeAsAny[NetworkSettings] = Field(description="the network whose modules are merged into one")
    context: PixelCNN | None = Field(
        None, description="aggregates the last module's representations before they predict"
    )

    def modules(self, sample_shape: Shape) -> list[Module]:
        parts = self.network.modules(sample_shape)
        return [MergedModule(parts, None if self.context is None else self.context.build(parts[-1].channels))]

    @property
    def has_context(self) -> bool:
        return self.context is not None or self.network.has_context


class MergedModule(Module):
    """Modules in sequence, through which the gradient of one objective flows."""

    def __init__(self, parts: Sequence[Module], context: PixelCNNContext | None) -> None:
        super().__init__()
        self._parts = nn.ModuleList(parts)
        self.context = context
        self.channels = parts[-1].channels if context is None else context.channels
        self.target_channels = parts[-1].target_channels
        self.hop, self.front = parts[-1].hop, parts[-1].front

    def forward(self, x: Tensor) -> Encoded:
        """What the last part gives; `c` from the context network where there is one."""
        for part in self._parts:
            encoded: Encoded = part(x)
            x = encoded.output
        return encoded if self.context is None else encoded._replace(c=self.context(encoded.c))

    def parts(self) -> list[Module]:
        return [part for part in self._parts if isinstance(part, Module)]
