"""What the matrix of all backends in test_bn_ops.py does not see of the Triton batch-norm family: its tilings, its
refusals, its corners.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conv_cases import runs_kernels

pytest.importorskip("triton")

from op_cases import reference

from resnet_fused import kernels
from resnet_fused.kernels._launch import index_type
from resnet_fused.kernels._tile import octets_of, reduction_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

pytestmark = runs_kernels
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def _like(shape, layout, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=LAYOUTS[layout])


@every_layout
@pytest.mark.parametrize("rows", [1, 4, 29])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_statistics_are_exact_whatever_the_mean(mean, rows, layout):
    x = _like((2, 5, 4, 3), layout) + mean  # 24 pixels: of 29 rows, 5 are empty
    partial = kernels.bn_stats(x, rows)
    _, _, save_mean, save_invstd = kernels.bn_finalize(*partial, None, None, None, None, 0.1, 0.0)
    exact = x.double().transpose(0, 1).flatten(1)
    invstd = exact.var(1, unbiased=False).rsqrt()
    ulp = 2.0**-23 * max(mean, 1.0)
    assert partial[2].sum() == 24
    assert (save_mean - exact.mean(1)).abs().max() <= ulp
    assert ((save_invstd / invstd - 1).abs() <= 1e-6).all()


@every_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_channel_and_row(value, layout):
    x = _like((2, 9, 3, 3), layout)
    x[1, 4, 2, 1] = value
    mean, m2, _ = kernels.bn_stats(x, 2)
    others = torch.arange(9) != 4
    assert mean[:, others].isfinite().all() and m2[:, others].isfinite().all()
    assert mean[0].isfinite().all() and m2[0].isfinite().all()
    assert m2[1, 4].isnan() and (mean[1, 4].isnan() if value != value else mean[1, 4].isposinf())


def test_finalize_passes_over_empty_rows_and_takes_strided_low_precision_parameters():
    x = _like((2, 4, 3, 3), "NHWC")
    m, m2, count = (torch.cat([torch.zeros_like(t[:1]), t]) for t in kernels.bn_stats(x, 2))
    weight, bias, mean, var = (torch.randn(4, 2, device=DEVICE).abs().bfloat16()[:, 0] for _ in range(4))
    expected_mean, expected_var = mean.clone(), var.clone()
    ours = kernels.bn_finalize(m, m2, count, weight, bias, mean, var, 0.3, 1e-5)
    theirs = reference.bn_finalize(m, m2, count, weight, bias, expected_mean, expected_var, 0.3, 1e-5)
    for a, b in zip((*ours, mean, var), (*theirs, expected_mean, expected_var), strict=True):
        assert torch.allclose(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5)


def test_partials_of_any_strides_and_no_rows_at_all():
    partials = torch.randn(700, 3, 37, device=DEVICE)
    turned = partials.transpose(0, 2)
    assert torch.allclose(kernels.reduce_rows(partials), partials.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    assert torch.allclose(kernels.reduce_rows(turned), turned.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(kernels.reduce_rows(partials[:0]), torch.zeros(3, 37, device=DEVICE))


def test_offsets_are_64_bit_where_a_tensor_needs_it():
    assert str(index_type(2**31)) == "int64" and str(index_type(2**31 - 1)) == "int64"
    assert str(index_type(2**30, 5)) == "int32"


@every_layout
def test_tilings_reach_every_element(layout):
    """For sizes around the powers of two and beyond CUDA's 65,535; on meta tensors, so no memory is needed."""
    for n, c, size in itertools.product((1, 70_000), (1, 7, 8, 63, 64, 65, 70_000), (1, 5, 8)):
        x = torch.empty((n, c, size, size), device="meta", memory_format=LAYOUTS[layout])
        view = octets_of(x)
        assert view.rows * view.octets * 8 >= x.numel() > (view.rows - 1) * view.octets * 8
        assert view.grid < 2**31 and view.grid * view.block_rows * view.block_octets * 8 >= x.numel()
        for rows in (1, 33, 2 * n):
            reduction = reduction_of(x, rows)
            assert reduction.rows * reduction.span >= reduction.pixels
            assert reduction.grid * reduction.block_channels >= rows * c and reduction.grid < 2**31


def four(x):
    return (torch.ones(x.shape[1], device=DEVICE),) * 4


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("bn_stats", lambda x: (x.double(), 1), "float64"),
        ("bn_stats", lambda x: (x[0], 1), "3-D"),
        ("bn_stats", lambda x: (x[:, ::2], 1), "dense"),
        ("add_act", lambda x: (x, x.half(), True), "float16"),
        ("add_act_backward", lambda x: (x, x[:1]), "shape"),
        (
            "bn_apply",
            lambda x: (x, x, x, x.to(memory_format=torch.channels_last), None, None, True, True),
            "memory order",
        ),
        ("bn_apply", lambda x: (x, x, x, x, x, None, True, True), "residual_shift"),
        (
            "bn_apply",
            lambda x: (x, x[0, :, 0, 0], *(None,) * 4, True, True),
            "scale must be a contiguous float32 vector",
        ),
        ("bn_backward_reduce", lambda x: (x.half(), x, None, *four(x), True, 1), "dy"),
        ("bn_backward_reduce", lambda x: (x, x, x.byte(), *four(x), True, 1), "mask must be contiguous uint8 [9]"),
        ("bn_backward_reduce", lambda x: (x, x, None, *four(x), True, 0), "at least one row"),
        ("bn_backward_apply", lambda x: (x[:1], x, None, *four(x), None, None, 1.0, True, True), "dy"),
        ("bn_backward_apply", lambda x: (x, x, None, *four(x), x, None, 1.0, True, True), "sum_dy_xhat"),
        ("bn_act_max_pool_backward_apply", lambda x: (x, x, x, *four(x), None, None, 1.0), "pooled"),
        (
            "bn_finalize",
            lambda x: (x[0, 0], x[0, 0], x[0, 0, 0], *(None,) * 4, 0.1, 1e-5),
            "mean must be contiguous float64",
        ),
        (
            "bn_finalize",
            lambda x: (x[0, 0].double(), x[0, 0].t(), x[0, 0, 0], *(None,) * 4, 0.1, 1e-5),
            "m2 must be contig",
        ),
        (
            "bn_finalize",
            lambda x: (x[0, 0].double(), x[0, 0], x[0, 0, 0], None, None, x[0, 0, 0, :1].expand(3), None, 0.1, 1e-5),
            "running_mean is written",
        ),
        ("pack_weight", lambda x: (x.int(), False), "int32"),
        ("reduce_rows", lambda x: (x.sum(),), "scalar"),
    ],
)
def test_refusals_name_the_value(op, arguments, message):
    x = torch.zeros(2, 4, 3, 3, device=DEVICE)
    assert message in kernels.refuse(op, *arguments(x))


def test_what_can_run_is_not_refused_and_an_unknown_op_is_named():
    x = torch.zeros(2, 4, 3, 3, device=DEVICE)
    assert kernels.refuse("bn_stats", x, 1) is None
    assert "CUDA" in kernels.refuse("bn_stats", x.to("meta"), 1)
    with pytest.raises(ValueError, match=r"bn_forward.*bn_stats"):
        kernels.refuse("bn_forward", x)
