"""Objectives that compare several augmented views of each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
import layerwise.training.stage
from layerwise.data.dataset import Splits
from layerwise.data.mapped import MappedSplit
from layerwise.errors import UsageError
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.objective import Context, Objective
from layerwise.training.feeds import Batch, DatasetFeed
from layerwise.training.step import Arithmetic, Learner, train_step

SAMPLES = 24


class Augmented(torch.utils.data.Dataset[Any]):
    """A point, moved at random each time that it is read."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index)) + torch.rand(4)


def alike(representations: tuple[Tensor, ...], context: Context) -> Tensor:
    """Pull the two views of a sample together, and push the samples apart."""
    z = representations[0]
    views = nn.functional.normalize(z.flatten(3).mean(3) if z.ndim > 3 else z, dim=2)  # the mean over positions
    assert views.shape[1] == 2
    first, second = views.unbind(1)
    noise = torch.rand(len(first), generator=context.generator).mean()  # what is drawn is drawn once for a batch
    return nn.functional.cross_entropy(first @ second.T * 5, torch.arange(len(first))) + noise.detach() * 0


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 6)]


def trained(to: Path, **options: Any) -> lw.Trained:
    settings = {"views": 2, "epochs": 2, "batch_size": 6, "cache": "float32", "quiet": True, "checkpoint_every": 1}
    return lw.train(modules(), alike, Augmented(), Augmented(), to=to, **{**settings, **options})


def weights(run: lw.Trained) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in run.encoder().state_dict().values()]


def test_batches_carry_different_views_of_the_same_samples() -> None:
    split = MappedSplit(Augmented(), "train", seed=0)
    feed = DatasetFeed(Splits(split, split), 6, seed=0, together=2)
    seen = []
    for epoch in (0, 1):
        for batch in feed.shuffled(epoch):
            assert batch.inputs.shape == (6, 2, 4)
            assert (batch.inputs[:, 0] != batch.inputs[:, 1]).all()
            assert (batch.inputs.floor() == batch.inputs.floor()[:, :1]).all()  # of one sample
            seen += batch.inputs.flatten(0, 1).tolist()
    assert len({tuple(value) for value in seen}) == 2 * 2 * SAMPLES  # fresh in every epoch
    for batch in feed.validation():
        assert (batch.inputs[:, 0] != batch.inputs[:, 1]).all()


def test_a_cache_holds_the_views_and_gives_the_bits_of_a_dataset(tmp_path: Path) -> None:
    cached = trained(tmp_path / "cached")
    split = lw.open_cache(cached.setup_of(), 1).splits
    assert (split["train"].views, split["validation"].views) == (2, 2)
    assert weights(cached) == weights(trained(tmp_path / "recomputed", feed="recompute"))


def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, step, made = weights(trained(tmp_path / "whole")), layerwise.training.stage.train_step, 0

    def dies(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made == 11:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(layerwise.training.stage, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed")
    assert weights(trained(tmp_path / "killed")) == wanted


class Flat(Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Encoded:
        z = self.layers(x)
        return Encoded(z, z, z)


class Alike(Objective):
    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        return alike(representations, context)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("group", [None, 4])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    dtype: torch.dtype, allowed: float, group: int | None
) -> None:
    found = []
    for micro in (None, 1, 3):
        made = [Flat(layers).to(dtype) for layers in modules()]
        before = [[w.detach().clone() for w in module.parameters()] for module in made]
        learners = [
            Learner(n, module, Alike(), torch.optim.SGD(module.parameters(), lr=1.0))
            for n, module in enumerate(made, 1)
        ]
        generator = torch.Generator().manual_seed(1)
        batch = Batch(torch.rand(8, 2, 4, generator=generator, dtype=dtype), views=2)
        losses = train_step(learners, batch, 0, Arithmetic(torch.device("cpu"), "fp32", micro, 0, group))
        steps = [a - b.detach() for module, old in zip(made, before, strict=True)
                 for a, b in zip(old, module.parameters(), strict=True)]  # fmt: skip
        found.append((losses, torch.cat([one.flatten() for one in steps])))
    (losses, whole), *others = found
    assert whole.norm() > 0.01
    for other_losses, other in others:
        np.testing.assert_allclose(other_losses, losses, rtol=10 * allowed)
        assert (other - whole).norm() / whole.norm() < 10 * allowed


def test_a_window_that_rolls_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", epochs=1)
    setup = run.setup_of()
    recipe = run.recipe.model_copy(update={"cache": run.recipe.cache.model_copy(update={"renew": True})})
    setup = replace_recipe(setup, recipe)
    lw.write_cache(setup, 1)
    with pytest.raises(UsageError, match="a rolling window"):
        lw.run_stage(setup, 2, fresh=True)


def replace_recipe(setup: Any, recipe: lw.Recipe) -> Any:
    return replace(setup, run=lw.open_run(setup.run.folder, recipe))


def test_one_view_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one view is handed on as it is."""
    split = MappedSplit(Augmented(), "train", seed=0)
    given: list[Tensor] = []
    read: Callable[..., Any] = MappedSplit.read

    def noting(self: MappedSplit, *args: Any) -> Any:
        for inputs, labels in read(self, *args):
            given.append(inputs)
            yield inputs, labels

    monkeypatch.setattr(MappedSplit, "read", noting)
    batches = list(DatasetFeed(Splits(split, split), 6, seed=0).shuffled(0))
    assert all(batch.inputs is inputs for batch, inputs in zip(batches, given, strict=True))
