"""Context over the rows above, by masked gated convolutions (Oord et al. 2016, "Conditional Image Generation with
PixelCNN Decoders").

Only the vertical stack is kept, since what is predicted lies below (Hénaff et al. 2019): the context of a position
sees its own row and the rows above, three columns more with every layer, and never a row below.

Letters: B batch, C channels of what is read, D channels of the context, R rows, S columns.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import RecipeError
from layerwise.nets.convolution import Convolution2d
from layerwise.settings.base import MOST_CHANNELS, MOST_LAYERS, Settings


class PixelCNN(Settings):
    """Gated layers, then a 1x1 convolution."""

    layers: int = Field(4, ge=1, le=MOST_LAYERS, description="gated layers")
    channels: int | None = Field(
        None,
        ge=1,
        le=MOST_CHANNELS,
        description="D, channels of every layer; null: as many as the encoder gives (1024 in the paper)",
    )

    def build(self, inputs: int) -> PixelCNNContext:
        return PixelCNNContext(inputs, self.channels or inputs, self.layers)


class PixelCNNContext(nn.Module):
    """(B, C, R, S) to (B, D, R, S)."""

    def __init__(self, inputs: int, channels: int, layers: int) -> None:
        super().__init__()
        self.channels = channels
        widths = [inputs] + [channels] * (layers - 1)
        self.layers = nn.Sequential(*(GatedRows(width, channels) for width in widths))
        self.output = Convolution2d(channels, channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        """
        Raises:
            RecipeError: z is no grid of patches.
        """
        if z.dim() != 4:
            raise RecipeError(
                f"the context of cpc reads a grid of patches, and this network gives {tuple(z.shape[1:])}: cpc of a "
                "recipe for sound needs the network's own context (network.context)"
            )
        c: Tensor = self.output(self.layers(z))
        return c


class GatedRows(nn.Module):
    """tanh(a) * sigmoid(b), where a and b are 3x3 convolutions that do not see the row below.

    A 3x3 kernel whose last row is masked is a 2x3 kernel: the same numbers from two thirds of the weights.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = Convolution2d(inputs, 2 * outputs, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.convolution(F.pad(x, (1, 1, 1, 0))).chunk(2, 1)
        gated: Tensor = value.tanh() * gate.sigmoid()
        return gated
