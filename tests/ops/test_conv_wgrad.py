"""The Triton weight gradient against plain PyTorch and float64."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from contract import assert_no_worse
from conv_cases import placed, runs_kernels
from torch.nn.grad import conv2d_weight

pytest.importorskip("triton")

from op_cases import reference

from resnet_fused.contract import in_double
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.conv_wgrad import MAX_PARTIAL_BYTES, conv_wgrad_configurations, conv_wgrad_heuristic
from resnet_fused.kernels import conv_wgrad, refuse
from resnet_fused.ops import arithmetic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NAN, INF = float("nan"), float("inf")

pytestmark = runs_kernels


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def _problem(n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return ConvShape(n, c, h, w, k, r, s, stride, padding, dilation, groups)


SHAPES = {
    "1x1": _problem(2, 64, 5, 7, 48, 1, 1),
    "1x1 stride 2, odd image": _problem(2, 32, 7, 9, 40, 1, 1, stride=(2, 2)),
    "1x1 padded": _problem(1, 64, 3, 4, 16, 1, 1, padding=(1, 1)),
    "3x3": _problem(1, 64, 5, 6, 32, 3, 3, padding=(1, 1)),
    "1x3, more channels than a tile": _problem(1, 72, 3, 5, 16, 1, 3, padding=(0, 1)),
    "3x3 stride 2, odd image": _problem(1, 64, 9, 7, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 stride 2, few channels": _problem(2, 24, 7, 9, 20, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 dilation 2": _problem(1, 16, 7, 6, 20, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "3x3 unpadded": _problem(1, 16, 6, 5, 16, 3, 3),
    "7x7 stem": _problem(1, 3, 19, 17, 24, 7, 7, stride=(2, 2), padding=(3, 3)),
    "one channel each": _problem(2, 1, 6, 5, 1, 3, 3, padding=(1, 1)),
    "channels divide no tile": _problem(2, 67, 2, 5, 65, 1, 2),
    "more outputs than one tile": _problem(1, 16, 4, 4, 136, 1, 1),
    "1x1 image": _problem(3, 64, 1, 1, 96, 1, 1),
    "1x1 image under 3x3": _problem(1, 64, 1, 1, 16, 3, 3, padding=(1, 1)),
    "7x7 image": _problem(1, 64, 7, 7, 16, 3, 3, padding=(1, 1)),
    "nothing square": _problem(1, 18, 8, 5, 12, 1, 3, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "4 groups of 8": _problem(2, 32, 6, 6, 32, 3, 3, padding=(1, 1), groups=4),
    "2 groups of 20": _problem(1, 40, 5, 5, 12, 3, 3, stride=(2, 2), padding=(1, 1), groups=2),
    "depthwise": _problem(1, 6, 5, 5, 12, 3, 3, padding=(1, 1), groups=6),
    "empty batch": _problem(0, 16, 5, 5, 16, 3, 3, padding=(1, 1)),
}
PROLOGUES = {"none": (False, False), "x": (True, False), "dy": (False, True), "both": (True, True)}


def _arguments(shape, dtype, prologue="none"):
    """The op's arguments; the shifts are far from zero, so that padding behind them would show."""
    x_prologue, dy_prologue = PROLOGUES[prologue]
    out = (shape.n, shape.k, shape.p, shape.q)
    x, dy, dy_x = (
        torch.randn(size).to(DEVICE, dtype).contiguous(memory_format=NHWC)
        for size in ((shape.n, shape.c, shape.h, shape.w), out, out)
    )
    coefficients = (torch.randn(3, shape.k) + torch.tensor([[0.0], [0.0], [2.0]])).to(DEVICE)
    scale, shift = torch.randn(shape.c).to(DEVICE), (torch.randn(shape.c) + 2).to(DEVICE)
    return (
        *(dy, x),
        *((dy_x, coefficients) if dy_prologue else (None, None)),
        *((scale, shift) if x_prologue else (None, None)),
        *([shape.r, shape.s], *(list(step) for step in (shape.stride, shape.padding, shape.dilation)), shape.groups),
    )


