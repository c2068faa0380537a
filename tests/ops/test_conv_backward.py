"""Both gradients of a convolution in one op: those of the ops for one each, bit for bit."""

from __future__ import annotations

import pytest
import torch
from op_cases import aten, reference

pytest.importorskip("triton")

from conv_cases import (
    DEVICE,
    NHWC,
    SHAPES,
    a_few_shapes,
    affine,
    batch_norm_behind,
    every_dtype,
    exact_fp32,  # noqa: F401
    filters,
    geometry,
    image,
    output,
    placed,
    problem,
    runs_kernels,
)

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.dispatch.table import Choice
from resnet_fused.kernels import bn_apply, conv_backward, conv_dgrad, conv_wgrad, refuse
from resnet_fused.kernels.reduce_rows import reduce_alike, reduce_rows
from resnet_fused.measure.network import tiny_network
from resnet_fused.tuning import checks
from resnet_fused.tuning.problems import jobs

pytestmark = [runs_kernels, pytest.mark.usefixtures("exact_fp32")]
# Rows of a tile enough for several of them, and pixels for several ranges of the weight gradient.
LARGE = problem(1, 8, 36, 36, 8, 3, 3, padding=(1, 1))


def _arguments(shape, dtype, prologue=False, x_prologue=False):
    dy, weight, x = output(shape, dtype), filters(shape, dtype), image(shape, dtype)
    before = batch_norm_behind(shape, dtype) if prologue else (None, None)
    norm = (*affine(shape.c), torch.randn(shape.c, device=DEVICE), torch.rand(shape.c, device=DEVICE) + 0.5)
    return (dy, weight, *before, x, *norm, x_prologue, *geometry(shape))


def _apart(arguments, **options):
    """The same by an op for each gradient, and one for the activation."""
    dy, weight, dy_x, coefficients, x, scale, shift, mean, invstd, x_prologue, *rest = arguments
    norm = (x, scale, shift, mean, invstd)
    dx, *sums = conv_dgrad(dy, weight, dy_x, coefficients, None, None, *norm, [*x.shape[2:]], *rest, **options)
    vectors = (scale, shift)
    if not x_prologue:
        x, vectors = bn_apply(x, scale, shift, None, None, None, True, False)[0], (None, None)
    return dx, *sums, conv_wgrad(dy, x, dy_x, coefficients, *vectors, [*weight.shape[2:]], *rest)


def _check(arguments, **options):
    assert refuse("conv_backward", *arguments) is None
    together = conv_backward(*arguments, **options)
    for got, expected in zip(together, _apart(arguments, **options), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    return together


@a_few_shapes
def test_every_shape(name):
    _check(_arguments(SHAPES[name], torch.bfloat16))


@every_dtype
@pytest.mark.parametrize("x_prologue", [False, True], ids=["activation", "x prologue"])
@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "prologue"])
def test_every_prologue(prologue, x_prologue, dtype):
    _check(_arguments(SHAPES["3x3 stride 2, odd image"], dtype, prologue, x_prologue))


@pytest.mark.larger
def test_many_tiles_and_many_ranges_are_added_in_one_launch_and_one_order():
    arguments = _arguments(LARGE, torch.float16)
    config = ConvConfig(32, 16, 16, 4, 2)
    assert all(map(torch.equal, _check(arguments, config=config), conv_backward(*arguments, config=config)))


@pytest.mark.parametrize("rows", [1, 300, 1100])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_one_launch_are_those_of_many(count, rows):
    alike = [torch.randn(rows, 24, device=DEVICE) for _ in range(count)]
    other = torch.randn(5, 3, 40, device=DEVICE)
    expected = [reduce_rows(t) for t in alike]
    assert all(map(torch.equal, reduce_alike(*alike), expected))
    assert all(map(torch.equal, reduce_alike(*alike, other=other), [*expected, reduce_rows(other)]))


@pytest.mark.parametrize("package", [reference, aten], ids=["reference", "aten"])
def test_it_is_two_ops_of_other_backends_too(package):
    arguments = _arguments(SHAPES["3x3"], torch.float32, prologue=True)
    dy, weight, dy_x, coefficients, x, scale, shift, mean, invstd, _, *rest = arguments
    norm = (x, scale, shift, mean, invstd)
    expected = (
        *package.conv_dgrad(dy, weight, dy_x, coefficients, None, None, *norm, [*x.shape[2:]], *rest),
        package.conv_wgrad(dy, x, dy_x, coefficients, scale, shift, [*weight.shape[2:]], *rest),
    )
    assert all(map(torch.equal, package.conv_backward(*arguments), expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_activation_that_is_not_finite_reaches_the_weight_s_gradient(value):
    arguments = _arguments(SHAPES["1x1"], torch.float32)
    arguments[4][0, 4, 0, 0] = value
    dweight, expected = conv_backward(*arguments)[3], _apart(arguments)[3]
    assert torch.equal(dweight.isfinite(), expected.isfinite()) and not dweight.isfinite().all()


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 6, 3, 3).double(), "float64"),
        (4, torch.zeros(2, 8, 5, 5), "x must be"),
        (5, torch.zeros(7), "scale must be a contiguous vector of 8"),
        (2, torch.zeros(2, 6, 3, 3).contiguous(memory_format=NHWC), "only dy_x"),
    ],
)
def test_refusals_name_the_value(index, value, message):
    arguments = list(_arguments(problem(2, 8, 5, 5, 6, 3, 3), torch.float32))
    arguments[index] = placed(value)
    assert message in refuse("conv_backward", *arguments)


@pytest.mark.parametrize("index", range(4))
def test_verification_finds_what_is_wrong_with_it(index, monkeypatch):
    job = next(job for job in jobs(tiny_network(), ("train",), 2, torch.float32, 80, False) if job.epilogue)
    device, right = torch.device(DEVICE), checks.caller

    def wrong(op, choice):
        def call(*operands):
            results = list(right(op, choice)(*operands))
            results[index] = results[index] * (1 + 1e-3)
            return results

        return call if op == "conv_backward" else right(op, choice)

    choice = Choice("triton", ConvConfig(32, 16, 16, 4, 2))
    assert checks.check_all(job, choice, device) == {"conv_dgrad": None, "conv_backward": None}
    monkeypatch.setattr(checks, "caller", wrong)
    found = checks.check_all(job, choice, device)
    assert found["conv_dgrad"] is None and "errs by" in found["conv_backward"]
