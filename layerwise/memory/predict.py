"""Predict the memory of a training step before anything is allocated.

The step itself runs, on fake tensors: shapes and lifetimes without numbers. Counted is what PyTorch holds in tensors
on the device; a CUDA context, workspaces inside an operation and an allocator's fragments come on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from layerwise.errors import LayerwiseError, Unpredictable, in_one_line
from layerwise.memory.count import REST, LiveBytes
from layerwise.nets.module import Encoded, Module, failure_named
from layerwise.recipe.learner import make_learner
from layerwise.recipe.recipe import Recipe
from layerwise.settings.base import Shape
from layerwise.stopping import signals_wait
from layerwise.training.feeds import Batch, as_stored
from layerwise.training.step import Arithmetic, Learner, train_step

CPU = torch.device("cpu")
Step = Callable[[Sequence[Learner], Batch, int, Arithmetic], object]
UNKNOWN = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.int16, "uint8": torch.uint8}
"""What a cache's batches are made of; bfloat16 comes as its bits."""


@dataclass(frozen=True)
class Samples:
    """What a prediction has to know of a dataset."""

    shape: Shape
    """Of one sample."""
    classes: Mapping[str, int]
    """Task to number of classes."""


@dataclass(frozen=True)
class Footprint:
    """Bytes in tensors on the device when a step holds the most of them."""

    peak: int
    parameters: int
    """Of modules and objectives; of frozen modules below, where the stage runs them."""
    gradients: int
    optimiser: int
    """The optimiser's states."""
    inputs: int
    activations: int
    """Activations, their gradients, and temporaries."""

    @property
    def floor(self) -> int:
        """What no micro-batch makes smaller."""
        return self.parameters + self.gradients + self.optimiser


def predict(
    recipe: Recipe, numbers: Sequence[int], samples: Samples, *, host_apart: bool = True, step: Step = train_step
) -> Footprint:
    """The footprint of training these modules together, after the first step (which makes the optimiser's states).

    Args:
        recipe: its `training.micro_batch` is taken as it stands; `training.max_memory` is not looked at.
        host_apart: the device has a memory of its own, to which inputs are copied. Where it is false, as on a CPU, the
            whole batch of inputs counts, whatever the micro-batch.
        step: the way of training; others than ours are for comparison.

    Raises:
        Unpredictable: a module or an objective computes shapes from values.
    """
    live = LiveBytes()
    with shapes_only():
        rehearse(live, recipe, numbers, samples, host_apart=host_apart, step=step)
    return Footprint(live.peak, **{part: live.parts.get(part, 0) for part in PARTS})


def rehearse(
    live: LiveBytes,
    recipe: Recipe,
    numbers: Sequence[int],
    samples: Samples,
    *,
    host_apart: bool = True,
    step: Step = train_step,
    device: torch.device = CPU,
    abridged: bool = True,
    before_second: Callable[[Sequence[Learner]], None] = lambda _: None,
) -> None:
    """Take two steps on zeros under the count of `live`, whose peak is then that of the second; the first makes the
    optimiser's states. Of tensors that are real, or fake within `shapes_only`.

    Args:
        abridged: from the third micro-batch on, a module only says what it would give; for fake tensors alone.
        before_second: is called between the two.
    """
    with live:
        modules = recipe.network.modules(samples.shape)
        below = modules[: numbers[0] - 1]
        given = stage_batch(recipe, below, samples)
        live.claim([given.inputs], None if host_apart else "inputs")
        batch = _Counted(
            given.inputs, given.labels, decode=given.decode, views=given.views, live=live, host_apart=host_apart
        )
        learners = [
            make_learner(recipe, number, modules[number - 1], samples.shape, samples.classes, device)
            for number in numbers
        ]
        del modules
        if recipe.feed == "cache":
            below.clear()
        live.claim((weight for module in below for weight in module.parameters()), "parameters")
        _claim_parts(learners, live)
        if abridged:
            learners = [replace(one, module=_Abridged(one.number, one.module)) for one in learners]
        training = recipe.training
        arithmetic = Arithmetic(device, training.precision, training.micro_batch, recipe.seed, training.loss_group)
        step(learners, batch, 0, arithmetic)
        for learner in learners:
            if isinstance(learner.module, _Abridged):
                learner.module.begin_second_step()
            states = (state for states in learner.optimiser.state.values() for state in states.values())
            live.claim((state for state in states if isinstance(state, Tensor)), "optimiser")
        before_second(learners)
        live.reset_peak()
        step(learners, batch, 1, arithmetic)


