"""What the settings of every network answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from layerwise.errors import RecipeError
from layerwise.settings.base import JsonValue, Settings, Shape, codes

if TYPE_CHECKING:
    from layerwise.nets.module import Module


class NetworkSettings(Settings, ABC):
    """An encoder cut into gradient-isolated modules."""

    @abstractmethod
    def modules(self, sample_shape: Shape) -> list[Module]:
        """Freshly initialised modules 1, 2, … for samples of this shape, drawing from torch's global generator in
        order.
        """

    def facts(self, sample_shape: Shape) -> list[dict[str, int]]:
        """Number, parameters, channels and number of parts of each module, without making one."""
        import torch  # settings are read where it is not needed

        with torch.device("meta"):
            modules = self.modules(sample_shape)
        return [
            {
                "module": number,
                "parameters": sum(w.numel() for w in module.parameters()),
                "channels": module.channels,
                "parts": len(module.parts()),
            }
            for number, module in enumerate(modules, 1)
        ]

    @property
    def has_context(self) -> bool:
        """Whether the last module aggregates a context over positions: end-to-end prediction then needs no other."""
        return False

    def scaled(self, scale: float) -> NetworkSettings:
        """The same network with about `scale` times the work a sample; itself where it cannot be made smaller."""
        return self

    def repeated(self, count: int) -> NetworkSettings:
        """A network of so many modules, each like this one's first: for the report of memory over depth.

        Raises:
            RecipeError: this kind of network has no such variant.
        """
        raise RecipeError(f"a {type(self).__name__} cannot be made deeper: --depth is for networks that can")

    def identity_through(self, number: int) -> dict[str, JsonValue]:
        """The settings that modules 1 to `number` depend on: adding a module on top must not change it."""
        return self.identity()

    def through(self, number: int | None) -> dict[str, JsonValue] | None:
        """`identity_through`, with the code of every class in the settings; of no module (None) the code alone."""
        found = {} if number is None else self.identity_through(number)
        if own := codes(self):
            found = {**found, "code": own}
        return found or None

    def fixed_features(self) -> dict[str, Callable[[], Module]]:
        """Features by hand that a probe can compare with: name to what makes the module, without parameters, that reads
        samples.
        """
        return {}
