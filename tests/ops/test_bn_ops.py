"""Batch norm's ops on every backend, dtype and layout: float64 and plain PyTorch judge, at what breaks kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from op_cases import (
    BACKENDS,
    DEVICE,
    EPS,
    NHWC,
    OPS,
    activation,
    backends,
    check_train,
    dtypes,
    environment,
    half_backends,
    layouts,
    misaligned,
    pixels,
    plain,
    shapes,
    statistics,
    stem,
    train,
    vector,
    weights,
)
from tiers import larger

from resnet_fused import ops
from resnet_fused.ops import arithmetic
from resnet_fused.ops.operands import Operands


@backends
@dtypes
@layouts
@shapes
@pytest.mark.parametrize("rows", [1, 3])
def test_each_row_summarises_its_range_of_pixels(backend, dtype, layout, shape, rows):
    check_rows(backend, activation(shape, dtype, layout) * 3 + 5, rows)


@half_backends
@layouts
@pytest.mark.parametrize("shape", [(2, 8, 2, 4), (1, 3, 3, 5)])
@pytest.mark.parametrize("rows", [7, 16, 21])
def test_rows_that_do_not_divide_the_pixels_or_outnumber_them(backend, layout, shape, rows):
    check_rows(backend, activation(shape, torch.float16, layout), rows)


def _moments(values):
    return {"mean": values.mean(0), "m2": values.var(0, correction=0) * len(values)}


def check_rows(backend, x, rows):
    mean, m2, count = OPS.bn_stats(x, rows, backend=backend)
    assert mean.dtype == torch.float64
    mean, every = mean.float(), pixels(x)
    per_row = -(-len(every) // rows)
    for row in range(rows):
        values = every[row * per_row : (row + 1) * per_row]
        assert count[row] == len(values)
        if len(values) == 0:
            assert not mean[row].any() and not m2[row].any()
            continue
        assert_no_worse({"mean": mean[row], "m2": m2[row]}, _moments, (values.float(),), addends=len(values))


@backends
@layouts
@pytest.mark.parametrize("rows", [1, 5])
def test_statistics_of_constants_and_of_outliers(backend, layout, rows):
    """Constants; a first or last pixel far outside; the end of fp16: exact to a millionth of the deviation."""
    x = torch.randn(4, 8, 12, 12, dtype=torch.float64)
    x[:, 1] = 1234567.0
    x[:, 2] = 3.1415926
    x[0, 3, 0, 0] = 1e5
    x[-1, 4, -1, -1] = -1e5
    x[:, 5] = 65504 - 32 * torch.randint(0, 3, (4, 12, 12))
    x[:, 6] = 1e-20
    x = x.float().to(DEVICE, memory_format=layout)
    _, _, mean, invstd = statistics(backend, x, rows)
    values = pixels(x).double()
    deviation = values.std(0, correction=0)
    assert ((mean - values.mean(0)).abs() <= values.mean(0).abs() * 2**-23 + deviation * 1e-6).all()
    truth = (deviation.square() + EPS).rsqrt()
    assert ((invstd - truth).abs() / truth).max() < 1e-6
    # y is formed from scale and shift, as in plain PyTorch: exact to a rounding of the mean's product with the scale.
    x[:, 1] = 1.0
    check_train(backend, x, *weights(8), torch.randn_like(x), rows=rows, relu=False)


@backends
@layouts
@pytest.mark.parametrize("rows", [1, 5])
def test_means_a_million_deviations_from_zero(backend, layout, rows):
    x = torch.randn(4, 32, 12, 12, dtype=torch.float64) + 1e6 * (1 + torch.rand(32, 1, 1, dtype=torch.float64))
    x = x.float().to(DEVICE, memory_format=layout)
    _, m2, _ = OPS.bn_stats(x, rows, backend=backend)
    values = pixels(x).double()
    truth = torch.stack([(v - v.mean(0)).square().sum(0) for v in values.split(-(-len(values) // rows))])
    assert ((m2 - truth).abs() / truth).max() < 1e-5
    check_train(backend, x, torch.ones(32, device=DEVICE), vector(32), torch.randn_like(x), rows=rows, relu=False)


@backends
@dtypes
def test_parameters_and_running_statistics_of_any_dtype(backend, dtype):
    x = activation((4, 24, 5, 5), torch.float32, NHWC)
    vectors = [v.to(dtype) for v in (*weights(24), vector(24), vector(24).abs())]
    ours = [v.clone() for v in vectors]
    scale, shift, mean, invstd = statistics(backend, x, 4, ours[0], ours[1], ours[2:], momentum=0.3)
    actual, _ = OPS.bn_apply(x, scale, shift, None, None, None, False, False, backend=backend)

    def plain(x, weight, bias, mean, var):
        weight, bias, *running = (v.to(x.dtype) for v in (weight, bias, mean, var))
        y = F.batch_norm(x, *running, weight, bias, True, 0.3, EPS)
        running = running if x.dtype == torch.float64 else [v.to(dtype) for v in running]
        return dict(zip(("y", "running_mean", "running_var"), (y, *running), strict=True))

    results = {"y": actual, "running_mean": ours[2], "running_var": ours[3]}
    assert_no_worse(results, plain, (x, *vectors))


# Forward and backward


@backends
@dtypes
@layouts
@shapes
@pytest.mark.parametrize(
    "kind", ["plain", "relu", "relu recomputed", "residual", "affine residual", "residual no relu"]
)
def test_training_matches_plain_pytorch(backend, dtype, layout, shape, kind):
    channels = shape[1]
    x, dy = activation(shape, dtype, layout), activation(shape, dtype, layout)
    # Integers: plain PyTorch rounds twice, and may then flip the mask where the sum is a rounding away from zero.
    residual = torch.randint(-2, 3, shape).to(dtype).to(DEVICE, memory_format=layout) if "residual" in kind else None
    shortcut = (
        (torch.full((channels,), 2.0, device=DEVICE), torch.ones(channels, device=DEVICE)) if "affine" in kind else None
    )
    relu = kind not in ("plain", "residual no relu")
    how = {"mask_from": "x"} if kind == "relu recomputed" else {}
    check_train(backend, x, *weights(channels), dy, residual, shortcut, relu, **how)


@backends
@dtypes
@layouts
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (3, 35, 5, 7)])
@pytest.mark.parametrize("relu", [True, False])
def test_constant_statistics(backend, dtype, layout, shape, relu):
    """Without the sums dx is scale * dz; x, even an infinite one, matters to the mask only."""
    x, dy = activation(shape, dtype, layout), activation(shape, dtype, layout)
    scale, shift = weights(shape[1])
    x[0, 1, 0, 0] = float("inf")
    x[0, 1, 1, 1] = float("nan")
    unused = torch.full_like(scale, float("nan"))
    args = dy, x, None, scale, shift, unused, unused, None, None, float("nan"), relu, True
    dx, dresidual = OPS.bn_backward_apply(*args, backend=backend)
    y, _ = OPS.bn_apply(x, scale, shift, None, None, None, relu, False, backend=backend)
    dz = torch.where(y <= 0, torch.zeros_like(dy), dy) if relu else dy
    assert torch.equal(dresidual, dz)

    def plain(dz, scale):
        return (dz * scale.view(-1, 1, 1)).to(dz.dtype)

    assert_no_worse(dx, plain, (dz, scale), "dx")


@backends
@dtypes
@layouts
@shapes
def test_mask_has_one_bit_per_element_in_memory_order(backend, dtype, layout, shape):
    x, residual = activation(shape, dtype, layout), activation(shape, dtype, layout)
    x[0, 0, 0, 0] = float("nan")
    scale, shift = weights(shape[1])
    y, mask = OPS.bn_apply(x, scale, shift, residual, None, None, True, True, backend=backend)
    assert mask.dtype == torch.uint8 and mask.shape == ((x.numel() + 7) // 8,)
    assert torch.equal(mask, arithmetic.pack_bits(~(arithmetic.in_memory_order(y) <= 0)))
    assert y[0, 0, 0, 0].isnan()


@backends
@dtypes
@layouts
def test_mask_is_that_of_the_rounded_output(backend, dtype, layout):
    """Values about the smallest that does not round to zero; the mask recomputed from x agrees with the stored one."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-140
    around = torch.tensor([0.25, 0.49, 0.5, 0.51, 0.75, 1.0, 1.49, -0.5], dtype=torch.float64) * tiny
    x = torch.ones(1, 8, 2, 4, dtype=dtype, device=DEVICE).to(memory_format=layout)
    scale, shift = around.float().to(DEVICE), torch.zeros(8, device=DEVICE)
    y, mask = OPS.bn_apply(x, scale, shift, None, None, None, True, True, backend=backend)
    expected = (x.float() * scale.view(-1, 1, 1)).to(dtype)
    assert torch.equal(y, expected.relu())
    dy = activation(x.shape, dtype, layout)
    for stored in (mask, None):
        dx, dz = OPS.bn_backward_apply(
            dy, x, stored, scale, shift, shift, scale, None, None, 1.0, True, True, backend=backend
        )
        assert torch.equal(dz, torch.where(expected <= 0, torch.zeros_like(dy), dy))


