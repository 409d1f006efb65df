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
from layerwise.nets.module import Module, encode
from layerwise.objectives.objective import Context, Objective
from layerwise.seeding import derive_seed, torch_generator
from layerwise.training.feeds import Batch
from layerwise.training.ranks import ALONE, Ranks


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
    ranks: Ranks = ALONE
    """The processes that share each batch."""

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

    def part(self, samples: int) -> slice:
        """The samples of a batch that this process takes: whole groups, where there are enough for all processes.

        Raises:
            RecipeError: there are fewer samples than processes.
        """
        if samples < self.ranks.world:
            raise RecipeError(
                f"training.batch_size is {samples}, and {self.ranks.world} processes share each batch: choose "
                f"{self.ranks.world} or more, or start fewer processes"
            )
        if self.shares_groups(samples):
            borders = self.ranks.shares(samples)
        else:
            starts = [*(group.start for group in self.groups(samples)), samples]
            borders = [starts[share] for share in self.ranks.shares(len(starts) - 1)]
        return slice(borders[self.ranks.rank], borders[self.ranks.rank + 1])

    def shares_groups(self, total: int) -> bool:
        """Whether a group of a batch of so many samples lies in more than one process."""
        return len(self.groups(total)) < self.ranks.world

    def one_pass(self, samples: int, begin: int = 0, total: int | None = None) -> bool:
        """Whether every group of these samples of a batch lies within a micro-batch, so that nothing has to go forward
        twice.
        """
        total = samples if total is None else total
        if self.shares_groups(total):
            return False
        borders = {*(group.start for group in self.groups(total)), total}
        return all(begin + chunk.start in borders for chunk in self.slices(samples)) and begin + samples in borders


HandOn = Callable[[Batch, slice, Tensor], None]
"""Takes the output of a micro-batch (b * views, ...) of a batch, without a graph, to whoever trains the next module."""


def train_step(
    learners: Sequence[Learner], batch: Batch, step: int, arithmetic: Arithmetic, hand_on: HandOn | None = None
) -> list[float]:
    """Update every learner that is due once, each fed with what the one before gave before its update.

    Where several processes share the batch, each calls this with its own part of it. Returns the losses of the whole
    batch, in nats. Random layers draw anew in each micro-batch, and the same in both of its passes.

    Args:
        hand_on: is called once for each micro-batch with the last learner's output, before that learner is updated.

    Raises:
        Diverged: a loss is not finite; that learner and those above it were not updated.
        RecipeError: a module couples samples and the batch does not go through whole.
        ProcessLost: another process ended.
    """
    slices = arithmetic.slices(len(batch))
    if len(slices) > 1 or len(batch) < batch.total:
        require_separable({learner.number: learner.module for learner in learners}, arithmetic)
    if arithmetic.one_pass(len(batch), batch.begin, batch.total):
        return _in_one_pass(learners, batch, step, arithmetic, slices, hand_on)
    return _in_two_passes(learners, batch, step, arithmetic, slices, hand_on)


def require_separable(modules: Mapping[int, Module], arithmetic: Arithmetic) -> None:
    """Hold modules, by their numbers, to what goes through them in parts.

    Raises:
        RecipeError: a module couples samples, so that micro-batches would change its gradients.
    """
    for number, module in modules.items():
        if (layer := module.couples_samples()) is not None:
            ranks = arithmetic.ranks
            what = f"micro-batches of {arithmetic.micro_batch}" if ranks.alone else f"{ranks.world} processes"
            instead = "leave out --micro-batch and --max-memory" if ranks.alone else "start one process"
            raise RecipeError(
                f"module {number} has {layer}, whose result for one sample depends on the others, so {what} "
                f"would change its gradients: {instead}: whole batches work; or normalise within a sample (GroupNorm, "
                "LayerNorm), as layerwise.group_norm(network) does"
            )


