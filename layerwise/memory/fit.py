"""Choose the micro-batch that keeps a stage under its memory budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from layerwise.errors import RecipeError, Unpredictable, WillNotFit
from layerwise.memory.predict import Footprint, Samples, Step, predict
from layerwise.recipe.recipe import Recipe
from layerwise.settings.units import size
from layerwise.training.step import train_step

WAYS = ". What would fit: "


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
    """How a stage goes through its batches: see `find`.

    Raises:
        WillNotFit: not even the smallest micro-batch does; the message says what would.
        Unpredictable: the memory of these modules cannot be told beforehand.
    """
    found, refusal = find(recipe, numbers, samples, host_apart=host_apart, step=step)
    if refusal is not None:
        raise WillNotFit(refusal)
    return found


def find(
    recipe: Recipe, numbers: Sequence[int], samples: Samples, *, host_apart: bool = True, step: Step = train_step
) -> tuple[Fit, str | None]:
    """The largest of what the recipe takes at once, half of it, a quarter, … that stays under `training.max_memory`,
    and where none does, the smallest with activation checkpointing; without a budget, what the recipe says. Where
    nothing fits, what takes least, and what to say of it.

    Raises:
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
            return tried[-1], None
    assert budget is not None
    least = min(tried, key=lambda fit: fit.footprint.peak)

    def fits(other: Recipe, modules: Sequence[int]) -> bool:
        try:
            found = predict(least.applied(other), modules, samples, host_apart=host_apart, step=step)
        except (RecipeError, Unpredictable):  # some objectives compare the samples of a batch, and need several
            return False
        return found.peak <= budget

    return least, _refusal(recipe, numbers, budget, least, list(_advice(recipe, numbers, fits)))


def _ways(recipe: Recipe, numbers: Sequence[int], samples: Samples) -> Iterator[tuple[int | None, bool]]:
    training = recipe.training
    micro_batch = training.micro_batch
    yield micro_batch, training.checkpointing
    if training.max_memory is None:
        return
    if _coupled(recipe, numbers, samples) is None:
        micro_batch = min(micro_batch or training.batch_size, training.batch_size)
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


def _advice(recipe: Recipe, numbers: Sequence[int], fits: Callable[[Recipe, Sequence[int]], bool]) -> Iterator[str]:
    """What else to change so that the modules fit, of what is predicted to be enough."""
    training = recipe.training
    if training.precision == "fp32":
        half = training.model_copy(update={"precision": "bf16"})
        if fits(recipe.model_copy(update={"training": half}), numbers):
            yield "--set training.precision=bf16"
    if len(numbers) > 1:
        alone = recipe.model_copy(update={"schedule": "iterative"})
        if all(fits(alone, [number]) for number in numbers):
            yield "--schedule iterative"
    size_ = training.batch_size
    while size_ > 1:
        size_ = (size_ + 1) // 2
        smaller = training.model_copy(update={"batch_size": size_})
        if fits(recipe.model_copy(update={"training": smaller}), numbers):
            yield f"--set training.batch_size={size_}"
            return


def _refusal(recipe: Recipe, numbers: Sequence[int], budget: int, least: Fit, advice: Sequence[str]) -> str:
    footprint, training = least.footprint, recipe.training
    whom = f"module {numbers[0]}" if len(numbers) == 1 else f"modules {numbers[0]} to {numbers[-1]} together"
    rest = footprint.peak - footprint.floor
    ways = [f"--max-memory {-(-footprint.peak // 10**6)}MB", *advice]
    return (
        f"{whom} in {least} (batch {training.batch_size}) need {size(footprint.peak)} (predicted: parameters, "
        f"gradients and optimiser {size(footprint.floor)}, inputs and activations {size(rest)}), and the "
        f"budget is {size(budget)}{WAYS}{', or '.join(ways)}"
    )


def without_ways(problems: Sequence[str]) -> tuple[list[str], int | None]:
    """Refusals, of several without what would fit each of them, and the megabytes that are enough for all of these."""
    parts = [problem.partition(WAYS) for problem in problems]
    enough = [int(found[1]) for *_, ways in parts if (found := re.match(r"--max-memory (\d+)MB", ways))]
    if len(enough) < 2:
        return list(problems), None
    return [problem for problem, *_ in parts], max(enough)
