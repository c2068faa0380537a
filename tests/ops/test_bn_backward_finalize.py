"""Batch norm's backward as coefficients, from the Triton kernel, against float64."""

from __future__ import annotations

import pytest
import torch
from conv_cases import runs_kernels
from op_cases import DEVICE, reference

pytest.importorskip("triton")

from resnet_fused.kernels import bn_backward_finalize, refuse

pytestmark = runs_kernels


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
    assert refuse("bn_backward_finalize", *vectors) is None
    coefficients = bn_backward_finalize(*vectors)
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
    coefficients = bn_backward_finalize(*vectors)
    error = (_apply(dy.double(), x.double(), coefficients.double()) - truth).abs()
    c = coefficients[2].double().abs()[:, None]
    assert (error <= torch.finfo(torch.float32).eps * (c + 4 * truth.abs().amax(1, keepdim=True) + 1)).all()


def test_a_nan_stays_in_its_channel():
    vectors = _bn_vectors(8, 1.0)
    vectors[1][5] = float("nan")
    coefficients = bn_backward_finalize(*vectors)
    assert coefficients[1:, 5].isnan().all() and int(coefficients.isnan().sum()) == 2


@pytest.mark.parametrize(
    "place, change, message",
    [
        (1, torch.zeros(7), "(8,)"),
        (2, torch.zeros(8).double(), "float64"),
        (3, torch.zeros(16)[::2], "contiguous"),
        (0, torch.zeros(8, 1), "sum_dy"),
    ],
)
def test_refusals_of_coefficients(place, change, message):
    vectors = list(_bn_vectors(8))
    vectors[place] = change.to(DEVICE)
    assert message in refuse("bn_backward_finalize", *vectors)
