"""The Triton convolution with a normalisation in front and statistics behind, against plain PyTorch and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from op_cases import pixels, reference

pytest.importorskip("triton")

from conv_cases import (
    DEVICE,
    NHWC,
    SHAPES,
    affine,
    every_dtype,
    every_shape,
    exact_fp32,  # noqa: F401
    filters,
    geometry,
    image,
    placed,
    problem,
    runs_kernels,
)

from resnet_fused.contract import in_double
from resnet_fused.dispatch.conv import ConvConfig, conv_candidates, conv_fprop_configurations
from resnet_fused.kernels import conv_fprop, conv_fprop_stats, refuse
from resnet_fused.kernels.merge_statistics import merge_statistics

pytestmark = [runs_kernels, pytest.mark.usefixtures("exact_fp32")]
SMALL = ConvConfig(32, 16, 16, 4, 2)  # many tiles of a small image


def _arguments(shape, dtype, prologue, rows=3):
    maps = affine(shape.c) if prologue else (None, None)
    return (image(shape, dtype), filters(shape, dtype), *maps, *geometry(shape), rows)


def _plain(x, weight, x_scale, x_shift, stride, padding, dilation, groups, rows):
    """What a user writes: the normalised activation stored in the dtype of x."""
    if x_scale is not None:
        x = (x.to(x_scale.dtype) * x_scale.view(1, -1, 1, 1) + x_shift.view(1, -1, 1, 1)).relu().to(x.dtype)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def _moments(values, row):
    var, mean = torch.var_mean(values, 0, correction=0)
    return {f"mean of row {row}": mean, f"m2 of row {row}": var * len(values)}


def _check_statistics(y, mean, m2, count, rows):
    """The rows describe consecutive parts of the pixels of y, and merge to its mean and variance."""
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


def _check(arguments, **options):
    assert refuse("conv_fprop_stats", *arguments) is None
    y, *statistics = conv_fprop_stats(*arguments, **options)
    assert y.is_contiguous(memory_format=NHWC)
    assert_no_worse(y, _plain, arguments, "y", addends=arguments[1][:1].numel())
    _check_statistics(y, *statistics, arguments[-1])
    return y, *statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_shape
def test_every_shape(name, dtype):
    _check(_arguments(SHAPES[name], dtype, prologue=True))


@every_shape
def test_every_shape_without_the_prologue(name):
    _check(_arguments(SHAPES[name], torch.float16, prologue=False))


def _tiles():
    found = {}
    for prologue in (False, True):
        for dtype in (torch.float32, torch.float16):
            for config in conv_fprop_configurations(dtype, 90, prologue=prologue, statistics=True):
                found.setdefault((config.block_m, config.block_n, config.block_k, config.flat), config)
    return list(found.values())


@pytest.mark.parametrize("config", _tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}{' flat' * c.flat}")
def test_every_tile(config):
    channels = 7 if config.flat else config.block_k + 8
    shape = problem(1, channels, 7, 6, 20, 3, 3, padding=(1, 1))
    _check(_arguments(shape, torch.float16, True), config=config)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 20])
def test_any_number_of_rows(rows):
    """Fewer rows than tiles (8 of 32 pixels), as many, and more."""
    shape = problem(3, 16, 9, 9, 12, 1, 1)
    _check(_arguments(shape, torch.bfloat16, False, rows), config=SMALL)


@pytest.mark.parametrize("rows", [2, 100])
@every_dtype
def test_statistics_where_the_mean_is_large_beside_the_deviations(dtype, rows):
    """|mean| is some hundred times the deviation, and fp32 sums of squares would leave three digits of the variance."""
    shape = problem(2, 16, 12, 11, 24, 1, 1)
    x, weight, *rest = _arguments(shape, dtype, False, rows)
    spread = 3.0 if dtype == torch.float32 else 20.0  # 16 bits hold no smaller one beside 1,000
    x = (1000 + spread * torch.randn_like(x, dtype=torch.float32)).to(dtype).contiguous(memory_format=NHWC)
    weight = torch.zeros_like(weight)
    weight[torch.arange(24), torch.arange(24) % 16] = 1.0
    y, mean, m2, count = conv_fprop_stats(x, weight, *rest, config=SMALL)
    assert torch.equal(y[:, :16], x)
    _, _, merged, invstd = reference.bn_finalize(mean, m2, count, None, None, None, None, 0.1, 0.0)
    exact = pixels(y).double().var(0, correction=0)
    torch.testing.assert_close(invstd.double() ** -2, exact, rtol=5e-7, atol=0)
    torch.testing.assert_close(merged.double(), pixels(y).double().mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("rows", [1, 100])
def test_another_formulation_answers_in_the_same_rows(rows):
    """A configuration names its formulation; its boxes of pixels are another partition than the tiles."""
    shape = problem(2, 16, 9, 9, 24, 3, 3, padding=(1, 1))
    x, weight, *maps, steps, padding, dilation, groups, _ = _arguments(shape, torch.float16, False)
    arguments = (x, weight, *maps, steps, padding, dilation, groups, rows)
    config = replace(SMALL, kernel="tma_conv")
    y, mean, m2, count = conv_fprop_stats(*arguments, config=config)
    assert_no_worse(y, _plain, arguments, "y", addends=arguments[1][:1].numel())
    expected = conv_fprop(x, weight, None, None, None, steps, padding, dilation, groups, None, config=config)
    assert torch.equal(y, expected)
    merged = merge_statistics(mean, m2, count, 1)
    _check_statistics(y, *merged, 1)
    assert mean.shape == (rows, 24)
    with pytest.raises(ValueError, match="tma_conv.*no prologue"):
        conv_fprop_stats(x, weight, *affine(16), *arguments[4:], config=config)


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
    x, weight, scale, shift, *rest = _arguments(shape, torch.float16, True)
    shift = shift.abs() + 1  # relu(0 * scale + shift) is far from zero
    a, _ = reference.bn_apply(x, scale, shift, None, None, None, True, False)
    expected = conv_fprop(a, weight, None, None, None, *rest[:-1], None)
    assert torch.equal(conv_fprop_stats(x, weight, scale, shift, *rest)[0], expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ["1x1", "7x7 stem", "4 groups of 8", "3x3 stride 2, odd image"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_exactly_the_pixels_and_channels_that_see_them(value, name):
    """The prologue's ReLU keeps NaN, the padding adds and hides none, and the statistics have it where y has."""
    shape = SHAPES[name]
    arguments = _arguments(shape, torch.float32, True, rows=1)
    arguments[0][0, shape.c - 1, 0, 0] = value
    y, mean, m2, count = conv_fprop_stats(*arguments)
    truth = _plain(*in_double(arguments))
    assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf())
    hit = ~pixels(truth).isfinite().all(0)
    assert torch.equal(~mean[0].isfinite(), hit) and torch.equal(m2[0].isnan(), hit)
    survives = value != value or value * float(arguments[2][-1]) > 0
    assert hit.any() == survives and truth.isfinite().any()


