"""How fast stages train from each of their feeds, and how fast caches are written."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from activation_cache import SplitSpec, Storage, create, make_key, open_cache
from benchmarks.cache_workloads import write_cache
from benchmarks.gpu.part import Bench, Figures, Task, wait
from layerwise.data.dataset import Splits
from layerwise.data.folder import ImageFolder
from layerwise.nets.module import Module
from layerwise.paper.memory_rows import Row, samples_of
from layerwise.pipeline.module_cache import as_stored
from layerwise.recipe.learner import make_learner
from layerwise.recipe.recipe import Recipe
from layerwise.seeding import seeded
from layerwise.training.feeds import Batch, CacheFeed, DatasetFeed, Feed, RecomputeFeed
from layerwise.training.step import Arithmetic, Learner, train_step

STORAGE = Storage("float16")


def feeds(bench: Bench) -> Iterator[Task]:
    """Each stage from the device's memory, which is the limit, from RAM, from its cache and from JPEG files."""
    batch = bench.batches[0]
    recipe = bench.recipe_of(Row("", "gim"), batch)
    files = _pictures(bench, recipe)
    for number in bench.modules:
        ground: dict[str, _Ground] = {}
        limit: dict[str, float] = {}
        for name in ("device memory", "RAM", "cache, page-cached", "cache, cold", "dataset"):
            yield f"module {number} from {name}", partial(_fed, bench, recipe, files, number, name, ground, limit)


def writing(bench: Bench) -> Iterator[Task]:
    """Samples a second of a cache being written, beside those of the forward pass alone."""
    recipe = bench.recipe_of(Row("", "gim"), bench.batches[0])
    files = _pictures(bench, recipe)
    for number in bench.modules:
        yield f"cache of module {number}", partial(_written, bench, recipe, files, number)


class _Ground:
    """A stage's inputs in the host's memory and in a cache."""

    def __init__(self, bench: Bench, recipe: Recipe, files: Splits, number: int) -> None:
        below = _modules(recipe, bench.device)[: number - 1]
        self.dataset = _source(bench, recipe, files, below)
        found = [batch.inputs_on(torch.device("cpu")).half() for batch in self.dataset.in_order("train", 0)]
        self.samples = torch.cat(found)
        self.location = bench.work / f"inputs-{number}"
        write_cache(self.location, self.samples.numpy(), STORAGE)
        os.sync()  # pages that are not on the disk yet cannot be dropped


def _fed(
    bench: Bench,
    recipe: Recipe,
    files: Splits,
    number: int,
    name: str,
    grounds: dict[str, _Ground],
    limit: dict[str, float],
) -> Figures:
    if not grounds:
        grounds["here"] = _Ground(bench, recipe, files, number)
    ground, size, device = grounds["here"], recipe.training.batch_size, bench.device
    cache = CacheFeed(open_cache(ground.location), size, recipe.seed, device)
    held = ground.samples.to(device) if name == "device memory" else ground.samples
    if name == "RAM" and device.type == "cuda":
        held = held.pin_memory()
    ways: dict[str, Callable[[int], Iterable[Batch]]] = {
        "device memory": lambda epoch: _split(held, size),
        "RAM": lambda epoch: _split(held, size),
        "cache, page-cached": cache.shuffled,
        "cache, cold": cache.shuffled,
        "dataset": ground.dataset.shuffled,
    }
    learner = make_learner(recipe, number, _modules(recipe, device)[number - 1], samples_of(recipe).shape, {}, device)
    arithmetic = Arithmetic(device, recipe.training.precision, None, recipe.seed, recipe.training.loss_group)
    rates, first = [], []
    for epoch in range(3):
        if name == "cache, cold":
            _drop_pages(ground.location)
        rate, begin = _epoch([learner], ways[name](epoch), arithmetic)
        if epoch:  # the first one warms up
            rates.append(rate)
            first.append(begin)
    figures: Figures = {
        "module": number,
        "feed": name,
        "batch": size,
        "samples_per_second": max(rates),
        "first_batch_seconds": min(first),
        "sample_bytes": ground.samples[0].nbytes,
    }
    if name == "device memory":
        limit["rate"] = figures["samples_per_second"]
    if "rate" in limit:
        figures["of_limit"] = figures["samples_per_second"] / limit["rate"]
        figures["waiting"] = max(0.0, 1 - figures["of_limit"])
    return figures


