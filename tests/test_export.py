"""Exported encoders compute what the run's do, in a process that imports torch, or ONNX Runtime, alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import layerwise as lw
import layerwise.pipeline.export
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.nets.speech import GRUContext
from layerwise.objectives.cross_entropy import CrossEntropy
from layerwise.pipeline.export import export_encoder, frozen_encoder
from layerwise.pipeline.frozen import freeze, stage_identity
from layerwise.pipeline.run import open_run
from layerwise.pipeline.setup import Setup
from layerwise.recipe import Recipe
from layerwise.recipe.as_json import describe
from layerwise.recipe.methods import with_method
from layerwise.seeding import derive_seed
from tests.conftest import TINY
from tests.nets.test_split import NETWORKS
from tests.test_speech_run import TINY as SPEECH
from tests.test_train import trained

ELSEWHERE = {
    ".pt2": """
import sys, torch
encoder = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save([encoder(x) for x in inputs], sys.argv[3])
""",
    ".onnx": """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
with numpy.load(sys.argv[2]) as inputs:
    numpy.savez(sys.argv[3], *(session.run(None, {"inputs": inputs[name]})[0] for name in inputs))
""",
}
ALONE = """
assert not [name for name in sys.modules if name.partition(".")[0] in ("layerwise", "activation_cache", "torchvision")]
"""


def elsewhere(file: Path, inputs: list[Tensor], folder: Path) -> list[Tensor]:
    """What an exported graph makes of these batches in a process of its own, which finds no layerwise."""
    given, found = folder / "given.npz", folder / "found.npz"
    if file.suffix == ".pt2":
        torch.save(inputs, given)
    else:
        np.savez(given, *(x.numpy() for x in inputs))
    code = ELSEWHERE[file.suffix] + ALONE
    if file.suffix == ".onnx":
        code += 'assert "torch" not in sys.modules\n'
    subprocess.run([sys.executable, "-P", "-c", code, file, given, found], check=True, cwd=folder, env={})
    if file.suffix == ".pt2":
        made: list[Tensor] = torch.load(found, weights_only=True)
        return made
    with np.load(found) as arrays:
        return [torch.from_numpy(arrays[name]) for name in arrays]


def frozen(setup: Setup) -> Setup:
    """The run with random weights in place of trained ones."""
    for group in setup.recipe.groups(setup.depth):
        for number in group:
            module = setup.untrained()[number - 1]
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(7, number))
                for weight in module.parameters():
                    weight.data += 0.1 * torch.randn_like(weight)
            outcome = {
                "epochs": 1, "best_epoch": 1, "seconds": 1.0, "steps": 1, "threads": None, "checkpoint_bytes": 0,
                "peak": {"bytes": 1, "kind": "predicted"}, "trained_with": list(group),
            }  # fmt: skip
            freeze(setup, setup.learner(number, module), stage_identity(setup, number), outcome)
    return setup


def require_same(file: Path, encoder: torch.nn.Module, inputs: list[Tensor], folder: Path) -> None:
    with torch.no_grad():
        wanted = [encoder(x) for x in inputs]
    for ours, theirs in zip(wanted, elsewhere(file, inputs, folder), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(ours.abs().max()))


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


VISION = {"gim": (TINY, 3), "cpc": (with_method(TINY, "cpc"), 2), "one module": (TINY, 1)}


@pytest.mark.parametrize("suffix", ELSEWHERE)
@pytest.mark.parametrize("name", VISION)
def test_a_network_of_patches(name: str, suffix: str, make_setup: Callable[..., Setup], tmp_path: Path) -> None:
    recipe, number = VISION[name]
    setup = frozen(make_setup(recipe))
    made = export_encoder(setup, number, tmp_path / f"encoder{suffix}")
    assert made.about["inputs"]["shape"] == ["batch", 1, 16, 16]
    assert made.about["representation"]["shape"][2:] == [3, 3]
    assert made.about["preprocessing"]["centre_crop_pixels"] == 16
    assert json.loads(made.description.read_text()) == made.about
    require_same(made.file, frozen_encoder(setup, number), [draw(n, 1, 16, 16) for n in (1, 2, 5)], tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voices")
    SPEECH.dataset.open(folder, download=False, seed=0)
    return folder


STATES = {"convolutions": None, "states": GRUContext(hidden=6), "states without bptt": GRUContext(hidden=6, bptt=False)}


@pytest.mark.parametrize("suffix", ELSEWHERE)
@pytest.mark.parametrize(
    "name",
    ["states", *(pytest.param(name, marks=pytest.mark.long) for name in ("convolutions", "states without bptt"))],
)
def test_a_network_of_recordings_takes_any_length(name: str, suffix: str, tmp_path: Path, corpus: Path) -> None:
    network = SPEECH.network.model_copy(update={"context": STATES[name]})
    recipe = SPEECH.model_copy(update={"network": network})
    setup = frozen(Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"), corpus))
    made = export_encoder(setup, setup.depth, tmp_path / f"encoder{suffix}")
    assert made.about["inputs"]["shape"] == ["batch", 1, "length"]
    assert made.about["representation"]["shape"][2] == "length"
    assert made.about["preprocessing"]["rate_hz"] == 16_000
    inputs = [draw(2, 1, 8000), draw(1, 1, 31_017), draw(3, 1, 1600)]
    require_same(made.file, frozen_encoder(setup, setup.depth), inputs, tmp_path)


SLOW = ("efficientnet_b0", "convnext_tiny", "vit_b_16", "two streams", "tokens")  # to export


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in NETWORKS]
)
def test_networks_of_other_peoples_modules(name: str, tmp_path: Path) -> None:
    run = trained(name, tmp_path / "run")
    encoder, example = run.encoder(), NETWORKS[name][2]
    batches = [example[:1], example[:2], torch.cat([example, example])]
    for suffix in ELSEWHERE:
        made = run.export(tmp_path / f"encoder{suffix}")
        assert made.about["inputs"]["shape"][0] == "batch"
        assert made.about["preprocessing"] is None
        require_same(made.file, encoder, batches, tmp_path)
    weights = run.export(tmp_path / "encoder.safetensors", through=1)
    found, wanted = load_file(weights.file), run.encoder(through=1).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    with pytest.raises(UsageError, match="code outside layerwise"):
        lw.load_encoder(weights.file)


class Stubborn(nn.Module):
    """What no graph can express: the way depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if x.device.type == "meta" or float(y.detach().sum()) > 0 else -y


