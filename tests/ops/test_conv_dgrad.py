"""The Triton data gradient with its prologue and epilogues against plain PyTorch and float64."""

from __future__ import annotations

import pytest
import torch
from contract import assert_no_worse

pytest.importorskip("triton")

from conv_cases import (
    ARCHITECTURES,
    DEVICE,
    NHWC,
    SHAPES,
    a_few_shapes,
    affine,
    assert_sums,
    batch_norm_behind,
    every_dtype,
    every_shape,
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
from resnet_fused.dispatch.conv import (
    ConvConfig,
    conv_dgrad_configurations,
    conv_dgrad_heuristic,
    training_refusal,
)
from resnet_fused.kernels import conv_dgrad, refuse
from resnet_fused.ops import arithmetic

pytestmark = [runs_kernels, pytest.mark.usefixtures("exact_fp32")]
EPILOGUES = ("plain", "residual", "masked residual", "batch norm")
SMALL = ConvConfig(32, 16, 16, 4, 2)  # many tiles of a small image


def _arguments(shape, dtype, prologue=False, epilogue="plain"):
    dy, weight, x = output(shape, dtype), filters(shape, dtype), image(shape, dtype)
    dy_x, coefficients, residual, mask, norm = None, None, None, None, (None,) * 5
    if prologue:
        dy_x, coefficients = batch_norm_behind(shape, dtype)
    if "residual" in epilogue:
        residual = x
    if "masked" in epilogue:
        mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8, device=DEVICE)
    if epilogue == "batch norm":
        norm = x, *affine(shape.c), torch.randn(shape.c, device=DEVICE), torch.rand(shape.c, device=DEVICE) + 0.5
    size = [shape.h, shape.w]
    return (dy, weight, dy_x, coefficients, residual, mask, *norm, size, *geometry(shape))


def _plain(*arguments):
    return (reference if arguments[0].dtype == torch.float64 else aten).conv_dgrad(*arguments)[0]


def _check(arguments, **options):
    """dx within the contract against plain PyTorch, the sums against those of dx as it was rounded."""
    assert refuse("conv_dgrad", *arguments) is None
    dx, *sums = conv_dgrad(*arguments, **options)
    assert dx.is_contiguous(memory_format=NHWC)
    assert_no_worse(dx, _plain, arguments, "dx", addends=arguments[1][:, 0].numel())
    x, mean, invstd = arguments[6], arguments[9], arguments[10]
    if x is None:
        assert all(s.numel() == 0 for s in sums)
        return dx, *sums
    assert all(got.dtype == torch.float32 for got in sums)
    assert_sums(dict(zip(("sum_dx", "sum_dx_xhat"), sums, strict=True)), dx, {"sum_dx_xhat": (x, mean, invstd)})
    return dx, *sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_shape
def test_every_shape_behind_and_in_front_of_a_batch_norm(name, dtype):
    _check(_arguments(SHAPES[name], dtype, prologue=True, epilogue="batch norm"))


@a_few_shapes
def test_every_shape_with_a_masked_residual(name):
    _check(_arguments(SHAPES[name], torch.float16, epilogue="masked residual"))


@every_dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "prologue"])
def test_every_prologue_and_epilogue(prologue, epilogue, dtype):
    _check(_arguments(SHAPES["3x3 stride 2, odd image"], dtype, prologue, epilogue))


def _tiles():
    found = {}
    for dtype in (torch.float32, torch.float16):
        for config in conv_dgrad_configurations(dtype, 90, prologue=True):
            found.setdefault((config.block_m, config.block_n, config.block_k), config)
    return list(found.values())


