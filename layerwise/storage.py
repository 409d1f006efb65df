"""Files that are either whole or absent, and tensors that are what their hash says.

A file is written beside its place, flushed to the disk, and renamed over it; the directory is flushed too. So a
reader never meets half a file, and a power cut never leaves one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from layerwise.errors import DamagedData, WillNotFit

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says, or a limit, that can take no more."""


def write_file(path: Path, content: bytes) -> None:
    """Replace the file's content, or leave it as it was.

    Raises:
        WillNotFit: the disk is full; the message names the path and the bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in FULL:
            raise WillNotFit(
                f"could not write {path} ({len(content):,} bytes): {os.strerror(error.errno)}. Free some "
                "disk and run the same command again; what was saved before is whole."
            ) from error
        raise


def flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SEAL = "seal"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with its own sha256 beside its fields, so that an altered one is never believed."""
    sealed = {**content, SEAL: _seal(content)}
    write_file(path, (json.dumps(sealed, indent=2, allow_nan=False) + "\n").encode())


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that `write_json` left in the file, or None where there is no file.

    Raises:
        DamagedData: the file is not what was written.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedData(
            f"{path} is damaged: it should hold a JSON object ({error}). Delete it to do that part again."
        ) from error
    if not isinstance(content, dict):
        raise DamagedData(
            f"{path} is damaged: it should hold a JSON object and holds a {type(content).__name__}. Delete "
            "it to do that part again."
        )
    if content.pop(SEAL, None) != _seal(content):
        raise DamagedData(
            f"{path} is damaged: its fields are not those that were written. Delete it to do that part again."
        )
    return content


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and return its sha256."""
    content = save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_file(path, content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        DamagedData: the file is missing or its bytes are not those that were written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedData(
            f"{path} is missing, though its record says it was written. Delete the record beside it to do "
            "that part again."
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DamagedData(
            f"{path} is damaged: its sha256 is {found[:12]}…, and {sha256[:12]}… was written. Restore it, "
            "or delete its folder to do that part again."
        )
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise DamagedData(f"{path} is not a safetensors file ({error}).") from error


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
