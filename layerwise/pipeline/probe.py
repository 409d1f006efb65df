"""A linear classifier on a frozen representation (paper, sections 4.1, 4.2 and A.1, A.2).

Where a sample has one label, it reads the mean over the sample's positions; where each position has its own, it reads
them one by one.

Letters: N samples (or positions), C channels, P positions, L labels of a sample.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.data.dataset import UNKNOWN
from layerwise.errors import NotReady, UsageError, WillNotFit
from layerwise.files.made_from import probe_made_from
from layerwise.files.records import PROBE, read_record
from layerwise.files.storage import FULL, write_json
from layerwise.nets.module import Module, encode
from layerwise.nets.speech import at_labels
from layerwise.pipeline.frozen import frozen_digests, load_frozen, require_stage, threads_of
from layerwise.pipeline.inputs import nearest_inputs
from layerwise.pipeline.setup import Setup, holds
from layerwise.seeding import numpy_generator, seeded
from layerwise.settings.training import Probe
from layerwise.training.feeds import DatasetFeed, Feed, RecomputeFeed

HELD_OUT = 0.2  # of the training samples, to choose the learning rate on (appendix A.1)
BLOCK = 1 << 16  # samples that are judged at once
SPLITS = ("probe", "test")


@dataclass(frozen=True)
class ProbeResult:
    accuracy: float
    """Of the test samples, from 0 to 1."""
    train_accuracy: float
    learning_rate: float
    """The one that was chosen."""
    samples: int
    test_samples: int


@dataclass(frozen=True)
class Labelled:
    """Features with their labels."""

    features: Tensor
    """(N, C) float32 on the CPU."""
    labels: Tensor
    """(N,) int64 on the CPU."""

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Tensor) -> Labelled:
        return Labelled(self.features[indices], self.labels[indices])


def fit_probe(
    train: Labelled, test: Labelled, classes: int, settings: Probe, seed: int, device: torch.device | None = None
) -> ProbeResult:
    """Train on one set of features, judge on the other.

    With several learning rates, each is tried on four fifths of the training samples and judged on the fifth.
    """
    device = device or torch.device("cpu")
    rate = settings.learning_rates[0]
    if len(settings.learning_rates) > 1:
        order = torch.from_numpy(numpy_generator(seed, "probe split").permutation(len(train)))
        count = max(1, int(len(order) * HELD_OUT))
        held, kept = order[:count], order[count:]
        trial, judges = train.at(kept), train.at(held)
        judged = {
            rate: accuracy(_train_linear(trial, classes, rate, settings, seed, device), judges)
            for rate in settings.learning_rates
        }
        rate = max(judged, key=lambda rate: judged[rate])
    classifier = _train_linear(train, classes, rate, settings, seed, device)
    return ProbeResult(accuracy(classifier, test), accuracy(classifier, train), rate, len(train), len(test))


def accuracy(classifier: nn.Module, judges: Labelled) -> float:
    device = next(classifier.parameters()).device
    with torch.no_grad():
        pairs = zip(judges.features.split(BLOCK), judges.labels.split(BLOCK), strict=True)
        right = sum(int((classifier(part.to(device)).argmax(1).cpu() == labels).sum()) for part, labels in pairs)
    return right / len(judges)


def _train_linear(
    train: Labelled, classes: int, rate: float, settings: Probe, seed: int, device: torch.device
) -> nn.Module:
    with seeded(seed, "probe"):
        linear = nn.Linear(train.features.shape[1], classes)
        if settings.initial == "xavier":
            nn.init.xavier_normal_(linear.weight)
    classifier = (nn.Sequential(Standardise(train.features), linear) if settings.standardise else linear).to(device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=rate)
    for epoch in range(settings.epochs):
        order = torch.from_numpy(numpy_generator(seed, "probe", epoch).permutation(len(train)))
        for chosen in order.split(settings.batch_size):
            optimiser.zero_grad()
            batch = train.at(chosen)
            F.cross_entropy(classifier(batch.features.to(device)), batch.labels.to(device)).backward()
            optimiser.step()
    return classifier


class Standardise(nn.Module):
    """Each channel to mean 0 and variance 1 over the given features; a constant channel to 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        count = len(features)
        mean = torch.stack([part.double().sum(0) for part in features.split(BLOCK)]).sum(0) / count
        squares = torch.stack([(part.double() - mean).square().sum(0) for part in features.split(BLOCK)]).sum(0)
        deviation = (squares / count).sqrt()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", torch.where(deviation > 1e-8, 1 / deviation.clamp_min(1e-8), 0).float())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale


