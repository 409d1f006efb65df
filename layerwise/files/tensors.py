"""Weights in safetensors files that are what their hash says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from layerwise.errors import DamagedData
from layerwise.files.storage import read_file, write_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its sha256."""
    content = save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_file(path, content)
    return hashlib.sha256(content).hexdigest()


HEADER = 1 << 16
"""Bytes that a file of tensors may have besides their numbers and names."""


def load_tensors(
    path: Path, sha256: str, like: Mapping[str, Tensor], optional: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU: those named in `like`, and any of `optional`, of their dtypes and shapes.

    Raises:
        DamagedData: the file is missing, its bytes are not those that were written, or it holds other tensors.
    """
    known = {**(optional or {}), **like}
    most = HEADER + sum(tensor.nbytes + len(name.encode()) + 256 for name, tensor in known.items())
    content = read_file(path, most)
    if content is None:
        raise DamagedData(
            f"{path} is missing, though its record says it was written. Delete the record beside it, and the "
            f"command repeats that part."
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DamagedData(
            f"{path} is damaged: its sha256 is {found[:12]}…, and {sha256[:12]}… was written. Restore it, "
            "or delete its folder, and the command repeats that part."
        )
    try:
        tensors = load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # of unknown dtypes too
        raise DamagedData(f"{path} is not a safetensors file ({error}).") from error
    wrong = [f"{name} is missing" for name in like if name not in tensors]
    wrong += [f"{name!r} belongs to nothing" for name in tensors if name not in known]
    wrong += [
        f"{name} is {_form(tensor)}, not {_form(known[name])}"
        for name, tensor in tensors.items()
        if name in known and _form(tensor) != _form(known[name])
    ]
    if wrong:
        raise DamagedData(
            f"{path} does not hold the weights of this network: {'; '.join(wrong[:3])}{' …' if wrong[3:] else ''}. "
            "Delete its folder, and the command repeats that part."
        )
    return tensors


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
