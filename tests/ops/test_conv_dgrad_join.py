"""Both gradients across two blocks, with the sums of the block before, against plain PyTorch and float64."""

from __future__ import annotations

import pytest
import torch
from contract import assert_no_worse

pytest.importorskip("triton")

from conv_cases import (
    DEVICE,
    NHWC,
    SHAPES,
    a_few_shapes,
    assert_sums,
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
from op_cases import aten, reference

from resnet_fused.contract import in_double
from resnet_fused.dispatch.conv import ConvConfig, conv_dgrad_configurations
from resnet_fused.dispatch.table import Choice
from resnet_fused.kernels import conv_dgrad, conv_dgrad_join, conv_wgrad, refuse
from resnet_fused.measure.network import tiny_network
from resnet_fused.ops import arithmetic
from resnet_fused.tuning import checks
from resnet_fused.tuning.problems import jobs

pytestmark = [runs_kernels, pytest.mark.usefixtures("exact_fp32")]
SMALL = ConvConfig(32, 16, 16, 4, 2)  # many tiles of a small image
LARGE = problem(1, 8, 36, 36, 8, 3, 3, padding=(1, 1))  # more than one range of pixels
RESIDUALS = ("", "residual", "masked residual")


def _bits(like):
    return torch.randint(0, 256, ((like.numel() + 7) // 8,), dtype=torch.uint8, device=DEVICE)


def _norm(channels):
    return torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE) + 0.5


def _arguments(shape, dtype, prologue=False, residual="masked residual", projected=True, wgrad=True):
    dy, weight, x = output(shape, dtype), filters(shape, dtype), image(shape, dtype)
    before = batch_norm_behind(shape, dtype) if prologue else (None, None)
    addend = (image(shape, dtype) if residual else None, _bits(x) if "masked" in residual else None)
    shortcut = (image(shape, dtype), *_norm(shape.c)) if projected else (None,) * 3
    size = [shape.h, shape.w]
    norms = (x, _bits(x), *_norm(shape.c), *shortcut)
    activation = image(shape, dtype) if wgrad else None
    return (dy, weight, *before, *addend, *norms, activation, size, *geometry(shape))


def _plain(*arguments):
    return (reference if arguments[0].dtype == torch.float64 else aten).conv_dgrad_join(*arguments)[0]


def _check(arguments, **options):
    """dx and dweight as `conv_dgrad` and `conv_wgrad` give them, bit for bit; the sums within the contract against
    those of dx behind the mask.
    """
    assert refuse("conv_dgrad_join", *arguments) is None
    dx, *sums, dweight = conv_dgrad_join(*arguments, **options)
    assert torch.equal(dx, conv_dgrad(*arguments[:6], *(None,) * 5, *arguments[14:], **options)[0])
    dy, weight, dy_x, coefficients, activation = *arguments[:4], arguments[13]
    if activation is None:
        assert dweight.numel() == 0 and dweight.dtype == torch.float32
    else:
        before = (dy_x, coefficients, None, None)
        alone = conv_wgrad(dy, activation, *before, [*weight.shape[2:]], *arguments[15:])
        assert torch.equal(dweight, alone) and dweight.stride() == alone.stride()
    assert_no_worse(dx, _plain, arguments, "dx", addends=arguments[1][:, 0].numel())
    x, mask, mean, invstd, shortcut, shortcut_mean, shortcut_invstd = arguments[6:13]
    dz = torch.where(arithmetic.unpack_bits(mask, x), dx, 0)
    found = dict(zip(("sum_dz", "sum_dz_xhat", "sum_dz_shortcut"), sums, strict=True))
    factors = {"sum_dz_xhat": (x, mean, invstd), "sum_dz_shortcut": (shortcut, shortcut_mean, shortcut_invstd)}
    if shortcut is None:
        assert found.pop("sum_dz_shortcut").numel() == 0 and factors.pop("sum_dz_shortcut")
    assert all(got.dtype == torch.float32 for got in found.values())
    assert_sums(found, dz, factors)
    return dx, *sums, dweight


@a_few_shapes  # dx is that of conv_dgrad, bit for bit
def test_every_shape(name):
    _check(_arguments(SHAPES[name], torch.bfloat16, wgrad=False))


@pytest.mark.larger
def test_many_tiles_and_many_ranges_are_added_in_one_launch_and_one_order():
    arguments = _arguments(LARGE, torch.float16)
    assert all(map(torch.equal, _check(arguments, config=SMALL), conv_dgrad_join(*arguments, config=SMALL)))


@every_dtype
@pytest.mark.parametrize("projected", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "prologue"])
def test_every_prologue_and_epilogue(prologue, residual, projected, dtype):
    _check(_arguments(SHAPES["3x3 stride 2, odd image"], dtype, prologue, residual, projected))


def _tiles():
    found = {}
    for dtype in (torch.float32, torch.float16):
        for config in conv_dgrad_configurations(dtype, 90):
            found.setdefault((config.block_m, config.block_n, config.block_k), config)
    return list(found.values())


@pytest.mark.parametrize("config", _tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
def test_every_tile(config):
    shape = problem(1, 20, 7, 6, config.block_k + 8, 1, 1)
    _check(_arguments(shape, torch.float16), config=config)


@pytest.mark.parametrize("op", [reference.conv_dgrad_join, aten.conv_dgrad_join], ids=["reference", "aten"])
@every_dtype
def test_it_is_a_dgrad_and_the_reduction_behind_it(op, dtype):
    """By whatever backend: the sums are those that `bn_backward_reduce` finds in what was written, bit for bit in the
    reference, whose order is one.
    """
    arguments = _arguments(SHAPES["1x1"], dtype)
    dx, *sums, dweight = op(*arguments)
    x, mask, mean, invstd, shortcut, shortcut_mean, shortcut_invstd = arguments[6:13]
    package = aten if op is aten.conv_dgrad_join else reference
    assert torch.equal(dx, package.conv_dgrad(*arguments[:6], *(None,) * 5, *arguments[14:])[0])
    filter_size, before = [*arguments[1].shape[2:]], (*arguments[2:4], None, None)
    alone = package.conv_wgrad(arguments[0], arguments[13], *before, filter_size, *arguments[15:])
    assert torch.equal(dweight, alone)
    expected = [
        reference.bn_backward_reduce(dx, z, mask, m, m, m, i, True, 3)
        for z, m, i in ((x, mean, invstd), (shortcut, shortcut_mean, shortcut_invstd))
    ]
    for got, exact in zip(sums, (*expected[0], expected[1][1]), strict=True):
        if package is aten:
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, exact)


@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2, odd image", "4 groups of 8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_masked_gradient_that_is_not_finite_is_written_and_not_summed(value, name):
    """dx keeps it, since a hook must see it; the sums drop it where the mask is zero, as `bn_backward_reduce` does."""
    arguments = list(_arguments(SHAPES[name], torch.float32))
    arguments[0][0, -1, 0, 0] = value
    dx, *sums, _ = conv_dgrad_join(*arguments)
    truth = reference.conv_dgrad_join(*in_double(arguments))
    assert torch.equal(dx.isfinite(), truth[0].isfinite()) and not dx.isfinite().all()
    for got, exact in zip(sums, truth[1:4], strict=True):
        assert torch.equal(got.isfinite(), exact.isfinite())
    bits = torch.where(dx.isfinite(), arithmetic.unpack_bits(arguments[7], dx), False)
    arguments[7] = arithmetic.pack_bits(arithmetic.in_memory_order(bits.contiguous(memory_format=NHWC)))
    dropped, *sums, _ = conv_dgrad_join(*arguments)
    assert torch.equal(dropped.isfinite(), dx.isfinite())
    assert all(s.isfinite().all() for s in sums)


def test_a_rerun_bit_for_bit():
    shape = problem(1, 16, 9, 8, 16, 3, 3, (2, 1), (1, 1))
    arguments = _arguments(shape, torch.float16, True)
    first, second = (conv_dgrad_join(*arguments, config=SMALL) for _ in range(2))
    assert all(map(torch.equal, first, second))


DY = torch.zeros(2, 6, 3, 3).contiguous(memory_format=NHWC)
IMAGE = torch.zeros(2, 8, 5, 5).contiguous(memory_format=NHWC)
V = torch.zeros(8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dy": DY.double()}, "float64"),
        ({"weight": torch.zeros(6, 8, 3, 3).half()}, "float16"),
        ({"residual_mask": torch.zeros(50, dtype=torch.uint8)}, "residual_mask comes with a residual"),
        ({"x": DY}, "x must be"),
        ({"x": IMAGE.contiguous()}, "x must be"),
        ({"mask": torch.zeros(49, dtype=torch.uint8)}, "mask must be contiguous uint8 [50]"),
        ({"mask": torch.zeros(50)}, "mask must be contiguous uint8"),
        ({"mean": torch.zeros(7)}, "mean must be a contiguous vector of 8"),
        ({"activation": DY}, "activation must be"),
        ({"shortcut": IMAGE}, "only shortcut"),
        ({"shortcut": DY, "shortcut_mean": V, "shortcut_invstd": V}, "shortcut must be"),
        ({"shortcut": IMAGE, "shortcut_mean": V, "shortcut_invstd": V[:7]}, "shortcut_invstd must be"),
    ],
)
def test_refusals_name_the_value(changes, message):
    names = "dy weight dy_x dy_coefficients residual residual_mask x mask mean invstd".split()
    arguments = dict.fromkeys([*names, "shortcut", "shortcut_mean", "shortcut_invstd", "activation"])
    arguments |= {"dy": DY, "weight": torch.zeros(6, 8, 3, 3), "x": IMAGE, "mean": V, "invstd": V}
    arguments |= {"mask": torch.zeros(50, dtype=torch.uint8)}
    arguments |= {"size": [5, 5], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    on_device = {k: placed(v) for k, v in (arguments | changes).items()}
    assert message in refuse("conv_dgrad_join", *on_device.values())


@pytest.mark.parametrize("index", range(5))
def test_verification_finds_what_is_wrong_with_it(index, monkeypatch):
    job = next(
        job
        for job in jobs(tiny_network(), ("train",), 2, torch.float32, 80, False)
        if job.problem.op == "conv_dgrad" and not job.epilogue
    )
    device, right = torch.device(DEVICE), checks.caller

    def wrong(op, choice):
        def call(*operands):
            results = list(right(op, choice)(*operands))
            results[index] = results[index] * (1 + 1e-3)
            return results

        return call if op == "conv_dgrad_join" else right(op, choice)

    choice = Choice("triton", SMALL)
    assert checks.check_all(job, choice, device) == {"conv_dgrad": None, "conv_dgrad_join": None}
    monkeypatch.setattr(checks, "caller", wrong)
    found = checks.check_all(job, choice, device)
    assert found["conv_dgrad"] is None and "errs by" in found["conv_dgrad_join"]