@holds("probe")
def probe_module(setup: Setup, number: int, *, fresh: bool = False) -> dict[str, Any]:
    """Classify the representation of module `number`, and that of the untrained network of the same seed, for every
    task.

    Where modules were merged into one to be trained end to end, they keep their numbers here.

    Raises:
        NotReady: the module is not frozen, or the dataset has no labels.
    """
    holder = require_part(setup, number)
    require_stage(setup, holder)
    if not fresh and (known := probe_record(setup, number)) is not None:
        return known
    made_from, path = _identity(setup, holder), setup.run.probe(number)
    _require_labels(setup)
    setup.progress.begin(f"probe {number}", 2, "networks")
    found: dict[str, Any] = {"made_from": made_from, "module": number, "tasks": {}}
    began = time.perf_counter()
    initial = parts([module.to(setup.device).eval() for module in setup.untrained()[:holder]])[:number]
    trained = parts(load_frozen(setup, holder))[:number]
    merged = setup.holders.count(holder) > 1
    networks = {
        "trained": (
            RecomputeFeed(_samples(setup), trained[:-1], setup.device)
            if merged
            else nearest_inputs(setup, number, SPLITS),
            trained[-1],
        ),
        "untrained": (RecomputeFeed(_samples(setup), initial[:-1], setup.device), initial[-1]),
    }
    with threads_of(setup, holder):
        for state, (feed, module) in networks.items():
            for task, result in _classify(setup, feed, module).items():
                found["tasks"].setdefault(task, {})[state] = asdict(result)
            setup.progress.advance(1, 0, state)
    setup.progress.end()
    outcomes = {
        f"{task}, {state}": result["accuracy"] for task, by in found["tasks"].items() for state, result in by.items()
    }
    setup.progress.measured("probe", number, outcomes)
    write_json(path, {**found, "seconds": round(time.perf_counter() - began, 3)})
    return found


def probe_record(setup: Setup, part: int | str) -> dict[str, Any] | None:
    """What was measured of a part of the network, or of features by hand, as it is now; None where that was not."""
    known = read_record(setup.run.probe(part), PROBE)
    try:
        made_from = _identity(setup, None if isinstance(part, str) else setup.holders[part - 1])
    except NotReady:  # a module below is not frozen
        return None
    if known is None or known["module"] != part or known["made_from"] != made_from:
        return None
    return {**known}


def _identity(setup: Setup, holder: int | None) -> dict[str, Any]:
    """Everything that can change a probe's accuracy, but for rounding in a cache that it was read from."""
    return probe_made_from(probe_part(setup, holder), [] if holder is None else frozen_digests(setup, holder))


def probe_part(setup: Setup, holder: int | None) -> dict[str, Any]:
    """The recipe's part of it."""
    recipe = setup.recipe
    return {
        "network": recipe.network.through(holder),
        "seed": recipe.seed,
        "dataset": recipe.dataset.identity(),
        "probe": recipe.probe.identity(),
        "manifest": setup.facts.manifest,
        **({"label_frames": "from the front"} if setup.facts.lengths else {}),  # earlier: from the end
    }


