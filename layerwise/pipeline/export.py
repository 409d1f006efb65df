"""A frozen encoder as a file that works without the run.

    FILE.pt2             a graph of torch.export with its weights: runs with torch alone
    FILE.onnx            the same for ONNX Runtime and whatever else reads ONNX
    FILE.safetensors     the weights, and in the header the settings of the network that they belong to
    FILE.….json          beside each: shapes, and how a picture or a recording becomes an input

A graph is run once before it is written, on random inputs of another batch size, and compared with the encoder.

Letters: B batch, C channels.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from layerwise.errors import DamagedData, LayerwiseError, NotReady, UsageError, in_one_line
from layerwise.files.storage import parse_json, write_file
from layerwise.nets.encoder import Encoder
from layerwise.nets.module import Module
from layerwise.nets.plain import PlainModule
from layerwise.nets.settings import NetworkSettings
from layerwise.pipeline.frozen import frozen_digests, load_frozen, require_stage
from layerwise.pipeline.probe import parts, require_part
from layerwise.pipeline.setup import Setup
from layerwise.recipe.as_json import NeedsCode, describe, rebuild_settings

FORMAT = 1
SUFFIXES = (".pt2", ".onnx", ".safetensors")
HEADER = "layerwise"
"""The entry of a safetensors file's metadata that holds the description."""
TOLERANCE = 1e-5
"""The most by which a graph may differ from the encoder, relative to the largest number of its output or to 1."""
TRACED, CHECKED = 2, 3  # samples in the batch that a graph is made from, and in the one that it is compared on
LONGER = 1600  # samples of a recording by which the compared ones exceed the traced ones


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    description: Path
    """The JSON beside it."""
    about: dict[str, Any]
    """The content of that JSON."""
    needs: tuple[str, ...]
    """Packages that the loader imports."""
    loader: str
    """Python code that loads the file."""
    difference: float | None
    """Largest difference from the encoder on random inputs; None for weights, which are the same bits."""


def frozen_encoder(setup: Setup, number: int) -> Encoder:
    """Parts 1 to `number` of the frozen network, numbered as probes number them, on the setup's device.

    Raises:
        NotReady: one of them is not trained.
        UsageError: there is no such part.
    """
    holder = require_part(setup, number)
    require_stage(setup, holder)
    return Encoder(parts(load_frozen(setup, holder))[:number])