# Values that break kernels


@backends
@dtypes
@layouts
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 9, 2, 3)])
def test_one_nan_or_infinity(backend, dtype, layout, value, where):
    x, dy = activation((2, 16, 4, 4), dtype, layout), activation((2, 16, 4, 4), dtype, layout)
    x[where] = value
    check_train(backend, x, *weights(16), dy, relu=False)
    actual = train(backend, x, *weights(16), dy)
    spoilt = torch.zeros(16, dtype=torch.bool, device=DEVICE)
    spoilt[where[1]] = True
    for name in ("y", "dx"):
        assert actual[name].isnan().all((0, 2, 3)).equal(spoilt), name
        assert actual[name][:, ~spoilt].isfinite().all(), name


@backends
@dtypes
@layouts
@pytest.mark.parametrize("mask_from", ["bits", "x"])
def test_a_nan_gradient_where_the_mask_is_zero_is_dropped(backend, dtype, layout, mask_from):
    x = activation((2, 16, 4, 4), dtype, layout)
    weight, bias = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    y = plain(x, weight, bias, x)["y"]
    dy = torch.where(y <= 0, torch.full_like(x, float("nan")), torch.ones_like(x))
    actual = check_train(backend, x, weight, bias, dy, mask_from=mask_from)
    assert all(t.isfinite().all() for t in actual.values())


