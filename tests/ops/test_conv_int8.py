"""What the matrices of all ops do not see of the int8 convolutions: exact sums, padding, rounding to even."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conv_cases import SHAPES, SMALL, check, launch, problem, runs_kernels, sample

pytest.importorskip("triton")

from resnet_fused.dispatch import choice
from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.dispatch.conv_chain import conv_join_configurations
from resnet_fused.dispatch.table import Problem, from_json
from resnet_fused.ops import OPS
from resnet_fused.ops.refusals import MAX_PRODUCTS

pytestmark = runs_kernels
NARROW = replace(SMALL, block_k=32)
JOINS = {  # of x, channels of the shortcut, its stride
    "stride 1": (problem(2, 16, 4, 5, 32, 1, 1), 24, 1),
    "stride 2": (problem(1, 64, 4, 3, 48, 1, 1), 32, 2),
    "channels divide no tile": (problem(1, 35, 3, 3, 65, 1, 1), 7, 1),
    "more pixels than one tile": (problem(2, 24, 7, 7, 40, 1, 1), 48, 1),
    "empty batch": (problem(0, 16, 3, 3, 16, 1, 1), 16, 1),
}


def _plain(args, act=None):
    """Sums alone: whole numbers, not rounded to 8 bits."""
    one = {name: torch.ones_like(v) for name, v in args._asdict().items() if name in ("scale", "shortcut_scale")}
    rest = {"act": act} if "act" in args._fields else {"relu": False}
    return args._replace(**one, shift=torch.zeros_like(args.shift), dtype=torch.float32, **rest)


def _centred(args):
    """`args` with the offset that the zero of x asks for, and the sums of x less that zero in int64."""
    centred = args.x.double() - args.x_zero.double().view(1, -1, 1, 1)
    stride, padding, dilation, groups = args.stride, args.padding, args.dilation, args.groups
    zeros = args.x_zero.double().view(groups, 1, -1, 1, 1)
    weight = args.weight.double()
    offset = -(weight.view(groups, -1, *weight.shape[1:]) * zeros).sum((2, 3, 4)).flatten()
    sums = F.conv2d(centred, weight, None, stride, padding, dilation, groups)
    return args._replace(offset=offset.to(torch.int32)), sums


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "empty batch"])
def test_sums_are_whole_numbers_and_padding_is_zero(name):
    """Whatever stands for zero: the sums are those of the activation less it, bit for bit, at the edges too."""
    args, sums = _centred(sample("conv_fprop_int8", SHAPES[name]))
    assert sums.abs().max() < 2**24  # which fp32 has all
    assert torch.equal(launch("conv_fprop_int8", _plain(args)).double(), sums)


def test_the_largest_sum_fits():
    args = _plain(sample("conv_fprop_int8", problem(1, MAX_PRODUCTS, 1, 1, 16, 1, 1)))
    args = args._replace(**{name: torch.full_like(getattr(args, name), -128) for name in ("x", "weight")})
    args = args._replace(
        x_zero=torch.full_like(args.x_zero, 127), offset=torch.full_like(args.offset, 127 * 128 * 2**16)
    )
    y = launch("conv_fprop_int8", args, ConvConfig(16, 16, 4096, 4, 2))
    assert (y == 255 * 128 * 2.0**16).all()


def test_halves_are_rounded_to_even_and_what_is_beyond_to_the_ends():
    args = sample("conv_fprop_int8", problem(1, 16, 8, 8, 16, 1, 1), act=None)
    args = args._replace(
        weight=torch.eye(16, dtype=torch.int8, device=args.x.device)[:, :, None, None].contiguous(),
        offset=torch.zeros_like(args.offset),
        scale=torch.full_like(args.scale, 0.5),
        shift=torch.zeros_like(args.shift),
        y_scale=1.0,
        y_zero=0,
    )
    assert torch.equal(launch("conv_fprop_int8", args), (args.x.float() / 2).round().to(torch.int8))
    wide = args._replace(scale=torch.full_like(args.scale, 1e30))
    expected = torch.where(args.x > 0, 127, torch.where(args.x < 0, -128, 0)).to(torch.int8)
    assert torch.equal(launch("conv_fprop_int8", wide), expected)


def test_the_residual_may_be_the_input():
    args = sample("conv_fprop_int8", replace(SHAPES["3x3"], k=32))
    before = args.x.clone()
    check("conv_fprop_int8", args._replace(residual=args.x))
    assert torch.equal(args.x, before)


@pytest.mark.parametrize("options", [{}, {"relu": False}, {"rounded": False}], ids=str)
@pytest.mark.parametrize("name", JOINS)
def test_every_join(name, options):
    shape, channels, stride = JOINS[name]
    chosen = {"shortcut_channels": channels, "shortcut_stride": stride, **options}
    check("conv_join_int8", sample("conv_join_int8", shape, torch.bfloat16, **chosen))


@pytest.mark.parametrize("config", conv_join_configurations(torch.int8, 90), ids=str)
def test_every_tile_of_a_join(config):
    shape, channels, stride = JOINS["channels divide no tile"]
    args = sample("conv_join_int8", shape, shortcut_channels=channels, shortcut_stride=stride)
    check("conv_join_int8", args, config=config)


def test_each_sum_of_a_join_has_its_own_scale():
    """They cancel, and each alone is beyond the grid."""
    args = sample("conv_join_int8", JOINS["stride 1"][0], shortcut_channels=16, relu=False)
    same = {"shortcut": args.x, "shortcut_weight": args.weight, "shortcut_offset": args.offset}
    args = args._replace(**same, scale=torch.ones_like(args.scale), shortcut_scale=-torch.ones_like(args.scale))
    args = args._replace(shift=torch.full_like(args.shift, 2.0))
    assert (launch("conv_join_int8", args, config=NARROW) == round(2.0 / args.y_scale) + args.y_zero).all()


def test_a_join_is_the_sequence_of_its_convolutions_but_for_a_rounding():
    shape, channels, stride = JOINS["stride 2"]
    args = sample("conv_join_int8", shape, shortcut_channels=channels, shortcut_stride=stride)._replace(y_scale=0.1)
    apart = OPS["conv_join_int8"].sequence(args, lambda a: launch("conv_fprop_int8", a))
    assert (apart.int() - launch("conv_join_int8", args).int()).abs().max() <= 1


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("channels", [1, 3, 16, 32, 64, 2048])
def test_a_tile_reduces_as_many_values_as_a_product_takes(channels, arch):
    for op, flags in (("conv_fprop_int8", ()), ("conv_join_int8", ("shortcut 64", "stride 2"))):
        config = choice.heuristic(Problem(op, problem(8, channels, 28, 28, 256, 1, 1), torch.int8, flags=flags), arch)
        assert config.block_k in (32, 64, 128)


def test_no_default_without_a_table_and_one_with():
    what = Problem("conv_fprop_int8", SHAPES["3x3"], torch.int8)
    assert choice.plan(what, 90).backend == "aten" and choice.default("conv_fprop_int8", 90) == "aten"
    config = choice.heuristic(what, 90)
    entry = choice.tables.Entry(what, ((choice.Choice("aten"), 2.0), (choice.Choice("triton", config), 1.0)))
    table = choice.Table("GPU", 90, {}, frozenset({(what.op, "triton")}), {what: entry})
    read = from_json(json.loads(json.dumps(table.to_json())))
    assert read == table and choice.plan(what, 90, [read], "GPU") == choice.Choice("triton", config)
    assert choice.default("conv_fprop_int8", 90, [read], "GPU") == "triton"
