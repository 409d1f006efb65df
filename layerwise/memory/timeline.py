"""The live bytes of one training step over time, by what they are for.

The same count as `predict`, kept as a record: each storage with the moment it begins and the moment it ends. Time is
counted in these events; a step on fake tensors takes no other time that means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.memory.count import REST, LiveBytes
from layerwise.memory.predict import CPU, Samples, Step, rehearse, shapes_only
from layerwise.nets.module import Encoded
from layerwise.objectives.objective import Context
from layerwise.recipe.recipe import Recipe
from layerwise.training.step import Learner, train_step

CATEGORIES = ("parameters", "optimiser", "gradients", "inputs", "representations", "activations", "temporaries")
"""From what stays through the step to what comes and goes: a picture stacks them in this order."""
LARGEST = 10
POINTS = 400


@dataclass(frozen=True)
class Held:
    """A tensor that is alive at the peak."""

    bytes: int
    category: str
    shape: tuple[int, ...]
    dtype: str
    layer: str
    """What made it, such as `module 2: blocks.0.conv1`, or whose it is."""


@dataclass(frozen=True)
class Mark:
    """Where a module begins a micro-batch."""

    time: int
    module: int
    micro_batch: int
    """From 1."""
    sweep: int
    """1, or 2 where the micro-batch goes forward for the second time."""


@dataclass(frozen=True)
class Timeline:
    """One step, in bytes."""

    peak: int
    peak_time: int
    events: int
    """Storages that began or ended in the step: the length of the time axis."""
    times: list[int]
    """Of the points that are kept, at most 400; of a stretch that holds several, the highest, so the peak is one."""
    bytes: dict[str, list[int]]
    """Category to what it holds at each point."""
    marks: list[Mark]
    largest: list[Held]
    """The ten largest tensors at the peak, the largest first."""

    @property
    def at_peak(self) -> dict[str, int]:
        """What each category holds at the peak."""
        place = self.times.index(self.peak_time)
        return {category: values[place] for category, values in self.bytes.items()}

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "at_peak": self.at_peak}


def timeline(
    recipe: Recipe,
    numbers: Sequence[int],
    samples: Samples,
    *,
    host_apart: bool = True,
    step: Step = train_step,
    device: torch.device | None = None,
) -> Timeline:
    """Record one step of training these modules together, after the first, which makes the optimiser's states.

    Args:
        device: take real steps there; None: on fake tensors. The other arguments are those of `predict`.

    Raises:
        Unpredictable: a module or an objective computes shapes from values; on fake tensors only.
    """
    record = _Record(eager=step is train_step)
    live = LiveBytes(record)
    with nullcontext() if device is not None else shapes_only():
        rehearse(
            live,
            recipe,
            numbers,
            samples,
            host_apart=host_apart,
            step=step,
            device=device or CPU,
            abridged=False,
            before_second=lambda learners: record.watch(learners, live, recipe),
        )
        return record.timeline()


@dataclass
class _Life:
    begin: int
    size: int
    category: str
    shape: tuple[int, ...]
    dtype: str
    layer: str
    end: int | None = None


@dataclass
class _Record:
    eager: bool
    """Each module's backward follows its own forward, so what a backward makes is that module's."""
    time: int = 0
    lives: list[_Life] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    _alive: dict[int, _Life] = field(default_factory=dict)
    _layers: list[str] = field(default_factory=list)
    """Those whose forward is under way, the innermost last."""
    _elsewhere: str = "the step"
    """What makes tensors where no forward and no optimiser does."""
    _undecided: list[_Life] = field(default_factory=list)
    """Made with a graph; whether a backward finds them there is not known yet."""

    def begins(self, key: int, tensor: Tensor, size: int, part: str) -> None:
        self.time += 1
        layer = self._layers[-1] if self._layers else self._elsewhere
        life = _Life(self.time, size, part, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), layer)
        if part == REST:
            life.category = "temporaries"
            if torch.is_grad_enabled():
                self._undecided.append(life)
        self._alive[key] = life
        self.lives.append(life)

    def ends(self, key: int) -> None:
        self.time += 1
        self._alive.pop(key).end = self.time

    def operation(self) -> None:
        if self._undecided and not torch.is_grad_enabled():
            self._decide()

    def _decide(self) -> None:
        """What a forward left for its backward are activations; what is gone by then was temporary."""
        for life in self._undecided:
            if life.end is None:
                life.category = "activations"
        self._undecided.clear()

    def watch(self, learners: Sequence[Learner], live: LiveBytes, recipe: Recipe) -> None:
        """Begin the record here, with what is alive, and learn from the learners what comes from where."""
        self.time, self.lives = 0, list(self._alive.values())
        for life in self.lives:
            life.begin = 0
        size = recipe.training.batch_size
        micro_batches = -(-size // min(recipe.training.micro_batch or size, size))
        for learner in learners:
            self._watch_module(learner, micro_batches)
            self._watch_objective(learner, live)
            self._name_weights(learner)
            learner.optimiser.register_step_pre_hook(
                lambda *_, number=learner.number: self._layers.append(f"module {number}: optimiser")
            )
            learner.optimiser.register_step_post_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._layers.pop()

    def _watch_module(self, learner: Learner, micro_batches: int) -> None:
        passes = 0

        def mark(*_: object) -> None:
            nonlocal passes
            sweep, micro_batch = divmod(passes, micro_batches)
            self.marks.append(Mark(self.time, learner.number, micro_batch + 1, sweep + 1))
            self._elsewhere = f"module {learner.number}: backward" if self.eager else "backward"
            passes += 1

        learner.module.register_forward_pre_hook(mark)
        self._follow(learner.module, f"module {learner.number}")

    def _follow(self, whole: nn.Module, title: str) -> None:
        for name, layer in whole.named_modules():
            inner = name.removeprefix("module").removeprefix(".")
            told = f"{title}: {inner}" if inner else title
            layer.register_forward_pre_hook(lambda *_, told=told: self._layers.append(told))
            # Always: a recomputation ends in the middle of a forward, on purpose and by an exception.
            layer.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _watch_objective(self, learner: Learner, live: LiveBytes) -> None:
        objective, title = learner.objective, f"module {learner.number}: objective"
        self._follow(objective, title)
        represent, loss = objective.represent, objective.loss

        @contextmanager
        def inside() -> Any:
            self._layers.append(title)
            try:
                yield
            finally:
                self._leave()

        def watched_represent(encoded: Encoded) -> tuple[Tensor, ...]:
            with inside():
                representations = represent(encoded)
                live.claim(representations, "representations")
            return representations

        def watched_loss(representations: tuple[Tensor, ...], context: Context) -> Tensor:
            with inside():
                live.claim(representations, "representations")
                return loss(representations, context)

        objective.represent, objective.loss = watched_represent, watched_loss  # type: ignore[method-assign]

    def _name_weights(self, learner: Learner) -> None:
        title = f"module {learner.number}"
        parts = ((title, learner.module), (f"{title}: objective", learner.objective))
        for name, weight in (pair for prefix, part in parts for pair in _named(prefix, part)):
            self._name(weight, name)
            for state in learner.optimiser.state.get(weight, {}).values():
                if isinstance(state, Tensor):
                    self._name(state, name)
            weight.register_post_accumulate_grad_hook(self._naming_gradient(name))

    def _naming_gradient(self, name: str) -> Callable[[Tensor], None]:
        return lambda weight: None if weight.grad is None else self._name(weight.grad, name)

    def _name(self, tensor: Tensor, name: str) -> None:
        if (life := self._alive.get(id(tensor.untyped_storage()))) is not None:
            life.layer = name

    def timeline(self) -> Timeline:
        self._decide()
        changes: list[tuple[int, _Life, int]] = [(life.begin, life, 1) for life in self.lives]
        changes += [(life.end, life, -1) for life in self.lives if life.end is not None]
        changes.sort(key=lambda change: change[0])
        stretch = max(1, -(-self.time // POINTS))
        sums = dict.fromkeys(CATEGORIES, 0)
        kept: dict[int, tuple[int, int, dict[str, int]]] = {}
        for place, (time, life, sign) in enumerate(changes):
            sums[life.category] += sign * life.size
            if place + 1 < len(changes) and changes[place + 1][0] == time:
                continue  # what is there from the beginning comes all at once
            total, at = sum(sums.values()), time // stretch
            if at not in kept or total > kept[at][1]:
                kept[at] = time, total, dict(sums)
        peak_time, peak, _ = max(kept.values(), key=lambda point: (point[1], -point[0]))
        there = [life for life in self.lives if life.begin <= peak_time and (life.end is None or life.end > peak_time)]
        there.sort(key=lambda life: (-life.size, life.begin))
        return Timeline(
            peak,
            peak_time,
            self.time,
            [time for time, _, _ in kept.values()],
            {category: [parts[category] for _, _, parts in kept.values()] for category in CATEGORIES},
            self.marks,
            [Held(life.size, life.category, life.shape, life.dtype, life.layer) for life in there[:LARGEST]],
        )


def _named(prefix: str, part: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*part.named_parameters(), *part.named_buffers()]
    return [(f"{prefix}: {name.removeprefix('module.')}", tensor) for name, tensor in tensors]
