"""Consecutive modules in different processes: each hands its detached outputs to the next, and nothing comes back.

No gradient crosses a module's border, so a position of the pipeline goes on to its next step as soon as its outputs are
on their way, at most DEPTH batches ahead of the next position. A position may have several processes, which share each
batch as they would without a pipeline. With one process at each position, a CPU computes the same bits as one process
that trains all modules in each step.

The first process, which writes and prints, is at the last position. Everything it has to know reaches it behind the
activations: losses, the states of modules for a checkpoint, and after which step to stop.

Letters: B samples of a batch, R rows (B * views).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import Diverged, RecipeError
from layerwise.training.feeds import HOST, Batch, Feed, SampleShape
from layerwise.training.messages import (
    Kind,
    Moving,
    dense,
    dtype_name,
    dtype_of,
    receive,
    receive_json,
    receive_tensors,
    send,
    send_json,
    send_tensors,
    wait,
)
from layerwise.training.ranks import Ranks
from layerwise.training.step import Arithmetic, HandOn, require_finite

DEPTH = 2
"""Batches that may be on their way between two positions, at each end."""


@dataclass(frozen=True)
class Deal:
    """Which position trains which modules, and how many processes it has; positions in the order of the modules."""

    modules: Sequence[Sequence[int]]
    processes: Sequence[int]

    def members(self, position: int) -> range:
        """The processes at a position: the first process is at the last one."""
        behind = sum(self.processes[position + 1 :])
        return range(behind, behind + self.processes[position])

    def position(self, rank: int) -> int:
        return next(number for number in range(len(self.processes)) if rank in self.members(number))


class Pipe:
    """What the training of some modules shares with that of the modules before and behind it, if there are any.

    Calls are collective: every process of the training makes the same ones, in the same order.

    Raises (all of its calls):
        ProcessLost: another process ended.
    """

    def __init__(self, everyone: Ranks, numbers: Sequence[int], deal: Deal | None = None) -> None:
        self.everyone, self.numbers = everyone, list(numbers)
        self.deal = deal or Deal([self.numbers], [everyone.world])
        self.position = self.deal.position(everyone.rank)
        self.own = self.deal.modules[self.position]
        """The modules of this position."""
        self.members = self.deal.members(self.position)
        self.before = self.deal.members(self.position - 1) if self.position else range(0)
        """The processes that hand their outputs to this position."""
        self.behind = self.deal.members(self.position + 1) if self.position + 1 < len(self.deal.modules) else range(0)
        """The processes that this position hands its outputs to."""
        self.ranks = everyone
        """The processes at this position, which share each batch."""
        if deal is not None:
            self.ranks = everyone.within([self.deal.members(number) for number in range(len(deal.modules))])
        self._stop_key, self._asked, self._stop_told = f"stop/{everyone.handed_out[0]}", False, 0.0
        self._losses: list[float] = []
        self._on_their_way: deque[list[Moving]] = deque()
        self._states: list[Moving] = []
        self._form: dict[str, Any] | None = None

    def handing_on(self, arithmetic: Arithmetic, batch_size: int) -> HandOn | None:
        """What takes the outputs of training batches to the next position, if there is one."""
        if not self.behind:
            return None
        theirs = dict(zip(self.behind, _parts(arithmetic, batch_size, len(self.behind)), strict=True))
        return lambda batch, chunk, output: self._hand_on(batch, chunk, output, theirs)

    def validating(self, number: int, batches: int) -> HandOn | None:
        """What takes the outputs of validation batch `number` to the process that takes it at the next position."""
        if not self.behind:
            return None
        shares = Ranks(0, len(self.behind)).shares(batches)
        owner = next(
            rank for index, rank in enumerate(self.behind) if number in range(shares[index], shares[index + 1])
        )

        def hand_on(batch: Batch, chunk: slice, output: Tensor) -> None:
            if chunk.start == 0:
                self._form = None  # these batches differ in length
            self._hand_on(batch, chunk, output, {owner: slice(0, len(batch))})

        return hand_on

    def _hand_on(self, batch: Batch, chunk: slice, output: Tensor, theirs: Mapping[int, slice]) -> None:
        """Send these rows (r, ...) of a batch to the processes that have parts `theirs` of it."""
        here = slice(batch.begin + chunk.start, batch.begin + chunk.stop)
        if chunk.start == 0:
            while len(self._on_their_way) >= DEPTH:
                wait(self._on_their_way.popleft())
            self._on_their_way.append([])
        output = self._as_announced(output.to(HOST), batch, theirs, whole=list(theirs.values()) == [here])
        if chunk.start == 0:
            self._send_labels(batch, theirs)
        flat = output.as_strided((output.numel(),), (1,), output.storage_offset())
        of_sample = len(flat) // (here.stop - here.start)
        for process, part in theirs.items():
            if common := _common(here, part):
                self._send(process, Kind.INPUTS, flat[_within(common, here, of_sample)])

    def _as_announced(self, output: Tensor, batch: Batch, theirs: Mapping[int, slice], *, whole: bool) -> Tensor:
        """The output in the layout that the next position knows of; its form is told where it may have changed.

        A layout such as channels-last stays, since it decides by which kernel the next module is computed.

        Raises:
            RecipeError: outputs of training batches differ in shape.
        """
        output = dense(output, whole=whole)
        strides = [output.stride(0) if whole else output[0].numel(), *output.stride()[1:]]
        if self._form is None:
            self._form = {
                "samples": len(batch),
                "views": batch.views,
                "dtype": dtype_name(output.dtype),
                "shape": list(output.shape[1:]),
                "strides": strides,
                "labels": {
                    task: [dtype_name(values.dtype), list(values.shape[1:])] for task, values in batch.labels.items()
                },
            }
            for process in theirs:
                self._on_their_way[-1] += send_json(process, Kind.FORM, self._form)
        form = self._form
        if (dtype_name(output.dtype), list(output.shape[1:])) != (form["dtype"], form["shape"]):
            raise RecipeError(
                f"module {self.own[-1]} gives outputs of {dtype_name(output.dtype)} {tuple(output.shape[1:])} after "
                f"those of {form['dtype']} {tuple(form['shape'])}, and the pipelined schedule needs one form: choose "
                "--schedule simultaneous"
            )
        if strides == form["strides"]:
            return output
        return torch.empty_strided(output.shape, form["strides"], dtype=output.dtype).copy_(output)

    def _send_labels(self, batch: Batch, theirs: Mapping[int, slice]) -> None:
        here = slice(batch.begin, batch.begin + len(batch))
        for values in batch.labels.values():
            on_host = values.to(HOST).contiguous()
            for process, part in theirs.items():
                if common := _common(here, part):
                    self._send(process, Kind.LABELS, on_host[_within(common, here)])

    def _send(self, process: int, kind: Kind, tensor: Tensor) -> None:
        self._on_their_way[-1].append(send(process, kind, tensor))

    def losses(self, step: int, own: Sequence[float]) -> list[float]:
        """Losses of all modules in this step, with 0 for those behind this position.

        Raises:
            Diverged: a loss of a position before this one is not finite.
        """
        *known, self._stop_told = self._told(1) if self.before else [0.0]
        self._losses = [*known, *own]
        if not all(map(math.isfinite, known)):
            self._tell([*self._losses, 0.0])
            self.close()
            self._require_finite(known, step)
        return self._of_all(self._losses)

    def stops(self, wish: bool) -> bool:
        """Whether all stop after this step, which the first position decides; to be called after `losses`.

        Args:
            wish: whether this process is to stop.
        """
        if len(self.deal.modules) == 1:
            return self.ranks.any(wish)
        if self.before:
            if wish and not self._asked:
                self.everyone.ask(self._stop_key)
                self._asked = True
            stop = self._stop_told > 0
        else:
            stop = self.ranks.any(wish or self.everyone.asked(self._stop_key))
        self._tell([*self._losses, float(stop)])
        return stop

    @contextmanager
    def divergence_told(self, step: int) -> Iterator[None]:
        """Let the positions behind know the loss that ends the block, so that the first process can say why it ends.

        Raises:
            Diverged: in place of that of the block, where the loss of a position before this one is not finite either.
        """
        try:
            yield
        except Diverged as error:
            if error.module not in self.own:
                raise
            known = self._told(1)[:-1] if self.before else []
            own = [error.loss if number == error.module else 0.0 for number in self.own]
            self._tell([*known, *own, 0.0])
            self.close()
            self._require_finite(known, step)
            raise

    def after_validation(self, losses: Sequence[float]) -> list[float]:
        """The losses of all modules, in every process."""
        if len(self.deal.modules) == 1:
            return list(losses)
        self._form = None
        known = self._told() if self.before else []
        self._tell([*known, *losses])
        self.close()
        found: list[float] = self.everyone.told(self._of_all([*known, *losses]))
        return found

    def states(self, own: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `own` gives at the other positions, in the first process; nothing elsewhere, where copies of it are
        sent while the training goes on.
        """
        if self.behind and self.everyone.rank == self.members[0]:
            wait(self._states)
            self._states = send_tensors(0, own())
        found: dict[str, Tensor] = {}
        if self.everyone.first:
            for position in range(self.position):
                found |= receive_tensors(self.deal.members(position)[0])
        return found

    def close(self) -> None:
        """Wait until everything that this process sent has arrived."""
        while self._on_their_way:
            wait(self._on_their_way.popleft())
        wait(self._states)
        self._states = []

    def _tell(self, values: Sequence[float]) -> None:
        """Send numbers to the next position."""
        if not self._on_their_way:
            self._on_their_way.append([])
        for index, process in enumerate(self.behind):
            if self.members[index % len(self.members)] == self.everyone.rank:
                self._send(process, Kind.NOTE, torch.tensor(values, dtype=torch.float64))

    def _told(self, more: int = 0) -> list[float]:
        """A number for each module before this position, and `more`."""
        index = self.everyone.rank - self.members.start
        numbers = torch.empty(self.numbers.index(self.own[0]) + more, dtype=torch.float64)
        receive(self.before[index % len(self.before)], Kind.NOTE, numbers).wait()
        found: list[float] = numbers.tolist()
        return found

    def _require_finite(self, known: Sequence[float], step: int) -> None:
        for number, loss in zip(self.numbers, known, strict=False):
            require_finite(loss, number, step)

    def _of_all(self, losses: Sequence[float]) -> list[float]:
        return [*losses, *[0.0] * (len(self.numbers) - len(losses))]


