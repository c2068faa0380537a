"""The Triton join against plain PyTorch and float64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from conv_cases import placed

pytest.importorskip("triton")

from resnet_fused.contract import in_double
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.conv_chain import (
    conv_join_configurations,
    conv_join_heuristic,
)
from resnet_fused.kernels import conv_join, refuse
from resnet_fused.kernels._launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and triton was imported without TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def _activation(dtype, *shape):
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=NHWC)


def _weight(dtype, outputs, inputs):
    return _activation(dtype, outputs, inputs, 1, 1) / inputs**0.5


# x [N, C, P, Q], inputs of the shortcut, its image, outputs, its stride
JOINS = {
    "stride 2": ((2, 32, 3, 4), 64, (6, 8), 48, [2, 2]),
    "stride 2, odd image": ((2, 16, 4, 3), 32, (7, 5), 40, [2, 2]),
    "stride 1": ((1, 64, 5, 5), 32, (5, 5), 64, [1, 1]),
    "channels divide no tile": ((1, 35, 5, 3), 21, (5, 3), 33, [1, 1]),
    "one channel": ((2, 1, 3, 3), 1, (5, 5), 1, [2, 2]),
    "1x1 image": ((3, 32, 1, 1), 16, (2, 1), 16, [2, 2]),
    "7x7 image, more pixels than one tile": ((3, 16, 7, 7), 8, (14, 13), 16, [2, 2]),
    "empty batch": ((0, 16, 3, 3), 16, (5, 5), 16, [2, 2]),
    "stride 2 down and 3 across": ((2, 16, 3, 3), 16, (5, 8), 16, [2, 3]),
}


def _arguments(name, dtype, relu=True):
    size, inputs, image, outputs, stride = JOINS[name]
    x, shortcut = _activation(dtype, *size), _activation(dtype, size[0], inputs, *image)
    weights = _weight(dtype, outputs, size[1]), _weight(dtype, outputs, inputs)
    return (x, weights[0], shortcut, weights[1], torch.randn(outputs).to(DEVICE), stride, relu)


def _plain(x, weight, shortcut, shortcut_weight, shift, stride, relu):
    y = F.conv2d(x, weight) + F.conv2d(shortcut, shortcut_weight, None, stride) + shift.to(x.dtype).view(-1, 1, 1)
    return y.relu() if relu else y


def _check(arguments, **options):
    assert refuse("conv_join", *arguments) is None
    y = conv_join(*arguments, **options)
    assert y.is_contiguous(memory_format=NHWC)
    assert_no_worse(y, _plain, arguments, "y", addends=arguments[1][:1].numel() + arguments[3][:1].numel())
    return y


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", JOINS)
def test_every_join(name, dtype, relu):
    _check(_arguments(name, dtype, relu))


def _tiles():
    configs = (config for dtype in (torch.float32, torch.float16) for config in conv_join_configurations(dtype, 90))
    return list({(c.block_m, c.block_n, c.block_k): c for c in configs}.values())


@pytest.mark.parametrize("config", _tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
def test_every_tile_of_the_join(config: ConvConfig):
    _check(_arguments("channels divide no tile", torch.float16), config=config)
    _check(_arguments("7x7 image, more pixels than one tile", torch.float16), config=config)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("place", [0, 2], ids=["x", "shortcut"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(value, place, relu):
    for name in ("stride 2, odd image", "channels divide no tile"):
        arguments = _arguments(name, torch.float32, relu)
        arguments[place][0, 0, 0, 0] = value
        y, truth = conv_join(*arguments), _plain(*in_double(arguments))
        assert torch.equal(y.isnan(), truth.isnan())
        assert torch.equal(y.isinf(), truth.isinf())
        assert truth.isfinite().any() and not truth.isfinite().all()


def test_both_products_share_one_accumulator():
    """The two products cancel, and each alone would overflow the dtype."""
    arguments = list(_arguments("stride 1", torch.float16))
    arguments[0].fill_(100.0)
    arguments[1].fill_(100.0)
    arguments[2].fill_(-100.0)
    arguments[3].fill_(200.0)
    arguments[4].fill_(3.0)
    assert torch.equal(conv_join(*arguments), torch.full_like(arguments[0], 3.0))


def test_a_one_channel_image_gives_nhwc_whatever_its_strides_say():
    """With C = 1 the image is NCHW and NHWC at once."""
    x, weight, shift = (
        _activation(torch.float32, 2, 1, 3, 4),
        _weight(torch.float32, 8, 1),
        torch.zeros(8, device=DEVICE),
    )
    for image in (x.contiguous(), torch.empty_like(x, memory_format=NHWC).copy_(x)):
        y = conv_join(image, weight, image, weight, shift, [1, 1], True)
        assert y.is_contiguous(memory_format=NHWC)
        torch.testing.assert_close(y, F.relu(2 * F.conv2d(image, weight)))


def test_the_join_repeats_bit_for_bit():
    arguments = _arguments("stride 2", torch.bfloat16)
    assert torch.equal(conv_join(*arguments), conv_join(*arguments))


J = {
    "x": torch.zeros(1, 16, 3, 3).contiguous(memory_format=NHWC),
    "weight": torch.zeros(32, 16, 1, 1),
    "shortcut": torch.zeros(1, 8, 5, 5).contiguous(memory_format=NHWC),
    "shortcut_weight": torch.zeros(32, 8, 1, 1),
    "shift": torch.zeros(32),
    "shortcut_stride": [2, 2],
    "relu": True,
}


def _on_device(arguments):
    return [placed(v) for v in arguments.values()]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": J["x"].contiguous()}, "NHWC"),
        ({"x": J["x"].double()}, "float64"),
        ({"weight": torch.zeros(32, 8, 1, 1)}, "weight must be"),
        ({"weight": torch.zeros(32, 16, 3, 3)}, "weight must be"),
        ({"shortcut": J["shortcut"].half(), "shortcut_weight": torch.zeros(32, 8, 1, 1).half()}, "shortcut must be"),
        ({"shortcut_weight": torch.zeros(16, 8, 1, 1)}, "shortcut_weight"),
        (
            {"x": _activation(torch.float32, 1, 0, 3, 3), "weight": torch.zeros(32, 0, 1, 1)},
            "weight must be [outputs, 0, 1, 1]",
        ),
        (
            {"shortcut": _activation(torch.float32, 1, 0, 5, 5), "shortcut_weight": torch.zeros(32, 0, 1, 1)},
            "shortcut_weight must be",
        ),
        ({"shortcut_stride": [1, 2]}, "stride (1, 2)"),
        ({"shift": torch.zeros(16)}, "shift"),
    ],
)
def test_refusals_name_the_value(changes, message):
    assert refuse("conv_join", *_on_device(J)) is None
    assert message in refuse("conv_join", *_on_device(J | changes))


@pytest.mark.parametrize("batch, bits", [(64, "int32"), (16384, "int64")])
def test_offsets_are_64_bit_where_a_tensor_has_more_than_2_31_elements(batch, bits, monkeypatch):
    launches = []
    module = sys.modules[conv_join.__module__]
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append(options))
    x, weight = (
        torch.empty(shape, dtype=torch.float16, device="meta", memory_format=NHWC)
        for shape in ((batch, 64, 56, 56), (256, 64, 1, 1))
    )
    shift = torch.empty(256, device="meta")
    conv_join(x, weight, x, weight, shift, [1, 1], True, config=ConvConfig(128, 128, 32, 8, 3))
    assert str(launches[0]["INDEX"]) == bits


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, tf32", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_the_heuristic_returns_only_listed_configurations(arch, dtype, tf32):
    listed = conv_join_configurations(dtype, arch, tf32)
    for batch, (channels, inputs, size, outputs) in (
        (batch, layer) for batch in (1, 256) for layer in ((64, 64, 56, 256), (512, 1024, 7, 2048), (3, 8, 5, 16))
    ):
        shape = ConvShape(batch, channels, size, size, outputs, 1, 1)
        assert conv_join_heuristic(shape, inputs, dtype, arch, tf32) in listed
