"""The stem's ops, batch norm + ReLU + max pool, against float64 and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from op_cases import (
    DEVICE,
    OPS,
    activation,
    backends,
    dtypes,
    layouts,
    plain_stem,
    same_memory_order,
    stem,
    weights,
)

from resnet_fused.contract import in_double

STEM_SHAPES = [(2, 8, 6, 8), (2, 3, 7, 5), (1, 35, 9, 4), (3, 16, 1, 2), (2, 1, 5, 5), (1, 72, 3, 3), (2, 64, 2, 1)]


@backends
@dtypes
@layouts
@pytest.mark.parametrize("shape", STEM_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_stem_matches_plain_pytorch(backend, dtype, layout, shape):
    """Permutations of distinct values, so that the winners do not depend on rounding; ties have their own test."""
    n, c, h, w = shape
    x = torch.stack([torch.randperm(n * h * w).view(n, h, w) for _ in range(c)], 1)
    x = ((x - n * h * w / 2) / 4).to(dtype).to(DEVICE, memory_format=layout)
    weight, bias = weights(c)
    bias = bias + 0.01
    dy = activation((n, c, (h + 1) // 2, (w + 1) // 2), dtype)
    actual = stem(backend, x, dtype, 3, dy, weight, bias)
    magnitudes = plain_stem(*in_double((x, weight, bias, dy.abs())))
    for name, like in (("stem dx", x), ("pooled", magnitudes["pooled"]), ("index", magnitudes["pooled"])):
        assert same_memory_order(actual[name], like), name
    terms = {"stem dbias": magnitudes["stem dbias"], "stem dweight": 4 * magnitudes["stem dbias"]}
    actual = {name: actual[name] for name in magnitudes}
    assert_no_worse(actual, plain_stem, (x, weight, bias, dy), terms=terms)


@backends
@dtypes
@layouts
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (1, 5, 4, 9)])
def test_stem_index_is_that_of_pytorch(backend, dtype, layout, shape):
    """Few distinct values, many equal or negative, some NaN: the first of equals wins, the last NaN."""
    x = torch.randint(-2, 3, shape).to(dtype)
    x[torch.rand(shape) < 0.05] = float("nan")
    x = x.to(DEVICE, memory_format=layout)
    ones, zeros = torch.ones(shape[1], device=DEVICE), torch.zeros(shape[1], device=DEVICE)
    y, index = OPS.bn_act_max_pool(x, ones, zeros, backend=backend)
    expected, flat = F.max_pool2d(F.relu(x), 3, 2, 1, return_indices=True)
    assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))
    a = torch.arange(y.shape[2], device=DEVICE).view(-1, 1)
    b = torch.arange(y.shape[3], device=DEVICE)
    place = index.long()
    ours = (2 * a - 1 + place // 3) * shape[3] + 2 * b - 1 + place % 3
    assert torch.equal(ours, flat)


@backends
@layouts
def test_stem_gradient_of_constant_statistics_and_of_nan(backend, layout):
    x = activation((2, 16, 6, 6), torch.float32, layout)
    scale, shift = weights(16)
    y, index = OPS.bn_act_max_pool(x, scale, shift, backend=backend)
    dy = torch.where(y > 0, torch.ones_like(y), torch.full_like(y, float("nan")))
    unused = torch.full_like(scale, float("nan"))
    args = dy, index, x, scale, shift, unused, unused
    dx = OPS.bn_act_max_pool_backward_apply(*args, None, None, float("nan"), backend=backend)
    leaf = x.clone().requires_grad_()
    affine = leaf * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    (expected,) = torch.autograd.grad(F.max_pool2d(F.relu(affine), 3, 2, 1), leaf, dy)
    torch.testing.assert_close(dx, expected)
    assert dx.isfinite().all()
