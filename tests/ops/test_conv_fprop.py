"""The Triton forward convolution and its epilogue against plain PyTorch and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse

pytest.importorskip("triton")

from conv_cases import (
    ARCHITECTURES,
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
    output,
    placed,
    problem,
    runs_kernels,
)

from resnet_fused.contract import in_double
from resnet_fused.dispatch.conv import ConvConfig, conv_fprop_configurations, conv_fprop_heuristic, tf32_allowed
from resnet_fused.kernels import conv_fprop, refuse

pytestmark = [runs_kernels, pytest.mark.usefixtures("exact_fp32")]

# (scale, shift, residual, activation)
EPILOGUES = {
    "plain": (False, False, False, None),
    "relu": (False, False, False, "relu"),
    "scale shift relu": (True, True, False, "relu"),
    "shift residual": (False, True, True, None),
    "scale shift residual relu": (True, True, True, "relu"),
    "scale shift residual silu": (True, True, True, "silu"),
    "shift hardswish": (False, True, False, "hardswish"),
}


def _tensors(shape, dtype):
    return image(shape, dtype), filters(shape, dtype), output(shape, dtype), *affine(shape.k)


def _arguments(shape, x, weight, scale=None, shift=None, residual=None, act=None):
    return (x, weight, scale, shift, residual, *geometry(shape), act)


def _plain(x, weight, scale, shift, residual, stride, padding, dilation, groups, act):
    """What a user writes: every op in the dtype of x."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale.to(x.dtype).view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.to(x.dtype).view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual
    return y if act is None else getattr(F, act)(y)


def _check(arguments, **options):
    assert refuse("conv_fprop", *arguments) is None
    x, y = arguments[0], conv_fprop(*arguments, **options)
    assert y.is_contiguous(memory_format=NHWC) or x.shape[1] == 1
    assert_no_worse(y, _plain, arguments, "y", addends=arguments[1][:1].numel())
    return y


@every_dtype
@every_shape
def test_every_shape(name, dtype):
    shape = SHAPES[name]
    x, weight, residual, scale, shift = _tensors(shape, dtype)
    _check(_arguments(shape, x, weight, scale, shift, residual, act="relu"))


@every_dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue(epilogue, dtype):
    shape = SHAPES["3x3 stride 2, odd image"]
    x, weight, residual, scale, shift = _tensors(shape, dtype)
    use_scale, use_shift, use_residual, act = EPILOGUES[epilogue]
    vectors = (scale if use_scale else None, shift if use_shift else None)
    _check(_arguments(shape, x, weight, *vectors, residual if use_residual else None, act))


@every_dtype
def test_scale_and_shift_of_the_datas_dtype(dtype):
    shape = SHAPES["1x1"]
    x, weight, _, scale, shift = _tensors(shape, dtype)
    _check(_arguments(shape, x, weight, scale.to(dtype), shift.to(dtype), act="relu"))


def _tiles():
    seen = {}
    for dtype in (torch.float32, torch.float16):
        for config in conv_fprop_configurations(dtype, 90):
            seen.setdefault((config.block_m, config.block_n, config.block_k, config.flat), config)
    return list(seen.values())


@pytest.mark.parametrize("config", _tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}{' flat' * c.flat}")
def test_every_tile(config: ConvConfig):
    """The result does not depend on the tile, also where the reduction is not a multiple of it."""
    channels = 7 if config.flat else config.block_k + 8
    shape = problem(1, channels, 7, 6, 20, 3, 3, padding=(1, 1))
    x, weight, residual, scale, shift = _tensors(shape, torch.float16)
    _check(_arguments(shape, x, weight, scale, shift, residual, act="relu"), config=config)


