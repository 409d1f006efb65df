"""Encode each patch of an image on its own, as the paper does, with a network for whole images.

Letters: B batch, C channels, P patches: a grid of R rows and S columns.
"""

from __future__ import annotations

from torch import Tensor

from layerwise.errors import UsageError
from layerwise.nets.module import Encoded, Module


def to_patches(images: Tensor, size: int, stride: int) -> Tensor:
    """Images (B, C, H, W) to their patches, row by row: (B, P, C, size, size)."""
    grid = images.unfold(2, size, stride).unfold(3, size, stride)  # (B, C, R, S, size, size)
    return grid.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).contiguous()


def grid_of(shape: tuple[int, ...], size: int, stride: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image of this shape, (C, H, W).

    Raises:
        UsageError: it is no image, or smaller than a patch.
    """
    if len(shape) != 3 or min(shape[1:]) < size:
        raise UsageError(
            f"patches of {size}x{size} are cut from images, (channels, {size} or more, {size} or more), and these "
            f"samples have shape {shape}: leave out patches, or choose smaller ones"
        )
    rows, columns = ((side - size) // stride + 1 for side in shape[1:])
    return rows, columns


class Patchwise(Module):
    """A module that sees one patch at a time.

    Args:
        inner: reads a batch of patches, or what the module below makes of one.
        grid: rows and columns of the patches.
        cut: size and stride of the patches in pixels, for the first module, which reads whole images.
    """

    def __init__(self, inner: Module, grid: tuple[int, int], cut: tuple[int, int] | None) -> None:
        super().__init__()
        self.inner, self.grid, self.cut = inner, grid, cut
        self.channels, self.target_channels = inner.channels, inner.target_channels
        self.channel_axis = inner.channel_axis + 1

    def forward(self, x: Tensor) -> Encoded:
        """Images (B, C, H, W) for the first module, (B, P, ...) for the others.

        z: (B, C, R, S), the mean over each patch. output: (B, P, ...).
        """
        patches = x if self.cut is None else to_patches(x, *self.cut)
        b = patches.shape[0]  # not len(): torch.export would take the batch size for a constant
        z, c, output = self.inner(patches.flatten(0, 1))
        pooled = self._pooled(z, b)
        return Encoded(pooled, pooled if c is z else self._pooled(c, b), output.unflatten(0, (b, -1)))

    def _pooled(self, values: Tensor, b: int) -> Tensor:
        """(B * P, C, *positions) to (B, C, R, S)."""
        pooled: Tensor = values.flatten(2).mean(2).unflatten(0, (b, *self.grid))
        return pooled.permute(0, 3, 1, 2)
