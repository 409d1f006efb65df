from __future__ import annotations

import torch
from torch.nn import functional as F

from layerwise.nets.pixelcnn import GatedRows, PixelCNN


def test_a_position_never_sees_a_row_below_it() -> None:
    torch.manual_seed(0)
    context = PixelCNN(layers=4).build(6).double()
    z = torch.randn(1, 6, 7, 7, dtype=torch.float64, requires_grad=True)
    for row in range(7):
        (gradient,) = torch.autograd.grad(context(z)[:, :, row].square().sum(), z)
        assert gradient[:, :, row + 1 :].abs().sum() == 0
        assert (gradient[:, :, : row + 1].abs().sum((0, 1, 3)) > 0)[max(row - 4, 0) :].all()


def test_a_gated_layer_is_a_masked_3x3_convolution() -> None:
    torch.manual_seed(0)
    layer = GatedRows(5, 3).double()
    x = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    kernel = torch.cat([layer.convolution.weight, torch.zeros(6, 5, 1, 3, dtype=torch.float64)], 2)
    value, gate = F.conv2d(x, kernel, layer.convolution.bias, padding=1).split(3, 1)
    torch.testing.assert_close(layer(x), torch.tanh(value) * torch.sigmoid(gate), rtol=0, atol=1e-12)


def test_channels_follow_the_encoder_unless_chosen() -> None:
    assert PixelCNN().build(16)(torch.zeros(2, 16, 7, 7)).shape == (2, 16, 7, 7)
    assert PixelCNN(channels=8, layers=2).build(16)(torch.zeros(2, 16, 7, 7)).shape == (2, 8, 7, 7)