def test_a_weight_of_any_strides_and_an_offset_view_of_the_image():
    shape = SHAPES["3x3"]
    x, weight, *_ = _tensors(shape, torch.float16)
    longer = torch.cat([x[:1], x]).contiguous(memory_format=NHWC)[1:]
    expected = conv_fprop(*_arguments(shape, x, weight))
    for other in (weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(conv_fprop(*_arguments(shape, longer, other)), expected)


def test_the_residual_may_be_the_input():
    shape = replace(SHAPES["3x3"], k=32)
    x, weight, _, scale, shift = _tensors(shape, torch.bfloat16)
    before = x.clone()
    _check(_arguments(shape, x, weight, scale, shift, residual=x, act="relu"))
    assert torch.equal(x, before)


@pytest.mark.parametrize("act", [None, "relu", "silu", "hardswish"])
@pytest.mark.parametrize("name", ["3x3", "1x1 stride 2, odd image", "7x7 stem", "4 groups of 8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(value, name, act):
    """Neither padding, masked channels, other groups, nor an activation adds or swallows one."""
    shape = SHAPES[name]
    x, weight, residual, *_ = _tensors(shape, torch.float32)
    x[0, shape.c - 1, 0, 0] = value
    residual[0, 0, -1, -1] = value
    y = conv_fprop(*_arguments(shape, x, weight, residual=residual, act=act))
    truth = _plain(*in_double(_arguments(shape, x, weight, residual=residual, act=act)))
    assert torch.equal(y.isnan(), truth.isnan())
    assert torch.equal(y.isinf(), truth.isinf())
    reached = int((~truth.isfinite()).sum())
    assert reached < truth.numel()
    assert reached > 0 or (act == "relu" and value == -float("inf"))  # the one that ReLU makes zero


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_an_fp16_result_that_overflows_is_inf_and_one_that_does_not_is_not():
    """The accumulator is fp32: only the rounded result can overflow."""
    shape = problem(1, 64, 2, 2, 16, 1, 1)
    x = torch.full((1, 64, 2, 2), 500.0, device=DEVICE, dtype=torch.float16).contiguous(memory_format=NHWC)
    weight = torch.full((16, 64, 1, 1), 4.0, device=DEVICE, dtype=torch.float16)  # 128,000 before the scale
    scale = torch.full((16,), 0.5, device=DEVICE)
    assert torch.equal(
        conv_fprop(*_arguments(shape, x, weight, scale)), torch.full((1, 16, 2, 2), 64000.0, device=DEVICE).half()
    )
    assert conv_fprop(*_arguments(shape, x, weight)).isposinf().all()


def test_relu_of_zero_is_zero_and_the_result_repeats_bit_for_bit():
    shape = SHAPES["3x3"]
    x, weight, *_ = _tensors(shape, torch.float16)
    arguments = _arguments(shape, torch.zeros_like(x), weight, act="relu")
    assert torch.equal(conv_fprop(*arguments), torch.zeros(2, 24, 4, 5, dtype=torch.float16, device=DEVICE))
    arguments = _arguments(shape, x, weight, act="relu")
    assert torch.equal(conv_fprop(*arguments), conv_fprop(*arguments))


def test_a_one_channel_image_gives_nhwc_whatever_its_strides_say():
    """With C = 1 the image is NCHW and NHWC at once."""
    shape = SHAPES["one input channel"]
    x, weight, *_ = _tensors(shape, torch.float32)
    for one_x in (x.contiguous(), torch.empty_like(x, memory_format=NHWC).copy_(x)):
        for one_weight in (weight.contiguous(), weight):
            arguments = _arguments(shape, one_x, one_weight)
            y = conv_fprop(*arguments)
            assert y.is_contiguous(memory_format=NHWC)
            torch.testing.assert_close(y, _plain(*arguments))


X = torch.zeros(2, 8, 5, 5).contiguous(memory_format=NHWC)
W = torch.zeros(6, 8, 3, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": X.double()}, "float64"),
        ({"x": X[0]}, "4-D"),
        ({"x": X.contiguous()}, "NHWC"),
        ({"x": X[:, :, ::2]}, "dense"),
        ({"weight": W.half()}, "float16"),
        ({"weight": W[0]}, "3-D"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, "do not fit 8 input channels"),
        ({"groups": 4}, "groups=4"),
        ({"weight": torch.zeros(6, 8, 16, 3)}, "15x15"),
        ({"weight": torch.zeros(6, 8, 7, 3)}, "larger than the padded image"),
        ({"residual": torch.zeros(2, 6, 5, 5).contiguous(memory_format=NHWC)}, "residual"),
        ({"residual": torch.zeros(2, 6, 3, 3)}, "residual"),
        ({"scale": torch.zeros(5)}, "scale"),
        ({"shift": torch.zeros(12)[::2]}, "shift"),
        ({"act": "gelu"}, "no activation 'gelu'; choose one of relu, silu, hardswish"),
    ],
)
def test_refusals_name_the_value(changes, message):
    arguments = {"x": X, "weight": W, "scale": None, "shift": None, "residual": None}
    arguments |= {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "act": None}
    on_device = {k: placed(v) for k, v in (arguments | changes).items()}
    assert message in refuse("conv_fprop", *on_device.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, tf32", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("prologue", [False, True])
def test_the_heuristic_returns_only_listed_configurations(prologue, dtype, tf32, arch):
    """What the compile gate compiles is what can be launched."""
    listed = conv_fprop_configurations(dtype, arch, tf32, prologue=prologue)
    problems = [*SHAPES.values()]
    problems += [
        problem(n, c, size, size, k, r, r, padding=(r // 2, r // 2))
        for n in (1, 32, 256)
        for c, size, k in ((3, 224, 64), (64, 56, 64), (64, 56, 256), (128, 28, 128), (512, 7, 2048), (2048, 7, 512))
        for r in (1, 3)
    ]
    for each in problems:
        assert conv_fprop_heuristic(each, dtype, arch, tf32, prologue=prologue) in listed


def test_the_heuristic_fills_the_gpu_before_it_widens_the_tile():
    wide = conv_fprop_heuristic(problem(256, 64, 56, 56, 256, 1, 1), torch.float16, 90)
    small = conv_fprop_heuristic(problem(1, 512, 7, 7, 512, 3, 3, padding=(1, 1)), torch.float16, 90)
    assert wide.block_m * wide.block_n > small.block_m * small.block_n


def test_tf32_follows_pytorchs_switch():
    for precision, allowed in (("tf32", True), ("ieee", False)):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert tf32_allowed() is allowed
