"""One update of gradient-isolated modules: each by its own loss, none through another.

Two ideas keep the memory of a step at that of one module's micro-batch, and change no gradient:

* *Eager local backward.* No gradient crosses a module's border, so each module is back-propagated and updated right
  after its own forward, and its graph is gone before the next module's is built.
* *Exact chunked gradients* (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
  Setup"). A loss that contrasts the samples of a batch needs all their representations, which are small, but not all
  their activations. Forward in micro-batches without a graph and keep the representations; take the loss and its
  gradient there; forward each micro-batch again, with a graph, and hand it its slice of that gradient.

A loss may see the samples of a step in groups (`Arithmetic.loss_group`), as the paper's does, which draws negatives
from the 16 images of one GPU of eight. Micro-batches that hold whole groups go forward once.

Letters: B batch, b micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import Diverged, RecipeError
from layerwise.nets.module import Module
from layerwise.objectives.objective import Context, Objective
from layerwise.seeding import derive_seed, torch_generator
from layerwise.training.feeds import Batch


@dataclass(frozen=True)
class Learner:
    """A module in training, with the loss and the optimiser that are its own."""

    number: int
    module: Module
    objective: Objective
    optimiser: torch.optim.Optimizer
    every: int = 1
    """Updated in each `every`-th step; in the others it only hands on what it makes of its inputs."""
    rate: Callable[[int], float] | None = None
    """From the number of a step to its learning rate; None: as the optimiser has it."""
    clip_norm: float | None = None
    """Largest norm of the gradient of module and objective together, over the whole batch."""

    def due(self, step: int) -> bool:
        return step % self.every == 0


@dataclass(frozen=True)
class Arithmetic:
    """Where and how a step is computed."""

    device: torch.device
    precision: str
    """"fp32" or "bf16" (autocast; weights and optimiser states stay float32)."""
    micro_batch: int | None
    """Samples that go through a module at once; None: the whole batch."""
    seed: int
    loss_group: int | None = None
    """Samples whose representations a loss sees at once, in the order of the batch; None: the whole batch."""

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def slices(self, samples: int) -> list[slice]:
        """The micro-batches, of whole groups where they can hold one."""
        size = min(self.micro_batch or samples, samples)
        if self.loss_group is not None and size > self.loss_group:
            size -= size % self.loss_group
        return [slice(begin, min(begin + size, samples)) for begin in range(0, samples, size)]

    def groups(self, samples: int) -> list[slice]:
        """The groups that a loss sees."""
        size = min(self.loss_group or samples, samples)
        return [slice(begin, min(begin + size, samples)) for begin in range(0, samples, size)]

    def one_pass(self, samples: int) -> bool:
        """Whether every group lies within a micro-batch, so that nothing has to go forward twice."""
        borders = {chunk.start for chunk in self.groups(samples)}
        return all(chunk.start in borders for chunk in self.slices(samples))


def train_step(learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic) -> list[float]:
    """Update every learner that is due once, each fed with what the one before gave before its update.

    Returns the losses, in nats. Random layers draw anew in each micro-batch, and the same in both of its passes.

    Raises:
        Diverged: a loss is not finite; that learner and those above it were not updated.
        RecipeError: a module couples samples and the batch does not go through whole.
    """
    slices = arithmetic.slices(len(batch))
    if len(slices) > 1:
        require_separable(learners, arithmetic)
    if arithmetic.one_pass(len(batch)):
        return _in_one_pass(learners, batch, step, arithmetic, slices)
    return _in_two_passes(learners, batch, step, arithmetic, slices)


def require_separable(learners: Sequence[Learner], arithmetic: Arithmetic) -> None:
    """
    Raises:
        RecipeError: a module couples samples, so that micro-batches would change its gradients.
    """
    for learner in learners:
        if (layer := learner.module.couples_samples()) is not None:
            raise RecipeError(
                f"module {learner.number} has {layer}, whose result for one sample depends on the others, so "
                f"micro-batches of {arithmetic.micro_batch} would change its gradients: leave out --micro-batch and "
                "--max-memory: whole batches work; or normalise within a sample (GroupNorm, LayerNorm), as "
                "layerwise.group_norm(network) does"
            )


def _in_one_pass(
    learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic, slices: Sequence[slice]
) -> list[float]:
    labels = batch.labels_on(arithmetic.device)
    losses = [0.0] * len(learners)
    for chunk in slices:
        share = (chunk.stop - chunk.start) / len(batch)
        for index, (learner, representations) in enumerate(_through(learners, batch, chunk, step, arithmetic)):
            loss = share * _loss(learner, representations, labels, step, arithmetic, chunk)
            losses[index] += _finite(loss, learner, step)
            if learner.due(step):
                loss.backward()
                if chunk is slices[-1]:
                    update(learner, step)
    return losses


def _in_two_passes(
    learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic, slices: Sequence[slice]
) -> list[float]:
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in learners]
    with torch.no_grad():
        for chunk in slices:
            for found, (_, representations) in zip(
                parts, _through(learners, batch, chunk, step, arithmetic), strict=True
            ):
                found.append(representations)

    labels = batch.labels_on(arithmetic.device)
    losses, gradients = [], []
    for learner in learners:
        whole = tuple(torch.cat(pieces) for pieces in zip(*parts.pop(0), strict=True))
        for part in whole:
            part.requires_grad_(part.is_floating_point())
        loss = _loss(learner, whole, labels, step, arithmetic, slice(0, len(batch)))
        losses.append(_finite(loss, learner, step))
        if learner.due(step):
            loss.backward()
        gradients.append([part.grad for part in whole])
    del whole, loss  # only their gradients are needed from here on

    for chunk in slices:
        for (_, representations), gradient in zip(
            _through(learners, batch, chunk, step, arithmetic), gradients, strict=True
        ):
            pairs = [
                (part, of_batch[chunk])
                for part, of_batch in zip(representations, gradient, strict=True)
                if of_batch is not None and part.requires_grad
            ]
            if pairs:
                torch.autograd.backward([part for part, _ in pairs], [of_chunk for _, of_chunk in pairs])
    for learner in learners:
        if learner.due(step):
            update(learner, step)
    return losses


@contextmanager
def rehearsal(learners: Sequence[Learner], batch: Batch, arithmetic: Arithmetic) -> Iterator[Callable[[], None]]:
    """What does the bulk of a step's work when it is called: on the first micro-batch, without the loss and the update.

    The block leaves weights, buffers, gradients and torch's generator as they were.
    """
    chunk, twice = arithmetic.slices(len(batch))[0], not arithmetic.one_pass(len(batch))
    parts = [part for learner in learners for part in (learner.module, learner.objective)]
    buffers = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]

    def rehearse() -> None:
        if twice:
            with torch.no_grad():
                for _ in _through(learners, batch, chunk, 0, arithmetic):
                    pass
        for _, representations in _through(learners, batch, chunk, 0, arithmetic):
            given = [part for part in representations if part.requires_grad]
            if given:
                torch.autograd.backward(given, [torch.ones_like(part) for part in given])

    with torch.random.fork_rng(devices=[]):
        try:
            yield rehearse
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for learner in learners:
                learner.optimiser.zero_grad(set_to_none=True)


def _through(
    learners: Sequence[Learner], batch: Batch, chunk: slice, step: int, arithmetic: Arithmetic
) -> Iterator[tuple[Learner, tuple[Tensor, ...]]]:
    """One micro-batch through every learner, with no gradient across a border.

    The caller back-propagates, or drops, what one learner gave before it asks for the next, so one graph is alive.
    """
    x = batch.inputs_on(arithmetic.device, chunk)
    for learner in learners:
        torch.manual_seed(derive_seed(arithmetic.seed, "layers", learner.number, step, chunk.start))
        with arithmetic.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and learner.due(step)):
            before = x._version
            encoded = learner.module(x)
            _require_unchanged(x, before, learner)
            representations = learner.objective.represent(encoded)
        x = encoded.output.detach() if learner is not learners[-1] else x.new_empty(0)  # nobody reads the last one's
        del encoded
        yield learner, representations


def _require_unchanged(x: Tensor, version: int, learner: Learner) -> None:
    """
    Raises:
        RecipeError: the module overwrote its input, which the module below, or a second pass, still needs.
    """
    if x._version != version:
        raise RecipeError(
            f"module {learner.number} ({type(learner.module).__name__}) changes its input in place, which belongs to "
            "the module before it: begin it with an operation that does not, such as nn.ReLU() without inplace=True"
        )


def _loss(
    learner: Learner,
    representations: tuple[Tensor, ...],
    labels: dict[str, Tensor],
    step: int,
    arithmetic: Arithmetic,
    chunk: slice,
) -> Tensor:
    """The mean loss over the groups in `chunk`, of which the representations are and which lies in the batch there."""
    with arithmetic.autocast():
        here = {task: values[chunk] for task, values in labels.items()}
        return grouped_loss(learner, representations, here, arithmetic, ("draws", learner.number, step), chunk.start)


def grouped_loss(
    learner: Learner,
    representations: tuple[Tensor, ...],
    labels: Mapping[str, Tensor],
    arithmetic: Arithmetic,
    draws: tuple[str | int, ...],
    begin: int = 0,
) -> Tensor:
    """The loss of each group by itself, with draws of its own, averaged over the samples.

    Args:
        draws: what names the random draws of this loss.
        begin: of the first sample within its batch: a group draws the same wherever it is computed.
    """
    samples = len(representations[0])
    groups = arithmetic.groups(samples)
    if arithmetic.loss_group is None:
        return learner.objective.loss(representations, Context(torch_generator(arithmetic.seed, *draws), dict(labels)))
    losses = []
    for group in groups:
        number = (begin + group.start) // arithmetic.loss_group
        context = Context(
            torch_generator(arithmetic.seed, *draws, "group", number),
            {task: values[group] for task, values in labels.items()},
        )
        loss = learner.objective.loss(tuple(part[group] for part in representations), context)
        losses.append(loss * ((group.stop - group.start) / samples))
    return torch.stack(losses).sum()


def update(learner: Learner, step: int) -> None:
    """Follow the gradient that the whole batch left, clipped once, at the learning rate of this step."""
    groups = learner.optimiser.param_groups
    if learner.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], learner.clip_norm)
    if learner.rate is not None:
        for group in groups:
            group["lr"] = learner.rate(step)
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)


def _finite(loss: Tensor, learner: Learner, step: int) -> float:
    return require_finite(loss.item(), learner, step)


def require_finite(loss: float, learner: Learner, step: int) -> float:
    """
    Raises:
        Diverged: the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        rate = learner.optimiser.param_groups[0]["lr"]
        raise Diverged(
            f"the loss of module {learner.number} is {loss} at step {step} (learning rate {rate:g}). The "
            "last checkpoint is whole; to begin again, try a lower optimiser.learning_rate with --fresh."
        )
    return loss