def _in_one_pass(
    learners: Sequence[Learner],
    batch: Batch,
    step: int,
    arithmetic: Arithmetic,
    slices: Sequence[slice],
    hand_on: HandOn | None,
) -> list[float]:
    labels = batch.labels_on(arithmetic.device)
    losses = [0.0] * len(learners)
    unfinished: list[Callable[[], float]] = []
    for chunk in slices:
        share = (chunk.stop - chunk.start) / batch.total
        here = {task: values[chunk] for task, values in labels.items()}
        through = _through(learners, batch, chunk, step, arithmetic, hand_on)
        for index, (learner, representations) in enumerate(through):
            loss = share * _loss(learner, representations, here, step, arithmetic, batch.begin + chunk.start)
            losses[index] += loss.item()
            if len(unfinished) == 1:  # the sums of the module below were made while this one went forward
                losses[index - 1] = unfinished.pop()()
            if learner.due(step):
                loss.backward()
            if chunk is slices[-1]:
                unfinished.append(_finishing(learner, losses[index], step, arithmetic))
                if arithmetic.ranks.alone:
                    losses[index] = unfinished.pop()()
    if unfinished:
        losses[-1] = unfinished.pop()()
    return losses


def _in_two_passes(
    learners: Sequence[Learner],
    batch: Batch,
    step: int,
    arithmetic: Arithmetic,
    slices: Sequence[slice],
    hand_on: HandOn | None,
) -> list[float]:
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in learners]
    with torch.no_grad():
        for chunk in slices:
            through = _through(learners, batch, chunk, step, arithmetic, hand_on)
            for found, (_, representations) in zip(parts, through, strict=True):
                found.append(representations)

    seen = _Seen.of(batch, arithmetic)
    labels = {task: seen.gathered(values) for task, values in batch.labels_on(arithmetic.device).items()}
    losses, gradients = [], []
    for learner in learners:
        whole = tuple(seen.gathered(torch.cat(pieces)) for pieces in zip(*parts.pop(0), strict=True))
        for part in whole:
            part.requires_grad_(part.is_floating_point())
        losses.append(_loss_of_groups(learner, whole, labels, step, arithmetic, seen))
        gradients.append([None if part.grad is None else part.grad[seen.own] for part in whole])
    del whole  # only its gradients are needed from here on

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
    unfinished = [_finishing(learner, loss, step, arithmetic) for learner, loss in zip(learners, losses, strict=True)]
    return [finish() for finish in unfinished]


@dataclass(frozen=True)
class _Seen:
    """What the loss in this process sees of a batch: the groups that its own samples lie in, whole."""

    batch: Batch
    arithmetic: Arithmetic
    begin: int
    """Of the first group, in the whole batch."""
    end: int
    counted: int
    """Where the groups begin that this process counts; the one before, if any, begins in another process."""

    @classmethod
    def of(cls, batch: Batch, arithmetic: Arithmetic) -> _Seen:
        stop = batch.begin + len(batch)
        groups = [group for group in arithmetic.groups(batch.total) if group.start < stop and group.stop > batch.begin]
        counted = [group.start for group in groups if group.start >= batch.begin]
        return cls(batch, arithmetic, groups[0].start, groups[-1].stop, counted[0] if counted else groups[-1].stop)

    @property
    def own(self) -> slice:
        """The samples of this process among them."""
        return slice(self.batch.begin - self.begin, self.batch.begin - self.begin + len(self.batch))

    def gathered(self, part: Tensor) -> Tensor:
        """Rows of all samples in these groups, from those of the samples of each process."""
        if not self.arithmetic.shares_groups(self.batch.total):
            return part
        return self.arithmetic.ranks.whole(part, self.batch.begin, self.batch.total)[self.begin : self.end]