def _epoch(learners: list[Learner], batches: Iterable[Batch], arithmetic: Arithmetic) -> tuple[float, float]:
    """Samples a second from the second batch on, and the seconds to the end of the first."""
    began = time.perf_counter()
    samples, first = 0, began
    for number, batch in enumerate(batches):
        train_step(learners, batch, number, arithmetic)
        wait(arithmetic.device)
        if number == 0:
            first = time.perf_counter()
        else:
            samples += len(batch)
    return samples / (time.perf_counter() - first), first - began


def _split(held: Tensor, size: int) -> Iterator[Batch]:
    for begin in range(0, len(held) - size + 1, size):
        yield Batch(held[begin : begin + size], decode=Tensor.float)


def _written(bench: Bench, recipe: Recipe, files: Splits, number: int) -> Figures:
    size, device = recipe.training.batch_size, bench.device
    modules = _modules(recipe, device)[:number]
    batches = list(_source(bench, recipe, files, []).in_order("train", 0))  # in RAM: decoding is not looked at here
    feed = RecomputeFeed(_source(bench, recipe, files, []), modules, device, device)
    feed.encode(batches[0])
    began = time.perf_counter()
    for batch in batches:
        feed.encode(batch)
    wait(device)
    alone = time.perf_counter() - began
    count = sum(map(len, batches))
    spec = SplitSpec("train", count, feed.shape("train").sizes)
    began = time.perf_counter()
    with create(bench.work / f"written-{number}", make_key({}, STORAGE), [spec], STORAGE) as writer:
        numbers = itertools.count()
        for batch in batches:
            values = as_stored(feed.encode(batch).inputs, STORAGE)
            writer.append("train", values, [str(next(numbers)) for _ in range(len(batch))])
        writer.commit()
    written = time.perf_counter() - began
    return {
        "module": number,
        "batch": size,
        "forward_samples_per_second": count / alone,
        "samples_per_second": count / written,
        "of_forward": alone / written,
        "bytes_per_second": count * 2 * math.prod(size or 0 for size in spec.shape) / written,
    }


def _modules(recipe: Recipe, device: torch.device) -> list[Module]:
    with seeded(recipe.seed, "modules"):
        return [module.to(device).eval() for module in recipe.network.modules(samples_of(recipe).shape)]


def _source(bench: Bench, recipe: Recipe, files: Splits, below: list[Module]) -> Feed:
    source = DatasetFeed(files, recipe.training.batch_size, recipe.seed)
    return RecomputeFeed(source, below, bench.device) if below else source


def _pictures(bench: Bench, recipe: Recipe) -> Splits:
    """JPEG files of windows of the two photographs that scikit-learn ships, as a dataset of the recipe's shape."""
    from PIL import Image

    _, side, _ = samples_of(recipe).shape
    window, folder = side * 3 // 2, bench.work / "pictures"
    drawn = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    photographs = load_sample_images().images
    for number in range(24 if bench.small else 512):
        picture = photographs[number % len(photographs)]
        top, left = (drawn.integers(0, length - window) for length in picture.shape[:2])
        Image.fromarray(picture[top : top + window, left : left + window]).save(folder / f"{number:04d}.jpg")
    settings = ImageFolder(
        resize=window, crop=side, grayscale=True, mean=(0.412,), std=(0.257,), labelled=False, memory=0
    )
    return settings.open(folder, download=False, seed=recipe.seed)


def _drop_pages(folder: Path) -> None:
    """Ask the kernel to forget what it keeps of these files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