@half_backends
@layouts
def test_large_fp16(backend, layout):
    x = (65504 - 32 * torch.randint(0, 60, (2, 16, 6, 6))).half().to(DEVICE, memory_format=layout)
    check_train(backend, x, *weights(16), activation(x.shape, torch.float16, layout))


@backends
@dtypes
@layouts
def test_an_empty_batch(backend, dtype, layout):
    x = activation((0, 8, 4, 4), dtype, layout)
    scale, shift = weights(8)
    assert not any(t.any() for t in OPS.bn_stats(x, 3, backend=backend))
    y, mask = OPS.bn_apply(x, scale, shift, x, None, None, True, True, backend=backend)
    assert y.shape == x.shape and mask.shape == (0,)
    sums = OPS.bn_backward_reduce(x, x, mask, scale, shift, shift, shift, True, 3, backend=backend)
    assert all(s.shape == (8,) and not s.any() for s in sums)
    dx, _ = OPS.bn_backward_apply(x, x, mask, scale, shift, shift, shift, *sums, 1.0, True, True, backend=backend)
    assert dx.shape == x.shape
    assert (
        OPS.add_act(x, x, True, backend=backend).shape == OPS.add_act_backward(x, x, backend=backend).shape == x.shape
    )


# Memory


@backends
@dtypes
@layouts
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (3, 35, 5, 7)])
def test_misaligned_views(backend, dtype, layout, shape):
    scale, shift = (misaligned(v) for v in weights(shape[1]))
    x, dy, residual = (misaligned(activation(shape, dtype, layout)) for _ in range(3))
    check_train(backend, x, scale, shift, dy, residual.round())
    y, mask = OPS.bn_apply(x, scale, shift, residual, None, None, True, True, backend=backend)
    again, same_mask = OPS.bn_apply(x.clone(), scale, shift, residual.clone(), None, None, True, True, backend=backend)
    assert torch.equal(y, again) and torch.equal(mask, same_mask)
    assert torch.equal(OPS.add_act(x, residual, True, backend=backend), F.relu(x + residual))
    pooled, index = OPS.bn_act_max_pool(x, scale, shift, backend=backend)
    aligned, same_index = OPS.bn_act_max_pool(x.clone(), scale, shift, backend=backend)
    assert torch.equal(pooled, aligned) and torch.equal(index, same_index)


