"""One update of gradient-isolated modules: each by its own loss, none through another.

Two ideas keep the memory of a step at that of one module's micro-batch, and change no gradient:

* *Eager local backward.* No gradient crosses a module's border, so each module is back-propagated and updated right
  after its own forward, and its graph is gone before the next module's is built.
* *Exact chunked gradients* (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
  Setup"). A loss that contrasts the samples of a batch needs all their representations, which are small, but not all
  their activations. Forward in micro-batches without a graph and keep the representations; take the loss and its
  gradient there; forward each micro-batch again, with a graph, and hand it its slice of that gradient.

Letters: B batch, b micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import Diverged, RecipeError
from layerwise.feeds import Batch
from layerwise.nets.module import Module
from layerwise.objectives.objective import Context, Objective
from layerwise.seeding import derive_seed, torch_generator


@dataclass(frozen=True)
class Learner:
    """A module in training, with the loss and the optimiser that are its own."""

    number: int
    module: Module
    objective: Objective
    optimiser: torch.optim.Optimizer


@dataclass(frozen=True)
class Arithmetic:
    """Where and how a step is computed."""

    device: torch.device
    precision: str
    """"fp32" or "bf16" (autocast; weights and optimiser states stay float32)."""
    micro_batch: int | None
    """Samples that go through a module at once; None: the whole batch."""
    seed: int

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def slices(self, samples: int) -> list[slice]:
        size = min(self.micro_batch or samples, samples)
        return [slice(begin, min(begin + size, samples)) for begin in range(0, samples, size)]


def train_step(learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic) -> list[float]:
    """Update every learner once, each fed with what the one before gave before its update.

    Returns the losses, in nats.

    Raises:
        Diverged: a loss is not finite; that learner and those above it were not updated.
        RecipeError: a module couples samples and the batch does not go through whole.
    """
    slices = arithmetic.slices(len(batch))
    if len(slices) == 1:
        return [_finite(loss, learner, step) for learner, loss in _whole(learners, batch, step, arithmetic)]
    return _chunked(learners, batch, step, arithmetic, slices)


def _whole(
    learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic
) -> Iterator[tuple[Learner, float]]:
    x = batch.inputs_on(arithmetic.device)
    labels = batch.labels_on(arithmetic.device)
    for learner in learners:
        torch.manual_seed(derive_seed(arithmetic.seed, "layers", learner.number, step))
        with arithmetic.autocast():
            encoded = learner.module(x)
            loss = learner.objective.loss(
                learner.objective.represent(encoded), _context(learner, step, arithmetic, labels)
            )
        _finite(loss.item(), learner, step)
        x = encoded.output.detach()
        del encoded
        loss.backward()
        _update(learner)
        yield learner, loss.item()


def _chunked(
    learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic, slices: Sequence[slice]
) -> list[float]:
    for learner in learners:
        if (layer := learner.module.couples_samples()) is not None:
            raise RecipeError(
                f"module {learner.number} has {layer}, whose result for one sample depends on the others, "
                "so micro-batches of "
                f"{arithmetic.micro_batch} would change its gradients: leave out --micro-batch and "
                "--max-memory, or normalise within a sample (GroupNorm, LayerNorm)"
            )
    labels = batch.labels_on(arithmetic.device)
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in learners]
    with torch.no_grad():
        for chunk in slices:
            for found, (_, represented) in zip(parts, _forward(learners, batch, chunk, step, arithmetic), strict=True):
                found.append(represented)

    losses = []
    whole = [tuple(torch.cat(pieces).requires_grad_() for pieces in zip(*found, strict=True)) for found in parts]
    del parts
    for learner, representations in zip(learners, whole, strict=True):
        with arithmetic.autocast():
            loss = learner.objective.loss(representations, _context(learner, step, arithmetic, labels))
        losses.append(_finite(loss.item(), learner, step))
        loss.backward()

    for chunk in slices:
        for (_, represented), representations in zip(
            _forward(learners, batch, chunk, step, arithmetic), whole, strict=True
        ):
            pairs = [
                (part, all_.grad[chunk])
                for part, all_ in zip(represented, representations, strict=True)
                if all_.grad is not None and part.requires_grad
            ]
            torch.autograd.backward([part for part, _ in pairs], [gradient for _, gradient in pairs])
    for learner in learners:
        _update(learner)
    return losses


def _forward(
    learners: Sequence[Learner], batch: Batch, chunk: slice, step: int, arithmetic: Arithmetic
) -> Iterator[tuple[Learner, tuple[Tensor, ...]]]:
    """One micro-batch through every learner; both passes see the same random layers."""
    x = batch.inputs_on(arithmetic.device, chunk)
    for learner in learners:
        torch.manual_seed(derive_seed(arithmetic.seed, "layers", learner.number, step, chunk.start))
        with arithmetic.autocast():
            encoded = learner.module(x)
            represented = learner.objective.represent(encoded)
        x = encoded.output.detach()
        del encoded
        yield learner, represented


def _context(learner: Learner, step: int, arithmetic: Arithmetic, labels: dict[str, Tensor]) -> Context:
    return Context(torch_generator(arithmetic.seed, "draws", learner.number, step), labels)


def _update(learner: Learner) -> None:
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)


def _finite(loss: float, learner: Learner, step: int) -> float:
    if not math.isfinite(loss):
        rate = learner.optimiser.param_groups[0]["lr"]
        raise Diverged(
            f"the loss of module {learner.number} is {loss} at step {step} (learning rate {rate:g}). The "
            "last checkpoint is whole; try a lower optimiser.learning_rate."
        )
    return loss
