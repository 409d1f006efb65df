"""A linear classifier on a frozen representation, mean-pooled over its positions (paper, sections 4.1 and A.1).

Letters: N samples, C channels, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.caching import nearest_inputs
from layerwise.errors import NotReady, UsageError
from layerwise.feeds import DatasetFeed, Feed, RecomputeFeed
from layerwise.frozen import load_frozen, require_stage
from layerwise.nets.module import Module
from layerwise.recipe import Probe
from layerwise.seeding import numpy_generator, seeded
from layerwise.setup import Setup
from layerwise.storage import read_json, write_json

HELD_OUT = 0.2  # of the training samples, to choose the learning rate on (appendix A.1)


@dataclass(frozen=True)
class ProbeResult:
    accuracy: float
    """Of the test samples, from 0 to 1."""
    train_accuracy: float
    learning_rate: float
    """The one that was chosen."""
    samples: int
    test_samples: int


def fit_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, settings: Probe, seed: int
) -> ProbeResult:
    """Train on (N, C) features with (N,) labels, judge on the test pair.

    With several learning rates, each is tried on four fifths of the training samples and judged on the fifth.
    """
    features, labels = train
    if settings.standardise:
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-8)
        features, test = (features - mean) / deviation, ((test[0] - mean) / deviation, test[1])
    rate = settings.learning_rates[0]
    if len(settings.learning_rates) > 1:
        order = torch.from_numpy(numpy_generator(seed, "probe split").permutation(len(labels)))
        held, kept = order.split([int(len(order) * HELD_OUT), len(order) - int(len(order) * HELD_OUT)])
        judged = {
            rate: accuracy(
                _train_linear(features[kept], labels[kept], classes, rate, settings, seed), features[held], labels[held]
            )
            for rate in settings.learning_rates
        }
        rate = max(judged, key=lambda rate: judged[rate])
    classifier = _train_linear(features, labels, classes, rate, settings, seed)
    return ProbeResult(
        accuracy(classifier, *test), accuracy(classifier, features, labels), rate, len(labels), len(test[1])
    )


def accuracy(classifier: nn.Module, features: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((classifier(features).argmax(1) == labels).double().mean())


def _train_linear(features: Tensor, labels: Tensor, classes: int, rate: float, settings: Probe, seed: int) -> nn.Linear:
    with seeded(seed, "probe"):
        classifier = nn.Linear(features.shape[1], classes, device=features.device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=rate)
    for epoch in range(settings.epochs):
        order = numpy_generator(seed, "probe", epoch).permutation(len(labels))
        for begin in range(0, len(order), settings.batch_size):
            chosen = torch.from_numpy(np.asarray(order[begin : begin + settings.batch_size])).to(features.device)
            optimiser.zero_grad()
            F.cross_entropy(classifier(features[chosen]), labels[chosen]).backward()
            optimiser.step()
    return classifier


def probe_module(setup: Setup, number: int, *, fresh: bool = False) -> dict[str, Any]:
    """Classify the representation of module `number`, and that of the untrained network of the same seed, for every
    task.

    Where modules were merged into one to be trained end to end, they keep their numbers here.

    Raises:
        NotReady: the module is not frozen, or the dataset has no labels.
    """
    holder = require_part(setup, number)
    record = require_stage(setup, holder)
    made_from = {"weights": record["weights"], "probe": setup.recipe.probe.identity(), "manifest": setup.facts.manifest}
    path = setup.run.probe(number)
    known = read_json(path)
    if known is not None and not fresh and known["made_from"] == made_from:
        return known
    if not {"probe", "test"} <= setup.facts.sizes.keys():
        raise NotReady(f"the dataset of recipe {setup.recipe.name!r} has no labelled samples to probe with")
    setup.progress.begin(f"probe {number}", 2, "networks")
    found: dict[str, Any] = {"made_from": made_from, "module": number, "tasks": {}}
    initial = parts([module.to(setup.device).eval() for module in setup.untrained()[:holder]])[:number]
    trained = parts(load_frozen(setup, holder))[:number]
    samples = DatasetFeed(setup.splits, setup.recipe.training.batch_size, setup.order_seed(number))
    merged = setup.holders.count(holder) > 1
    networks = {
        "trained": (
            RecomputeFeed(samples, trained[:-1], setup.device) if merged else nearest_inputs(setup, number),
            trained[-1],
        ),
        "untrained": (RecomputeFeed(samples, initial[:-1], setup.device), initial[-1]),
    }
    for state, (feed, module) in networks.items():
        pairs = {split: features(feed, module, split, setup.device) for split in ("probe", "test")}
        for task, classes in setup.facts.classes.items():
            train, test = ((pairs[split][0], pairs[split][1][task]) for split in ("probe", "test"))
            found["tasks"].setdefault(task, {})[state] = asdict(
                fit_probe(train, test, classes, setup.recipe.probe, setup.recipe.seed)
            )
        setup.progress.advance(1, 0, state)
    setup.progress.end()
    write_json(path, found)
    return found


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


def features(feed: Feed, module: Module, split: str, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """(N, C) mean over the positions of a module's representations of a split, and its labels, on the device."""
    pooled, labels = [], []
    with torch.no_grad():
        for batch in feed.in_order(split):
            for i in range(len(batch)):
                pooled.append(module(batch.inputs_on(device, slice(i, i + 1))).c.flatten(2).mean(2).float())
            labels.append(batch.labels_on(device))
    return torch.cat(pooled), {task: torch.cat([part[task] for part in labels]) for task in labels[0]}
