"""The toolkit from Python: networks and data that were not made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils.data import TensorDataset

import layerwise as lw
import layerwise.training.stage
from layerwise.errors import NotReady, RecipeError
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.recipe import Optimiser
from tests.nets.test_split import NETWORKS

CLASSES = 3


def labelled(example: Tensor, count: int = 20) -> TensorDataset:
    """Samples like the example's, of three classes that are easily told."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(count) % CLASSES
    if example.dtype == torch.int64:
        return TensorDataset(
            torch.randint(5, (count, *example.shape[1:]), generator=generator) + 5 * classes[:, None], classes
        )
    noise = torch.rand(count, *example.shape[1:], generator=generator)
    return TensorDataset(noise + classes.view(-1, *[1] * (example.ndim - 1)), classes)


def trained(name: str, to: Path, **options: Any) -> lw.Trained:
    make, at, example = NETWORKS[name]
    torch.manual_seed(0)
    data = labelled(example)
    settings = {
        "epochs": 1, "batch_size": 6, "optimiser": Optimiser(learning_rate=1e-3), "cache": "float32", "quiet": True,
        "checkpoint_every": 2, **options,
    }  # fmt: skip
    modules = lw.split(make(), at, example=example)[:2]
    return lw.train(modules, CrossEntropy(), data, data, to=to, **settings)


def weights(run: lw.Trained) -> dict[str, Tensor]:
    return run.encoder().state_dict()


SLOW = ("efficientnet_b0", "convnext_tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in NETWORKS]
)
def test_a_cached_stage_a_recomputed_one_and_a_resumed_one_give_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = weights(trained(name, tmp_path / "cached"))
    recomputed = weights(trained(name, tmp_path / "recomputed", feed="recompute"))
    steps = layerwise.training.stage.train_step
    made = 0

    def dies(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made == 6:  # in the second stage, where each takes three
            raise KeyboardInterrupt
        return steps(*args)

    monkeypatch.setattr(layerwise.training.stage, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(name, tmp_path / "resumed")
    resumed = weights(trained(name, tmp_path / "resumed"))
    assert made == 7  # the two steps before it were in the checkpoint
    for others in (recomputed, resumed):
        assert wanted.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in wanted.items())


with torch.random.fork_rng():
    torch.manual_seed(0)  # by chance alone, Adam can make much of the rounding of a gradient that is all but zero
    TWO = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 6)]


def small(to: Path, **options: Any) -> lw.Trained:
    data = labelled(torch.zeros(1, 4), 60)
    settings = {
        "modules": TWO,
        "objective": CrossEntropy(), "validation": data, "epochs": 3, "batch_size": 10, "quiet": True,
        "optimiser": Optimiser(learning_rate=1e-2), **options,
    }  # fmt: skip
    return lw.train(train=data, to=to, **settings)


def test_what_a_run_gives(tmp_path: Path) -> None:
    data = labelled(torch.zeros(1, 4), 60)
    before = TWO[0][0].weight.clone()
    run = small(tmp_path / "run")
    assert torch.equal(TWO[0][0].weight, before)  # a copy is trained
    assert repr(run) == f"<run {tmp_path / 'run'}: 2 modules, CrossEntropy>"
    found = run.probe(train=data, test=data)
    assert found["class"]["trained"] > 0.6
    assert run.probe(1, train=data, test=data)["class"].keys() == {"trained", "untrained"}
    curves = run.history()
    assert [stage["module"] for stage in curves] == [1, 2]
    assert curves[0]["curve"][-1]["loss"] < curves[0]["curve"][0]["loss"]
    assert all(stage["peak_bytes"] > 0 for stage in run.memory())
    assert run.report() == tmp_path / "run/report/report.html"
    assert "module 2" in run.report().read_text()


@pytest.mark.parametrize("asked", [False, True])
def test_the_process_keeps_its_own_settings_of_torch(asked: bool, tmp_path: Path) -> None:
    settings: Any = torch.utils.deterministic
    try:
        torch.use_deterministic_algorithms(asked)
        small(tmp_path / "run", epochs=1)
        assert torch.are_deterministic_algorithms_enabled() is asked
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert settings.fill_uninitialized_memory is True
        with pytest.raises(RuntimeError, match="stops"):
            small(tmp_path / "other", epochs=1, objective=_stops)
        assert torch.are_deterministic_algorithms_enabled() is asked
        assert settings.fill_uninitialized_memory is True
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = True


def _stops(representations: tuple[Tensor, ...], context: lw.Context) -> Tensor:
    if not is_fake(representations[0]):  # the prediction of memory runs the step too
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("stops")
    return representations[0].square().mean()


def test_an_encoder_is_frozen_and_gives_what_the_cache_holds(tmp_path: Path) -> None:
    data = labelled(torch.zeros(1, 4), 60)
    run = small(tmp_path / "run", cache="float32")
    encoder = run.encoder(through=1)
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())
    split = run.cache(1)["train"]
    features, labels = split[:100]
    assert features.shape == (60, 8)
    inputs = torch.stack([data[i][0] for i in range(60)])
    torch.testing.assert_close(encoder(inputs)[..., 0], features)
    assert labels.tolist() == [int(data[i][1]) for i in range(60)]
    one, label = split[-1]
    assert torch.equal(one, features[59])
    assert int(label) == 59 % CLASSES
    assert torch.equal(split[[5, 2]][0], features[[5, 2]])
    assert len(list(torch.utils.data.DataLoader(split, batch_size=20))) == 3
    assert split.ids[3] == "train-0000003"
    assert torch.equal(torch.from_numpy(split.zarr[:5]), features[:5])
    assert "60 cached samples of shape (8,), stored as float32" in repr(split)