def export_encoder(setup: Setup, number: int, to: Path, *, overwrite: bool = False) -> Exported:
    """Write modules 1 to `number`, as one network, to the file `to`, whose ending says in which format.

    Raises:
        UsageError: the ending is none of the three, a file is there already, or the network cannot be exported.
        NotReady: a module is not trained, or a package of the extra `onnx` is missing.
    """
    require_format(to)
    description = to.with_name(f"{to.name}.json")
    require_free((to, description), overwrite)
    if to.suffix == ".onnx":
        _require_onnx()
    encoder = frozen_encoder(setup, number).cpu()
    stages = [stage for stage in encoder.stages if isinstance(stage, Module)]
    about: dict[str, Any] = {
        "format": FORMAT,
        "file": to.name,
        "recipe": setup.recipe.name,
        "module": number,
        "weights_sha256": frozen_digests(setup, setup.holders[number - 1]),
        "versions": {"layerwise": version("layerwise"), "torch": torch.__version__},
        "preprocessing": setup.recipe.dataset.preprocessing(),
    }
    whole = isinstance(stages[0], PlainModule) and stages[0].whole_numbers
    dtype = torch.int64 if whole else torch.float32
    shape = setup.facts.sample_shape
    example = _inputs(TRACED, shape, dtype)
    with torch.no_grad():
        given = encoder(example)
    lengths = stages[0].hop is not None
    difference: float | None = None
    if to.suffix == ".safetensors":
        content = _weights(setup, encoder, about, shape)
        dynamic = [0, len(shape)] if lengths else [0]
    elif to.suffix == ".pt2":
        content, dynamic, difference = _graph(encoder, example, lengths)
    else:
        content, dynamic, difference = _onnx(encoder, example, lengths)
    about |= {
        "inputs": {"shape": _axes(example, dynamic), "dtype": str(dtype).removeprefix("torch.")},
        "representation": {
            "shape": _axes(given, [0, 2] if 2 in dynamic and lengths else dynamic[:1]),
            "dtype": "float32",
            "axes": "batch, channels, then positions; a linear probe reads the mean over the positions",
        },
    }
    write_file(to, content)
    write_file(description, (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
    needs, loader = _loader(to, about, setup.recipe.network)
    return Exported(to, description, about, needs, loader, difference)


def require_format(to: Path) -> None:
    """
    Raises:
        UsageError: the name of the file does not end in a format that there is.
    """
    if to.suffix not in SUFFIXES:
        raise UsageError(f"--to {str(to)!r}: the file's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def require_free(files: tuple[Path, ...], overwrite: bool) -> None:
    """
    Raises:
        UsageError: one of the files is there already.
    """
    if taken := [str(file) for file in files if os.path.lexists(file)]:
        if not overwrite:
            raise UsageError(f"{', '.join(taken)} already exists: choose another --to, or add --overwrite")
        if folders := [file for file in taken if Path(file).is_dir()]:
            raise UsageError(f"{', '.join(folders)} is a folder: choose another --to")


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise NotReady(
            f"exporting to .onnx needs {', '.join(missing)}, which cannot be imported here. Install the extra: "
            "pip install 'layerwise[onnx]'"
        )


def _inputs(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A batch of random inputs; of tokens, the lowest two, which every vocabulary has."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int64:
        return torch.randint(0, 2, (count, *shape), generator=generator)
    return torch.randn(count, *shape, generator=generator)


def _axes(values: Tensor, dynamic: list[int]) -> list[int | str]:
    names = {0: "batch"} | {axis: "length" for axis in dynamic if axis > 0}
    return [names.get(axis, size) if axis in dynamic else size for axis, size in enumerate(values.shape)]


def _weights(setup: Setup, encoder: Encoder, about: Mapping[str, Any], shape: tuple[int, ...]) -> bytes:
    described = {**about, "sample_shape": list(shape), "network": describe(setup.recipe.network)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in encoder.state_dict().items()}
    return save_safetensors(tensors, metadata={HEADER: json.dumps(described, allow_nan=False)})


def _graph(encoder: Encoder, example: Tensor, lengths: bool) -> tuple[bytes, list[int], float]:
    from layerwise.nets.recurrence import ScannedGRU

    portable = _with_recurrence(encoder, ScannedGRU)
    program, dynamic = _traced(portable, example, lengths)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), dynamic, _difference(encoder, example, dynamic, loaded)


def _onnx(encoder: Encoder, example: Tensor, lengths: bool) -> tuple[bytes, list[int], float]:
    import onnxruntime

    from layerwise.nets.recurrence import OnnxGRU

    program, dynamic = _traced(_with_recurrence(encoder, OnnxGRU), example, lengths)
    with _failure("ONNX"), _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["inputs"],
            output_names=["representation"],
        )
        assert made is not None
        content: bytes = made.model_proto.SerializeToString()
    with _failure("ONNX Runtime"):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])

    return content, dynamic, _difference(encoder, example, dynamic, run)


def _with_recurrence(encoder: Encoder, form: type[nn.Module]) -> Encoder:
    """A copy whose recurrent modules run on any length."""
    from layerwise.nets.speech import GRUModule

    found = copy.deepcopy(encoder)
    for module in found.modules():
        if isinstance(module, GRUModule):
            setattr(module, "gru", form(module.gru))  # noqa: B010 - it is declared as an nn.GRU
    return found


def _traced(encoder: Encoder, example: Tensor, lengths: bool) -> tuple[torch.export.ExportedProgram, list[int]]:
    """The graph, and the axes of its inputs that may have any size: as many as the network allows."""
    last = example.ndim - 1
    ways = [*([[0, last]] if lengths else []), [0], []]
    for axes in ways:
        try:
            with _quiet(), torch.no_grad():
                dims = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
                # A graph of a fixed batch takes one sample at a time.
                inputs = example if 0 in axes else example[:1]
                return torch.export.export(encoder, (inputs,), dynamic_shapes=(dims or None,)), axes
        except Exception as error:  # whatever code of the user's, or torch, raises
            failure = error
    raise UsageError(
        f"the network cannot be exported as a graph: {in_one_line(failure)[:500]}. Export its weights: --to "
        "FILE.safetensors"
    ) from failure


