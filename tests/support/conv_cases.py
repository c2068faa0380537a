"""What the tests of the Triton convolutions share: problems, sample arguments of an op's record, and its judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import DEVICE, DTYPES, NHWC
from torch import Tensor

from resnet_fused import kernels, ops
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.ops import comparison
from resnet_fused.ops.operands import Operands

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SMALL = ConvConfig(32, 16, 16, 4, 2)  # many tiles of a small image

runs_kernels = pytest.mark.skipif(not ops.available("triton", DEVICE), reason=f"{ops.unavailable('triton', DEVICE)}")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


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
# For an op that is two others: a pointwise and a spatial filter, edges, strides, groups, nothing.
FEW = (
    *("1x1 stride 2, odd image", "3x3 stride 2, odd image", "3x3 dilation 2", "channels divide no tile"),
    *("1x1 image under 3x3, stride 2", "rows that no tap reaches", "2 groups of 20", "empty batch"),
)
a_few_shapes = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.larger] * (name not in FEW)) for name in SHAPES]
)


def sample(op: str, shape: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Sample arguments of an op's record, every third of its scales negative."""
    args = ops.OPS[op].case(Operands(torch.device(DEVICE), dtype), shape, **options)
    for name, value in args._asdict().items():
        if "scale" in name and isinstance(value, Tensor):
            value[::3] *= -1
    return args


def launch(op: str, args: Any, config: ConvConfig | None = None) -> Any:
    """What the Triton launcher of an op gives, which has no reason to refuse."""
    assert kernels.refuse(op, args) is None
    return kernels.run(op, args, config)


def check(op: str, args: Any, config: ConvConfig | None = None) -> Any:
    """The results of the Triton launcher, within the contract and in NHWC order."""
    record, actual = ops.OPS[op], launch(op, args, config)
    plain, truth = record.reference(args), record.reference(comparison.double(args))
    assert [reason for one in record.compare(args, actual, plain, truth) if (reason := one.breach())] == []
    for ours, right in zip(tensors(actual), tensors(plain), strict=True):
        assert ours.dtype == right.dtype and ours.shape == right.shape
        assert ours.dim() != 4 or ours.is_contiguous(memory_format=NHWC)
    return actual


def tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def placed(value):
    """A tensor on DEVICE with the strides it has, which `Tensor.to` gives up where they leave gaps."""
    if not isinstance(value, Tensor) or value.device.type == DEVICE:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)
