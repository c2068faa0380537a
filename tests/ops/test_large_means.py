"""A mean that is large beside the deviations costs no digits: of the statistics, and of what is made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_within_contract
from op_cases import BACKENDS, DEVICE, EPS, OPS, pixels
from torch import Tensor

from resnet_fused import functional, use_backend

MOMENTUM = 1.0  # so that the running statistics are those of the batch
# The deviations of what is stored, in units in the last place of the largest mean, are thousands to a few.
RATIOS = {torch.float32: (10.0, 1e3, 1e4, 1e5), torch.float16: (10.0, 100.0), torch.bfloat16: (10.0,)}
backends = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize(
    ("dtype", "ratio"), [(dtype, ratio) for dtype, ratios in RATIOS.items() for ratio in ratios], ids=str
)


def _far_from_zero(dtype: torch.dtype, ratio: float, images: int) -> Tensor:
    """Every channel with a mean and a deviation of its own, the means of both signs."""
    deviation = torch.tensor([1.0, 0.25, 3.0, 1.0, 0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    mean = deviation * ratio * torch.tensor([1.0, -1.0, 0.7, -0.3, 1.3, -1.7, 0.2, -1.0], dtype=torch.float64)
    x = torch.randn(images, 8, 9, 8, dtype=torch.float64) * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return x.to(dtype).to(DEVICE, memory_format=torch.channels_last)


def _running(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(8, dtype=dtype, device=DEVICE), torch.ones(8, dtype=dtype, device=DEVICE)


def _check(backend: str, x: Tensor, normalise, plain) -> None:
    """y, and by channel the running statistics, within the contract; `normalise` and `plain` update the latter."""
    weight, bias = torch.rand(8, device=DEVICE) + 0.5, torch.randn(8, device=DEVICE)
    outcomes = []
    for function, dtype, vectors in ((normalise, x.dtype, torch.float32), (plain, x.dtype, torch.float32)):
        running = _running(vectors)
        with use_backend(backend if function is normalise else "auto"):
            outcomes.append((function(x.to(dtype), *running, weight, bias), *running))
    running = _running(torch.float64)
    truth = (plain(x.double(), *running, weight.double(), bias.double()), *running)
    for name, actual, expected, right in zip(("y", "running_mean", "running_var"), *outcomes, truth, strict=True):
        by_channel = actual.dim() == 1
        for a, p, t in zip(actual, expected, right, strict=True) if by_channel else [(actual, expected, right)]:
            assert_within_contract(a, p, t, name)


def _plain(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)


@backends
@cases
@pytest.mark.parametrize("images", [2, 16], ids=["one row", "several rows"])
def test_batch_norm(backend, dtype, ratio, images):
    def ours(x, mean, var, weight, bias):
        return functional.batch_norm_act(x, mean, var, weight, bias, training=True, momentum=MOMENTUM, act=None)

    _check(backend, _far_from_zero(dtype, ratio, images), ours, _plain)


@backends
@cases
@pytest.mark.parametrize("images", [2, 16], ids=["one row", "several rows"])
def test_the_batch_norm_behind_a_convolution(backend, dtype, ratio, images):
    """Whose epilogue forms the statistics: of a convolution that copies its input, so that its rounding is none."""
    copies = torch.eye(8, device=DEVICE).view(8, 8, 1, 1)

    def ours(x, mean, var, weight, bias):
        options = {"training": True, "momentum": MOMENTUM, "act": None}
        return functional.conv_bn_act(x, copies.to(x.dtype), mean, var, weight, bias, **options)

    _check(backend, _far_from_zero(dtype, ratio, images), ours, _plain)


@backends
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_rows_merge_to_the_variance_of_all(backend, rows):
    """However the pixels are split; with a first pixel far outside, which is no measure of its channel."""
    x = _far_from_zero(torch.float32, 1e4, 4)
    x[0, :4, 0, 0] *= 1.01
    _, _, mean, invstd = OPS.bn_finalize(
        *OPS.bn_stats(x, rows, backend=backend), None, None, None, None, 0.1, 0.0, backend=backend
    )
    variance, right = torch.var_mean(pixels(x).double(), 0, correction=0)
    torch.testing.assert_close(invstd.double() ** -2, variance, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(mean.double(), right, rtol=1e-7, atol=1e-6)