@pytest.mark.parametrize("config", _tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
def test_every_tile(config):
    """The result does not depend on the tile, also where the reduction is not a multiple of it."""
    shape = problem(1, 20, 7, 6, config.block_k + 8, 3, 3, padding=(1, 1))
    _check(_arguments(shape, torch.float16, True, "batch norm"), config=config)


@pytest.mark.parametrize(
    "name", ["1x1 stride 2, odd image", "rows that no tap reaches", "stride larger than the filter"]
)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_pixel_that_no_tap_reaches_gets_the_residual_alone(epilogue, name):
    shape = SHAPES[name]
    arguments = _arguments(shape, torch.float32, True, epilogue)
    dx = _check(arguments, config=SMALL)[0]
    ones = torch.ones_like(arguments[0]), torch.ones_like(arguments[1]), *(None,) * 9
    reached = reference.conv_dgrad(*ones, *arguments[11:])[0] != 0
    assert not reached.all()
    addend = torch.zeros_like(dx) if arguments[4] is None else arguments[4]
    if arguments[5] is not None:
        addend = torch.where(arithmetic.unpack_bits(arguments[5], addend), addend, 0)
    assert torch.equal(dx[~reached], addend[~reached])


def test_a_weight_of_any_strides_and_an_offset_view_of_the_gradient():
    arguments = list(_arguments(SHAPES["4 groups of 8"], torch.float16))
    expected = conv_dgrad(*arguments)[0]
    dy, weight = arguments[:2]
    arguments[0] = torch.cat([dy[:1], dy]).contiguous(memory_format=NHWC)[1:]
    for other in (weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        arguments[1] = other
        assert torch.equal(conv_dgrad(*arguments)[0], expected)


def test_a_gradient_of_one_pixel_or_one_channel_gives_nhwc_as_any_other_does():
    """It is NCHW too; what is made of it is for kernels that read NHWC."""
    for shape in (problem(2, 16, 2, 2, 24, 3, 3, (2, 2), (1, 1)), problem(2, 16, 4, 4, 1, 3, 3, padding=(1, 1))):
        arguments = _arguments(shape, torch.float32)
        dx, expected = conv_dgrad(*arguments)[0], reference.conv_dgrad(*arguments)[0]
        assert arguments[0].is_contiguous() and dx.is_contiguous(memory_format=NHWC)
        torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("prologue", [False, True], ids=["raw", "prologue"])
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2, odd image", "4 groups of 8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(value, name, prologue):
    arguments = _arguments(SHAPES[name], torch.float32, prologue, "residual")
    arguments[0][0, -1, 0, 0] = value
    dx, truth = conv_dgrad(*arguments)[0], reference.conv_dgrad(*in_double(arguments))[0]
    assert torch.equal(dx.isnan(), truth.isnan()) and torch.equal(dx.isinf(), truth.isinf())
    assert 0 < int((~truth.isfinite()).sum()) < truth.numel()


def test_a_nan_of_the_input_passes_the_mask_and_a_relud_zero_does_not():
    """As PyTorch's ReLU does: its gradient is dropped where its result is <= 0, and a NaN is not."""
    shape = SHAPES["3x3"]
    arguments = _arguments(shape, torch.float32, False, "batch norm")
    x, scale, shift = arguments[6:9]
    x[0, 0], x[0, 1], x[0, 2] = 1.0, float("nan"), -1.0
    scale[:3], shift[:3] = 2.0, -2.0
    arguments[0][1] = float("nan")  # a gradient that is NaN is dropped too
    dx = conv_dgrad(*arguments)[0]
    assert not dx[0, 0].any() and not dx[0, 2].any()
    assert torch.equal(dx[0, 1], conv_dgrad(*arguments[:6], *(None,) * 5, *arguments[11:])[0][0, 1])
    passes = ~(x[1] * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) <= 0)
    assert torch.equal(dx[1].isnan(), passes) and not dx[1][~passes].any()


def test_a_masked_residual_drops_its_nan():
    arguments = _arguments(SHAPES["1x1"], torch.float32, False, "masked residual")
    residual, mask = arguments[4:6]
    keep = arithmetic.unpack_bits(mask, residual)
    residual.fill_(float("nan"))
    assert torch.equal(conv_dgrad(*arguments)[0].isnan(), keep)


def test_a_rerun_bit_for_bit():
    shape = problem(1, 16, 9, 8, 16, 3, 3, (2, 1), (1, 1))
    arguments = _arguments(shape, torch.float16, True, "batch norm")
    first, second = (conv_dgrad(*arguments, config=SMALL) for _ in range(2))
    assert all(map(torch.equal, first, second))


DY = torch.zeros(2, 6, 3, 3).contiguous(memory_format=NHWC)
IMAGE = torch.zeros(2, 8, 5, 5).contiguous(memory_format=NHWC)
W = torch.zeros(6, 8, 3, 3)
V = torch.zeros(8)
NORM = {"x": IMAGE, "scale": V, "shift": V, "mean": V, "invstd": V}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dy": DY.double()}, "float64"),
        ({"dy": DY.contiguous()}, "NHWC"),
        ({"dy": DY[:, :, :2]}, "dense"),
        ({"dy": DY[:, :, :2].contiguous(memory_format=NHWC)}, "dy is (2, 6, 2, 3)"),
        ({"weight": W.half()}, "float16"),
        ({"groups": 4}, "groups=4"),
        ({"weight": torch.zeros(6, 8, 16, 3)}, "15x15"),
        ({"size": [2, 5]}, "larger than the padded image"),
        ({"size": [6, 5]}, "(6, 5)"),
        ({"stride": [2, 2], "dilation": [2, 2], "size": [9, 9]}, "dilation at stride 1"),
        ({"dy_x": DY}, "only dy_x"),
        ({"dy_coefficients": torch.zeros(3, 6)}, "only dy_coefficients"),
        ({"dy_x": DY.half(), "dy_coefficients": torch.zeros(3, 6)}, "dy_x must be float32"),
        ({"dy_x": DY, "dy_coefficients": torch.zeros(3, 5)}, "[3, 6]"),
        ({"dy_x": DY, "dy_coefficients": torch.zeros(6, 3).t()}, "contiguous"),
        ({"residual": DY}, "residual must be"),
        ({"residual_mask": torch.zeros(50, dtype=torch.uint8)}, "comes with a residual"),
        ({"residual": IMAGE, "residual_mask": torch.zeros(49, dtype=torch.uint8)}, "[50]"),
        ({"residual": IMAGE, "residual_mask": torch.zeros(50)}, "uint8"),
        ({"residual": IMAGE, **NORM}, "exclude each other"),
        ({"x": IMAGE}, "only x"),
        (NORM | {"x": IMAGE.contiguous()}, "x must be"),
        (NORM | {"mean": torch.zeros(7)}, "mean must be a contiguous vector of 8"),
    ],
)
def test_refusals_name_the_value(changes, message):
    names = "dy weight dy_x dy_coefficients residual residual_mask x scale shift mean invstd".split()
    arguments = dict.fromkeys(names) | {"dy": DY, "weight": W}
    arguments |= {"size": [5, 5], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    on_device = {k: placed(v) for k, v in (arguments | changes).items()}
    assert message in refuse("conv_dgrad", *on_device.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, tf32", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("prologue", [False, True])
def test_the_heuristic_returns_only_listed_configurations(prologue, dtype, tf32, arch):
    """What the compile gate compiles is what can be launched."""
    listed = conv_dgrad_configurations(dtype, arch, tf32, prologue=prologue)
    problems = [*SHAPES.values()]
    problems += [
        problem(n, c, size, size, k, r, r, padding=(r // 2, r // 2), groups=groups)
        for n in (1, 32, 256)
        for c, size, k, groups in ((64, 56, 64, 1), (64, 56, 256, 1), (128, 56, 128, 32), (2048, 7, 512, 1))
        for r in (1, 3)
    ]
    for each in problems:
        assert conv_dgrad_heuristic(each, dtype, arch, tf32, prologue=prologue) in listed


def test_what_the_training_family_refuses():
    fits = problem(2, 64, 8, 8, 64, 3, 3, stride=(2, 2), padding=(1, 1), groups=4)
    assert training_refusal(fits, torch.bfloat16) is None
    assert training_refusal(SHAPES["nothing square"], torch.float32) is None
    assert "float64" in training_refusal(fits, torch.float64)
    assert "15x15" in training_refusal(problem(1, 8, 32, 32, 8, 17, 1), torch.float16)
    assert "padded image" in training_refusal(problem(1, 8, 2, 2, 8, 3, 3), torch.float16)
    assert "pixels" in training_refusal(problem(2**20, 1, 64, 64, 1, 1, 1), torch.float16)
    strided = problem(1, 8, 9, 9, 8, 3, 3, stride=(2, 2), padding=(2, 2), dilation=(2, 2))
    assert "stride (2, 2) with dilation (2, 2)" in training_refusal(strided, torch.float16)
    assert "channels" in training_refusal(problem(1, 0, 9, 9, 8, 1, 1), torch.float16)
