"""Count the bytes of live tensors, operation by operation, real tensors and fake ones alike.

Every operation passes through a dispatch mode, which notes the storages that it meets and follows each by a weak
reference until it dies. What an operation allocates and frees inside itself (a convolution's workspace) and what an
allocator keeps in reserve are not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

REST = "activations"
"""What nobody claimed: activations, their gradients, and temporaries."""


_aten = torch.ops.aten
IN_PLACE = frozenset(
    {
        _aten.uniform_.default,
        _aten.normal_.default,
        _aten.zero_.default,
        _aten.fill_.Scalar,
        _aten.add_.Tensor,
        _aten.mul_.Tensor,
        _aten.div_.Tensor,
        _aten.lerp_.Scalar,
        _aten.addcmul_.default,
        _aten.addcdiv_.default,
    }
)
"""What initialises weights and what optimisers do. It gives no shape and takes no memory, so fake tensors skip it:
that is much of what there is to do in a network of many layers."""


class Journal(Protocol):
    """Is told when storages begin and cease to count."""

    def begins(self, key: int, tensor: Tensor, size: int, part: str) -> None:
        """A storage of `size` bytes counts as `part` from now on."""

    def ends(self, key: int) -> None:
        """It no longer counts, or counts as another part from now on."""

    def operation(self) -> None:
        """An operation is about to run."""


def _alike(args: Sequence[Any]) -> bool:
    """Whether these are fake tensors of one shape, and numbers."""
    first = args[0]
    return isinstance(first, FakeTensor) and all(
        arg.shape == first.shape if isinstance(arg, FakeTensor) else not isinstance(arg, Tensor) for arg in args[1:]
    )


class LiveBytes(TorchDispatchMode):
    """Within the block, `peak` is the most bytes that were alive at once, and `parts` what they were then.

    Storages that are claimed as `None` are not counted: inputs that wait in the host's memory, say.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._journal = journal
        self.now = 0
        self.peak = 0
        self.parts: dict[str, int] = {}
        self._sums: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref[Any], int, str | None]] = {}

    def claim(self, tensors: Iterable[Tensor], part: str | None) -> None:
        """Count these tensors as `part` from now on; `None`: do not count them."""
        for tensor in tensors:
            self._forget(id(tensor.untyped_storage()))
            self._note(tensor, part)

    def reset_peak(self) -> None:
        self.peak, self.parts = self.now, self._present()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.5  # a fake tensor has no value: one that is finite, and where 1 minus it may divide (NAdam)
        if self._journal is not None:
            self._journal.operation()
        result = args[0] if func in IN_PLACE and _alike(args) else func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values(), result):
            if isinstance(value, Tensor):
                self._note(value, REST)
            elif isinstance(value, list | tuple):  # no operation of torch nests them deeper
                for leaf in value:
                    if isinstance(leaf, Tensor):
                        self._note(leaf, REST)
        return result

    def _note(self, tensor: Tensor, part: str | None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        # The storage's Python object lives as long as the storage itself, so its death is the storage's.
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, part)
        if part is not None:
            self._sums[part] += size
            self.now += size
            if self._journal is not None:
                self._journal.begins(key, tensor, size, part)
            if self.now > self.peak:
                self.peak, self.parts = self.now, self._present()

    def _forget(self, key: int) -> None:
        if (entry := self._known.pop(key, None)) is not None and entry[2] is not None:
            self._sums[entry[2]] -= entry[1]
            self.now -= entry[1]
            if self._journal is not None:
                self._journal.ends(key)

    def _present(self) -> dict[str, int]:
        return {part: size for part, size in self._sums.items() if size}
