"""Other ways to take a step, for comparison only: what our own is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerwise.objectives.objective import Context
from layerwise.seeding import derive_seed, torch_generator
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, Learner, update


def summed_step(learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic) -> float:
    """Every module's graph at once, one backward through the sum of their losses: the published code's way.

    Same draws, and so the same weights, as `layerwise.training.step.train_step` on the whole batch.
    """
    x = batch.inputs_on(arithmetic.device)
    labels = batch.labels_on(arithmetic.device)
    total = torch.zeros((), device=arithmetic.device)
    for learner in learners:
        torch.manual_seed(derive_seed(arithmetic.seed, "layers", learner.number, step, 0))
        context = Context(torch_generator(arithmetic.seed, "draws", learner.number, step), labels)
        with arithmetic.autocast():
            encoded = learner.module(x)
            total = total + learner.objective.loss(learner.objective.represent(encoded), context)
        x = encoded.output.detach()
    total.backward()
    for learner in learners:
        update(learner, step)
    return total.item()
