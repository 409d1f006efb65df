"""What every module of an encoder is: something that turns inputs into an `Encoded`.

Letters: B batch, C channels, P positions (a grid of patches `rows x columns`, or frames in time).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError, RecipeError, in_one_line


class Encoded(NamedTuple):
    """What a module makes of a batch.

    `z` and `c` carry the gradient of the module's own objective; `output` is what the next module reads.
    """

    z: Tensor
    """(B, C, *positions) representation: what is predicted and contrasted."""
    c: Tensor
    """(B, C', *positions) context: what predicts, and what a probe reads. The same tensor as `z` where there is no
    context network.
    """
    output: Tensor
    """(B, ...) all that the next module needs, and all that a cache stores."""


class Module(nn.Module, ABC):
    """One gradient-isolated part of the encoder."""

    channels: int
    """C' of `Encoded.c`: the size of the representation that a probe reads."""
    target_channels: int
    """C of `Encoded.z`: the size of what is predicted."""
    channel_axis: int = 0
    """Which axis of one sample's `output` counts channels; a quantised cache has a scale for each."""
    hop: int | None = None
    """Samples of a recording between neighbouring positions; None for what is no recording."""
    front: int | None = None
    """Positions before those of a recording's first label; None: the last position belongs to the last label."""

    @abstractmethod
    def forward(self, x: Tensor) -> Encoded:
        """(B, *sample_shape) to `Encoded`. Each sample is encoded on its own unless `couples_samples` says
        otherwise.
        """

    def parts(self) -> list[Module]:
        """The modules that a probe can look at: this one, unless it was merged from several."""
        return [self]

    def couples_samples(self) -> str | None:
        """The name of a layer whose result for one sample depends on the others (batch statistics), or None.

        Such a module cannot run in micro-batches with the same gradients.
        """
        for name, layer in self.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
                return f"{name} ({type(layer).__name__})"
        return None


def encode(module: nn.Module, x: Tensor, number: int | None = None) -> Encoded:
    """What the module makes of `x`, which it leaves as it was.

    Args:
        number: of the module, for the error.

    Raises:
        RecipeError: the module overwrote `x`, which the module below, or a second pass, still needs.
    """
    before = x._version
    encoded: Encoded = module(x)
    if x._version != before:
        name = type(module).__name__ if number is None else f"module {number} ({type(module).__name__})"
        raise RecipeError(
            f"{name} changes its input in place, which belongs to the module before it: start it with an operation "
            f"that does not, such as nn.ReLU() without inplace=True"
        )
    return encoded


def output_shapes(make: Callable[[], Sequence[Module]], inputs: Sequence[int]) -> list[tuple[int, ...]]:
    """Shape of each module's output for one input of shape `inputs`, each module reading what the one before gives.

    Args:
        make: makes the modules, on the device `meta` if they can be made there.

    Raises:
        RecipeError: a module fails on its input.
    """
    try:
        with torch.device("meta"):
            return _through(make(), inputs)
    except Exception:  # a module of the user's own that looks at values
        return _through(make(), inputs)


def _through(modules: Sequence[Module], inputs: Sequence[int]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    x = torch.zeros(1, *inputs)
    with torch.no_grad():
        for number, module in enumerate(modules, 1):
            module.eval()  # a batch of one has no statistics
            with failure_named(number, module, x, RecipeError):
                x = module(x).output
            shapes.append(tuple(x.shape[1:]))
    return shapes


@contextmanager
def failure_named(
    number: int,
    module: nn.Module,
    x: Tensor,
    kind: type[LayerwiseError],
    but: tuple[type[Exception], ...] = (LayerwiseError,),
) -> Iterator[None]:
    """What a module raises on the input `x`, as an error of `kind` that names both; errors `but` stay as they are."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        raise kind(
            f"module {number} ({type(module).__name__}) fails on an input of shape {tuple(x.shape)}: "
            f"{in_one_line(error)}"
        ) from error