def test_a_network_that_no_graph_can_express_is_refused_in_one_line(tmp_path: Path) -> None:
    data = TensorDataset(draw(12, 4), torch.arange(12) % 3)
    settings = {"epochs": 1, "batch_size": 4, "quiet": True, "checkpoint_every": 100}
    run = lw.train([Stubborn()], CrossEntropy(), data, data, to=tmp_path / "run", **settings)
    for suffix in ELSEWHERE:
        with pytest.raises(UsageError, match=r"cannot be exported as a graph: .*--to FILE.safetensors") as refused:
            run.export(tmp_path / f"encoder{suffix}")
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("encoder*"))
    assert run.export(tmp_path / "encoder.safetensors").file.exists()


@pytest.mark.parametrize("recipe", [TINY, SPEECH, with_method(TINY, "cpc")], ids=["patches", "speech", "merged"])
def test_weights_and_settings_are_loaded_without_the_run(recipe: Recipe, tmp_path: Path, corpus: Path) -> None:
    data_dir = corpus if recipe is SPEECH else None
    setup = frozen(Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"), data_dir))
    file = export_encoder(setup, 2, tmp_path / "encoder.safetensors").file
    shutil.rmtree(tmp_path / "run")
    found, x = lw.load_encoder(file), draw(2, *setup.facts.sample_shape)
    assert not found.training
    assert not any(weight.requires_grad for weight in found.parameters())
    setup = frozen(Setup(open_run(tmp_path / "run", recipe), torch.device("cpu"), data_dir))
    assert torch.equal(found(x), frozen_encoder(setup, 2)(x))


def test_a_file_that_is_no_encoder_is_refused(make_setup: Callable[..., Setup], tmp_path: Path) -> None:
    file = export_encoder(frozen(make_setup()), 1, tmp_path / "encoder.safetensors").file
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["layerwise"])
    wrong: dict[str, Any] = {
        "other tensors": ({"a": torch.zeros(2)}, about),
        "a missing tensor": (dict(list(tensors.items())[1:]), about),
        "another shape": ({**tensors, next(iter(tensors)): torch.zeros(7)}, about),
        "no description": (tensors, None),
        "no network": (tensors, {**about, "network": describe(TINY.dataset)}),
        "a function": (tensors, {**about, "network": {"class": "layerwise.files.storage.write_file"}}),
        "no shape": (tensors, {**about, "sample_shape": "x"}),
    }
    for name, (held, described) in wrong.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(held, path, None if described is None else {"layerwise": json.dumps(described)})
        with pytest.raises(DamagedData, match="is not an encoder that layerwise exported"):
            lw.load_encoder(path)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(DamagedData):
        lw.load_encoder(tmp_path / "text.safetensors")
    with pytest.raises(NotReady, match="there is no file"):
        lw.load_encoder(tmp_path / "none.safetensors")


def test_what_cannot_be_exported_is_said(
    make_setup: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup()
    with pytest.raises(NotReady, match="module 1 is not trained yet"):
        export_encoder(setup, 1, tmp_path / "a.pt2")
    frozen(setup)
    with pytest.raises(UsageError, match=r"must end in .pt2, .onnx or .safetensors"):
        export_encoder(setup, 1, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="there is no module 4"):
        export_encoder(setup, 4, tmp_path / "a.pt2")
    (tmp_path / "a.safetensors.json").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        export_encoder(setup, 1, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    assert export_encoder(setup, 1, tmp_path / "a.safetensors", overwrite=True).file.exists()
    monkeypatch.setattr(layerwise.pipeline.export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(NotReady, match=r"needs onnxruntime, .* pip install 'layerwise\[onnx\]'"):
        export_encoder(setup, 1, tmp_path / "a.onnx")