def _loss_of_groups(
    learner: Learner,
    representations: tuple[Tensor, ...],
    labels: dict[str, Tensor],
    step: int,
    arithmetic: Arithmetic,
    seen: _Seen,
) -> float:
    """The share of this process in the loss. Leaves the gradient of every group on the representations, and on the
    objective's own weights that of the groups that it counts: so that each is counted once.
    """
    counted = 0.0
    for begin, end, counts in ((seen.begin, seen.counted, False), (seen.counted, seen.end, True)):
        if begin == end:
            continue
        span = slice(begin - seen.begin, end - seen.begin)
        here = {task: values[span] for task, values in labels.items()}
        parts = representations if end - begin == len(representations[0]) else tuple(r[span] for r in representations)
        loss = _loss(learner, parts, here, step, arithmetic, begin) * ((end - begin) / seen.batch.total)
        if counts:
            counted = loss.item()
        if not learner.due(step):
            continue
        if counts:
            loss.backward()
            continue
        leaves = [part for part in representations if part.requires_grad]
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return counted


def _finishing(learner: Learner, loss: float, step: int, arithmetic: Arithmetic) -> Callable[[], float]:
    """Begin to sum what the processes have of a learner; the call that is returned waits for it, updates the learner,
    and returns its loss.
    """
    weights = [weight for part in (learner.module, learner.objective) for weight in part.parameters()]
    summed = arithmetic.ranks.sum_gradients(weights if learner.due(step) else [], loss)

    def finish() -> float:
        found = require_finite(summed(), learner.number, step, learner)
        if learner.due(step):
            update(learner, step)
        return found

    return finish


@contextmanager
def rehearsal(learners: Sequence[Learner], batch: Batch, arithmetic: Arithmetic) -> Iterator[Callable[[], None]]:
    """What does the bulk of a step's work when it is called: on the first micro-batch, without the loss and the update.

    The block leaves weights, buffers, gradients and torch's generator as they were.
    """
    chunk, twice = arithmetic.slices(len(batch))[0], not arithmetic.one_pass(len(batch), batch.begin, batch.total)
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
    learners: Sequence[Learner],
    batch: Batch,
    chunk: slice,
    step: int,
    arithmetic: Arithmetic,
    hand_on: HandOn | None = None,
) -> Iterator[tuple[Learner, tuple[Tensor, ...]]]:
    """One micro-batch through every learner, with no gradient across a border.

    The caller back-propagates, or drops, what one learner gave before it asks for the next, so one graph is alive.
    """
    x = batch.inputs_on(arithmetic.device, chunk)
    for learner in learners:
        torch.manual_seed(derive_seed(arithmetic.seed, "layers", learner.number, step, batch.begin + chunk.start))
        with arithmetic.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and learner.due(step)):
            encoded = encode(learner.module, x, learner.number)
            representations = batch.by_sample(learner.objective.represent(encoded))
        if learner is not learners[-1]:
            x = encoded.output.detach()
        else:
            x = x.new_empty(0)
            if hand_on is not None:
                hand_on(batch, chunk, encoded.output.detach())
        del encoded
        yield learner, representations


def _loss(
    learner: Learner,
    representations: tuple[Tensor, ...],
    labels: dict[str, Tensor],
    step: int,
    arithmetic: Arithmetic,
    begin: int,
) -> Tensor:
    """The mean loss over the groups of these samples, of which the first is number `begin` of the batch."""
    with arithmetic.autocast():
        return grouped_loss(learner, representations, labels, arithmetic, ("draws", learner.number, step), begin)


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


def require_finite(loss: float, number: int, step: int, learner: Learner | None = None) -> float:
    """
    Args:
        number: of the module.
        learner: of which the message gives the learning rate.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        rate = "" if learner is None else f" (learning rate {learner.optimiser.param_groups[0]['lr']:g})"
        raise Diverged(
            f"the loss of module {number} is {loss} at step {step}{rate}. The last checkpoint is intact; to start "
            "over, try a lower optimiser.learning_rate with --fresh.",
            number,
            loss,
        )
    return loss
