"""Choose the micro-batch that keeps a stage under its memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layerwise.errors import WillNotFit
from layerwise.memory.predict import Footprint, Samples, Step, predict
from layerwise.recipe import Recipe
from layerwise.step import train_step
from layerwise.units import size


@dataclass(frozen=True)
class Fit:
    """How a stage goes through its batch, and what that takes."""

    micro_batch: int | None
    """Samples at once; None: the whole batch."""
    footprint: Footprint
    checkpointing: bool = False
    """Whether activations inside the module's blocks are computed a second time."""

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe, trained so."""
        found = {"micro_batch": self.micro_batch, "checkpointing": self.checkpointing}
        return recipe.model_copy(update={"training": recipe.training.model_copy(update=found)})

    def __str__(self) -> str:
        how = "whole batches" if self.micro_batch is None else f"micro-batches of {self.micro_batch}"
        return how + (" with activation checkpointing" if self.checkpointing else "")


def fit(
    recipe: Recipe,
    numbers: Sequence[int],
    samples: Samples,
    *,
    host_apart: bool = True,
    step: Step = train_step,
) -> Fit:
    """The largest of batch, half of it, a quarter, … that stays under `training.max_memory`, and where none does, the
    smallest with activation checkpointing; without a budget, what the recipe says.

    Raises:
        WillNotFit: not even the smallest micro-batch does; the message says what would.
        Unpredictable: the memory of these modules cannot be told beforehand.
    """
    training = recipe.training
    budget = training.max_memory
    tried: list[Fit] = []
    for micro_batch, checkpointing in _ways(recipe, numbers, samples):
        settings = training.model_copy(update={"micro_batch": micro_batch, "checkpointing": checkpointing})
        footprint = predict(
            recipe.model_copy(update={"training": settings}), numbers, samples, host_apart=host_apart, step=step
        )
        tried.append(Fit(micro_batch, footprint, checkpointing))
        if budget is None or footprint.peak <= budget:
            return tried[-1]
    assert budget is not None
    raise WillNotFit(_refusal(recipe, numbers, budget, min(tried, key=lambda fit: fit.footprint.peak)))


def _ways(recipe: Recipe, numbers: Sequence[int], samples: Samples) -> Iterator[tuple[int | None, bool]]:
    training = recipe.training
    micro_batch = training.micro_batch
    yield micro_batch, training.checkpointing
    if training.max_memory is None:
        return
    if micro_batch is None and _coupled(recipe, numbers, samples) is None:
        micro_batch = training.batch_size
        while micro_batch > 1:
            micro_batch = (micro_batch + 1) // 2
            yield micro_batch, training.checkpointing
    if not training.checkpointing:
        yield micro_batch, True


def _coupled(recipe: Recipe, numbers: Sequence[int], samples: Samples) -> str | None:
    with torch.device("meta"):
        modules = recipe.network.modules(samples.shape)
    layers = (modules[number - 1].couples_samples() for number in numbers)
    return next((layer for layer in layers if layer is not None), None)


def _refusal(recipe: Recipe, numbers: Sequence[int], budget: int, least: Fit) -> str:
    footprint, training = least.footprint, recipe.training
    whom = f"module {numbers[0]}" if len(numbers) == 1 else f"modules {numbers[0]} to {numbers[-1]} together"
    rest = footprint.peak - footprint.floor
    advice = [f"--max-memory {-(-footprint.peak // 10**6)}MB"]
    if least.micro_batch not in (None, 1) and training.micro_batch is not None:
        advice.append("a smaller --micro-batch")
    if training.precision == "fp32":
        advice.append("--set training.precision=bf16")
    if len(numbers) > 1:
        advice.append("--schedule iterative")
    if training.batch_size > 1:
        advice.append("a smaller training.batch_size")
    advice.append("a network cut into more modules")
    return (
        f"{whom} in {least} (batch {training.batch_size}) need {size(footprint.peak)} (predicted: parameters, "
        f"gradients and optimiser {size(footprint.floor)}, inputs and activations {size(rest)}), and the "
        f"budget is {size(budget)}. "
        f"What would fit: {', or '.join(advice)}"
    )
