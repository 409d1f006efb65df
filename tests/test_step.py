"""An update is the same whatever its micro-batch and schedule, against the whole batch and the summed loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import Diverged, RecipeError
from layerwise.nets.module import Encoded, Module
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.infonce import PatchInfoNCE
from layerwise.objectives.objective import Context, Objective
from layerwise.paper.baselines import summed_step
from layerwise.seeding import derive_seed, torch_generator
from layerwise.training.feeds import Batch
from layerwise.training.step import Arithmetic, Learner, train_step

SAMPLES = 7
IMAGES = (1, 20, 20)
NETWORK = PatchResNet(
    patch=8,
    patch_stride=4,
    stem_channels=4,
    groups=(Group(channels=8, blocks=2), Group(channels=16, blocks=1, stride=2), Group(channels=16, blocks=1)),
)
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Keep(torch.optim.SGD):
    """Remembers the gradients of its last step."""

    gradients: list[Tensor]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        super().step()


class Recurrent(Module):
    """A random layer, and a context network whose representation is not what it predicts."""

    def __init__(self, inputs: int, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = channels
        self.convolution = nn.Conv1d(inputs, 6, 4, 2)
        self.dropout = nn.Dropout(dropout)
        self.context = nn.GRU(6, channels, batch_first=True)

    def forward(self, x: Tensor) -> Encoded:
        z = self.dropout(torch.relu(self.convolution(x)))
        c = self.context(z.transpose(1, 2))[0].transpose(1, 2)
        return Encoded(z, c, z)


class Ahead(Objective):
    """Predict the frame ahead among those of the other samples; with parameters on both sides of the cut."""

    def __init__(self, z: int, c: int) -> None:
        super().__init__()
        self.project = nn.Conv1d(z, 5, 1)
        self.predict = nn.Linear(c, 5, bias=False)

    def represent(self, encoded: Encoded) -> tuple[Tensor, ...]:
        numbers = torch.arange(encoded.z.shape[0])
        return self.project(encoded.z), encoded.c, numbers

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        z, c, _ = representations
        scores = torch.einsum("bdt,ntd->bnt", z[..., 1:], self.predict(c[..., :-1].transpose(1, 2)))
        drawn = torch.randint(3, (), generator=context.generator) + 1
        return nn.functional.cross_entropy(scores * drawn, context.labels["self"][:, None].expand(-1, scores.shape[2]))


def vision(dtype: torch.dtype) -> tuple[list[Module], list[Objective], Batch]:
    modules = NETWORK.modules(IMAGES)
    objectives = [PatchInfoNCE(steps=2, negatives=3).build(module, IMAGES, {}) for module in modules]
    return modules, objectives, Batch(torch.randn(SAMPLES, *IMAGES, dtype=dtype))


def recurrent(dtype: torch.dtype) -> tuple[list[Module], list[Objective], Batch]:
    modules: list[Module] = [Recurrent(2, 5), Recurrent(6, 4)]
    objectives: list[Objective] = [Ahead(6, 5), Ahead(6, 4)]
    return modules, objectives, Batch(torch.randn(SAMPLES, 2, 24, dtype=dtype), {"self": torch.arange(SAMPLES)})


def learners(modules: Sequence[Module], objectives: Sequence[Objective], rate: float = 0.1) -> list[Learner]:
    """Fresh copies, so that several arms start from the same weights."""
    made = []
    for number, (module, objective) in enumerate(copy.deepcopy(list(zip(modules, objectives, strict=True))), 1):
        made.append(Learner(number, module, objective, Keep([*module.parameters(), *objective.parameters()], lr=rate)))
    return made


def arithmetic(micro_batch: int | None = None, precision: str = "fp32", loss_group: int | None = None) -> Arithmetic:
    return Arithmetic(CPU, precision, micro_batch, seed=3, loss_group=loss_group)


def gradients(found: Sequence[Learner]) -> Tensor:
    return torch.cat([gradient.flatten() for learner in found for gradient in learner.optimiser.gradients])  # type: ignore[attr-defined]


def weights(found: Sequence[Learner]) -> Tensor:
    return torch.cat(
        [
            p.detach().flatten()
            for learner in found
            for part in (learner.module, learner.objective)
            for p in part.parameters()
        ]
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("make", [vision, recurrent])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_micro_batches_give_the_gradients_of_the_whole_batch(make, dtype, micro_batch) -> None:
    torch.manual_seed(0)
    modules, objectives, batch = make(dtype)
    for part in (*modules, *objectives):
        part.to(dtype)
    whole, chunked = learners(modules, objectives), learners(modules, objectives)
    expected = train_step(whole, batch, 0, arithmetic())
    found = train_step(chunked, batch, 0, arithmetic(micro_batch))
    assert found == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert relative(gradients(chunked), gradients(whole)) <= TOLERANCE[dtype]
    assert all(p.grad is None for learner in chunked for p in learner.module.parameters())


def test_a_micro_batch_of_all_samples_or_more_is_the_whole_batch() -> None:
    modules, objectives, batch = vision(torch.float32)
    arms = {size: learners(modules, objectives) for size in (None, SAMPLES, 100)}
    for size, arm in arms.items():
        train_step(arm, batch, 0, arithmetic(size))
    assert torch.equal(weights(arms[None]), weights(arms[SAMPLES]))
    assert torch.equal(weights(arms[None]), weights(arms[100]))


@pytest.mark.parametrize("make", [vision, recurrent])
def test_eager_backward_gives_the_bits_of_the_summed_loss(make) -> None:
    modules, objectives, batch = make(torch.float32)
    eager, summed = learners(modules, objectives), learners(modules, objectives)
    train_step(eager, batch, 0, arithmetic())
    summed_step(summed, batch, 0, arithmetic())
    assert torch.equal(weights(eager), weights(summed))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_no_gradient_crosses_a_border(micro_batch: int | None) -> None:
    """The first module learns the same with others above it as alone."""
    modules, objectives, batch = vision(torch.float32)
    together, alone = learners(modules, objectives), learners(modules[:1], objectives[:1])
    train_step(together, batch, 0, arithmetic(micro_batch))
    train_step(alone, batch, 0, arithmetic(micro_batch))
    assert torch.equal(weights(together[:1]), weights(alone))


def test_random_layers_are_replayed_in_the_second_pass() -> None:
    """Against one graph over the whole batch in which each micro-batch's masks are drawn once."""
    torch.manual_seed(0)
    modules: list[Module] = [Recurrent(2, 5, dropout=0.5).double()]
    objectives: list[Objective] = [Ahead(6, 5).double()]
    batch = Batch(torch.randn(SAMPLES, 2, 24, dtype=torch.float64), {"self": torch.arange(SAMPLES)})
    chunked, whole = learners(modules, objectives), learners(modules, objectives)
    train_step(chunked, batch, 5, arithmetic(3))

    learner = whole[0]
    parts = []
    for begin in range(0, SAMPLES, 3):
        torch.manual_seed(derive_seed(3, "layers", 1, 5, begin))
        parts.append(learner.objective.represent(learner.module(batch.inputs[begin : begin + 3])))
    representations = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    learner.objective.loss(representations, Context(torch_generator(3, "draws", 1, 5), batch.labels)).backward()
    learner.optimiser.step()
    assert relative(gradients(chunked), gradients(whole)) <= 1e-12