def test_relu_of_zero_and_a_rerun_bit_for_bit():
    shape = SHAPES["3x3"]
    x, weight, scale, shift, *rest = _arguments(shape, torch.float16, True, rows=2)
    y, mean, m2, _ = conv_fprop_stats(torch.zeros_like(x), weight, scale, -shift.abs(), *rest)
    assert not y.any() and not mean.any() and not m2.any()
    first, second = (conv_fprop_stats(x, weight, scale, shift, *rest, config=SMALL) for _ in range(2))
    assert all(map(torch.equal, first, second))


X = torch.zeros(2, 8, 5, 5).contiguous(memory_format=NHWC)
W = torch.zeros(6, 8, 3, 3)
V = torch.zeros(8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": X.contiguous()}, "NHWC"),
        ({"weight": W.half()}, "float16"),
        ({"groups": 4}, "groups=4"),
        ({"x_scale": V}, "only x_scale"),
        ({"x_shift": V}, "only x_shift"),
        ({"x_scale": V[:6], "x_shift": V}, "x_scale must be a contiguous vector of 8"),
        ({"x_scale": V, "x_shift": torch.zeros(16)[::2]}, "x_shift"),
        ({"rows": 0}, "rows=0"),
    ],
)
def test_refusals_name_the_value(changes, message):
    arguments = {"x": X, "weight": W, "x_scale": None, "x_shift": None}
    arguments |= {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "rows": 4}
    on_device = {k: placed(v) for k, v in (arguments | changes).items()}
    assert message in refuse("conv_fprop_stats", *on_device.values())


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("prologue", [False, True])
def test_tune_tries_a_tile_of_which_two_fit_onto_a_multiprocessor(prologue, arch):
    """65,536 registers, 227 KB of shared memory, a KB of it reserved for each program."""
    wide = problem(256, 256, 28, 28, 512, 1, 1)
    found = conv_candidates("conv_fprop_stats", wide, torch.bfloat16, arch, prologue=prologue)
    pairs = [config for config in found if config.max_registers < 255]
    assert [(config.block_m, config.block_n) for config in pairs] == [(128, 128)]
    for config in pairs:
        operands = 2 * config.num_stages * (config.block_m + config.block_n) * config.block_k
        assert 2 * (operands + 1024) <= 227 * 1024
        assert 2 * 32 * config.num_warps * config.max_registers <= 65536
