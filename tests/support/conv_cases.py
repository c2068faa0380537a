"""What the tests of the Triton convolutions share: problems, tensors, and the sums' contract."""

from __future__ import annotations

import pytest
import torch
from contract import assert_no_worse
from op_cases import pixels
from torch import Tensor

from resnet_fused import ops
from resnet_fused.contract import in_double
from resnet_fused.dispatch.conv import ConvShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

runs_kernels = pytest.mark.skipif(not ops.available("triton", DEVICE), reason=f"{ops.unavailable('triton', DEVICE)}")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def problem(n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> ConvShape:
    return ConvShape(n, c, h, w, k, r, s, stride, padding, dilation, groups)


SHAPES = {
    "1x1": problem(2, 32, 5, 7, 48, 1, 1),
    "1x1 stride 2, odd image": problem(2, 32, 7, 9, 40, 1, 1, stride=(2, 2)),
    "1x1 padded": problem(1, 16, 4, 5, 24, 1, 1, padding=(1, 1)),
    "3x3": problem(2, 32, 4, 5, 24, 3, 3, padding=(1, 1)),
    "3x3 stride 2, odd image": problem(2, 32, 9, 7, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 stride 2, even image": problem(1, 32, 8, 6, 24, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 dilation 2": problem(1, 16, 7, 6, 20, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "7x7 stem": problem(1, 3, 13, 11, 24, 7, 7, stride=(2, 2), padding=(3, 3)),
    "one input channel": problem(2, 1, 6, 5, 17, 3, 3, padding=(1, 1)),
    "channels divide no tile": problem(1, 35, 5, 5, 65, 3, 3, padding=(1, 1)),
    "more channels than one tile, ragged": problem(1, 100, 4, 4, 10, 1, 1),
    "7x7 image": problem(1, 24, 7, 7, 40, 3, 3, padding=(1, 1)),
    "1x1 image": problem(3, 64, 1, 1, 96, 1, 1),
    "1x1 image under 3x3": problem(1, 16, 1, 1, 16, 3, 3, padding=(1, 1)),
    "1x1 image under 3x3, stride 2": problem(2, 16, 1, 1, 16, 3, 3, stride=(2, 2), padding=(1, 1)),
    "image smaller than the filter": problem(1, 20, 2, 3, 16, 5, 5, padding=(2, 2)),
    "more pixels than one tile": problem(1, 8, 12, 12, 16, 3, 3, padding=(1, 1)),
    "stride larger than the filter": problem(1, 16, 8, 7, 20, 2, 1, stride=(3, 2)),
    "rows that no tap reaches": problem(1, 16, 10, 9, 20, 3, 3, stride=(3, 4)),
    "nothing square": problem(1, 18, 8, 5, 12, 1, 3, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "4 groups of 8": problem(1, 32, 4, 4, 32, 3, 3, padding=(1, 1), groups=4),
    "2 groups of 20": problem(1, 40, 5, 5, 12, 3, 3, stride=(2, 2), padding=(1, 1), groups=2),
    "depthwise": problem(1, 6, 5, 5, 12, 3, 3, padding=(1, 1), groups=6),
    "empty batch": problem(0, 16, 5, 5, 16, 3, 3, padding=(1, 1)),
}
every_shape = pytest.mark.parametrize("name", SHAPES)
# For a test of which another covers every shape: a pointwise and a spatial filter, edges, strides, groups, nothing.
FEW = (
    *("1x1 stride 2, odd image", "3x3 stride 2, odd image", "3x3 dilation 2", "channels divide no tile"),
    *("1x1 image under 3x3, stride 2", "rows that no tap reaches", "2 groups of 20", "empty batch"),
)
a_few_shapes = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.larger] * (name not in FEW)) for name in SHAPES]
)


def activation(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, channels, height, width).to(DEVICE, dtype).contiguous(memory_format=NHWC)


def image(shape: ConvShape, dtype: torch.dtype) -> Tensor:
    return activation(shape.n, shape.c, shape.h, shape.w, dtype)


def output(shape: ConvShape, dtype: torch.dtype) -> Tensor:
    return activation(shape.n, shape.k, shape.p, shape.q, dtype)


def batch_norm_behind(shape: ConvShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dy_x and dy_coefficients: the prologue of a gradient whose convolution a batch norm follows."""
    return output(shape, dtype), torch.randn(3, shape.k, device=DEVICE)


def filters(shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """A weight under which the magnitudes stay."""
    fan_in = max(1, shape.c // shape.groups * shape.r * shape.s)
    weight = torch.randn(shape.k, shape.c // shape.groups, shape.r, shape.s) / fan_in**0.5
    return weight.to(DEVICE, dtype).contiguous(memory_format=NHWC)


def affine(channels: int) -> tuple[Tensor, Tensor]:
    """Scale, some of it negative, and shift."""
    scale, shift = torch.rand(channels) + 0.5, torch.randn(channels)
    scale[::3] *= -1
    return scale.to(DEVICE), shift.to(DEVICE)


def geometry(shape: ConvShape) -> tuple[list[int], list[int], list[int], int]:
    return list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups


def assert_sums(found, dz, factors):
    """The sums over all pixels: of dz, and of dz * (z - mean) * invstd for each of `factors`, by channel."""

    def addends(dz, factors):
        dz = pixels(dz).to(torch.promote_types(dz.dtype, torch.float32))
        products = (dz * ((pixels(z).to(dz.dtype) - mean) * invstd) for z, mean, invstd in factors.values())
        return dict(zip(found, (dz, *products), strict=True))

    def sums(dz, factors):
        return {name: v.sum(0) for name, v in addends(dz, factors).items()}

    terms = {name: v.abs().sum(0) for name, v in addends(*in_double((dz, factors))).items()}
    assert_no_worse(found, sums, (dz, factors), terms=terms)


def placed(value):
    """A tensor on DEVICE with the strides it has, which `Tensor.to` gives up where they leave gaps."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)
