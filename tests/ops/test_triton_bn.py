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
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_channel_and_row(value, layout):
    x = _like((2, 9, 3, 3), layout)
    x[1, 4, 2, 1] = value
    mean, m2, _ = kernels.checked("bn_stats")(x, 2)
    others = torch.arange(9) != 4
    assert mean[:, others].isfinite().all() and m2[:, others].isfinite().all()
    assert mean[0].isfinite().all() and m2[0].isfinite().all()
    assert m2[1, 4].isnan() and (mean[1, 4].isnan() if value != value else mean[1, 4].isposinf())


def test_finalize_passes_over_empty_rows_and_takes_strided_low_precision_parameters():
    x = _like((2, 4, 3, 3), "NHWC")
    m, m2, count = (torch.cat([torch.zeros_like(t[:1]), t]) for t in kernels.checked("bn_stats")(x, 2))
    weight, bias, mean, var = (torch.randn(4, 2, device=DEVICE).abs().bfloat16()[:, 0] for _ in range(4))
    expected_mean, expected_var = mean.clone(), var.clone()
    ours = kernels.checked("bn_finalize")(m, m2, count, weight, bias, mean, var, 0.3, 1e-5)
    theirs = reference.bn_finalize(m, m2, count, weight, bias, expected_mean, expected_var, 0.3, 1e-5)
    for a, b in zip((*ours, mean, var), (*theirs, expected_mean, expected_var), strict=True):
        assert torch.allclose(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5)


def test_partials_of_any_strides_and_no_rows_at_all():
    partials = torch.randn(700, 3, 37, device=DEVICE)
    turned = partials.transpose(0, 2)
    assert torch.allclose(
        kernels.checked("reduce_rows")(partials), partials.double().sum(0).float(), rtol=1e-5, atol=1e-4
    )
    assert torch.allclose(kernels.checked("reduce_rows")(turned), turned.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(kernels.checked("reduce_rows")(partials[:0]), torch.zeros(3, 37, device=DEVICE))


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


# Batch norm's backward as coefficients


def _bn_vectors(channels, offset=0.0):
    """sum_dy, sum_dy_xhat, scale, mean, invstd, count of a batch norm whose mean is `offset` standard deviations."""
    std = torch.rand(channels) + 0.5
    vectors = (torch.randn(channels) * 10, torch.randn(channels) * 10, torch.randn(channels), std * offset, 1 / std)
    return (*(v.to(DEVICE) for v in vectors), 77.0)


def _apply(dy, x, coefficients):
    a, b, c = (v.view(-1, 1) for v in coefficients)
    return torch.addcmul(torch.addcmul(c.expand_as(x), x, b), dy, a)


@pytest.mark.parametrize("channels", [1, 64, 130])
def test_coefficients(channels):
    vectors = _bn_vectors(channels, 1.0)
    coefficients = kernels.checked("bn_backward_finalize")(*vectors)
    assert coefficients.shape == (3, channels) and coefficients.is_contiguous()
    truth = reference.bn_backward_finalize(*[v.double() for v in vectors[:5]], vectors[5])
    torch.testing.assert_close(coefficients.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4, 1e6])
def test_coefficients_apply_as_the_backward_does_where_the_mean_is_large(offset):
    """b*x + c cancels: the error must stay in the order of one rounding of c."""
    vectors = _bn_vectors(40, offset)
    sum_dy, sum_dy_xhat, scale, mean, invstd, count = *(v.double() for v in vectors[:5]), vectors[5]
    dy, x = torch.randn(40, 50, device=DEVICE), torch.randn(40, 50, device=DEVICE) / vectors[4][:, None]
    x += vectors[3][:, None]
    xhat = (x.double() - mean[:, None]) * invstd[:, None]
    truth = scale[:, None] * (dy - sum_dy[:, None] / count - xhat * sum_dy_xhat[:, None] / count)
    coefficients = kernels.checked("bn_backward_finalize")(*vectors)
    error = (_apply(dy.double(), x.double(), coefficients.double()) - truth).abs()
    c = coefficients[2].double().abs()[:, None]
    assert (error <= torch.finfo(torch.float32).eps * (c + 4 * truth.abs().amax(1, keepdim=True) + 1)).all()


def test_a_nan_stays_in_its_channel():
    vectors = _bn_vectors(8, 1.0)
    vectors[1][5] = float("nan")
    coefficients = kernels.checked("bn_backward_finalize")(*vectors)
    assert coefficients[1:, 5].isnan().all() and int(coefficients.isnan().sum()) == 2
