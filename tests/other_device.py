"""A device that is not the CPU, for machines without one: whatever would fail on CUDA because a tensor is on the wrong
device fails here.

Its tensors keep their numbers in the host's memory and compute there, so results are those of the CPU, bit for bit.
They follow CUDA's rules: they mix with host tensors only as CUDA's do, they have no `numpy()`, and what moves between
host and device is counted. They call their device `lazy`, a name that PyTorch knows and for which it has no code of its
own: autograd runs on the thread that calls it, and nothing is registered that would outlast a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

OTHER = torch.device("lazy", 0)
HOST = torch.device("cpu")

_aten = torch.ops.aten
CROSSES = {_aten.copy_.default, _aten._to_copy.default}
"""Operations that move numbers between devices."""
READS = {_aten._local_scalar_dense.default, _aten.equal.default}
"""Operations that give the host a number."""
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
        given = _tensors((*args, *(kwargs or {}).values()))
        there = any(isinstance(tensor, OtherTensor) for tensor in given)
        if func in COMPUTES and not there and not given[0].is_meta:
            raise WrongDevice(f"{func} on the host, beside a device that should do it")
        result = _compute(func, args, dict(kwargs or {}))
        if there and (func in CROSSES or func in READS) and not isinstance(result, OtherTensor):
            self.to_host.append(str(func))
        elif func in CROSSES and isinstance(result, OtherTensor) and not all(isinstance(t, OtherTensor) for t in given):
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


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operation's arguments, which no operation nests deeper than in a list."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [leaf for leaf in value if isinstance(leaf, Tensor)]
    return found


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(map(change, value)) if type(value) in (list, tuple) else change(value)


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    there = any(isinstance(tensor, OtherTensor) for tensor in _tensors((*args, *kwargs.values())))
    asked = kwargs.get("device")
    stays = there if asked is None else torch.device(asked).type == OTHER.type
    if stays and asked is not None:
        kwargs["device"] = HOST
    if func is _aten.copy_.default:
        stays = isinstance(args[0], OtherTensor)
    elif there and func is not _aten._to_copy.default:
        _require_one_device(func, args, kwargs)
    found = func(
        *(_mapped(_held, arg) for arg in args), **{name: _mapped(_held, value) for name, value in kwargs.items()}
    )
    if not stays:
        return args[0] if there and func is _aten.copy_.default else found
    wrapped = _mapped(lambda leaf: OtherTensor(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OtherTensor) else leaf


def _require_one_device(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    mixing = (*args[:1], *args[2:]) if func in INDEXES else args
    for tensor in _tensors((*mixing, *kwargs.values())):
        if not isinstance(tensor, OtherTensor) and tensor.dim() > 0:
            raise WrongDevice(
                f"{func}: expected all tensors on {OTHER}, and one of shape {tuple(tensor.shape)} is on {tensor.device}"
            )
