"""Optimisers, schedules, clipping and weight decay: in every stage, checkpoint and prediction of memory."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise import memory
from layerwise.errors import DamagedData, NotReady, RecipeError, StoppedEarly, UsageError
from layerwise.files.records import CHECKPOINT
from layerwise.files.storage import write_json
from layerwise.files.tensors import save_tensors
from layerwise.nets.module import Encoded, Module
from layerwise.objectives.objective import Context, Objective
from layerwise.pipeline.frozen import stage_record
from layerwise.pipeline.schedule import run_stage, run_together
from layerwise.pipeline.setup import make_learner
from layerwise.recipe import Optimiser
from layerwise.recipe.as_json import describe, rebuild
from layerwise.recipe.loader import resolve_recipe
from layerwise.recipe.optimisers import named_optimiser, optimiser_of
from layerwise.recipe.overrides import apply_overrides, for_stage
from layerwise.settings.optimiser_kinds import KINDS, KindName
from layerwise.training.checkpoint import load_checkpoint, save_checkpoint
from layerwise.training.feeds import Batch
from layerwise.training.optimisers import make_optimiser, norms_and_biases, state_forms
from layerwise.training.step import Arithmetic, Learner, train_step
from tests.conftest import TINY
from tests.test_stage import StopAt, weights
from tests.test_step import SAMPLES, learners, recurrent, relative
from tests.test_step import weights as all_weights
from tests.test_train import small

CPU = torch.device("cpu")
QUICK = apply_overrides(TINY, ["dataset.samples=100", "training.epochs=2"])  # three steps an epoch
WAYS = {
    **{kind: [f"optimiser.kind={kind}"] for kind in KINDS},
    "AdamW": ["optimiser.kind=AdamW", "optimiser.weight_decay=0.1"],  # without, it is Adam
    "Nesterov, cosine": [
        "optimiser.kind=SGD",
        "optimiser.momentum=0.9",
        "optimiser.arguments.nesterov=true",
        "optimiser.schedule=cosine",
        "optimiser.warmup=1",
    ],
    "LARS, spared": ["optimiser.kind=LARS", "optimiser.momentum=0.9", "optimiser.decay_norms_and_biases=false"],
    "AdamW, all options": [
        "optimiser.kind=adamw",
        "optimiser.weight_decay=0.1",
        "optimiser.decay_norms_and_biases=false",
        "optimiser.clip_norm=0.01",
        "optimiser.schedule=step",
        "optimiser.schedule_unit=steps",
        "optimiser.step_every=3",
        "optimiser.warmup=2",
        "optimiser.arguments.amsgrad=true",
    ],
}


def asked(*overrides: str) -> lw.Recipe:
    return apply_overrides(QUICK, list(overrides))


def killed_here() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_ends_in_the_same_bits(make_setup: Any, way: str) -> None:
    recipe = asked(*WAYS[way])
    whole = make_setup(recipe, "whole")
    run_stage(whole, 1)
    killed = make_setup(recipe, "killed")
    killed.progress = StopAt(5, killed_here)  # after the checkpoint at 3
    with pytest.raises(KeyboardInterrupt):
        run_stage(killed, 1)
    resumed = make_setup(recipe, "killed")
    run_stage(resumed, 1)
    assert weights(resumed, 1) == weights(whole, 1)
    plain = make_setup(QUICK, "plain")
    run_stage(plain, 1)
    assert (weights(plain, 1) == weights(whole, 1)) is (way == "Adam")


def test_so_they_do_with_settings_of_their_own_in_modules_trained_together(make_setup: Any) -> None:
    own = ["stages.2.optimiser.kind=SGD", "stages.2.optimiser.momentum=0.9", "stages.3.optimiser.clip_norm=0.01"]
    recipe = asked("schedule=simultaneous", "training.update_every=[1,2]", "optimiser.schedule=cosine", *own)
    whole, stopped = make_setup(recipe, "whole"), make_setup(recipe, "stopped")
    run_together(whole)
    stop: list[bool] = []
    stopped.progress, stopped.should_stop = StopAt(4, lambda: stop.append(True)), lambda: bool(stop)
    with pytest.raises(StoppedEarly):
        run_together(stopped)
    resumed = make_setup(recipe, "stopped")
    run_together(resumed)
    plain = make_setup(asked("schedule=simultaneous", "training.update_every=[1,2]", "optimiser.schedule=cosine"), "p")
    run_together(plain)
    numbers = (1, 2, 3)
    assert [weights(resumed, number) for number in numbers] == [weights(whole, number) for number in numbers]
    assert [weights(plain, n) == weights(whole, n) for n in numbers] == [True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_clipped_as_the_whole_batch_is(kind: KindName, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modules, objectives, batch = recurrent(torch.float64)
    modules, objectives = [m.double() for m in modules], [o.double() for o in objectives]
    options: dict[str, Any] = {"eps": 0.1} if "epsilon" in KINDS[kind].fields else {}
    if kind == "LARS":  # which undoes clipping, but for what has no rate of its own
        options["decay_norms_and_biases"] = False
    settings = named_optimiser(kind, 0.1, **options)

    def trained(clip: float | None, micro_batch: int | None) -> Tensor:
        made = learners(modules, objectives)
        made = [
            replace(one, optimiser=make_optimiser(settings, [one.module, one.objective], CPU), clip_norm=clip)
            for one in made
        ]
        for step in range(3):
            train_step(made, batch, step, Arithmetic(CPU, "fp32", micro_batch, seed=3))
        return all_weights(made)

    whole = trained(1e-2, None)
    assert relative(trained(None, None), whole) > 1e-6  # so the clipping did something
    for size in (1, 2, SAMPLES - 1):
        assert relative(trained(1e-2, size), whole) <= 1e-12


def test_the_clipped_gradient_has_the_norm_over_module_and_objective_together() -> None:
    torch.manual_seed(0)
    modules, objectives, batch = recurrent(torch.float64)
    for micro_batch in (None, 2):
        found = []
        for clip in (None, 1e-2, 1e6):
            made = learners([m.double() for m in modules], [o.double() for o in objectives])
            before = all_weights(made)
            made = [
                replace(one, optimiser=torch.optim.SGD(one.optimiser.param_groups[0]["params"], lr=1.0), clip_norm=clip)
                for one in made[:1]
            ]
            train_step(made, batch, 0, Arithmetic(CPU, "fp32", micro_batch, seed=3))
            found.append(before[: len(all_weights(made))] - all_weights(made))
        free, clipped, loose = found
        assert clipped.norm().item() == pytest.approx(1e-2, rel=1e-3)
        torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
        torch.testing.assert_close(loose, free)


class Normed(Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels = 6
        self.first = nn.Conv1d(2, 6, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.wide = nn.LayerNorm((6, 6))
        self.attention = nn.MultiheadAttention(6, 1, add_bias_kv=True)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Encoded:
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "LARS"])
def test_weight_decay_spares_norms_and_biases_on_request(kind: KindName) -> None:
    parts = [Normed(), nn.Linear(6, 2)]
    spared = list(norms_and_biases(parts))
    names = {name for part in parts for name, w in part.named_parameters() if any(w is one for one in spared)}
    assert names == {
        "first.bias", "norm.weight", "norm.bias", "wide.weight", "wide.bias", "attention.in_proj_bias",
        "attention.bias_k", "attention.bias_v", "attention.out_proj.bias", "scale", "bias",
    }  # fmt: skip
    common = make_optimiser(named_optimiser(kind, weight_decay=0.1), parts, CPU)
    assert [group["weight_decay"] for group in common.param_groups] == [0.1]
    optimiser = make_optimiser(named_optimiser(kind, weight_decay=0.1, decay_norms_and_biases=False), parts, CPU)
    decayed, others = optimiser.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (decayed.get("adapted"), others.get("adapted")) == ((True, False) if kind == "LARS" else (None, None))
    assert {id(weight) for weight in others["params"]} == {id(weight) for weight in spared}
    assert len(decayed["params"]) + len(spared) == len([weight for part in parts for weight in part.parameters()])


def test_the_table_of_kinds_is_torchs() -> None:
    assert set(KINDS) == set(get_args(KindName))
    words = {"beta1": "betas", "beta2": "betas", "epsilon": "eps", "momentum": "momentum"}
    for kind, uses in KINDS.items():
        if kind == "LARS":
            continue
        known = inspect.signature(getattr(torch.optim, kind)).parameters
        assert {"lr", "weight_decay", *(words[name] for name in uses.fields)} <= set(known)
        assert all(known[name].default == default for name, default in uses.arguments.items())
        assert all((torchs in known) is (ours in uses.fields) for ours, torchs in words.items())


@pytest.mark.parametrize("way", WAYS)
def test_the_forms_of_the_state_are_those_of_a_real_step(way: str) -> None:
    settings = asked(*WAYS[way]).optimiser
    parts = [nn.Conv2d(2, 3, 3), nn.Linear(4, 5)]
    optimiser = make_optimiser(settings, parts, CPU)
    before = copy.deepcopy(parts[0].state_dict())
    begun = set(optimiser.state)  # Adagrad makes its own at once
    forms = state_forms(optimiser)
    assert optimiser.state.keys() == begun
    assert all(torch.equal(before[name], value) for name, value in parts[0].state_dict().items())
    for part in parts:
        for weight in part.parameters():
            weight.grad = torch.ones_like(weight)
    optimiser.step()
    state = optimiser.state_dict()["state"]
    assert all(isinstance(value, Tensor) for fields in state.values() for value in fields.values() if value is not None)
    found = {
        (index, name): (value.shape, value.dtype)
        for index, fields in state.items()
        for name, value in fields.items()
        if value is not None
    }
    assert found == {
        (index, name): (value.shape, value.dtype) for index, fields in forms.items() for name, value in fields.items()
    }


def checkpointed(kind: str, folder: Path) -> tuple[Learner, dict[str, Tensor]]:
    """A learner, and the tensors of its checkpoint in `folder`."""
    recipe = asked(*WAYS[kind])
    made = make_learner(recipe, 1, TINY.network.modules((1, 16, 16))[0], (1, 16, 16), {}, CPU)
    for weight in (*made.module.parameters(), *made.objective.parameters()):
        weight.grad = torch.ones_like(weight)
    made.optimiser.step()
    place = {"epoch": 1, "batch": 2, "step": 8, "sums": [1.0], "best_loss": 2.0, "best_epoch": 1, "seconds": 1.0}
    save_checkpoint(folder, [made], {}, place, best=True)
    assert load_checkpoint(folder, [made], {}) is not None
    from safetensors.torch import load_file

    return made, load_file(folder / "checkpoint-8-1.safetensors")


DAMAGE = {
    "a negative step": lambda name, tensor: -tensor if name.endswith(".step") else tensor,
    "a step that is not finite": lambda name, tensor: tensor * float("nan") if name.endswith(".step") else tensor,
    "a step of another shape": lambda name, tensor: tensor[None] if name.endswith(".step") else tensor,
    "a step of another type": lambda name, tensor: tensor.double() if name.endswith(".step") else tensor,
    "moments of another shape": lambda name, tensor: tensor[None] if ".optimiser." in name else tensor,
    "moments of another type": lambda name, tensor: tensor.half() if ".optimiser." in name else tensor,
    "a moment missing": lambda name, tensor: None if name.endswith(("0.exp_avg", "0.square_avg", "0.sum")) else tensor,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["Adam", "NAdam", "RMSprop", "Adagrad"])
def test_a_checkpoint_that_no_optimiser_wrote_is_refused(kind: str, damage: str, tmp_path: Path) -> None:
    made, tensors = checkpointed(kind, tmp_path)
    altered = {name: value for name, tensor in tensors.items() if (value := DAMAGE[damage](name, tensor)) is not None}
    write_again(tmp_path, altered)
    with pytest.raises(DamagedData):
        load_checkpoint(tmp_path, [made], {})


@pytest.mark.parametrize("written", ["Adam", "SGD", "LARS, spared", "Nesterov, cosine"])
def test_so_is_the_state_of_another_optimiser(written: str, tmp_path: Path) -> None:
    checkpointed(written, tmp_path)
    other, _ = checkpointed("RMSprop", tmp_path / "other")
    if written == "SGD":  # keeps nothing, as RMSprop does before its first update
        assert load_checkpoint(tmp_path, [other], {}) is not None
        return
    with pytest.raises(DamagedData, match="belongs to nothing"):
        load_checkpoint(tmp_path, [other], {})


def test_single_numbers_of_other_names_are_looked_at_too(tmp_path: Path) -> None:
    made, tensors = checkpointed("NAdam", tmp_path)
    altered = {name: value * float("inf") if "mu_product" in name else value for name, value in tensors.items()}
    write_again(tmp_path, altered)
    with pytest.raises(DamagedData, match="state of an optimiser"):
        load_checkpoint(tmp_path, [made], {})


def write_again(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As somebody would who seals what they altered."""
    from layerwise.files.records import read_record

    record = read_record(folder / "checkpoint.json", CHECKPOINT)
    assert record is not None
    sha256 = save_tensors(folder / "checkpoint-8-1.safetensors", tensors)
    for entry in record["files"].values():
        entry["sha256"] = sha256
    write_json(folder / "checkpoint.json", record)


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (["optimiser.kind=SGD"], 0),
        (["optimiser.kind=SGD", "optimiser.momentum=0.9"], 1),
        (["optimiser.kind=LARS", "optimiser.momentum=0.9"], 1),
        (["optimiser.kind=Adagrad"], 1),
        (["optimiser.kind=RMSprop"], 1),
        (["optimiser.kind=Adadelta"], 2),
        (["optimiser.kind=AdamW"], 2),
        (["optimiser.kind=AdamW", "optimiser.arguments.amsgrad=true", "optimiser.clip_norm=1"], 3),
        (["optimiser.kind=NAdam"], 2),
        (["optimiser.kind=RAdam"], 2),
        (["optimiser.kind=Adamax"], 2),
    ],
)
def test_the_memory_of_the_optimisers_state_is_predicted(overrides: list[str], copies: int) -> None:
    samples = memory.Samples((1, 16, 16), {"class": 10})
    found = memory.predict(asked(*overrides), (2,), samples)
    assert found.optimiser == pytest.approx(copies * found.parameters, rel=0.02, abs=1)
    if copies:  # of real tensors
        made = make_learner(asked(*overrides), 2, TINY.network.modules((1, 16, 16))[1], (1, 16, 16), {}, CPU)
        forms = state_forms(made.optimiser)
        assert sum(form.nbytes for fields in forms.values() for form in fields.values()) == found.optimiser


