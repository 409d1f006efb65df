"""How fast modules train from a cache, beside from memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from activation_cache import Storage, open_cache
from activation_cache.reading.order import epoch_order
from benchmarks.cache_peers import Array
from benchmarks.cache_workloads import WORKLOADS, say, write_cache


def training(work: Path, raw: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Samples a second of two trainings from the cache, over those from memory.

    A convolution that does little to its inputs, on B, where the feed matters; and the paper's module 2 as the recipe
    stl10 trains it, on A.
    """
    patches: Array = np.memmap(raw["B"], np.float16, "r").reshape(-1, *WORKLOADS[1].shape)[:512]
    images: Array = np.memmap(raw["A"], np.float16, "r").reshape(-1, *WORKLOADS[0].shape)[:32]
    return {
        "a small module": _trained(work / "B-training", patches, 32, _small_step(), repeats),
        "the paper's module 2": _trained(work / "A-training", images, 16, _module_2_step(), max(3, repeats // 2)),
    }


def _trained(
    location: Path, samples: Array, batch: int, step: Callable[[torch.Tensor], None], repeats: int
) -> dict[str, float]:
    in_memory = torch.from_numpy(np.array(samples))
    write_cache(location, np.array(samples), Storage("float16"))
    split = open_cache(location).splits["train"]

    def from_memory(epoch: int) -> None:
        order = torch.from_numpy(epoch_order(len(samples), 1, epoch))
        for at in range(0, len(order) - batch + 1, batch):
            step(in_memory[order[at : at + batch]])

    def from_cache(epoch: int) -> None:
        for some in split.batches(batch, seed=1, epoch=epoch):
            step(torch.from_numpy(some.values))

    seconds: dict[str, list[float]] = {"memory": [], "cache": []}
    for repeat in range(-1, repeats):
        for name, run in (("memory", from_memory), ("cache", from_cache)):
            began = time.perf_counter()
            run(repeat + 1)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["ratio"] = medians["memory"] / medians["cache"]
    say(f"training {location.name}: from the cache {medians['ratio']:.2f} of the speed from memory")
    return medians


def _small_step() -> Callable[[torch.Tensor], None]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(256, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    optimiser = torch.optim.Adam(model.parameters())

    def step(x: torch.Tensor) -> None:
        optimiser.zero_grad()
        model(x.float()).square().mean().backward()
        optimiser.step()

    return step


def _module_2_step() -> Callable[[torch.Tensor], None]:
    from layerwise.recipe.learner import make_learner
    from layerwise.recipe.loader import load_recipe
    from layerwise.seeding import seeded
    from layerwise.training.feeds import Batch
    from layerwise.training.step import Arithmetic, train_step

    recipe, device = load_recipe("stl10"), torch.device("cpu")
    with seeded(0, "modules"):
        module = recipe.network.modules((1, 64, 64))[1]
    learner = make_learner(recipe, 2, module, (1, 64, 64), {}, device)
    arithmetic = Arithmetic(device, "fp32", None, 0)

    def step(x: torch.Tensor) -> None:
        train_step([learner], Batch(x, decode=torch.Tensor.float), 0, arithmetic)

    return step
