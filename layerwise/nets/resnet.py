"""Pre-activation residual network on image patches, cut into modules (paper, section 4.1 and appendix A.1; He et al.
2016, v2).

An image becomes a grid of partly overlapping patches, and each patch is encoded on its own, without batch
normalisation. Between modules a sample is `(P, C, h, w)`: one feature map a patch.

Letters: B batch, P = rows x columns patches, C channels, h, w height and width of a patch's feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import RecipeError
from layerwise.nets.convolution import Convolution2d
from layerwise.nets.module import Encoded, Module
from layerwise.nets.patchwise import to_patches
from layerwise.nets.settings import NetworkSettings
from layerwise.settings.base import MOST_CHANNELS, MOST_LAYERS, MOST_SIDE, JsonValue, Settings, Shape


class Group(Settings):
    """Residual blocks at one resolution; the first block strides and widens."""

    channels: int = Field(
        ge=4,
        le=MOST_CHANNELS,
        multiple_of=4,
        description="output channels of each block; a bottleneck has a quarter inside",
    )
    blocks: int = Field(ge=1, le=MOST_LAYERS, description="residual blocks")
    stride: int = Field(1, ge=1, le=4, description="stride of the first block, pixels of the feature map")


class PatchResNet(NetworkSettings):
    """A patch-wise pre-activation ResNet of bottlenecks."""

    patch: int = Field(16, ge=2, le=MOST_SIDE, description="side of a patch, pixels")
    patch_stride: int = Field(8, ge=1, le=MOST_SIDE, description="pixels between neighbouring patches")
    stem_channels: int = Field(
        64, ge=1, le=MOST_CHANNELS, description="channels of the first convolution, before the groups"
    )
    width: float = Field(1.0, gt=0, le=64, description="all channels are multiplied by this, to the nearest 4")
    groups: tuple[Group, ...] = Field(
        min_length=1, description="residual blocks by resolution; each group is a module, unless `cuts` says otherwise"
    )
    cuts: tuple[int, ...] | None = Field(
        None, description="blocks in each module, from the first; null: one module for each group"
    )

    @model_validator(mode="after")
    def _cuts_cover_the_blocks(self) -> PatchResNet:
        blocks = sum(group.blocks for group in self.groups)
        if blocks > MOST_LAYERS:
            raise ValueError(f"the groups have {blocks} blocks, more than {MOST_LAYERS}")
        if self.cuts is not None and (min(self.cuts, default=0) < 1 or sum(self.cuts) != blocks):
            raise ValueError(f"cuts {self.cuts} must be positive and add up to the network's {blocks} blocks")
        return self

    def modules(self, sample_shape: Shape) -> list[Module]:
        if len(sample_shape) != 3:
            raise RecipeError(
                f"PatchResNet reads images (channels, height, width); the dataset gives samples of shape {sample_shape}"
            )
        channels, *sides = sample_shape
        if min(sides) < self.patch:
            raise RecipeError(
                f"network.patch is {self.patch} pixels, larger than the dataset's images of {sides[0]}x{sides[1]}"
            )
        rows, columns = ((side - self.patch) // self.patch_stride + 1 for side in sides)
        plan = self._blocks()
        stem = Stem(self.patch, self.patch_stride, channels, plan[0].inputs)
        blocks = [Bottleneck(*block) for block in plan]
        ends = list(accumulate(self._cuts()))
        modules: list[Module] = []
        for begin, end in pairwise([0, *ends]):
            # A block with a projection shortcut reads only relu(x). Handing that on loses nothing, and half of it is
            # zeros.
            rectify = end == len(plan) or plan[end].projects
            modules.append(
                ResidualModule(
                    blocks[begin:end], (rows, columns), stem if begin == 0 else None, rectify, plan[end - 1].outputs
                )
            )
            if end < len(plan):
                blocks[end].input_is_rectified = rectify
        return modules

    def scaled(self, scale: float) -> PatchResNet:
        """Channels times the root of `scale`, since the work of a convolution grows with their square."""

        def width(channels: int) -> int:
            return max(4, 4 * round(channels * math.sqrt(scale) / 4))

        groups = tuple(group.model_copy(update={"channels": width(group.channels)}) for group in self.groups)
        return self.model_copy(update={"groups": groups, "stem_channels": width(self.stem_channels)})

    def repeated(self, count: int) -> PatchResNet:
        blocks = self._cuts()[0]
        first = self.groups[0].model_copy(update={"blocks": blocks * count})
        return self.model_copy(update={"groups": (first,), "cuts": (blocks,) * count})

    def identity_through(self, number: int) -> dict[str, JsonValue]:
        plan = self._blocks()
        end = list(accumulate(self._cuts()))[number - 1]
        handed_on = "relu" if end == len(plan) or plan[end].projects else "sum"
        return {
            "kind": type(self).__name__,
            "patch": self.patch,
            "patch_stride": self.patch_stride,
            "stem_channels": plan[0].inputs,
            "blocks": [list(block) for block in plan[:end]],
            "cuts": list(self._cuts()[:number]),
            "handed_on": handed_on,
        }

    def _cuts(self) -> tuple[int, ...]:
        return self.cuts or tuple(group.blocks for group in self.groups)

    def _blocks(self) -> list[Block]:
        plan, inputs = [], self._widened(self.stem_channels)
        for group in self.groups:
            outputs = self._widened(group.channels)
            for index in range(group.blocks):
                plan.append(Block(inputs, outputs, group.stride if index == 0 else 1))
                inputs = outputs
        return plan

    def _widened(self, channels: int) -> int:
        return channels if self.width == 1 else max(4 * round(channels * self.width / 4), 4)


class Block(NamedTuple):
    """Shape of one residual block."""

    inputs: int
    outputs: int
    stride: int

    @property
    def projects(self) -> bool:
        return self.inputs != self.outputs or self.stride != 1


class Stem(nn.Module):
    """Images (B, C, H, W) to patches, then a convolution that keeps their size: (B, P, stem channels, patch, patch)."""

    def __init__(self, patch: int, stride: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.patch, self.stride = patch, stride
        self.convolution = Convolution2d(inputs, outputs, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        b = images.shape[0]  # not len(): torch.export would take the batch size for a constant
        encoded: Tensor = self.convolution(to_patches(images, self.patch, self.stride).flatten(0, 1))
        return encoded.view(b, -1, *encoded.shape[1:])


class Bottleneck(nn.Module):
    """out = relu(x); 1x1, relu, 3x3 with the stride, relu, 1x1; added to x, or to a 1x1 projection of out where the
    shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.input_is_rectified = False
        self.convolution1 = Convolution2d(inputs, inner, 1)
        self.convolution2 = Convolution2d(inner, inner, 3, stride=stride, padding=1)
        self.convolution3 = Convolution2d(inner, outputs, 1)
        projects = Block(inputs, outputs, stride).projects
        self.shortcut = Convolution2d(inputs, outputs, 1, stride=stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.input_is_rectified else F.relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.convolution1(out), inplace=True)
        out = F.relu(self.convolution2(out), inplace=True)
        result: Tensor = self.convolution3(out) + shortcut
        return result


class ResidualModule(Module):
    """Consecutive residual blocks, after the patches and the first convolution where it is the first module."""

    channel_axis = 1

    def __init__(
        self, blocks: Sequence[nn.Module], grid: tuple[int, int], stem: Stem | None, rectify: bool, channels: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.grid, self.rectify, self.channels, self.target_channels = grid, rectify, channels, channels

    def forward(self, x: Tensor) -> Encoded:
        """Images (B, C, H, W) for the first module, feature maps (B, P, C, h, w) for the others.

        z = c: (B, C, rows, columns), the mean over each patch. output: (B, P, C, h, w).
        """
        patches = x if self.stem is None else self.stem(x)
        b = patches.shape[0]
        y: Tensor = self.blocks(patches.flatten(0, 1))
        z = y.mean((2, 3)).view(b, *self.grid, -1).permute(0, 3, 1, 2)
        output = (F.relu(y) if self.rectify else y).view(b, -1, *y.shape[1:])
        return Encoded(z, z, output)