def _difference(encoder: Encoder, example: Tensor, dynamic: list[int], graph: Any) -> float:
    """The largest difference on other inputs, of other sizes where they may differ.

    Raises:
        LayerwiseError: it is more than rounding.
    """
    sizes = list(example.shape[1:])
    if len(dynamic) > 1:
        sizes[-1] += LONGER
    inputs = _inputs(CHECKED if 0 in dynamic else 1, tuple(sizes), example.dtype)
    with torch.no_grad(), _failure("the exported graph"):
        wanted, found = encoder(inputs), graph(inputs)
        difference = float((wanted - found).abs().max())
    if wanted.shape != found.shape or not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise LayerwiseError(f"the exported graph differs from the encoder by {difference:g}, so nothing was written")
    return difference


@contextmanager
def _failure(what: str) -> Iterator[None]:
    try:
        yield
    except LayerwiseError:
        raise
    except Exception as error:
        raise UsageError(
            f"{what} cannot express this network: {in_one_line(error)[:500]}. Export its weights: --to FILE.safetensors"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters print on their way: a failure is told once, by us."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _loader(to: Path, about: Mapping[str, Any], network: NetworkSettings) -> tuple[tuple[str, ...], str]:
    """Packages, and code that uses them to load the file."""
    path = json.dumps(str(to))
    sizes = ", ".join(str(size) if isinstance(size, int) else "1" for size in about["inputs"]["shape"])
    if about["inputs"]["shape"][-1] == "length":
        sizes = sizes.removesuffix("1") + "20480"
    kind, said = about["inputs"]["dtype"], f"  # preprocessed as {to.name}.json says"
    if to.suffix == ".pt2":
        return ("torch",), (
            "import torch\n\n"
            f"encoder = torch.export.load({path}).module()\n"
            f"inputs = torch.zeros({sizes}, dtype=torch.{kind}){said}\n"
            "with torch.no_grad():\n    representation = encoder(inputs)"
        )
    if to.suffix == ".onnx":
        return ("numpy", "onnxruntime"), (
            "import numpy, onnxruntime\n\n"
            f"session = onnxruntime.InferenceSession({path})\n"
            f'inputs = numpy.zeros(({sizes}), "{kind}"){said}\n'
            '(representation,) = session.run(None, {"inputs": inputs})'
        )
    if not type(network).__module__.startswith("layerwise.") or type(network).__name__ == "GivenNetwork":
        return ("safetensors", "torch", "your code"), (
            "from safetensors.torch import load_file\n\n"
            "# `encoder` is what run.encoder(through=NUMBER) returns, or any nn.Module with the same names of weights\n"
            f"encoder.load_state_dict(load_file({path}))"
        )
    return ("layerwise",), (
        "import layerwise, torch\n\n"
        f"encoder = layerwise.load_encoder({path})\n"
        f"inputs = torch.zeros({sizes}, dtype=torch.{kind}){said}\n"
        "representation = encoder(inputs)"
    )


def load_encoder(file: str | Path) -> Encoder:
    """The encoder in a .safetensors file that `layerwise export` wrote, frozen, on the CPU. No code of the file runs.

    Raises:
        NotReady: there is no such file.
        DamagedData: it is not such a file, or its weights are not those of the network that it names.
        UsageError: its network is not one of layerwise's: see the loader that `layerwise export` printed.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            about = parse_json((opened.metadata() or {})[HEADER].encode())
        shape, number = tuple(about["sample_shape"]), about["module"]
        network = rebuild_settings(about["network"])
        if not isinstance(network, NetworkSettings):
            raise ValueError("it describes no network")
        with torch.device("meta"):
            encoder = Encoder(parts(network.modules(shape))[:number])
        forms = {name: (tensor.dtype, tensor.shape) for name, tensor in encoder.state_dict().items()}
        if forms != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
            raise ValueError("its weights do not fit its network")
        encoder.load_state_dict(tensors, assign=True)
    except FileNotFoundError as error:
        raise NotReady(f"there is no file {file}") from error
    except (NeedsCode, NotReady) as error:
        raise UsageError(
            f"the network of {file} is defined by code outside layerwise ({error}): make its modules in "
            "Python and load the weights with safetensors.torch.load_file"
        ) from error
    except (SafetensorError, DamagedData, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedData(f"{file} is not an encoder that layerwise exported: {in_one_line(error)[:300]}") from error
    encoder.eval().requires_grad_(False)
    return encoder
