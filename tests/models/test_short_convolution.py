"""The short convolution on a CPU beside PyTorch's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from zoo.layers.short_convolution import ShortConvolution, _MovingSum


def convolved(x_BLD, weight_DW):
    return F.conv1d(x_BLD.mT, weight_DW[:, None], groups=len(weight_DW)).mT


@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_the_convolution(size):
    generator = torch.Generator().manual_seed(size)
    x, weight = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 9, 3), (3, size))
    )
    torch.testing.assert_close(_MovingSum.apply(x, weight), convolved(x, weight))
    assert torch.autograd.gradcheck(_MovingSum.apply, (x, weight))


def test_bfloat16_is_rounded_once():
    """The nearest to the exact sum, as under autocast, where the weight stays float32."""
    generator = torch.Generator().manual_seed(0)
    convolution = ShortConvolution(16, 4, 0.02)
    with torch.no_grad():
        convolution.weight.copy_(torch.randn(16, 1, 4, generator=generator))
    x = torch.randn(1, 64, 16, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = convolution._convolve(x, None)
    before = torch.cat([x.new_zeros(1, 3, 16), x], dim=1).double()
    exact = convolved(before, convolution.weight[:, 0].bfloat16().double())
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    y.sum().backward()
    assert convolution.weight.grad.dtype == torch.float32
