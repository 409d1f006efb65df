"""Choose the micro-batch that keeps a stage under its memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layerwise.errors import WillNotFit
from layerwise.memory.predict import Footprint, Samples, predict
from layerwise.recipe import Recipe
from layerwise.units import size


@dataclass(frozen=True)
class Fit:
    """How a stage goes through its batch, and what that takes."""

    micro_batch: int | None
    """Samples at once; None: the whole batch."""
    footprint: Footprint


def fit(recipe: Recipe, numbers: Sequence[int], samples: Samples, *, host_apart: bool = True) -> Fit:
    """The largest of batch, half of it, a quarter, … that stays under `training.max_memory`; without a budget, the
    recipe's own micro-batch.

    Raises:
        WillNotFit: not even the smallest micro-batch does; the message says what would.
        Unpredictable: the memory of these modules cannot be told beforehand.
    """
    training = recipe.training
    budget = training.max_memory
    tried: list[Fit] = []
    for micro_batch in _sizes(recipe, numbers, samples):
        settings = training.model_copy(update={"micro_batch": micro_batch})
        footprint = predict(recipe.model_copy(update={"training": settings}), numbers, samples, host_apart=host_apart)
        tried.append(Fit(micro_batch, footprint))
        if budget is None or footprint.peak <= budget:
            return tried[-1]
    assert budget is not None
    raise WillNotFit(_refusal(recipe, numbers, budget, min(tried, key=lambda fit: fit.footprint.peak)))


def _sizes(recipe: Recipe, numbers: Sequence[int], samples: Samples) -> Iterator[int | None]:
    training = recipe.training
    if training.micro_batch is not None or training.max_memory is None:
        yield training.micro_batch
        return
    yield None
    if _coupled(recipe, numbers, samples) is not None:
        return
    micro_batch = training.batch_size
    while micro_batch > 1:
        micro_batch = (micro_batch + 1) // 2
        yield micro_batch


def _coupled(recipe: Recipe, numbers: Sequence[int], samples: Samples) -> str | None:
    with torch.device("meta"):
        modules = recipe.network.modules(samples.shape)
    layers = (modules[number - 1].couples_samples() for number in numbers)
    return next((layer for layer in layers if layer is not None), None)


def _refusal(recipe: Recipe, numbers: Sequence[int], budget: int, least: Fit) -> str:
    footprint, training = least.footprint, recipe.training
    whom = f"module {numbers[0]}" if len(numbers) == 1 else f"modules {numbers[0]} to {numbers[-1]} together"
    how = "whole batches" if least.micro_batch is None else f"micro-batches of {least.micro_batch}"
    rest = footprint.peak - footprint.floor
    advice = [f"--max-memory {-(-footprint.peak // 10**6)}MB"]
    if least.micro_batch not in (None, 1) and training.micro_batch is not None:
        advice.append("a smaller --micro-batch")
    if training.precision == "fp32":
        advice.append("--set training.precision=bf16")
    if len(numbers) > 1:
        advice.append("--schedule iterative")
    advice.append("a network cut into more modules")
    return (
        f"{whom} in {how} of {training.batch_size} need {size(footprint.peak)} (predicted: parameters, gradients and "
        f"optimiser {size(footprint.floor)}, inputs and activations {size(rest)}), and the budget is {size(budget)}. "
        f"What would fit: {', or '.join(advice)}"
    )
