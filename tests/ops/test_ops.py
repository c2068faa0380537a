"""The small ops, and what all of them refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from op_cases import (
    BACKENDS,
    DEVICE,
    NHWC,
    OPS,
    activation,
    backends,
    backends_of,
    dtypes,
    layouts,
    same_memory_order,
    shapes,
    vector,
)

from resnet_fused import ops


@backends
@dtypes
@layouts
@shapes
@pytest.mark.parametrize("relu", [True, False])
def test_add_act(backend, dtype, layout, shape, relu):
    x, other, dy = (activation(shape, dtype, layout) for _ in range(3))
    x[0, 0, 0, 0] = float("nan")
    y = OPS.add_act(x, other, relu, backend=backend)
    expected = F.relu(x + other) if relu else x + other
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)) and same_memory_order(y, x)
    dy[y <= 0] = float("nan")
    dz = OPS.add_act_backward(dy, y, backend=backend)
    assert torch.equal(dz, torch.where(y <= 0, torch.zeros_like(dy), dy)) and same_memory_order(dz, x)


@backends_of("reduce_rows")
@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 5), (7, 3, 2), (40, 64), (3, 16, 9), (300, 1), (5, 2, 600), (2049, 3), (0, 4), (4, 0)]
)
def test_reduce_rows(backend, dtype, shape):
    partials = torch.randn(shape).to(DEVICE, dtype)
    total = OPS.reduce_rows(partials, backend=backend)
    assert_no_worse(total, lambda v: v.sum(0), (partials,), addends=max(1, len(partials)))


@backends_of("pack_weight")
@dtypes
@pytest.mark.parametrize(
    "shape", [(8, 16, 1, 1), (5, 3, 7, 7), (40, 33, 3, 3), (1, 1, 1, 1), (64, 2, 1, 3), (3, 0, 3, 3)]
)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("memory", ["KCRS", "KRSC", "CKRS", "expanded"])
def test_pack_weight(backend, dtype, shape, flip, memory):
    weight = torch.randn(shape).to(DEVICE, dtype)
    if memory == "KRSC":
        weight = weight.to(memory_format=NHWC)
    elif memory == "CKRS":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    elif memory == "expanded":
        weight = weight[:1].expand(shape)
    packed = OPS.pack_weight(weight, flip, backend=backend)
    expected = weight.flip(2, 3).permute(1, 2, 3, 0) if flip else weight.permute(0, 2, 3, 1)
    assert torch.equal(packed, expected) and packed.is_contiguous()


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values == ("cuda",)])
def test_refusals_name_the_value_and_the_choices(backend):
    x, v = activation((2, 8, 4, 5)), vector(8)

    def apply(x, scale=v, residual=None):
        return OPS.bn_apply(x, scale, v, residual, None, None, True, False, backend=backend)

    cases = [
        (lambda: apply(x[0]), r"x must be 4-D \[N, C, H, W\], got Float \[8, 4, 5\]"),
        (lambda: apply(x.double()), "x must be Float, Half or BFloat16, got Double"),
        (lambda: apply(x[..., ::2]), "x must be dense in NCHW or NHWC order"),
        (
            lambda: apply(x, residual=x.to(memory_format=NHWC)),
            "residual must be dense in NCHW or NHWC order, and alike",
        ),
        (lambda: apply(x, residual=x.half()), "residual must have the shape and dtype of x"),
        (
            lambda: apply(x, v[:7]),
            "scale must be a contiguous Float vector with one value for each of the 8 channels, got Float",
        ),
        (lambda: OPS.bn_stats(x, 0, backend=backend), "rows must be from 1 to 16777215, got 0"),
        (lambda: OPS.reduce_rows(x[:, ::2], backend=backend), "partials must be contiguous"),
        (lambda: OPS.pack_weight(x[0], False, backend=backend), "weight must be 4-D"),
        (
            lambda: OPS.bn_backward_reduce(x, x, v.byte(), v, v, v, v, True, 1, backend=backend),
            r"mask must be contiguous Byte \[40\]",
        ),
        (
            lambda: OPS.bn_act_max_pool_backward_reduce(x, x.byte(), x, v, v, v, v, 1, backend=backend),
            r"dy must have the shape \[2, 8, 2, 3\]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_rows_partition_is_the_same_on_all_backends():
    """Rows of one backend may be merged by another: a range of pixels is a range of pixels."""
    x = activation((3, 16, 5, 7), torch.float32, NHWC)
    ready = [p.values[0] for p in BACKENDS if ops.available(p.values[0], DEVICE)]
    for one, other in itertools.permutations(ready, 2):
        for a, b in zip(OPS.bn_stats(x, 4, backend=one), OPS.bn_stats(x, 4, backend=other), strict=True):
            torch.testing.assert_close(a.float(), b.float())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.empty(2, 3, 4, 5), "shapes differ: [2, 3, 4, 4] and [2, 3, 4, 5]"),
        (torch.empty(2, 3, 4, 4).half(), "dtypes differ: torch.float32 and torch.float16"),
        (torch.empty(2, 3, 4, 4, device="meta"), "devices differ: cpu and meta"),
        (None, None),
        (torch.empty(2, 3, 4, 4), None),
    ],
)
def test_activations_that_do_not_agree_are_refused_with_both_values(other, message):
    x = torch.empty(2, 3, 4, 4)
    assert ops.refusal("reference", "bn_apply", x, None, other) == message
    assert ops.refusal("aten", "bn_apply", x, other) is None  # PyTorch's to raise