def test_a_tenth_of_the_training_samples_validates_where_no_others_are_given(tmp_path: Path) -> None:
    run = small(tmp_path / "run", validation=None)
    assert {name: len(split) for name, split in run.cache(1).items()} == {"train": 54, "validation": 6}


class Contrastive(lw.Objective):
    """A loss with weights of its own, made for each module."""

    def __init__(self, module: lw.Module) -> None:
        super().__init__()
        self.head = nn.Linear(module.channels, 5)

    def loss(self, representations: tuple[Tensor, ...], context: lw.Context) -> Tensor:
        return self.head(representations[0].mean(2)).var(0).sub(1).square().mean()


class Scored(nn.Module):
    def forward(self, representations: tuple[Tensor, ...], context: lw.Context) -> Tensor:
        return nn.functional.cross_entropy(representations[0].mean(2), context.labels["class"])


@pytest.mark.parametrize(
    "objective",
    [Contrastive, Scored(), lambda representations, context: representations[0].square().mean()],
    ids=["a class", "a module", "a function"],
)
def test_any_loss(objective: Any, tmp_path: Path) -> None:
    run = small(tmp_path / "run", objective=objective)
    losses = [line["loss"] for line in run.history()[0]["curve"]]
    assert losses[-1] < losses[0]
    whole, micro = (
        small(tmp_path / str(size), objective=objective, epochs=1, micro_batch=size).history()[1]["curve"][0]
        for size in (10, 5)
    )
    assert micro["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert micro["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-3)


def test_other_modules_data_or_losses_are_trained_anew_or_refused(tmp_path: Path) -> None:
    small(tmp_path / "run")
    with pytest.raises(NotReady, match=r"trained with other settings \(network.fingerprints"):
        small(tmp_path / "run", modules=[nn.Linear(4, 8), nn.Linear(8, 6)])
    with pytest.raises(NotReady, match=r"dataset\.revision"):
        small(tmp_path / "run", version="2")
    with pytest.raises(NotReady, match="objective"):
        small(tmp_path / "run", objective=Scored())


def test_batch_statistics_are_not_micro_batched(tmp_path: Path) -> None:
    modules = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 6)]
    with pytest.raises(
        RecipeError, match=r"inner.1 \(BatchNorm1d\), whose result for one sample depends on the others"
    ):
        small(tmp_path / "run", modules=modules, micro_batch=5)


def test_patches_of_images_are_predicted(tmp_path: Path) -> None:
    data = labelled(torch.zeros(1, 3, 24, 24), 20)
    modules = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 8, 3)]
    run = lw.train(
        modules,
        lw.PatchInfoNCE(steps=1, skip=0),
        data,
        to=tmp_path / "run",
        epochs=1,
        batch_size=9,
        patches=(8, 8),
        quiet=True,
    )
    assert run.encoder()(data[0][0][None]).shape == (1, 8, 3, 3)


def test_the_command_line_reads_a_run_made_in_python(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from layerwise.cli import main

    run = small(tmp_path / "run")
    run.probe(train=labelled(torch.zeros(1, 4), 60), test=labelled(torch.zeros(1, 4), 60))
    shown = CliRunner().invoke(main, ["status", "--run-dir", str(run.folder)])
    assert "Every module is trained and probed" not in shown.output  # module 1 has no probe
    assert shown.output.count("trained, 3 epochs") == 2, shown.output
    assert "valid" in shown.output
    verified = CliRunner().invoke(main, ["verify", "--run-dir", str(run.folder)])
    assert verified.exit_code == 0, verified.output
    known = CliRunner().invoke(main, ["probe", "--run-dir", str(run.folder)])
    assert known.exit_code == 0, known.output
    probed = CliRunner().invoke(main, ["probe", "--fresh", "--run-dir", str(run.folder)])
    assert probed.exit_code == 1
    assert "use the script that made it" in probed.output


def test_the_code_of_datasets_transforms_and_losses_is_part_of_the_identity() -> None:
    from torch.utils.data import Subset

    from layerwise.nets.plain import plain_modules
    from layerwise.recipe.given import GivenData, GivenNetwork, GivenObjective
    from layerwise.settings.sources import code_of

    class Own(TensorDataset):
        transform = staticmethod(lambda sample: sample)

    data = Own(*labelled(torch.zeros(1, 4)).tensors)
    assert code_of(Own) in GivenData.of(Subset(data, range(5)), None).sources
    assert GivenData.of(labelled(torch.zeros(1, 4)), None).sources == ()
    assert GivenObjective.of(Scored()).source != GivenObjective.of(Contrastive).source
    (module,) = plain_modules([nn.Linear(4, 2)], torch.zeros(4))
    before = GivenNetwork.of([module]).fingerprints
    with torch.no_grad():
        module.inner.weight[0, 0] += 1
    assert GivenNetwork.of([module]).fingerprints != before
