"""Representations of new images and recordings, decoded and preprocessed as the dataset's own in the evaluation view.

Letters: N samples, C channels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from activation_cache.reading.processors import allowed_processors
from layerwise.data.seen import legible
from layerwise.errors import NotReady, UsageError
from layerwise.files.storage import write_file
from layerwise.pipeline.export import frozen_encoder
from layerwise.pipeline.frozen import frozen_digests, threads_of
from layerwise.pipeline.probe import require_part
from layerwise.pipeline.setup import Setup

SUFFIXES = (".safetensors", ".npz", ".parquet")
TOGETHER = "representations"
"""The name of the array that holds all samples, where each is one vector."""
READERS = 4


@dataclass(frozen=True)
class Embeddings:
    """Representations by the name of the sample: the path of its file, with @LEFT,TOP where that is cut into tiles."""

    values: dict[str, Tensor]
    """(C,) float32 each, the mean over the positions; or (C, *positions)."""
    positions: bool
    about: Mapping[str, Any]
    """Recipe, module and weights that they come from."""

    def stacked(self) -> Tensor:
        """(N, C), in the order of the names."""
        return torch.stack(list(self.values.values()))


def embed_files(setup: Setup, number: int, files: Sequence[Path], *, positions: bool = False) -> Embeddings:
    """What module `number` makes of these files.

    Args:
        positions: keep a vector for each position instead of their mean, which is what a linear probe reads.

    Raises:
        NotReady: the module is not trained.
        UsageError: a file does not exist or is named twice, or the recipe's dataset is not made of files.
        DamagedData: a file cannot be read.
    """
    require_part(setup, number)
    encoder = frozen_encoder(setup, number)
    _require_files(files)
    split, training = setup.recipe.dataset.of_files(files, setup.progress), setup.recipe.training
    size = 1 if split.lengths is not None else training.micro_batch or training.batch_size
    batches = np.split(np.arange(len(split)), range(size, len(split), size))
    values: list[Tensor] = []
    setup.progress.begin("embed", len(split), "samples")
    with torch.no_grad(), threads_of(setup, setup.holders[number - 1]):
        for inputs, _ in split.read(batches, None, min(READERS, allowed_processors())):
            c = encoder(inputs.to(setup.device)).float()
            values += (c if positions else c.flatten(2).mean(2)).cpu().unbind(0)
            setup.progress.advance(len(inputs), len(inputs), "")
    setup.progress.end()
    about = {
        "recipe": setup.recipe.name,
        "module": number,
        "weights_sha256": frozen_digests(setup, setup.holders[number - 1]),
        "preprocessing": setup.recipe.dataset.preprocessing(),
    }
    return Embeddings(dict(zip(split.ids, values, strict=True)), positions, about)


def _require_files(files: Sequence[Path]) -> None:
    if not files:
        raise UsageError("no file to embed: name at least one")
    seen: set[str] = set()
    for file in files:
        name = legible(file)
        if file.is_dir():
            raise UsageError(f"{name} is a folder: name the files in it, such as {name}/*")
        if not file.exists():
            raise UsageError(f"there is no file {name}")
        if name in seen:
            raise UsageError(f"{name} is named twice")
        seen.add(name)


def require_writable(to: Path) -> None:
    """
    Raises:
        UsageError: the ending of the file's name is none of the formats.
        NotReady: the package that writes the format is missing.
    """
    if to.suffix not in SUFFIXES:
        raise UsageError(f"--to {str(to)!r}: the file's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if to.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise NotReady(
            "writing .parquet needs pyarrow, which cannot be imported here. Install the extra: pip install "
            "'layerwise[parquet]', or write .npz or .safetensors"
        )


def write_embeddings(embeddings: Embeddings, to: Path) -> None:
    """Write them in the format that the file's ending names.

    .safetensors  `representations` (N, C), or with positions a tensor `0`, `1`, … for each sample; the names of the
                  samples are in the metadata, as JSON
    .npz          the same arrays, and the names as the array `ids`
    .parquet      a row a sample: `id`, `representation`, and with positions its `shape`
    """
    require_writable(to)
    write_file(to, {".safetensors": _safetensors, ".npz": _npz, ".parquet": _parquet}[to.suffix](embeddings))


def _arrays(embeddings: Embeddings) -> dict[str, Tensor]:
    if not embeddings.positions:
        return {TOGETHER: embeddings.stacked()}
    return {str(index): value.contiguous() for index, value in enumerate(embeddings.values.values())}


def _safetensors(embeddings: Embeddings) -> bytes:
    about = {**embeddings.about, "ids": list(embeddings.values)}
    return save_safetensors(_arrays(embeddings), metadata={"layerwise": json.dumps(about, allow_nan=False)})


def _npz(embeddings: Embeddings) -> bytes:
    buffer = io.BytesIO()
    arrays = {name: value.numpy() for name, value in _arrays(embeddings).items()}
    np.savez(buffer, allow_pickle=False, ids=np.array(list(embeddings.values)), **arrays)
    return buffer.getvalue()


def _parquet(embeddings: Embeddings) -> bytes:
    import pyarrow
    from pyarrow import parquet

    values = list(embeddings.values.values())
    numbers = pyarrow.array(torch.cat([value.flatten() for value in values]).numpy())
    columns = {"id": pyarrow.array(list(embeddings.values))}
    if embeddings.positions:
        ends = np.cumsum([0, *(value.numel() for value in values)])
        columns["representation"] = pyarrow.LargeListArray.from_arrays(pyarrow.array(ends, pyarrow.int64()), numbers)
        columns["shape"] = pyarrow.array([list(value.shape) for value in values])
    else:
        columns["representation"] = pyarrow.FixedSizeListArray.from_arrays(numbers, len(values[0]))
    table = pyarrow.table(columns).replace_schema_metadata({"layerwise": json.dumps(embeddings.about, allow_nan=False)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
