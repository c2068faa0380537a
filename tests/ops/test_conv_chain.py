"""The Triton inference chain against plain PyTorch and float64."""

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
    chain_refusal,
    conv_chain_configurations,
    conv_chain_heuristic,
)
from resnet_fused.kernels import conv_chain, refuse
from resnet_fused.kernels._launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]
NHWC = torch.channels_last
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and triton was imported without TRITON_INTERPRET=1"
)


def _activation(dtype, *shape):
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=NHWC)


def _weight(dtype, outputs, inputs, *filter_size):
    size = filter_size or (1, 1)
    return _activation(dtype, outputs, inputs, *size) / (inputs * size[0] * size[1]) ** 0.5


def _affine(channels):
    scale = torch.rand(channels) + 0.5
    scale[::3] *= -1
    return scale.to(DEVICE), torch.randn(channels).to(DEVICE)


# The first convolution, outputs of the second, of the third.
CHAINS = {
    "3x3": (ConvShape(2, 32, 5, 7, 32, 3, 3, padding=(1, 1)), 64, 32),
    "3x3 stride 2, odd image": (ConvShape(2, 32, 7, 5, 16, 3, 3, (2, 2), (1, 1)), 128, 16),
    "3x3, another geometry each way": (ConvShape(2, 16, 7, 9, 16, 3, 3, (2, 1), (1, 2), (1, 2)), 32, 16),
    "3x3 dilation 2": (ConvShape(1, 16, 6, 5, 16, 3, 3, (1, 1), (2, 2), (2, 2)), 32, 16),
    "channels divide no tile": (ConvShape(1, 40, 4, 5, 24, 3, 3, padding=(1, 1)), 72, 40),
    "next wider than inner": (ConvShape(1, 16, 4, 4, 16, 1, 1), 64, 128),
    "inner wider than next": (ConvShape(1, 16, 3, 4, 128, 1, 1), 32, 8),
    "no next": (ConvShape(1, 16, 5, 5, 8, 3, 3, padding=(1, 1)), 32, None),
    "1x1 image": (ConvShape(3, 16, 1, 1, 16, 3, 3, padding=(1, 1)), 32, 16),
    "7x7 image, more pixels than one tile": (ConvShape(2, 16, 7, 7, 16, 3, 3, padding=(1, 1)), 32, 16),
    "unpadded, nothing square": (ConvShape(1, 16, 5, 6, 16, 1, 3, (2, 1)), 32, 16),
    "empty batch": (ConvShape(0, 16, 5, 5, 16, 3, 3, padding=(1, 1)), 32, 16),
}


def _chain_arguments(name, dtype, scales=True):
    shape, outputs, following = CHAINS[name]
    x, residual = (
        _activation(dtype, shape.n, *size) for size in ((shape.c, shape.h, shape.w), (outputs, shape.p, shape.q))
    )
    weights = _weight(dtype, shape.k, shape.c, shape.r, shape.s), _weight(dtype, outputs, shape.k)
    (scale2, shift2), (scale3, shift3) = _affine(shape.k), _affine(outputs)
    head = (None, None, None)
    if following is not None:
        scale1, shift1 = _affine(following)
        head = (_weight(dtype, following, outputs), scale1 if scales else None, shift1)
    affine = ((scale2, shift2), (scale3, shift3)) if scales else ((None, shift2), (None, shift3))
    steps = [list(step) for step in (shape.stride, shape.padding, shape.dilation)]
    return (x, weights[0], *affine[0], weights[1], *affine[1], residual, *head, *steps)


def _plain_chain(x, weight2, scale2, shift2, weight3, scale3, shift3, residual, weight1, scale1, shift1, *geometry):
    """What a user writes: every op in the dtype of x."""

    def affine(y, scale, shift):
        scaled = y if scale is None else y * scale.to(y.dtype).view(-1, 1, 1)
        return scaled + shift.to(y.dtype).view(-1, 1, 1)

    a = affine(F.conv2d(x, weight2, None, *geometry), scale2, shift2).relu()
    y = (affine(F.conv2d(a, weight3), scale3, shift3) + residual).relu()
    return y, None if weight1 is None else affine(F.conv2d(y, weight1), scale1, shift1).relu()