def test_steps_draw_differently() -> None:
    modules, objectives, batch = vision(torch.float32)
    first, second = learners(modules, objectives), learners(modules, objectives)
    assert train_step(first, batch, 0, arithmetic()) != train_step(second, batch, 1, arithmetic())


class Normalised(Recurrent):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(2, 5)
        self.norm = norm

    def forward(self, x: Tensor) -> Encoded:
        return super().forward(self.norm(x))


def test_batch_statistics_are_refused_in_micro_batches_only() -> None:
    batch = Batch(torch.randn(SAMPLES, 2, 24), {"self": torch.arange(SAMPLES)})
    found = learners([Normalised(nn.BatchNorm1d(2))], [Ahead(6, 5)])
    train_step(found, batch, 0, arithmetic())
    before = weights(found)
    with pytest.raises(RecipeError, match=r"module 1 has norm \(BatchNorm1d\).*GroupNorm"):
        train_step(found, batch, 1, arithmetic(2))
    assert torch.equal(weights(found), before)


def test_frozen_statistics_are_no_obstacle_and_absent_ones_are() -> None:
    batch = Batch(torch.randn(SAMPLES, 2, 24), {"self": torch.arange(SAMPLES)})
    modules, objectives = [Normalised(nn.BatchNorm1d(2).eval())], [Ahead(6, 5)]
    arms = [learners(modules, objectives) for _ in range(2)]
    for arm, size in zip(arms, (None, 2), strict=True):
        train_step(arm, batch, 0, arithmetic(size))
    assert relative(gradients(arms[1]), gradients(arms[0])) <= 1e-5
    untracked = Normalised(nn.BatchNorm1d(2, track_running_stats=False).eval())
    with pytest.raises(RecipeError, match="norm"):
        train_step(learners([untracked], [Ahead(6, 5)]), batch, 0, arithmetic(2))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_loss_that_is_not_finite_updates_nothing(micro_batch: int | None) -> None:
    modules, objectives, batch = vision(torch.float32)
    found = learners(modules[:1], objectives[:1])
    before = weights(found)
    with pytest.raises(Diverged, match=r"module 1 is nan at step 4 \(learning rate 0\.1\)"):
        train_step(found, Batch(batch.inputs * torch.nan), 4, arithmetic(micro_batch))
    assert torch.equal(weights(found), before)