@backends
@pytest.mark.parametrize("shape", [(4, 1, 6, 5), (7, 16, 1, 1), (1, 1, 1, 9)])
def test_tensors_that_are_dense_both_ways(backend, shape):
    """Their strides may be written either way; they are one memory order."""
    x, dy = activation(shape), activation(shape)
    other = torch.empty(shape, device=DEVICE).to(memory_format=NHWC)
    other = torch.empty_strided(shape, other.stride(), device=DEVICE).copy_(dy)
    y, _ = OPS.bn_apply(x, *weights(shape[1]), other, None, None, True, True, backend=backend)
    assert y.isfinite().all()
    assert torch.equal(OPS.add_act(x, other, True, backend=backend), F.relu(x + dy))


@backends
@pytest.mark.parametrize("shape", [(66000, 3, 1, 1), (1, 66000, 1, 1), larger((1, 65544, 1, 2))])
@layouts
def test_more_than_65535_of_n_and_c(backend, layout, shape):
    if backend == "triton" and DEVICE == "cpu":
        shape = tuple(min(s, 300) for s in shape)  # the interpreter takes a second for every few hundred programs
    x = activation(shape, torch.float32, layout)
    if x.numel() > x.shape[1]:
        check_train(backend, x, *weights(shape[1]), activation(shape, torch.float32, layout), rows=2)
    pooled, index = OPS.bn_act_max_pool(x, *weights(shape[1]), backend=backend)
    assert pooled.isfinite().all() and index.le(8).all()


@backends
@dtypes
@layouts
def test_bitwise_reproducible(backend, dtype, layout):
    shape, seeds = (3, 40, 9, 8), ("1", "2", "5")  # the order of the threads, where they run on the CPU
    if backend == "triton" and DEVICE == "cpu":
        shape, seeds = (2, 20, 4, 3), seeds[:2]  # the interpreter is slow and has no threads
    x, dy = activation(shape, dtype, layout), activation(shape, dtype, layout)
    runs = []
    for seed in seeds:
        with environment(RESNET_FUSED_HOST_SEED=seed):
            runs.append(
                train(backend, x, *(torch.ones(shape[1], device=DEVICE),) * 2, dy, rows=7)
                | stem(backend, x, dtype, rows=7)
            )
    for name in runs[0]:
        assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("backend", BACKENDS[:2])
@dtypes
@layouts
@pytest.mark.parametrize("size", [(2, 16, 5, 6), larger((3, 7, 3, 5)), larger((2, 1, 4, 4))])
def test_the_gradients_of_two_batch_norms_in_one_pass_are_those_of_a_pass_for_each(size, layout, dtype, backend):
    a = ops.OPS["bn_backward_apply_join"].case(Operands(torch.device(DEVICE), dtype, nhwc=layout is NHWC), size)
    branch = (a.dy, a.x, a.mask, a.scale, a.scale, a.mean, a.invstd, a.sum_dz, a.sum_dz_xhat)
    vectors = (a.shortcut_scale, a.shortcut_scale, a.shortcut_mean, a.shortcut_invstd)
    projection = (a.dy, a.shortcut, a.mask, *vectors, a.sum_dz, a.sum_dz_shortcut)
    together = OPS.bn_backward_apply_join(*a, backend=backend)
    for got, args in zip(together, (branch, projection), strict=True):
        assert torch.equal(got, OPS.bn_backward_apply(*args, a.count, True, False, backend=backend)[0])
