"""The Triton kernels of inference that hold more than one convolution, against plain PyTorch and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from conv_cases import ARCHITECTURES, NHWC, check, every_dtype, launch, problem, runs_kernels, sample, tensors
from op_cases import DEVICE

from resnet_fused.dispatch.conv_chain import (
    chain_refusal,
    conv_chain_configurations,
    conv_chain_heuristic,
    conv_join_configurations,
    conv_join_heuristic,
)
from resnet_fused.ops import OPS, comparison

pytestmark = runs_kernels
NAN, INF = float("nan"), float("inf")
HALVES = [torch.float16, torch.bfloat16]

# The first convolution, outputs of the second, of the third.
CHAINS = {
    "3x3": (problem(2, 32, 5, 7, 32, 3, 3, padding=(1, 1)), 64, 32),
    "3x3 stride 2, odd image": (problem(2, 32, 7, 5, 16, 3, 3, (2, 2), (1, 1)), 128, 16),
    "3x3, another geometry each way": (problem(2, 16, 7, 9, 16, 3, 3, (2, 1), (1, 2), (1, 2)), 32, 16),
    "3x3 dilation 2": (problem(1, 16, 6, 5, 16, 3, 3, (1, 1), (2, 2), (2, 2)), 32, 16),
    "channels divide no tile": (problem(1, 40, 4, 5, 24, 3, 3, padding=(1, 1)), 72, 40),
    "next wider than inner": (problem(1, 16, 4, 4, 16, 1, 1), 64, 128),
    "inner wider than next": (problem(1, 16, 3, 4, 128, 1, 1), 32, 8),
    "no next": (problem(1, 16, 5, 5, 8, 3, 3, padding=(1, 1)), 32, 0),
    "1x1 image": (problem(3, 16, 1, 1, 16, 3, 3, padding=(1, 1)), 32, 16),
    "7x7 image, more pixels than one tile": (problem(2, 16, 7, 7, 16, 3, 3, padding=(1, 1)), 32, 16),
    "unpadded, nothing square": (problem(1, 16, 5, 6, 16, 1, 3, (2, 1)), 32, 16),
    "empty batch": (problem(0, 16, 5, 5, 16, 3, 3, padding=(1, 1)), 32, 16),
}
# The product of x, inputs of the shortcut, its image, its stride.
JOINS = {
    "stride 2": (problem(2, 32, 3, 4, 48, 1, 1), 64, (6, 8), (2, 2)),
    "stride 2, odd image": (problem(2, 16, 4, 3, 40, 1, 1), 32, (7, 5), (2, 2)),
    "stride 1": (problem(1, 64, 5, 5, 64, 1, 1), 32, (5, 5), (1, 1)),
    "channels divide no tile": (problem(1, 35, 5, 3, 33, 1, 1), 21, (5, 3), (1, 1)),
    "one channel": (problem(2, 1, 3, 3, 1, 1, 1), 1, (5, 5), (2, 2)),
    "1x1 image": (problem(3, 32, 1, 1, 16, 1, 1), 16, (2, 1), (2, 2)),
    "7x7 image, more pixels than one tile": (problem(3, 16, 7, 7, 16, 1, 1), 8, (14, 13), (2, 2)),
    "empty batch": (problem(0, 16, 3, 3, 16, 1, 1), 16, (5, 5), (2, 2)),
    "stride 2 down and 3 across": (problem(2, 16, 3, 3, 16, 1, 1), 16, (5, 8), (2, 3)),
}


def _chain(name, dtype, scaled=True):
    shape, outputs, following = CHAINS[name]
    args = sample("conv_chain", shape, dtype, outputs=outputs, following=following)
    if not scaled:
        return args
    scales = {"scale2": args.shift2, "scale3": args.shift3, "scale1": args.shift1}
    return args._replace(**{name: None if v is None else v + 1 for name, v in scales.items()})


def _join(name, dtype, relu=True):
    shape, inputs, image, stride = JOINS[name]
    args = sample("conv_join", shape, dtype, shortcut_channels=inputs, relu=relu)
    shortcut = torch.randn(shape.n, inputs, *image).to(DEVICE, dtype).contiguous(memory_format=NHWC)
    return args._replace(shortcut=shortcut, shortcut_stride=stride)


@pytest.mark.parametrize("scaled", [True, False], ids=["scales", "folded"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain(name, dtype, scaled):
    check("conv_chain", _chain(name, dtype, scaled))


@pytest.mark.parametrize("relu", [True, False])
@every_dtype
@pytest.mark.parametrize("name", JOINS)
def test_every_join(name, dtype, relu):
    check("conv_join", _join(name, dtype, relu))


def _tiles():
    for arch, width in ((90, 64), (90, 128), (86, 128)):
        for config in conv_chain_configurations(width, width, torch.float16, arch):
            yield "conv_chain", config
    joins = (config for dtype in (torch.float32, torch.float16) for config in conv_join_configurations(dtype, 90))
    for config in {(c.block_m, c.block_n, c.block_k): c for c in joins}.values():
        yield "conv_join", config


@pytest.mark.parametrize(
    ("op", "config"),
    list(dict.fromkeys(_tiles())),
    ids=lambda v: v if isinstance(v, str) else f"{v.block_m}x{v.block_n}x{v.block_k} s{v.num_stages}",
)
def test_every_tile(op, config):
    make = _chain if op == "conv_chain" else _join
    for name in ("channels divide no tile", "7x7 image, more pixels than one tile"):
        check(op, make(name, torch.float16), config=config)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, under the interpreter
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "place", [("conv_chain", "x"), ("conv_chain", "residual"), ("conv_join", "x"), ("conv_join", "shortcut")]
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_reach_exactly_the_pixels_that_see_them(value, place, relu):
    """Through ReLUs, padding, and channels that a tile has and the problem has not."""
    op, operand = place
    args = (
        _chain("channels divide no tile", torch.float16)
        if op == "conv_chain"
        else _join("channels divide no tile", torch.float32, relu)
    )
    getattr(args, operand)[0, 0, 0, 0] = value
    truth = tensors(OPS[op].reference(comparison.double(args)))
    for ours, right in zip(tensors(launch(op, args)), truth, strict=True):
        assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf())
        assert right.isfinite().any()
    assert value == -INF or not all(right.isfinite().all() for right in truth)


def test_vectors_of_the_datas_dtype_and_weights_of_any_strides():
    args = _chain("3x3", torch.float16)
    vectors = ("scale2", "shift2", "scale3", "shift3", "scale1", "shift1")
    args = args._replace(**{name: getattr(args, name).half() for name in vectors})
    other = args._replace(weight2=args.weight2.contiguous())
    assert all(map(torch.equal, check("conv_chain", args), check("conv_chain", other)))


def test_the_residual_may_be_the_input():
    args = sample("conv_chain", CHAINS["3x3"][0], torch.bfloat16, outputs=32, following=32)
    args = args._replace(
        x=(x := sample("conv_chain", problem(2, 32, 5, 7, 32, 3, 3, padding=(1, 1)), torch.bfloat16).x), residual=x
    )
    before = x.clone()
    check("conv_chain", args)
    assert torch.equal(x, before)


def test_an_infinite_pixel_meets_no_channel_that_only_a_tile_has():
    """Positive weights, so that infinity stays infinity: a padded channel would make it zero times infinity."""
    args = _chain("channels divide no tile", torch.bfloat16)
    names = ("weight2", "scale2", "weight3", "scale3", "weight1", "scale1")
    args = args._replace(**{name: getattr(args, name).abs() for name in names})
    args.x[0, 1, 0, 0] = INF
    y, following = launch("conv_chain", args)
    assert y[0, :, 0, 0].isposinf().all() and following[0, :, 0, 0].isposinf().all()
    assert not y.isnan().any() and not following.isnan().any()


def test_both_products_share_one_accumulator():
    """The two products cancel, and each alone would overflow the dtype."""
    args = _join("stride 1", torch.float16)
    values = {"x": 100.0, "weight": 100.0, "shortcut": -100.0, "shortcut_weight": 200.0, "shift": 3.0}
    args = args._replace(**{name: torch.full_like(getattr(args, name), value) for name, value in values.items()})
    assert (launch("conv_join", args) == 3.0).all()


def test_a_one_channel_image_gives_nhwc_whatever_its_strides_say():
    """With C = 1 the image is NCHW and NHWC at once."""
    args = sample("conv_join", problem(2, 1, 3, 4, 8, 1, 1), shortcut_channels=1)
    for image in (args.x.contiguous(), torch.empty_like(args.x, memory_format=NHWC).copy_(args.x)):
        check("conv_join", args._replace(x=image, shortcut=image))


def test_they_repeat_bit_for_bit_and_relu_of_zero_is_zero():
    for op, args in (("conv_chain", _chain("3x3", torch.bfloat16)), ("conv_join", _join("stride 2", torch.bfloat16))):
        assert all(map(torch.equal, tensors(launch(op, args)), tensors(launch(op, args))))
        zeros = comparison.map_tensors(args, torch.zeros_like)
        assert not any(t.any() for t in tensors(launch(op, zeros)))


def test_the_chain_refuses_exact_fp32_and_groups():
    shape = problem(1, 64, 8, 8, 64, 3, 3, padding=(1, 1))
    assert chain_refusal(shape, 256, 64, torch.bfloat16) is None
    assert "16-bit" in chain_refusal(shape, 256, 64, torch.float32)
    assert "group" in chain_refusal(replace(shape, groups=2), 256, 64, torch.float16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_chains_heuristic_returns_only_listed_configurations_and_fills_the_gpu(arch):
    blocks = set()
    for batch in (1, 32, 256):
        for size, inner, following in ((56, 64, 64), (56, 64, 128), (28, 128, None), (7, 16, 16)):
            shape = problem(batch, inner, size, size, inner, 3, 3, padding=(1, 1))
            config = conv_chain_heuristic(shape, following, torch.float16, arch)
            assert config in conv_chain_configurations(inner, following, torch.float16, arch)
            blocks.add((batch, config.block_m))
    assert (1, 64) in blocks and (256, 128) in blocks


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, tf32", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_the_joins_heuristic_returns_only_listed_configurations(arch, dtype, tf32):
    listed = conv_join_configurations(dtype, arch, tf32)
    for batch in (1, 256):
        for channels, inputs, size, outputs in ((64, 64, 56, 256), (512, 1024, 7, 2048), (3, 8, 5, 16)):
            shape = problem(batch, channels, size, size, outputs, 1, 1)
            assert conv_join_heuristic(shape, inputs, dtype, arch, tf32) in listed