def require_part(setup: Setup, number: int) -> int:
    """The module that holds part `number`.

    Raises:
        UsageError: there is no such part.
    """
    if not 1 <= number <= len(setup.holders):
        raise UsageError(
            f"there is no module {number}: the recipe {setup.recipe.name!r} has modules 1 to {len(setup.holders)}"
        )
    return setup.holders[number - 1]


def parts(modules: Sequence[Module]) -> list[Module]:
    return [part for module in modules for part in module.parts()]


@holds("probe")
def probe_fixed(setup: Setup, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Classify the features by hand that the network is compared with (MFCC, for speech), for every task.

    Raises:
        NotReady: the dataset has no labels, or a library that the features need is missing.
    """
    results = []
    for name, make in setup.recipe.network.fixed_features().items():
        made_from, path = _identity(setup, None), setup.run.probe(name)
        known = probe_record(setup, name)
        if known is None or fresh:
            _require_labels(setup)
            setup.progress.begin(f"probe {name}", 1, "features")
            outcomes = _classify(setup, _samples(setup), make().to(setup.device).eval())
            known = {
                "made_from": made_from,
                "module": name,
                "tasks": {task: {"fixed": asdict(result)} for task, result in outcomes.items()},
            }
            setup.progress.end()
            write_json(path, known)
        results.append(known)
    return results


def _require_labels(setup: Setup) -> None:
    if not set(SPLITS) <= setup.facts.sizes.keys() or not setup.facts.classes:
        raise NotReady(f"the dataset of recipe {setup.recipe.name!r} has no labelled samples to probe with")


def _samples(setup: Setup) -> Feed:
    return DatasetFeed(setup.splits, setup.recipe.training.batch_size, setup.order_seed(1))


def _classify(setup: Setup, feed: Feed, module: Module) -> dict[str, ProbeResult]:
    """The outcome for each task on what the module makes of the feed."""
    outcomes = {}
    found = {split: features(feed, module, split, setup.device, setup.run.folder) for split in SPLITS}
    for task, classes in setup.facts.classes.items():
        train, test = (found[split][task] for split in SPLITS)
        settings = setup.recipe.probe.of(task)
        outcomes[task] = fit_probe(train, test, classes, settings, setup.recipe.seed, setup.device)
    return outcomes


def features(feed: Feed, module: Module, split: str, device: torch.device, folder: Path) -> dict[str, Labelled]:
    """By task, what a module makes of a split.

    The numbers lie on the disk that holds `folder`, in files without a name, since the frames of a hundred hours of
    speech take tens of gigabytes. The system removes such a file with its last user, even one that is killed.

    Raises:
        WillNotFit: the disk is full.
    """
    labels: dict[str, list[Tensor]] = {}
    files: dict[str, IO[bytes]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            for batch in feed.in_order(split):
                for task, values in batch.labels.items():
                    labels.setdefault(task, []).append(values.flatten())
                    if task not in files:
                        files[task] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed below)
                for i in range(len(batch)):
                    c = encode(module, batch.inputs_on(device, slice(i, i + 1))).c.float()
                    for task, values in batch.labels.items():
                        if values.ndim == 1:
                            pooled = c.flatten(2).mean(2)
                        else:
                            pooled = at_labels(c, module.hop, values.shape[1], module.front)[0].T
                        files[task].write(pooled.cpu().contiguous().numpy().tobytes())
        found = {}
        for task, file in files.items():
            known = torch.cat(labels[task])
            rows = np.memmap(file, np.float32, "r+", shape=(len(known), module.channels))
            every = Labelled(torch.from_numpy(rows), known)
            found[task] = every if bool((known != UNKNOWN).all()) else every.at((known != UNKNOWN).nonzero().flatten())
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise WillNotFit(
            f"could not write the features of the split {split!r} to {folder}: {os.strerror(error.errno)}. Free "
            f"some disk space and run the same command again; what was saved before is intact."
        ) from error
    finally:
        for file in files.values():
            with suppress(OSError):  # of which was told above
                file.close()
    return found