PARTS = ("parameters", "gradients", "optimiser", "inputs", REST)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Make tensors within the block fake: shapes and lifetimes without numbers.

    Raises:
        Unpredictable: an operation needs values, or fails.
    """
    try:
        with signals_wait(), FakeTensorMode():
            yield
    except UNKNOWN as error:
        raise _unpredictable(f"an operation's shape depends on values ({error})") from error
    except Unpredictable as error:
        raise _unpredictable(str(error)) from error
    except LayerwiseError:
        raise
    except Exception as error:  # of the user's own objective, say
        raise _unpredictable(in_one_line(error)) from error


def _unpredictable(reason: str) -> Unpredictable:
    return Unpredictable(
        f"the memory of this training cannot be predicted: {reason}. Train without --max-memory, with --micro-batch "
        "where memory is short"
    )


def _claim_parts(learners: Sequence[Learner], live: LiveBytes) -> None:
    """Count weights as parameters, and each gradient as one from when it is whole."""
    for part in (part for learner in learners for part in (learner.module, learner.objective)):
        live.claim((*part.parameters(), *part.buffers()), "parameters")
        for weight in part.parameters():
            weight.register_post_accumulate_grad_hook(
                lambda weight: live.claim([weight.grad], "gradients") if weight.grad is not None else None
            )


class _Abridged(Module):
    """A module that works a few times for each shape of input and then only says what it would give.

    From the second micro-batch on, all are alike: gradients exist, and one graph comes and goes. So it works twice in
    the step that counts, and once in the one before, which is there for the optimiser's states.
    """

    def __init__(self, number: int, module: Module) -> None:
        super().__init__()
        self.number, self.module, self.channels = number, module, module.channels
        self._times = 1
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._given: dict[tuple[object, ...], tuple[list[tuple[Shape, torch.dtype]], bool]] = {}

    def begin_second_step(self) -> None:
        self._times = 2
        self._seen.clear()

    def forward(self, x: Tensor) -> Encoded:
        key = (x.shape, x.dtype, torch.is_grad_enabled())
        self._seen[key] += 1
        if self._seen[key] <= self._times:
            with failure_named(self.number, self.module, x, Unpredictable, (*UNKNOWN, LayerwiseError)):
                encoded: Encoded = self.module(x)
            self._given[key] = [(part.shape, part.dtype) for part in encoded], encoded.c is encoded.z
            return encoded
        shapes, same = self._given[key]
        z, c, output = (
            x.new_empty(shape, dtype=dtype, requires_grad=torch.is_grad_enabled()) for shape, dtype in shapes
        )
        return Encoded(z, z if same else c, output)


@dataclass(frozen=True)
class _Counted(Batch):
    """A batch whose inputs count as such, and on the device only."""

    live: LiveBytes = field(kw_only=True)
    host_apart: bool = field(kw_only=True)

    def inputs_on(self, device: torch.device, chunk: slice = slice(None)) -> Tensor:
        part = self.inputs[chunk] if self.views == 1 else self.inputs[chunk].flatten(0, 1)
        inputs = self.decode(part.to(device, copy=self.host_apart))
        self.live.claim([inputs], "inputs")
        return inputs


def stage_batch(recipe: Recipe, below: Sequence[Module], samples: Samples) -> Batch:
    """A batch of zeros as the stage's feed gives it: the dataset's, a cache's, or one computed by the modules below."""
    size = recipe.training.batch_size
    labels = {task: torch.zeros(size, dtype=torch.long) for task in samples.classes}
    one = torch.zeros(1, *samples.shape)
    with torch.no_grad():
        for number, module in enumerate(below, 1):
            with failure_named(number, module, one, Unpredictable, (*UNKNOWN, LayerwiseError)):
                one = module.eval()(one).output
    dtype, decode = one.dtype, as_stored
    if below and recipe.feed == "cache":
        dtype, decode = STORED[recipe.cache.dtype], partial(_decode, bits=recipe.cache.dtype == "bfloat16")
    views = recipe.views_of(len(below) + 1)
    shape = (size, *one.shape[1:]) if views == 1 else (size, views, *one.shape[1:])
    return Batch(torch.zeros(shape, dtype=dtype), labels, decode=decode, views=views)


def _decode(stored: Tensor, bits: bool) -> Tensor:
    return (stored.view(torch.bfloat16) if bits else stored).float()
