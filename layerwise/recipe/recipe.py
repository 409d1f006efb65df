"""What to train, on what, and how. A recipe only chooses: one dataset, one network, one objective, and the numbers of
the training. The settings of datasets, networks and objectives are defined beside the code that they configure.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializeAsAny

from layerwise.data.settings import DatasetSettings
from layerwise.errors import RecipeError
from layerwise.nets.settings import NetworkSettings
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.settings.base import MOST_LAYERS, Settings
from layerwise.settings.choices import TOGETHER, FeedName, MethodName, ScheduleName
from layerwise.settings.training import CacheSettings, Optimiser, Probe, SpeechProbes, Training


class Recipe(Settings):
    """Everything that defines one training."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="name of the runs: letters, digits, - and _, at most 64 characters",
    )
    dataset: SerializeAsAny[DatasetSettings] = Field(description="where samples come from")
    network: SerializeAsAny[NetworkSettings] = Field(description="the encoder, cut into modules")
    objective: SerializeAsAny[ObjectiveSettings] = Field(description="the local loss of each module")
    optimiser: Optimiser = Field(Optimiser(), description="optimiser and learning rate")
    training: Training = Field(Training(), description="batch size, length and precision of a stage")
    stages: dict[Annotated[int, Field(ge=1, le=MOST_LAYERS)], dict[str, Any]] = Field(
        {},
        description="settings of single modules, by number, as in stages.2.optimiser.learning_rate: fields of "
        "objective and optimiser, and of training epochs, patience, tolerance, keep and noise",
    )
    probe: Probe | SpeechProbes = Field(Probe(), description="the linear classifiers on frozen representations")
    cache: CacheSettings = Field(CacheSettings(), description="how the outputs of frozen modules are stored")
    method: MethodName = Field(
        "gim", description="how the network is trained; every method but gim changes other fields too"
    )
    scale: float = Field(1.0, gt=0, le=1, description="below 1: fewer samples, epochs and channels, for a quick trial")
    schedule: ScheduleName = Field(
        "iterative",
        description="one module after another; all in each step; or pipelined: all in each step, with consecutive "
        "modules in different processes",
    )
    together: int | None = Field(
        None,
        ge=1,
        le=MOST_LAYERS,
        description="with the schedules simultaneous and pipelined: modules 1 to this one train together, and those "
        "above one after another; null: all together",
    )
    feed: FeedName = Field(
        "cache",
        description="inputs of stages above the first; recompute: the data, through the frozen modules, in each epoch",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all random numbers")

    def views_of(self, number: int) -> int:
        """Augmented views of each sample that module `number` trains on at a time, as its objective asks."""
        own = self.stages.get(number, {}).get("objective")
        objective = own if isinstance(own, ObjectiveSettings) else self.objective
        return objective.views

    def stored_views(self, split: str) -> int:
        """Views of each sample of a split that a cache holds."""
        asked = max(self.views_of(number) for number in (1, *self.stages))
        return {"train": max(asked, self.cache.views), "validation": asked}.get(split, 1)

    def groups(self, depth: int) -> list[tuple[int, ...]]:
        """The trainings of modules 1 to `depth`, in their order: the numbers of those that are trained at once.

        Raises:
            RecipeError: `stages` tells of a module that there is not.
        """
        if (most := max(self.stages, default=0)) > depth:
            raise RecipeError(
                f"stages.{most} would have no effect: there are modules 1 to {depth}. Leave it out, or "
                f"take it back with --set stages.{most}=null"
            )
        together = 1
        if self.schedule in TOGETHER:
            together = depth if self.together is None else min(self.together, depth)
        return [tuple(range(1, together + 1)), *((number,) for number in range(together + 1, depth + 1))]
