"""What the settings of every objective answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.settings.base import Settings, Shape

if TYPE_CHECKING:
    from layerwise.nets.module import Module
    from layerwise.objectives.objective import Objective


class ObjectiveSettings(Settings, ABC):
    """A local loss."""

    @property
    def views(self) -> int:
        """How many augmented views of each sample a batch carries for this loss."""
        return 1

    @abstractmethod
    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        """The loss for one module of a network whose samples have `sample_shape`.

        `classes`: number of classes of each task that the samples have labels for; empty where they have none.
        """