def _magnitudes(arguments):
    """What the summands' magnitudes add up to."""
    dy, x, dy_x, coefficients, scale, shift, *geometry = in_double(arguments)
    g, a = arithmetic.bn_gradient(dy, dy_x, coefficients).abs(), arithmetic.activation(x, scale, shift).abs()
    weight = [dy.shape[1], x.shape[1] // geometry[-1], *geometry[0]]
    return conv2d_weight(a, weight, g, *geometry[1:])


def _check(arguments, **options):
    assert refuse("conv_wgrad", *arguments) is None
    dweight = conv_wgrad(*arguments, **options)
    assert dweight.dtype == torch.float32
    assert dweight.is_contiguous(memory_format=NHWC)
    dy = arguments[0]
    terms = {"dweight": _magnitudes(arguments)}
    assert_no_worse(dweight, reference.conv_wgrad, arguments, "dweight", terms=terms, addends=dy[:, :1].numel())
    return dweight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, dtype):
    _check(_arguments(SHAPES[name], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prologue", ["x", "dy", "both"])
@pytest.mark.parametrize(
    "name",
    [
        "1x1",
        "1x1 stride 2, odd image",
        "1x3, more channels than a tile",
        "3x3 stride 2, few channels",
        "2 groups of 20",
    ],
)
def test_every_prologue(name, prologue, dtype):
    _check(_arguments(SHAPES[name], dtype, prologue))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "empty batch"])
def test_every_shape_with_both_prologues(name):
    _check(_arguments(SHAPES[name], torch.float16, "both"))


def _tiles():
    seen = {}
    for dtype, dy_prologue in itertools.product((torch.float32, torch.float16), (False, True)):
        for config in conv_wgrad_configurations(dtype, 90, x_prologue=dy_prologue, dy_prologue=dy_prologue):
            seen.setdefault((config.block_m, config.block_n, config.block_k, config.flat), config)
    return list(seen.values())


@pytest.mark.parametrize("prologue", ["none", "dy", "both"])  # dy alone turns the product around
@pytest.mark.parametrize("config", _tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}{' flat' * c.flat}")
def test_every_tile(config: ConvConfig, prologue):
    """The result does not depend on the tile, flat or tap by tap, also where nothing is a multiple of it."""
    shape = _problem(1, 7 if config.flat else 72, 7, 6, 20, 1, 3, padding=(0, 1))
    _check(_arguments(shape, torch.float16, prologue), config=config)


@pytest.mark.parametrize("prologue", ["none", "both"])
@pytest.mark.parametrize("width", [7, 16], ids=["ragged pixels", "whole tiles of pixels"])
@pytest.mark.parametrize("splits", [1, 2, 5, 100])
def test_every_number_of_splits(splits, width, prologue):
    """Ranges of pixels that run out early, or hold none at all, add nothing."""
    shape = _problem(1, 16, 9, width, 24, 1, 1)
    config = ConvConfig(64, 32, 16, 4, 2, True, splits)
    _check(_arguments(shape, torch.float32, prologue), config=config)


