"""The image patches that excite a neuron most (paper, Figure 2): what the modules of a patch-wise network look for.

Letters: N pictures, C neurons (channels of a representation), P patches of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.nets.module import encode
from layerwise.nets.resnet import PatchResNet
from layerwise.pipeline.frozen import load_frozen
from layerwise.pipeline.setup import Setup
from layerwise.recipe.recipe import Recipe
from layerwise.training.feeds import DatasetFeed

SHOWN = 4  # patches of each neuron, as in the paper


def require_patches(recipe: Recipe) -> PatchResNet:
    """The recipe's network.

    Raises:
        UsageError: it does not look at patches.
    """
    if not isinstance(recipe.network, PatchResNet):
        raise UsageError(
            f"figure2 shows patches of pictures, and the recipe {recipe.name!r} has a {type(recipe.network).__name__}: "
            "choose a recipe whose network is a PatchResNet"
        )
    return recipe.network


def exciting_patches(setup: Setup, neurons: int) -> list[dict[str, Any]]:
    """For each module, that many of its most selective neurons with the patches of distinct pictures that excite them.

    The pictures are those of the test split, or of the validation split where there is none.

    Raises:
        UsageError: the network does not look at patches.
    """
    network = require_patches(setup.recipe)
    split = "test" if setup.splits.test is not None else "validation"
    maxima, positions = _strongest(setup, split)
    found = []
    for number, (strength, position) in enumerate(zip(maxima, positions, strict=True), 1):
        chosen = _selective(strength, neurons)
        found.append(
            {
                "module": number,
                "neurons": [
                    {
                        "neuron": neuron,
                        "patches": _patches(setup, network, split, strength[:, neuron], position[:, neuron]),
                    }
                    for neuron in chosen
                ],
            }
        )
    return found


def _strongest(setup: Setup, split: str) -> tuple[list[Tensor], list[Tensor]]:
    """For each module, (N, C) of the highest activation in each picture, and (N, C) of the patch where it is."""
    modules = load_frozen(setup, setup.depth)
    feed = DatasetFeed(setup.splits, setup.recipe.training.batch_size, seed=0)
    values: list[list[Tensor]] = [[] for _ in modules]
    places: list[list[Tensor]] = [[] for _ in modules]
    with torch.no_grad():
        for batch in feed.in_order(split):
            for i in range(len(batch)):
                x = batch.inputs_on(setup.device, slice(i, i + 1))
                for module, value, place in zip(modules, values, places, strict=True):
                    encoded = encode(module, x)
                    highest = encoded.z.flatten(2).max(2)
                    value.append(highest.values.cpu())
                    place.append(highest.indices.cpu())
                    x = encoded.output
    return [torch.cat(value) for value in values], [torch.cat(place) for place in places]


def _selective(strength: Tensor, count: int) -> list[int]:
    """The neurons whose favourites stand out most from the other pictures; first those with favourites of their own."""
    best = strength.topk(min(SHOWN, len(strength)), 0)
    standing = (best.values[-1] - strength.mean(0)) / strength.std(0).clamp_min(1e-12)
    ranked = standing.argsort(descending=True).tolist()
    chosen: list[int] = []
    seen: set[int] = set()
    for neuron in ranked:
        favourites = set(best.indices[:, neuron].tolist())
        if len(favourites & seen) < SHOWN // 2:
            chosen.append(neuron)
            seen |= favourites
    return [*chosen, *(neuron for neuron in ranked if neuron not in chosen)][:count]


def _patches(
    setup: Setup, network: PatchResNet, split: str, strength: Tensor, position: Tensor
) -> Sequence[dict[str, Any]]:
    samples = setup.splits.named()[split]
    columns = (setup.facts.sample_shape[2] - network.patch) // network.patch_stride + 1
    found = []
    for index in strength.topk(min(SHOWN, len(strength))).indices.tolist():
        row, column = divmod(int(position[index]), columns)
        top, left = row * network.patch_stride, column * network.patch_stride
        picture = samples.batch(np.array([index]), None)[0].mean(0)
        pixels = picture[top : top + network.patch, left : left + network.patch]
        found.append(
            {
                "sample": samples.ids[index],
                "row": row,
                "column": column,
                "activation": float(strength[index]),
                "pixels": [[round(value, 3) for value in line] for line in pixels.tolist()],
            }
        )
    return found