def test_bf16_keeps_float32_weights_and_agrees_over_micro_batches() -> None:
    torch.manual_seed(0)
    modules, objectives, batch = vision(torch.float32)
    whole, chunked, exact = (learners(modules, objectives) for _ in range(3))
    train_step(whole, batch, 0, arithmetic(None, "bf16"))
    train_step(chunked, batch, 0, arithmetic(2, "bf16"))
    train_step(exact, batch, 0, arithmetic())
    assert weights(whole).dtype == torch.float32
    # An untrained network tells samples apart in the third digit, which is about the last that bfloat16 keeps.
    assert 0 < relative(gradients(whole), gradients(exact)) < 0.2
    assert relative(gradients(chunked), gradients(whole)) < 0.02


class Counting(Module):
    """Counts the samples that go through."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module, self.channels, self.samples = module, module.channels, 0

    def forward(self, x: Tensor) -> Encoded:
        self.samples += len(x)
        encoded: Encoded = self.module(x)
        return encoded


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 4, 6])
def test_the_loss_of_groups_is_the_mean_of_their_losses(micro_batch: int | None) -> None:
    """Whatever the micro-batch; and micro-batches that hold whole groups go forward once."""
    torch.manual_seed(0)
    modules, objectives, batch = vision(torch.float64)
    for part in (*modules, *objectives):
        part.to(torch.float64)
    group, samples = 3, 6
    batch = Batch(batch.inputs[:samples])
    expected = [torch.zeros(1, dtype=torch.float64)] * len(modules)
    by_hand = learners(modules, objectives)
    x = batch.inputs
    for learner in by_hand:
        total = torch.zeros((), dtype=torch.float64)
        encoded = learner.module(x)
        for index in range(samples // group):
            part = slice(index * group, (index + 1) * group)
            draws = torch_generator(3, "draws", learner.number, 0, "group", index)
            chosen = Encoded(*(value[part] for value in encoded))
            total = total + learner.objective.loss(learner.objective.represent(chosen), Context(draws, {}))
        loss = total / (samples // group)
        loss.backward()
        expected[learner.number - 1] = torch.cat(
            [
                w.grad.flatten()
                for p in (learner.module, learner.objective)
                for w in p.parameters()
                if w.grad is not None
            ]
        )
        x = encoded.output.detach()
    found = learners([Counting(module) for module in modules], objectives)
    train_step(found, batch, 0, arithmetic(micro_batch, loss_group=group))
    for learner, gradient in zip(found, expected, strict=True):
        ours = torch.cat([value.flatten() for value in learner.optimiser.gradients])  # type: ignore[attr-defined]
        assert relative(ours, gradient) < 1e-12
        assert isinstance(learner.module, Counting)
        assert learner.module.samples == samples * (1 if micro_batch in (None, 3, 4, 6) else 2)


class Overwrites(Recurrent):
    def forward(self, x: Tensor) -> Encoded:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_module_that_overwrites_its_input_is_refused(micro_batch):
    _, objectives, batch = recurrent(torch.float32)
    both = learners([Recurrent(2, 5), Overwrites(6, 4)], objectives)
    with pytest.raises(RecipeError, match=r"module 2 \(Overwrites\) changes its input in place"):
        train_step(both, batch, 0, arithmetic(micro_batch))