def _check_chain(arguments, **options):
    assert refuse("conv_chain", *arguments) is None
    results = conv_chain(*arguments, **options)
    y, following = results
    if arguments[8] is None:
        assert following.numel() == 0
        following = None
    assert all(v is None or v.is_contiguous(memory_format=NHWC) for v in (y, following))
    addends = max(w[:1].numel() for w in (arguments[1], arguments[4], arguments[8]) if w is not None)
    assert_no_worse([y, following], _plain_chain, arguments, addends=addends)
    return results


@pytest.mark.parametrize("scales", [True, False], ids=["scales", "folded"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain(name, dtype, scales):
    _check_chain(_chain_arguments(name, dtype, scales))


def _chain_tiles():
    found = [
        config
        for arch, width in ((90, 64), (90, 128), (86, 128))
        for config in conv_chain_configurations(width, width, torch.float16, arch)
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("config", _chain_tiles(), ids=lambda c: f"{c.block_m}x{c.block_n} s{c.num_stages}")
def test_every_tile_of_the_chain(config: ConvConfig):
    for name in ("channels divide no tile", "3x3 stride 2, odd image"):
        _check_chain(_chain_arguments(name, torch.float16), config=config)


def test_vectors_of_the_datas_dtype_and_weights_of_any_strides():
    arguments = list(_chain_arguments("3x3", torch.float16))
    for place in (2, 3, 5, 6, 9, 10):
        arguments[place] = arguments[place].half()
    expected = conv_chain(*arguments)
    arguments[1] = arguments[1].contiguous()
    for actual, other in zip(conv_chain(*arguments), expected, strict=True):
        assert torch.equal(actual, other)
    _check_chain(arguments)


def test_the_residual_may_be_the_input():
    arguments = list(_chain_arguments("3x3", torch.bfloat16))
    arguments[4] = arguments[4][:32].contiguous(memory_format=NHWC)
    arguments[5], arguments[6] = arguments[5][:32], arguments[6][:32]
    arguments[7], arguments[8] = arguments[0], arguments[8][:, :32].contiguous(memory_format=NHWC)
    before = arguments[0].clone()
    _check_chain(arguments)
    assert torch.equal(arguments[0], before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, under the interpreter
@pytest.mark.parametrize("name", ["3x3", "channels divide no tile"])
@pytest.mark.parametrize("place", [0, 7], ids=["x", "residual"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(value, place, name):
    """Through two ReLUs, padding, and channels that a tile has and the problem has not."""
    arguments = _chain_arguments(name, torch.float16)
    arguments[place][0, 1, 0, 0] = value
    for actual, truth in zip(conv_chain(*arguments), _plain_chain(*in_double(arguments)), strict=True):
        assert torch.equal(actual.isnan(), truth.isnan())
        assert torch.equal(actual.isinf(), truth.isinf())
        assert truth.isfinite().any()


def test_an_infinite_pixel_meets_no_channel_that_only_a_tile_has():
    """Positive weights, so that infinity stays infinity: a padded channel would make it zero times infinity."""
    arguments = list(_chain_arguments("channels divide no tile", torch.bfloat16))
    for place in (1, 2, 4, 5, 8, 9):
        arguments[place] = arguments[place].abs()
    arguments[0][0, 1, 0, 0] = INF
    y, following = conv_chain(*arguments)
    assert y[0, :, 0, 0].isposinf().all() and following[0, :, 0, 0].isposinf().all()
    assert not y.isnan().any() and not following.isnan().any()


def test_relu_of_zero_is_zero_and_the_chain_repeats_bit_for_bit():
    arguments = _chain_arguments("3x3", torch.bfloat16)
    for a, b in zip(conv_chain(*arguments), conv_chain(*arguments), strict=True):
        assert torch.equal(a, b)
    zeros = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert all(not y.any() for y in conv_chain(*zeros))


C = {
    "x": torch.zeros(1, 16, 4, 4).half().contiguous(memory_format=NHWC),
    "weight2": torch.zeros(16, 16, 3, 3).half(),
    "scale2": torch.zeros(16),
    "shift2": torch.zeros(16),
    "weight3": torch.zeros(32, 16, 1, 1).half(),
    "scale3": None,
    "shift3": torch.zeros(32),
    "residual": torch.zeros(1, 32, 4, 4).half().contiguous(memory_format=NHWC),
    "weight1": torch.zeros(8, 32, 1, 1).half(),
    "scale1": None,
    "shift1": torch.zeros(8),
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
}


def _on_device(arguments):
    return [placed(v) for v in arguments.values()]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": C["x"].contiguous()}, "NHWC"),
        ({"x": C["x"].float()}, "float16"),
        ({"weight2": torch.zeros(16, 8, 3, 3).half()}, "16 input channels"),
        ({"weight2": torch.zeros(136, 16, 3, 3).half(), "weight3": torch.zeros(32, 136, 1, 1).half()}, "136"),
        ({"weight2": torch.zeros(12, 16, 3, 3).half(), "weight3": torch.zeros(32, 12, 1, 1).half()}, "multiples of 8"),
        ({"weight3": torch.zeros(32, 16, 3, 3).half()}, "weight3"),
        ({"weight1": torch.zeros(8, 16, 1, 1).half()}, "weight1"),
        ({"weight1": torch.zeros(256, 32, 1, 1).half(), "shift1": torch.zeros(256)}, "256"),
        ({"shift1": None}, "shift1"),
        ({"weight1": None}, "weight1"),
        ({"residual": torch.zeros(1, 32, 2, 2).half().contiguous(memory_format=NHWC)}, "(1, 32, 4, 4)"),
        ({"scale2": torch.zeros(8)}, "scale2"),
        ({"shift3": torch.zeros(64)[::2]}, "shift3"),
        ({"padding": [0, 0], "dilation": [2, 2]}, "larger than the padded image"),
    ],
)
def test_refusals_of_the_chain_name_the_value(changes, message):
    assert refuse("conv_chain", *_on_device(C)) is None
    assert message in refuse("conv_chain", *_on_device(C | changes))


def test_the_chain_refuses_exact_fp32_and_groups():
    shape = ConvShape(1, 64, 8, 8, 64, 3, 3, padding=(1, 1))
    assert chain_refusal(shape, 256, 64, torch.bfloat16) is None
    assert "16-bit" in chain_refusal(shape, 256, 64, torch.float32)
    assert "group" in chain_refusal(ConvShape(1, 64, 8, 8, 64, 3, 3, padding=(1, 1), groups=2), 256, 64, torch.float16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_chains_heuristic_returns_only_listed_configurations_and_fills_the_gpu(arch):
    blocks = set()
    for batch in (1, 32, 256):
        for size, inner, following in ((56, 64, 64), (56, 64, 128), (28, 128, None), (7, 16, 16)):
            shape = ConvShape(batch, inner, size, size, inner, 3, 3, padding=(1, 1))
            config = conv_chain_heuristic(shape, following, torch.float16, arch)
            assert config in conv_chain_configurations(inner, following, torch.float16, arch)
            blocks.add((batch, config.block_m))
    assert (1, 64) in blocks and (256, 128) in blocks


@pytest.mark.parametrize("batch, bits", [(64, "int32"), (16384, "int64")])
def test_offsets_are_64_bit_where_a_tensor_has_more_than_2_31_elements(batch, bits, monkeypatch):
    launches = []
    module = sys.modules[conv_chain.__module__]
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append(options))

    def meta(*shape):
        return torch.empty(shape, dtype=torch.float16, device="meta", memory_format=NHWC)

    x, residual = meta(batch, 64, 56, 56), meta(batch, 256, 56, 56)
    w2, w3, w1, v = meta(64, 64, 3, 3), meta(256, 64, 1, 1), meta(64, 256, 1, 1), torch.empty(256, device="meta")
    config = ConvConfig(128, 64, 32, 8, 3)
    conv_chain(x, w2, None, v, w3, None, v, residual, w1, None, v, [1, 1], [1, 1], [1, 1], config=config)
    assert str(launches[0]["INDEX"]) == bits