def test_a_finished_stage_is_trained_further_unless_its_cosine_has_ended(make_setup: Any) -> None:
    fixed = ["optimiser.schedule=cosine", "optimiser.cosine_length=2", "optimiser.cosine_end=0.1"]
    run_stage(make_setup(asked(*fixed), "fixed"), 1)
    longer, whole = (make_setup(asked(*fixed, "training.epochs=3"), name) for name in ("fixed", "whole"))
    run_stage(longer, 1)
    run_stage(whole, 1)
    assert weights(longer, 1) == weights(whole, 1)

    run_stage(make_setup(asked("optimiser.schedule=cosine"), "open"), 1)
    with pytest.raises(NotReady, match=r"optimiser\.cosine_length: 2 -> 3.*--fresh"):
        run_stage(make_setup(asked("optimiser.schedule=cosine", "training.epochs=3"), "open"), 1)
    assert stage_record(make_setup(asked("optimiser.schedule=cosine"), "open"), 1) is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.kind=Adm"], "optimiser.kind = 'Adm': should be 'Adam', 'AdamW'"),
        (["optimiser.kind=Adm"], "; did you mean Adam?"),
        (["optimiser.kind=LBFGS"], "optimiser.kind = 'LBFGS'"),
        (
            ["optimiser.momentum=0.9"],
            "optimiser.momentum: 0.9 would have no effect: Adam has no momentum (SGD, RMSprop",
        ),
        (["optimiser.kind=SGD", "optimiser.beta1=0.5"], "optimiser.beta1: 0.5 would have no effect: SGD has no beta1"),
        (["optimiser.kind=SGD", "optimiser.momentum=1"], "optimiser.momentum = 1: should be less than 1"),
        (
            ["optimiser.arguments.amsgrd=true"],
            "optimiser.arguments: Adam has no argument 'amsgrd' here: did you mean ams",
        ),
        (["optimiser.arguments.lr=1"], "set optimiser.learning_rate instead"),
        (["optimiser.arguments.amsgrad=2"], "optimiser.arguments: amsgrad = 2.0: should be true or false"),
        (
            ["optimiser.kind=SGD", "optimiser.arguments.dampening=-1"],
            "dampening = -1.0: should be at least 0; the near",
        ),
        (["optimiser.kind=SGD", "optimiser.arguments.nesterov=true"], "needs optimiser.momentum above 0"),
        (["optimiser.clip_norm=0"], "optimiser.clip_norm = 0: should be greater than 0"),
        (
            ["optimiser.schedule=cosin"],
            "optimiser.schedule = 'cosin': should be 'constant', 'cosine' or 'step'; did you",
        ),
        (
            ["optimiser.warmup=-1"],
            "optimiser.warmup = -1: should be greater than or equal to 0; the nearest valid value",
        ),
        (["optimiser.step_every=3"], "optimiser.step_every: 3 would have no effect with the schedule constant"),
        (["optimiser.schedule_unit=steps"], "optimiser.schedule_unit: steps would have no effect"),
        (["optimiser.schedule=cosine", "optimiser.schedule_unit=steps"], "cosine_length is missing"),
        (["stages.2.optimiser.kind=Sdg"], "stages.2.optimiser.kind = 'Sdg'"),
        (["stages.2.optimiser.arguments.nestrov=true"], "stages.2.optimiser.arguments: Adam has no argument 'nestrov'"),
        (["optimiser.lr=1"], "there is no field 'optimiser.lr': "),
    ],
)
def test_wrong_values_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        asked(*overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_settings_of_the_optimiser_stand_in_stages_and_files() -> None:
    recipe = asked("optimiser.kind=sgd", "optimiser.arguments.dampening=0.5", "stages.2.optimiser.momentum=0.9")
    recipe = apply_overrides(recipe, ["stages.2.optimiser.arguments.dampening=0.25", "optimiser.clip_norm=2"])
    first, second = for_stage(recipe, 1).optimiser, for_stage(recipe, 2).optimiser
    assert (first.kind, first.momentum, first.arguments, first.clip_norm) == ("SGD", 0.0, {"dampening": 0.5}, 2)
    assert (second.kind, second.momentum, second.arguments, second.clip_norm) == ("SGD", 0.9, {"dampening": 0.25}, 2)
    assert rebuild(json.loads(json.dumps(describe(recipe)))) == recipe
    plain = apply_overrides(recipe, ["optimiser.arguments.dampening=null", "optimiser.clip_norm=null"])
    assert (plain.optimiser.arguments, plain.optimiser.clip_norm) == ({}, None)


def test_a_schedule_shrinks_with_the_scale_of_a_recipe() -> None:
    plain = asked("optimiser.schedule=step", "optimiser.step_every=10", "optimiser.warmup=4")
    third = ["stages.3.optimiser.schedule=constant", "stages.3.optimiser.step_every=null"]
    own = apply_overrides(plain, ["stages.2.optimiser.warmup=8", *third])
    small = resolve_recipe(own, ["scale=0.5"])
    found = [for_stage(small, number).optimiser for number in (1, 2, 3)]
    assert [(one.warmup, one.step_every) for one in found] == [(2, 5), (4, 5), (2, 30)]
    steps = resolve_recipe(asked("optimiser.warmup=100", "optimiser.schedule_unit=steps"), ["scale=0.5"])
    assert steps.optimiser.warmup == 25
    assert resolve_recipe(QUICK, ["scale=0.5"]).optimiser == QUICK.optimiser


def test_optimisers_from_python() -> None:
    assert lw.Adam() == Optimiser(learning_rate=1e-3)
    assert lw.AdamW(lr=0.1, betas=(0.5, 0.6)) == Optimiser(
        kind="AdamW", learning_rate=0.1, beta1=0.5, beta2=0.6, weight_decay=1e-2
    )
    nesterov = lw.SGD(lr=0.1, momentum=0.9, nesterov=True, schedule="cosine", warmup=5, clip_norm=1.0)
    assert (nesterov.arguments, nesterov.schedule, nesterov.clip_norm) == ({"nesterov": True}, "cosine", 1.0)
    assert lw.LARS(trust=0.02).arguments == {"trust": 0.02}
    for kind in KINDS:
        if kind != "LARS":
            made = make_optimiser(optimiser_of(getattr(torch.optim, kind)), [nn.Linear(2, 2)], CPU)
            plain = getattr(torch.optim, kind)([torch.zeros(1)])
            assert {name: float(value) if name == "lr" else value for name, value in made.defaults.items()} == {
                name: float(value) if name == "lr" else value for name, value in plain.defaults.items()
            }
    assert optimiser_of(partial(torch.optim.RMSprop, lr=1e-4, alpha=0.5)).arguments == {"alpha": 0.5}
    assert optimiser_of(nesterov) is nesterov
    with pytest.raises(UsageError, match="copies of the modules are trained"):
        optimiser_of(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there are Adam, AdamW"):
        optimiser_of(torch.optim.LBFGS)
    with pytest.raises(RecipeError, match=r"^optimiser\.learning_rate = -1: should be greater than 0$"):
        lw.SGD(lr=-1)


@pytest.mark.parametrize("given", [lw.AdamW(lr=1e-2, schedule="cosine"), partial(torch.optim.SGD, lr=0.1)])
def test_a_network_of_ones_own_is_trained_by_it(given: Any, tmp_path: Path) -> None:
    run = small(tmp_path / "run", optimiser=given)
    losses = [line["loss"] for line in run.history()[0]["curve"]]
    assert losses[-1] < losses[0]


def test_modules_without_weights_to_spare_make_one_group() -> None:
    settings = named_optimiser("SGD", weight_decay=0.1, decay_norms_and_biases=False)
    assert len(make_optimiser(settings, [nn.Linear(2, 2, bias=False)], CPU).param_groups) == 1
    assert len(make_optimiser(settings, [nn.GroupNorm(1, 2)], CPU).param_groups) == 1


class Unused(Objective):
    """Has a parameter that never gets a gradient, and so no state."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(2))

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        return representations[0].square().mean()


@pytest.mark.parametrize("way", ["Adam", "LARS, spared", "NAdam"])
def test_a_parameter_without_state_stays_without(way: str, tmp_path: Path) -> None:
    recipe = asked(*WAYS[way])
    made = make_learner(recipe, 1, TINY.network.modules((1, 16, 16))[0], (1, 16, 16), {}, CPU)
    objective = Unused()
    made = replace(made, objective=objective, optimiser=make_optimiser(recipe.optimiser, [made.module, objective], CPU))
    train_step([made], Batch(torch.randn(4, 1, 16, 16)), 0, Arithmetic(CPU, "fp32", None, seed=3))
    assert objective.idle not in made.optimiser.state
    place = {"epoch": 0, "batch": 1, "step": 1, "sums": [1.0], "best_loss": None, "best_epoch": 0, "seconds": 1.0}
    save_checkpoint(tmp_path, [made], {}, place)
    assert load_checkpoint(tmp_path, [made], {}) is not None
    assert objective.idle not in made.optimiser.state
