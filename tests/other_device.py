"""A device that is not the CPU, for machines without one: whatever would fail on CUDA because a tensor is on the wrong
device fails here.

Its tensors keep their numbers in the host's memory and compute there, so results are those of the CPU, bit for bit.
They follow CUDA's rules: they mix with host tensors only as CUDA's do, they have no `numpy()`, and what moves between
host and device is counted. They call their device `lazy`, a name that PyTorch knows and for which it has no code of its
own: autograd runs on the thread that calls it, and nothing is registered that would outlast a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

OTHER = torch.device("lazy", 0)
HOST = torch.device("cpu")

_aten = torch.ops.aten
CROSSES = {_aten.copy_.default, _aten._to_copy.default}
"""Operations that move numbers between devices."""
INDEXES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index_put.default}
"""On CUDA, too, indices may be on the host."""
COMPUTES = {
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
}
"""What a module or a classifier spends its time with: on the host, they would be in the wrong place altogether."""


class WrongDevice(RuntimeError):
    """Tensors of two devices met, or the host did the device's work."""


class OtherTensor(Tensor):
    """A tensor on the device, around a host tensor with its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OtherTensor:
        made: OtherTensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=OTHER,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OtherTensor({self.held!r})"


class OtherDevice(TorchDispatchMode):
    """Within the block the device exists. Counts what moves, and refuses heavy work on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[str] = []
        """The operation behind each transfer from the device: on CUDA, each waits for all work that was asked for."""
        self.to_device = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        there = any(isinstance(leaf, OtherTensor) for leaf in tree_leaves((args, named)))
        if func in COMPUTES and not there and not any(leaf.is_meta for leaf in _tensors((args, named))):
            raise WrongDevice(f"{func} on the host, beside a device that should do it")
        result = _compute(func, args, named)
        if there and not any(isinstance(leaf, OtherTensor) for leaf in tree_leaves(result)):
            if func in CROSSES or func is _aten._local_scalar_dense.default or func is _aten.equal.default:
                self.to_host.append(str(func))
        elif func in CROSSES and any(not isinstance(leaf, OtherTensor) for leaf in _tensors(args)):
            self.to_device += 1
        return result


@contextmanager
def other_device() -> Iterator[OtherDevice]:
    with pytest.MonkeyPatch.context() as patch, OtherDevice() as mode:
        patch.setattr(torch, "autocast", _autocast)
        yield mode


def _autocast(kind: str, dtype: torch.dtype, enabled: bool) -> AbstractContextManager[None]:
    assert not enabled, "this device knows float32 only"
    return nullcontext()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    before = _tensors((args, kwargs))
    there = any(isinstance(leaf, OtherTensor) for leaf in before)
    if there and func not in CROSSES:
        _require_one_device(func, args, kwargs)
    if asked is not None and asked.type == OTHER.type:
        kwargs = {**kwargs, "device": HOST}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    stays = there if asked is None else asked.type == OTHER.type
    if func is _aten.copy_.default:
        stays = isinstance(args[0], OtherTensor)
    if not stays:
        return found if not there or func is not _aten.copy_.default else args[0]
    wrapped = tree_map(lambda leaf: OtherTensor(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OtherTensor) else leaf


def _require_one_device(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    mixing = args[:1] + args[2:] if func in INDEXES else args
    strays = [leaf for leaf in _tensors((mixing, kwargs)) if not isinstance(leaf, OtherTensor) and leaf.dim() > 0]
    if strays:
        shape = tuple(strays[0].shape)
        raise WrongDevice(f"{func}: expected all tensors on {OTHER}, and one of shape {shape} is on {strays[0].device}")
