"""What the matrix of test_conv.py does not see of the forward convolutions: their epilogues, and rows of statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import assert_no_worse

pytest.importorskip("triton")

from conv_cases import FEW, NHWC, SHAPES, SMALL, check, every_dtype, launch, problem, runs_kernels, sample
from op_cases import DEVICE, pixels, reference

from resnet_fused.kernels.merge_statistics import merge_statistics
from resnet_fused.ops import OPS

pytestmark = runs_kernels


@every_dtype
def test_scale_and_shift_of_the_datas_dtype(dtype):
    args = sample("conv_fprop", SHAPES["1x1"], dtype, scaled=True)
    check("conv_fprop", args._replace(scale=args.scale.to(dtype), shift=args.shift.to(dtype)))


def test_a_weight_of_any_strides_and_an_offset_view_of_the_image():
    args = sample("conv_fprop", SHAPES["3x3"], torch.float16)
    expected = launch("conv_fprop", args)
    longer = torch.cat([args.x[:1], args.x]).contiguous(memory_format=NHWC)[1:]
    for other in (args.weight.contiguous(), args.weight.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(launch("conv_fprop", args._replace(x=longer, weight=other)), expected)


def test_the_residual_may_be_the_input():
    args = sample("conv_fprop", replace(SHAPES["3x3"], k=32), torch.bfloat16, scaled=True)
    before = args.x.clone()
    check("conv_fprop", args._replace(residual=args.x))
    assert torch.equal(args.x, before)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_an_fp16_result_that_overflows_is_inf_and_one_that_does_not_is_not():
    """The accumulator is fp32: only the rounded result can overflow."""
    args = sample("conv_fprop", problem(1, 64, 2, 2, 16, 1, 1), torch.float16, scaled=True, act=None)
    args.x.fill_(500.0)
    args.weight.fill_(4.0)  # 128,000 before the scale
    args.scale.fill_(0.5)
    args.shift.zero_()
    assert (launch("conv_fprop", args) == 64000.0).all()
    assert launch("conv_fprop", args._replace(scale=None)).isposinf().all()


@pytest.mark.parametrize("op", ["conv_fprop", "conv_fprop_stats"])
def test_relu_of_zero_is_zero(op):
    args = sample(op, SHAPES["3x3"], torch.float16, **({} if op == "conv_fprop" else {"prologue": True, "rows": 2}))
    vectors = ("shift",) if op == "conv_fprop" else ("x_shift",)
    zero = args._replace(x=torch.zeros_like(args.x), **{name: -getattr(args, name).abs() for name in vectors})
    results = launch(op, zero)
    assert not any(t.any() for t in ([results] if op == "conv_fprop" else results[:3]))


def test_a_one_channel_image_gives_nhwc_whatever_its_strides_say():
    """With C = 1 the image is NCHW and NHWC at once."""
    args = sample("conv_fprop", SHAPES["one input channel"])
    for x in (args.x.contiguous(), torch.empty_like(args.x, memory_format=NHWC).copy_(args.x)):
        for weight in (args.weight.contiguous(), args.weight):
            check("conv_fprop", args._replace(x=x, weight=weight))


# The statistics


def _moments(values, row):
    var, mean = torch.var_mean(values, 0, correction=0)
    return {f"mean of row {row}": mean, f"m2 of row {row}": var * len(values)}


def _check_rows(y, mean, m2, count, rows):
    """The rows describe consecutive parts of the pixels of y."""
    values = pixels(y)
    assert mean.shape == m2.shape == (rows, y.shape[1]) and count.shape == (rows,)
    assert (mean.dtype, m2.dtype, count.dtype) == (torch.float64, torch.float32, torch.float32)
    assert int(count.sum()) == len(values)
    for row, part in enumerate(values.split([int(n) for n in count])):
        if len(part) == 0:
            assert not mean[row].any() and not m2[row].any()
            continue
        single = part.detach().float()
        terms = {f"mean of row {row}": single.double().abs().mean(0)}
        results = {f"mean of row {row}": mean[row].float(), f"m2 of row {row}": m2[row]}
        assert_no_worse(results, lambda v, row=row: _moments(v, row), (single,), terms=terms, addends=len(part))


@every_dtype
@pytest.mark.parametrize("name", FEW)
def test_rows_describe_consecutive_parts(name, dtype):
    _check_rows(*launch("conv_fprop_stats", sample("conv_fprop_stats", SHAPES[name], dtype, prologue=True, rows=3)), 3)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 20])
def test_any_number_of_rows(rows):
    """Fewer rows than tiles (8 of 32 pixels), as many, and more."""
    args = sample("conv_fprop_stats", problem(3, 16, 9, 9, 12, 1, 1), torch.bfloat16, rows=rows)
    _check_rows(*check("conv_fprop_stats", args, config=SMALL), rows)


@pytest.mark.parametrize("rows", [2, 100])
@every_dtype
def test_statistics_where_the_mean_is_large_beside_the_deviations(dtype, rows):
    """|mean| is some hundred times the deviation, and fp32 sums of squares would leave three digits of the variance."""
    args = sample("conv_fprop_stats", problem(2, 16, 12, 11, 24, 1, 1), dtype, rows=rows)
    spread = 3.0 if dtype == torch.float32 else 20.0  # 16 bits hold no smaller one beside 1,000
    args.x.copy_(1000 + spread * torch.randn_like(args.x, dtype=torch.float32))
    args.weight.zero_()
    args.weight[torch.arange(24), torch.arange(24) % 16] = 1.0
    y, mean, m2, count = launch("conv_fprop_stats", args, config=SMALL)
    assert torch.equal(y[:, :16], args.x)
    _, _, merged, invstd = reference.bn_finalize(mean, m2, count, None, None, None, None, 0.1, 0.0)
    exact = pixels(y).double().var(0, correction=0)
    torch.testing.assert_close(invstd.double() ** -2, exact, rtol=5e-7, atol=0)
    torch.testing.assert_close(merged.double(), pixels(y).double().mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("rows", [1, 100])
def test_another_formulation_answers_in_the_same_rows(rows):
    """A configuration names its formulation; its boxes of pixels are another partition than the tiles."""
    shape = problem(2, 16, 9, 9, 24, 3, 3, padding=(1, 1))
    args = sample("conv_fprop_stats", shape, torch.float16, rows=rows)
    config = replace(SMALL, kernel="tma_conv")
    y, mean, m2, count = check("conv_fprop_stats", args, config=config)
    plain = OPS["conv_fprop"].args(args.x, args.weight, None, None, None, *shape.geometry, act=None)
    assert torch.equal(y, launch("conv_fprop", plain, config=config)) and mean.shape == (rows, 24)
    _check_rows(y, *merge_statistics(mean, m2, count, 1), 1)
    with pytest.raises(ValueError, match="tma_conv.*no prologue"):
        launch("conv_fprop_stats", sample("conv_fprop_stats", shape, torch.float16, prologue=True), config=config)


def test_merging_keeps_the_variance_between_the_tiles():
    """All of the variance is between the tiles, and the means are large."""
    mean = 5000 + torch.randn(37, 6, device=DEVICE, dtype=torch.float64)
    m2, count = torch.zeros_like(mean, dtype=torch.float32), torch.arange(1.0, 38.0, device=DEVICE)
    got = merge_statistics(mean, m2, count, 4)
    assert got[2].tolist() == [float(part.sum()) for part in count.split(10)]
    for row, (part, n) in enumerate(zip(mean.split(10), count.double().split(10), strict=True)):
        average = (part * n[:, None]).sum(0) / n.sum()
        torch.testing.assert_close(got[0][row], average, rtol=1e-10, atol=0)
        exact = ((part - average).square() * n[:, None]).sum(0)
        torch.testing.assert_close(got[1][row].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("tile", [0, 2])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_an_infinite_mean_stays_one_whichever_tile_it_is_of(value, tile):
    """As in `var_mean` of the pixels: the mean keeps it, the deviations from it are none, no other channel knows."""
    mean, m2, count = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3), torch.full((4,), 5.0)
    mean[tile, 1] = value
    got, deviations, _ = merge_statistics(mean.to(DEVICE), m2.to(DEVICE), count.to(DEVICE), 1)
    torch.testing.assert_close(got.cpu(), mean.mean(0, keepdim=True), equal_nan=True)
    assert deviations[0].isnan().tolist() == [False, True, False]


def test_the_prologue_is_what_bn_apply_would_have_written():
    """Bit for bit the convolution of the stored activation, which also shows where the padding is zero."""
    shape = SHAPES["3x3 stride 2, odd image"]
    args = sample("conv_fprop_stats", shape, torch.float16, prologue=True)
    args.x_shift.abs_().add_(1)  # relu(0 * scale + shift) is far from zero
    norm = OPS["bn_apply"].args(args.x, args.x_scale, args.x_shift, None, None, None, True, False)
    a = launch("bn_apply", norm).y
    plain = OPS["conv_fprop"].args(a, args.weight, None, None, None, *shape.geometry, act=None)
    assert torch.equal(launch("conv_fprop_stats", args).y, launch("conv_fprop", plain))