class HandedFeed(Feed):
    """What the position before hands on. Batches are in the host's memory, one of them ahead of time."""

    def __init__(
        self, pipe: Pipe, arithmetic: Arithmetic, batch_size: int, sizes: Mapping[str, int], *, ragged: bool, views: int
    ) -> None:
        """
        Args:
            sizes: samples of "train" and "validation".
            ragged: whether validation samples differ in length.
            views: of each sample in a batch.
        """
        self._pipe, self._arithmetic, self._batch_size, self._sizes = pipe, arithmetic, batch_size, sizes
        self._ragged, self.views = ragged, views
        self.samples = sizes["train"]

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        here, before = self._arithmetic.part(self._batch_size), self._pipe.before
        parts = list(zip(before, _parts(self._arithmetic, self._batch_size, len(before)), strict=True))
        left = self.samples // self._batch_size - start
        if left == 0:
            return
        form, *_ = [receive_json(process, Kind.FORM) for process in before]
        posted: deque[tuple[Batch, list[Moving]]] = deque()
        while left or posted:
            while left and len(posted) < DEPTH:
                posted.append(self._post(form, here, parts))
                left -= 1
            batch, moving = posted.popleft()
            wait(moving)
            yield (
                batch
                if here == slice(0, self._batch_size)
                else replace(batch, begin=here.start, whole=self._batch_size)
            )

    def validation(self, start: int = 0) -> Iterator[Batch]:
        size = 1 if self._ragged else self._batch_size
        batches = -(-self._sizes["validation"] // size)
        before = self._pipe.before
        shares = Ranks(0, len(before)).shares(batches)
        for number in range(start // size, batches):
            owner = next(rank for index, rank in enumerate(before) if shares[index] <= number < shares[index + 1])
            form = receive_json(owner, Kind.FORM)
            here = slice(0, form["samples"])
            batch, moving = self._post(form, here, [(owner, here)])
            wait(moving)
            yield batch

    def _post(
        self, form: Mapping[str, Any], here: slice, parts: Sequence[tuple[int, slice]]
    ) -> tuple[Batch, list[Moving]]:
        """Begin to receive the samples `here` of a batch, of which other processes have `parts`."""
        samples, views = here.stop - here.start, form["views"]
        of_sample = views * math.prod(form["shape"])
        flat = torch.empty(samples * of_sample, dtype=dtype_of(form["dtype"]))
        labels = {
            task: torch.empty((samples, *shape), dtype=dtype_of(dtype))
            for task, (dtype, shape) in form["labels"].items()
        }
        moving = []
        for process, part in parts:
            if common := _common(here, part):
                for values in labels.values():
                    moving.append(receive(process, Kind.LABELS, values[_within(common, here)]))
            for chunk in self._arithmetic.slices(part.stop - part.start):
                if common := _common(here, slice(part.start + chunk.start, part.start + chunk.stop)):
                    moving.append(receive(process, Kind.INPUTS, flat[_within(common, here, of_sample)]))
        inputs = flat.as_strided((samples * views, *form["shape"]), form["strides"])
        return Batch(inputs if views == 1 else inputs.unflatten(0, (-1, views)), labels, views=views), moving

    def in_order(self, split: str, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        raise NotImplementedError("a position is handed what the training reads, and no more")

    def splits(self) -> Sequence[str]:
        return list(self._sizes)

    def samples_of(self, split: str) -> int:
        return self._sizes[split]

    def shape(self, split: str) -> SampleShape:
        return SampleShape((), self._ragged and split == "validation")


def _parts(arithmetic: Arithmetic, batch_size: int, processes: int) -> list[slice]:
    """The part of a batch that each process of a position takes."""
    return [replace(arithmetic, ranks=Ranks(rank, processes)).part(batch_size) for rank in range(processes)]


def _common(one: slice, other: slice) -> slice | None:
    begin, end = max(one.start, other.start), min(one.stop, other.stop)
    return slice(begin, end) if begin < end else None


def _within(part: slice, whole: slice, each: int = 1) -> slice:
    """Where a part begins and ends in what holds `each` numbers for every sample of the whole."""
    return slice((part.start - whole.start) * each, (part.stop - whole.start) * each)
