"""Any `nn.Module` as a module of the toolkit: nothing to subclass.

What it returns is both its representation and what the next module reads. Several tensors are stored as one, end to
end, and taken apart again where they are read.

Letters: B batch, C channels, T tokens or frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.nets.module import Encoded, Module
from layerwise.nets.patchwise import Patchwise, grid_of
from layerwise.nets.split.trace import without_memory

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Represent: TypeAlias = Callable[..., Tensor]
"""From what a module returns to its representation, (B, C) or (B, C, *positions)."""


class PlainModule(Module):
    """A module of somebody else's.

    Args:
        inner: takes the tensors that the module before returns, and returns a tensor or a tuple of tensors, each with
            the batch first.
        reads: shape of each tensor that it takes, for one sample.
        gives: shape of each tensor that it returns, for one sample.
        represent: from what it returns to its representation. By default the last tensor; where that has three axes,
            the last one counts channels if `channels` says so.
        whole_numbers: it takes int64, such as tokens, whatever comes.
        channels: which axis of a tensor (B, T, C) or (B, C, T) counts channels. By default the last one, as in a
            transformer, unless `inner` has a one-dimensional convolution.
    """

    def __init__(
        self,
        inner: nn.Module,
        reads: Shapes,
        gives: Shapes,
        represent: Represent | None = None,
        channels: Literal["first", "last"] | None = None,
        whole_numbers: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.reads, self.gives, self._represent = inner, reads, gives, represent
        self.whole_numbers = whole_numbers
        along = any(isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) for layer in inner.modules())
        self._last = (not along) if channels is None else channels == "last"
        with torch.no_grad():
            shape = self._representation(tuple(torch.empty(1, *sizes, device="meta") for sizes in gives)).shape
        self.channels = self.target_channels = int(shape[1])
        self.channel_axis = 0 if len(gives) > 1 or not self._tokens(gives[0]) else 1

    def forward(self, x: Tensor) -> Encoded:
        if self.whole_numbers:
            x = x.long()
        before = x._version
        returned = self.inner(*unpacked(x, self.reads))
        if x._version != before:
            raise UsageError(
                f"{type(self.inner).__name__} changes its input in place, which belongs to the module before it: "
                f"start it with an operation that does not, such as nn.ReLU() without inplace=True"
            )
        found = returned if isinstance(returned, tuple) else (returned,)
        z = self._representation(found)
        return Encoded(z, z, packed(found))

    def _representation(self, found: Sequence[Tensor]) -> Tensor:
        """(B, C, *positions), with a single position where there is none."""
        if self._represent is not None:
            z = self._represent(*found)
        else:
            z = found[-1].movedim(-1, 1) if self._tokens(found[-1].shape[1:]) else found[-1]
        return z.unsqueeze(-1) if z.ndim == 2 else z

    def _tokens(self, shape: Sequence[int]) -> bool:
        """Whether one sample is (T, C) rather than (C, *positions)."""
        return len(shape) == 2 and self._last


def plain_modules(
    modules: Sequence[nn.Module],
    sample: Tensor,
    represent: Represent | None = None,
    channels: Literal["first", "last"] | None = None,
    patches: tuple[int, int] | None = None,
) -> list[Module]:
    """Each of these modules as one of the toolkit; those that are one already stay.

    Args:
        sample: one input of the first, without the batch; only its shape and dtype matter.
        patches: size and stride, in pixels, of the patches that the modules see one at a time, for images.

    Raises:
        UsageError: a module does not read what the one before returns, or returns something else than tensors.
    """
    grid = None if patches is None else grid_of(tuple(sample.shape), *patches)
    shape = tuple(sample.shape) if patches is None else (len(sample), patches[0], patches[0])
    values: tuple[Tensor, ...] = (torch.zeros(2, *shape, dtype=sample.dtype, device="meta"),)
    found: list[Module] = []
    for number, module in enumerate(modules, 1):
        with torch.no_grad():
            returned = _tried(module, values, number)
        if isinstance(module, Module):
            found.append(module)
            returned = (returned.output,)
        else:
            reads, gives = _shapes(values), _shapes(_tensors(returned, module, number))
            whole = values[0].dtype == torch.int64
            found.append(PlainModule(module, reads, gives, represent, channels, whole))
            returned = returned if isinstance(returned, tuple) else (returned,)
        values = returned
    if grid is None:
        return found
    return [Patchwise(module, grid, patches if number == 0 else None) for number, module in enumerate(found)]


def _tried(module: nn.Module, values: Sequence[Tensor], number: int) -> Any:
    """What the module returns, on tensors without memory, in evaluation."""
    try:
        with torch.device("meta"):
            return without_memory(module).eval()(*values)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        shapes = ", ".join(str(("batch", *sizes)) for sizes in _shapes(values)).replace("'", "")
        raise UsageError(
            f"module {number} ({type(module).__name__}) fails on its input, {shapes}: {reason}. Each module "
            "must read what the one before returns"
        ) from error


def _tensors(returned: Any, module: nn.Module, number: int) -> tuple[Tensor, ...]:
    found = returned if isinstance(returned, tuple) else (returned,)
    for value in found:
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != 2:
            what = (
                f"a tensor of shape {tuple(value.shape)} for a batch of 2" if isinstance(value, Tensor) else repr(value)
            )
            raise UsageError(
                f"module {number} ({type(module).__name__}) returns {what}: it must return a tensor, or a tuple of "
                "tensors, each with the batch first and at least one more axis"
            )
    return found


def _shapes(values: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(value.shape[1:]) for value in values)


def packed(values: Sequence[Tensor]) -> Tensor:
    """One tensor alone as it is; several end to end, (B, numbers)."""
    return values[0] if len(values) == 1 else torch.cat([value.flatten(1) for value in values], 1)


def unpacked(values: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """The tensors that `packed` put together; `shapes` are those of one sample."""
    if len(shapes) == 1:
        return (values,)
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + math.prod(shape))
    return tuple(
        values[:, begin:end].unflatten(1, shape) for (begin, end), shape in zip(pairwise(ends), shapes, strict=True)
    )
