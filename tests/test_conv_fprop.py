"""The Triton forward convolution and its epilogue against plain PyTorch and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import assert_within_contract

pytest.importorskip("triton")

from resnet_fused.kernels import conv_fprop, refuse
from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.kernels.conv_fprop import tf32_allowed
from resnet_fused.plan.conv import ConvConfig, ConvShape, conv_fprop_configurations, conv_fprop_heuristic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and triton was imported without TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def _problem(n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return ConvShape(n, c, h, w, k, r, s, stride, padding, dilation, groups)


SHAPES = {
    "1x1": _problem(2, 32, 5, 7, 48, 1, 1),
    "1x1 stride 2, odd image": _problem(2, 32, 7, 9, 40, 1, 1, stride=(2, 2)),
    "3x3": _problem(2, 64, 6, 6, 32, 3, 3, padding=(1, 1)),
    "3x3 stride 2, odd image": _problem(2, 32, 9, 7, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 dilation 2": _problem(1, 16, 7, 6, 20, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "7x7 stem": _problem(1, 3, 19, 17, 24, 7, 7, stride=(2, 2), padding=(3, 3)),
    "one input channel": _problem(2, 1, 6, 5, 17, 3, 3, padding=(1, 1)),
    "channels divide no tile": _problem(2, 35, 5, 5, 65, 3, 3, padding=(1, 1)),
    "more channels than one tile, ragged": _problem(1, 100, 4, 4, 10, 1, 1),
    "1x1 image": _problem(3, 64, 1, 1, 96, 1, 1),
    "1x1 image under 3x3": _problem(1, 16, 1, 1, 16, 3, 3, padding=(1, 1)),
    "image smaller than the filter": _problem(2, 20, 2, 3, 16, 5, 5, padding=(2, 2)),
    "more pixels than one tile": _problem(1, 8, 15, 13, 16, 3, 3, padding=(1, 1)),
    "nothing square": _problem(1, 18, 8, 5, 12, 1, 3, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "4 groups of 8": _problem(2, 32, 6, 6, 32, 3, 3, padding=(1, 1), groups=4),
    "2 groups of 20": _problem(1, 40, 5, 5, 12, 3, 3, stride=(2, 2), padding=(1, 1), groups=2),
    "depthwise": _problem(1, 6, 5, 5, 12, 3, 3, padding=(1, 1), groups=6),
    "empty batch": _problem(0, 16, 5, 5, 16, 3, 3, padding=(1, 1)),
}
# (scale, shift, residual, relu)
EPILOGUES = {
    "plain": (False, False, False, False),
    "relu": (False, False, False, True),
    "scale shift relu": (True, True, False, True),
    "shift residual": (False, True, True, False),
    "scale shift residual relu": (True, True, True, True),
}


def _tensors(shape, dtype):
    fan_in = max(1, shape.c // shape.groups * shape.r * shape.s)
    x = torch.randn(shape.n, shape.c, shape.h, shape.w)
    weight = torch.randn(shape.k, shape.c // shape.groups, shape.r, shape.s) / fan_in**0.5
    residual = torch.randn(shape.n, shape.k, shape.p, shape.q)
    scale, shift = torch.rand(shape.k) + 0.5, torch.randn(shape.k)
    scale[::3] *= -1
    data = (t.to(DEVICE, dtype).contiguous(memory_format=NHWC) for t in (x, weight, residual))
    return (*data, scale.to(DEVICE), shift.to(DEVICE))


def _arguments(shape, x, weight, scale=None, shift=None, residual=None, relu=False):
    steps = [list(step) for step in (shape.stride, shape.padding, shape.dilation)]
    return (x, weight, scale, shift, residual, *steps, shape.groups, relu)


def _plain(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu):
    """What a user writes: every op in the dtype of x."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale.to(x.dtype).view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.to(x.dtype).view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def _double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def _check(arguments, **options):
    assert refuse("conv_fprop", *arguments) is None
    x, y = arguments[0], conv_fprop(*arguments, **options)
    assert y.is_contiguous(memory_format=NHWC) or x.shape[1] == 1
    assert_within_contract(y, _plain(*arguments), _plain(*_double(arguments)), "y")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, dtype):
    shape = SHAPES[name]
    x, weight, residual, scale, shift = _tensors(shape, dtype)
    _check(_arguments(shape, x, weight, scale, shift, residual, relu=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue(epilogue, dtype):
    shape = SHAPES["3x3 stride 2, odd image"]
    x, weight, residual, scale, shift = _tensors(shape, dtype)
    use_scale, use_shift, use_residual, relu = EPILOGUES[epilogue]
    vectors = (scale if use_scale else None, shift if use_shift else None)
    _check(_arguments(shape, x, weight, *vectors, residual if use_residual else None, relu))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_shift_of_the_datas_dtype(dtype):
    shape = SHAPES["1x1"]
    x, weight, _, scale, shift = _tensors(shape, dtype)
    _check(_arguments(shape, x, weight, scale.to(dtype), shift.to(dtype), relu=True))


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
    shape = _problem(1, channels, 7, 6, 20, 3, 3, padding=(1, 1))
    x, weight, residual, scale, shift = _tensors(shape, torch.float16)
    _check(_arguments(shape, x, weight, scale, shift, residual, relu=True), config=config)


def test_a_weight_of_any_strides_and_an_offset_view_of_the_image():
    shape = SHAPES["3x3"]
    x, weight, *_ = _tensors(shape, torch.float16)
    longer = torch.cat([x[:1], x]).contiguous(memory_format=NHWC)[1:]
    expected = conv_fprop(*_arguments(shape, x, weight))
    for other in (weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(conv_fprop(*_arguments(shape, longer, other)), expected)


def test_the_residual_may_be_the_input():
    shape = replace(SHAPES["3x3"], k=64)
    x, weight, _, scale, shift = _tensors(shape, torch.bfloat16)
    before = x.clone()
    _check(_arguments(shape, x, weight, scale, shift, residual=x, relu=True))
    assert torch.equal(x, before)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", ["3x3", "1x1 stride 2, odd image", "7x7 stem", "4 groups of 8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(value, name, relu):
    """Neither padding, masked channels, other groups, nor ReLU adds or swallows one."""
    shape = SHAPES[name]
    x, weight, residual, *_ = _tensors(shape, torch.float32)
    x[0, shape.c - 1, 0, 0] = value
    residual[0, 0, -1, -1] = value
    y = conv_fprop(*_arguments(shape, x, weight, residual=residual, relu=relu))
    truth = _plain(*_double(_arguments(shape, x, weight, residual=residual, relu=relu)))
    assert torch.equal(y.isnan(), truth.isnan())
    assert torch.equal(y.isinf(), truth.isinf())
    reached = int((~truth.isfinite()).sum())
    assert reached < truth.numel()
    assert reached > 0 or (relu and value == -float("inf"))  # the one that ReLU makes zero


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_an_fp16_result_that_overflows_is_inf_and_one_that_does_not_is_not():
    """The accumulator is fp32: only the rounded result can overflow."""
    shape = _problem(1, 64, 2, 2, 16, 1, 1)
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
    arguments = _arguments(shape, torch.zeros_like(x), weight, relu=True)
    assert torch.equal(conv_fprop(*arguments), torch.zeros(2, 32, 6, 6, dtype=torch.float16, device=DEVICE))
    arguments = _arguments(shape, x, weight, relu=True)
    assert torch.equal(conv_fprop(*arguments), conv_fprop(*arguments))


def test_a_one_channel_image_keeps_pytorchs_result_layout():
    """With C = 1 the image is NCHW and NHWC at once; PyTorch's rule looks at the strides of both operands."""
    shape = SHAPES["one input channel"]
    x, weight, *_ = _tensors(shape, torch.float32)
    for image in (x.contiguous(), torch.empty_like(x, memory_format=NHWC).copy_(x)):
        for filters in (weight.contiguous(), weight):
            arguments = _arguments(shape, image, filters)
            assert conv_fprop(*arguments).stride() == _plain(*arguments).stride()


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
    ],
)
def test_refusals_name_the_value(changes, message):
    arguments = {"x": X, "weight": W, "scale": None, "shift": None, "residual": None}
    arguments |= {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "relu": False}
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (arguments | changes).items()}
    assert message in refuse("conv_fprop", *on_device.values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, tf32", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_the_heuristic_returns_only_listed_configurations(arch, dtype, tf32):
    """What the compile gate compiles is what can be launched."""
    listed = conv_fprop_configurations(dtype, arch, tf32)
    problems = [*SHAPES.values()]
    problems += [
        _problem(n, c, size, size, k, r, r, padding=(r // 2, r // 2))
        for n in (1, 32, 256)
        for c, size, k in ((3, 224, 64), (64, 56, 64), (64, 56, 256), (128, 28, 128), (512, 7, 2048), (2048, 7, 512))
        for r in (1, 3)
    ]
    for problem in problems:
        assert conv_fprop_heuristic(problem, dtype, arch, tf32) in listed


def test_the_heuristic_fills_the_gpu_before_it_widens_the_tile():
    wide = conv_fprop_heuristic(_problem(256, 64, 56, 56, 256, 1, 1), torch.float16, 90)
    small = conv_fprop_heuristic(_problem(1, 512, 7, 7, 512, 3, 3, padding=(1, 1)), torch.float16, 90)
    assert wide.block_m * wide.block_n > small.block_m * small.block_n


def test_tf32_follows_pytorchs_switch():
    for precision, allowed in (("tf32", True), ("ieee", False)):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert tf32_allowed() is allowed