def test_the_result_repeats_bit_for_bit_also_where_it_is_split():
    arguments = _arguments(_problem(3, 16, 9, 9, 24, 1, 1), torch.float16, "both")
    config = ConvConfig(64, 32, 16, 4, 2, True, splits=5)
    assert torch.equal(conv_wgrad(*arguments, config=config), conv_wgrad(*arguments, config=config))


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("name", ["3x3 stride 2, odd image", "3x3 stride 2, few channels"])
def test_padding_contributes_nothing_behind_the_prologue(name, prologue):
    """Ones everywhere: a weight's gradient counts the pixels that its tap sees inside the image."""
    shape = SHAPES[name]
    arguments = list(_arguments(shape, torch.float16, prologue))
    x_prologue, dy_prologue = PROLOGUES[prologue]
    arguments[0], arguments[1] = torch.ones_like(arguments[0]), torch.ones_like(arguments[1])
    if x_prologue:
        arguments[1].zero_()
        arguments[5].fill_(1.0)
    if dy_prologue:
        arguments[0].zero_()
        arguments[2].zero_()
        arguments[3].fill_(1.0)
    rows, columns = (
        torch.tensor([sum(0 <= p * 2 - 1 + tap < size for p in range(out)) for tap in range(3)], dtype=torch.float32)
        for size, out in ((shape.h, shape.p), (shape.w, shape.q))
    )
    expected = shape.n * rows[:, None] * columns
    assert torch.equal(conv_wgrad(*arguments), expected.to(DEVICE).expand(shape.k, shape.c, 3, 3))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, under the interpreter
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize(
    "name", ["1x3, more channels than a tile", "1x1 stride 2, odd image", "7x7 stem", "2 groups of 20"]
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_in_the_image_reach_exactly_the_weights_that_see_them(value, name, prologue):
    """Neither padding, masked channels, other groups, nor the prologue's ReLU adds or swallows one."""
    shape = SHAPES[name]
    arguments = _arguments(shape, torch.float32, prologue)
    arguments[1][0, shape.c - 1, 0, 0] = value
    _assert_special_values_agree(arguments)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, under the interpreter
@pytest.mark.parametrize("prologue", ["none", "dy"])
@pytest.mark.parametrize(
    "name", ["1x3, more channels than a tile", "1x1 stride 2, odd image", "7x7 stem", "2 groups of 20"]
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_in_the_gradient_reach_what_they_reach_in_pytorch(value, name, prologue):
    """Padding is a zero, which an infinite gradient turns into NaN."""
    shape = SHAPES[name]
    arguments = _arguments(shape, torch.float32, prologue)
    arguments[0][0, shape.k - 1, 0, 0] = value
    _assert_special_values_agree(arguments)


@pytest.mark.parametrize("prologue", ["x", "both"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_behind_a_prologue_an_infinite_gradient_reaches_the_weights_that_see_it(value, prologue):
    shape = _problem(1, 64, 4, 4, 16, 1, 3, padding=(0, 1))
    arguments = _arguments(shape, torch.float32, prologue)
    arguments[0][0, 3, 0, 0] = value
    special = ~conv_wgrad(*arguments).isfinite()
    sees_padding = torch.tensor([True, False, False], device=DEVICE)
    truth = ~reference.conv_wgrad(*in_double(arguments)).isfinite()
    assert torch.equal(special, truth & ~sees_padding)
    assert special.any()


def _assert_special_values_agree(arguments):
    dweight, truth = conv_wgrad(*arguments), reference.conv_wgrad(*in_double(arguments))
    assert torch.equal(dweight.isnan(), truth.isnan())
    assert torch.equal(dweight.isinf(), truth.isinf())
    assert truth.isfinite().any()


def test_a_nan_shift_stays_out_of_taps_that_no_pixel_sees():
    """A batch norm whose statistics are NaN makes its channel NaN, and padding zero all the same."""
    arguments = _arguments(SHAPES["1x1 image under 3x3"], torch.float32, "x")
    arguments[5][3] = NAN
    dweight = conv_wgrad(*arguments)
    assert dweight[:, 3, 1, 1].isnan().all() and int(dweight.isnan().sum()) == dweight.shape[0]


def test_the_gradient_is_that_of_autograd():
    shape = SHAPES["3x3 stride 2, odd image"]
    arguments = _arguments(shape, torch.float32)
    weight = torch.zeros(shape.k, shape.c, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.nn.functional.conv2d(arguments[1].double(), weight, None, shape.stride, shape.padding)
    (truth,) = torch.autograd.grad(y, weight, arguments[0].double())
    torch.testing.assert_close(conv_wgrad(*arguments).double(), truth, rtol=0, atol=1e-4)


def test_division_by_multiplication():
    module = sys.modules[conv_wgrad.__module__]
    largest = 2**31 - 1
    for divisor in (1, 2, 3, 7, 49, 56 * 56, 112 * 112, 2**20, 2**30 - 1, 2**30 + 1, largest):
        factor, shift = module._magic(divisor)
        assert -(2**31) <= factor < 2**31
        for n in {0, 1, divisor - 1, divisor, divisor + 1, 2 * divisor - 1, largest - largest % divisor - 1, largest}:
            if 0 <= n <= largest:
                assert (n * (factor % 2**32)) >> shift == n // divisor, (n, divisor)


@pytest.mark.parametrize("batch, bits", [(64, "int32"), (16384, "int64")])
def test_offsets_are_64_bit_where_a_tensor_has_more_than_2_31_elements(batch, bits, monkeypatch):
    launches = []
    module = sys.modules[conv_wgrad.__module__]
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append(options))
    x = torch.empty(batch, 64, 56, 56, dtype=torch.float16, device="meta").to(memory_format=NHWC)
    conv_wgrad(x, x, None, None, None, None, [3, 3], [1, 1], [1, 1], [1, 1], 1, config=ConvConfig(64, 64, 64, 4, 3))
    assert str(launches[0]["INDEX"]) == bits


X = torch.zeros(2, 8, 5, 5).contiguous(memory_format=NHWC)
DY = torch.zeros(2, 6, 3, 3).contiguous(memory_format=NHWC)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": X.double()}, "float64"),
        ({"x": X[0]}, "4-D"),
        ({"x": X.contiguous()}, "NHWC"),
        ({"dy": DY[0]}, "3-D"),
        ({"dy": DY.half()}, "float16"),
        ({"dy": torch.zeros(2, 6, 5, 5).contiguous(memory_format=NHWC)}, "(2, 6, 3, 3)"),
        ({"dy": DY.contiguous()}, "dy must be"),
        ({"dy_x": DY}, "dy_coefficients"),
        ({"dy_coefficients": torch.zeros(3, 6)}, "dy_x"),
        ({"dy_x": DY, "dy_coefficients": torch.zeros(3, 5)}, "[3, 6]"),
        ({"dy_x": DY, "dy_coefficients": torch.zeros(3, 6).double()}, "float32 [3, 6]"),
        ({"dy_x": DY, "dy_coefficients": torch.zeros(6, 3).t()}, "contiguous float32 [3, 6]"),
        ({"x_scale": torch.zeros(8)}, "x_shift"),
        ({"x_scale": torch.zeros(8), "x_shift": torch.zeros(7)}, "x_shift"),
        ({"groups": 4}, "groups=4"),
        ({"filter": [16, 3]}, "15x15"),
        ({"filter": [7, 3]}, "larger than the padded image"),
    ],
)
def test_refusals_name_the_value(changes, message):
    arguments = {"dy": DY, "x": X, "dy_x": None, "dy_coefficients": None, "x_scale": None, "x_shift": None}
    arguments |= {"filter": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    on_device = {k: placed(v) for k, v in (arguments | changes).items()}
    assert message in refuse("conv_wgrad", *on_device.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, tf32", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_the_heuristic_returns_only_listed_configurations(arch, dtype, tf32):
    """What the compile gate compiles is what can be launched."""
    problems = [*SHAPES.values()]
    problems += [
        _problem(n, c, size, size, k, r, r, padding=(r // 2, r // 2))
        for n in (1, 32, 256)
        for c, size, k in ((3, 224, 64), (64, 56, 64), (64, 56, 256), (256, 56, 64), (512, 7, 2048), (2048, 7, 512))
        for r in (1, 3)
    ]
    for x_prologue, dy_prologue in PROLOGUES.values():
        how = {"x_prologue": x_prologue, "dy_prologue": dy_prologue}
        listed = conv_wgrad_configurations(dtype, arch, tf32, **how)
        for shape in problems:
            config = conv_wgrad_heuristic(shape, dtype, arch, tf32, **how)
            assert replace(config, splits=1) in listed
            weight_bytes = 4 * shape.k * shape.c // shape.groups * shape.r * shape.s
            assert config.splits == 1 or config.splits * weight_bytes <= MAX_PARTIAL_BYTES


def test_the_heuristic_splits_pixels_until_the_gpu_is_full():
    few_weights = conv_wgrad_heuristic(_problem(256, 64, 56, 56, 64, 1, 1), torch.float16, 90)
    many_weights = conv_wgrad_heuristic(_problem(256, 512, 7, 7, 512, 3, 3, padding=(1, 1)), torch.float16, 90)
    few_pixels = conv_wgrad_heuristic(_problem(1, 64, 7, 7, 64, 1, 1), torch.float16, 90)
    assert few_weights.splits >= 132 and many_weights.splits <= 4 and few_pixels.splits == 1


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_fp32_is_exact_unless_pytorch_allows_tf32(precision, monkeypatch):
    launches = []
    module = sys.modules[conv_wgrad.__module__]
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append(options))
    torch.backends.cudnn.conv.fp32_precision = precision
    conv_wgrad(*_arguments(SHAPES["1x1"], torch.float32))
    assert launches[0]["PRECISION"] == precision
