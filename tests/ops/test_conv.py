"""Every convolution's Triton kernel, by its record: shapes, tiles, values that are not finite, what repeats."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from conv_cases import ARCHITECTURES, FEW, SHAPES, SMALL, check, launch, problem, runs_kernels, sample, tensors

from resnet_fused import kernels, ops
from resnet_fused.dispatch.conv import (
    ConvConfig,
    conv_candidates,
    conv_dgrad_configurations,
    conv_dgrad_heuristic,
    conv_fprop_configurations,
    conv_fprop_heuristic,
    tf32_allowed,
    training_refusal,
)
from resnet_fused.dispatch.conv_wgrad import MAX_PARTIAL_BYTES, conv_wgrad_configurations, conv_wgrad_heuristic
from resnet_fused.ops import comparison
from resnet_fused.ops.operands import Operands

pytestmark = runs_kernels
NAN, INF = float("nan"), float("inf")
# A block's tail and a join have geometries of their own: test_conv_chain.py.
OPS = [name for name, op in ops.OPS.items() if op.triton and name.startswith("conv_") and "groups" in op.args._fields]
TWO_IN_ONE = ("conv_dgrad_join", "conv_backward")  # of kernels that the other ops' samples show
WGRAD = {
    "1x3, more channels than a tile": problem(1, 72, 3, 5, 16, 1, 3, padding=(0, 1)),
    "3x3 stride 2, few channels": problem(2, 24, 7, 9, 20, 3, 3, stride=(2, 2), padding=(1, 1)),
    "more outputs than one tile": problem(1, 16, 4, 4, 136, 1, 1),
}
ALL_SHAPES = SHAPES | WGRAD


def _shapes():
    for op in OPS:
        for name in [*SHAPES, *(WGRAD if op == "conv_wgrad" else ())]:
            marks = [pytest.mark.larger] * (op in TWO_IN_ONE and name not in FEW)
            yield pytest.param((op, name), marks=marks, id=f"{op}-{name}")


def _strongest(op):
    return {name: values[-1] for name, values in ops.OPS[op].options.items()}


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("case", list(_shapes()))
def test_every_shape(case, dtype, fused):
    op, name = case
    options = _strongest(op) if fused else {}
    check(op, sample(op, ALL_SHAPES[name], dtype, **options))


CONFIGURATIONS = {
    "conv_fprop": (conv_fprop_heuristic, conv_fprop_configurations),
    "conv_fprop_int8": (conv_fprop_heuristic, conv_fprop_configurations),
    "conv_fprop_stats": (conv_fprop_heuristic, conv_fprop_configurations),
    "conv_dgrad": (conv_dgrad_heuristic, conv_dgrad_configurations),
    "conv_dgrad_join": (conv_dgrad_heuristic, conv_dgrad_configurations),
    "conv_wgrad": (conv_wgrad_heuristic, conv_wgrad_configurations),
}


def _flags(op):
    """What a heuristic is told of an op, in every combination."""
    names = ("x_prologue", "dy_prologue") if op == "conv_wgrad" else ("join" if op.endswith("int8") else "prologue",)
    return [dict(zip(names, values, strict=True)) for values in itertools.product((False, True), repeat=len(names))]


def _tiles():
    for op, (_, configurations) in CONFIGURATIONS.items():
        found = {}
        dtypes = (torch.int8,) if op.endswith("int8") else (torch.float32, torch.float16)
        for dtype, flags in itertools.product(dtypes, _flags(op)):
            for config in configurations(dtype, 90, **flags):
                found.setdefault((config.block_m, config.block_n, config.block_k, config.flat), config)
        for (m, n, k, flat), config in found.items():
            yield pytest.param((op, config), id=f"{op}-{m}x{n}x{k}{' flat' * flat}")


@pytest.mark.parametrize("case", list(_tiles()))
def test_every_tile(case):
    """The result does not depend on the tile, flat or tap by tap, also where the reduction is no multiple of it."""
    op, config = case
    channels = 7 if config.flat else 72 if op == "conv_wgrad" else config.block_k + 8
    given = [_strongest(op)]
    if op == "conv_wgrad":
        shape = problem(1, channels, 7, 6, 20, 1, 3, padding=(0, 1))
        given += [{}, {"dy_prologue": True}]  # dy alone turns the product around
    elif op.startswith("conv_dgrad"):
        shape = problem(1, 20, 7, 6, channels, 3, 3, padding=(1, 1))
    else:
        shape = problem(1, channels, 7, 6, 20, 3, 3, padding=(1, 1))
    for options in given:
        check(op, sample(op, shape, torch.float16, **options), config=config)


@pytest.mark.parametrize("op", OPS)
def test_a_rerun_bit_for_bit(op):
    shape = problem(1, 16, 9, 8, 16, 3, 3, (2, 1), (1, 1))
    config = replace(SMALL, block_m=64, flat=True, splits=5) if op == "conv_wgrad" else SMALL
    args = sample(op, shape, torch.float16, **_strongest(op))
    first, second = (tensors(launch(op, args, config=config)) for _ in range(2))
    assert all(map(torch.equal, first, second))


# op, the operand with the value, options, whether a ReLU on the way may end it
PLACES = [
    *(
        ("conv_fprop", "x", {"residual": True, "act": act}, act == "relu")
        for act in (None, "relu", "silu", "hardswish")
    ),
    *(("conv_fprop", "residual", {"residual": True, "act": act}, act == "relu") for act in (None, "relu", "silu")),
    *(("conv_fprop_stats", "x", {"prologue": prologue, "rows": 1}, prologue) for prologue in (False, True)),
    *(("conv_dgrad", "dy", {"prologue": prologue, "epilogue": "residual"}, False) for prologue in (False, True)),
    ("conv_dgrad_join", "dy", {"epilogue": "masked residual"}, False),
    *(("conv_wgrad", "x", {"x_prologue": x, "dy_prologue": dy}, x) for x in (False, True) for dy in (False, True)),
    *(("conv_wgrad", "dy", {"dy_prologue": dy}, False) for dy in (False, True)),
    ("conv_backward", "x", {}, True),
]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of numpy, under the interpreter
@pytest.mark.parametrize(
    "place", PLACES, ids=lambda p: f"{p[0]}-{p[1]}-{'-'.join(f'{k}={v}' for k, v in p[2].items())}"
)
@pytest.mark.parametrize("name", ["1x1 stride 2, odd image", "3x3", "7x7 stem", "4 groups of 8"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_reach_exactly_what_sees_them(value, name, place):
    """Neither padding, masked channels, other groups, nor an activation adds or swallows one; sums have it where an
    element that they add up has it.
    """
    op, operand, options, may_end = place
    args = sample(op, SHAPES[name], torch.float32, **options)
    getattr(args, operand)[0, -1, 0, 0] = value
    truth = tensors(ops.OPS[op].reference(comparison.double(args)))
    for ours, right in zip(tensors(launch(op, args)), truth, strict=True):
        if ours.dim() == 4:
            assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf())
        assert torch.equal(ours.isfinite(), right.isfinite())
    reached = any(not right.isfinite().all() for right in truth)
    assert any(right.isfinite().any() for right in truth) and (reached or value == value and may_end)


@pytest.mark.parametrize("op", [name for name, op in ops.OPS.items() if op.triton and name.startswith("conv_")])
@pytest.mark.parametrize(("batch", "bits"), [(64, "int32"), (16384, "int64")])
def test_offsets_are_64_bit_where_a_tensor_has_more_than_2_31_elements(batch, bits, op, monkeypatch):
    launches = []
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_fused.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append(options))
    shape = problem(batch, 64, 56, 56, 64, 1, 1)
    args = ops.OPS[op].case(Operands(torch.device("meta"), torch.float16), shape)
    kernels.run(op, args, ConvConfig(64, 64, 64, 4, 3))
    assert bits in {str(options["INDEX"]) for options in launches if "INDEX" in options}


@pytest.mark.parametrize("op", CONFIGURATIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_the_heuristic_returns_only_listed_configurations(dtype, tf32, arch, op):
    """What the compile gate compiles is what can be launched."""
    if op.endswith("int8"):
        dtype, tf32 = torch.int8, False
    heuristic, configurations = CONFIGURATIONS[op]
    layers = (
        (3, 224, 64, 1),
        (64, 56, 64, 1),
        (64, 56, 256, 1),
        (128, 56, 128, 32),
        (512, 7, 2048, 1),
        (2048, 7, 512, 1),
    )
    problems = [
        problem(n, c, size, size, k, r, r, padding=(r // 2, r // 2), groups=groups)
        for n in (1, 32, 256)
        for c, size, k, groups in layers
        for r in (1, 3)
    ]
    for flags in _flags(op):
        listed = configurations(dtype, arch, tf32, **flags)
        for shape in (*ALL_SHAPES.values(), *problems):
            config = heuristic(shape, dtype, arch, tf32, **flags)
            assert replace(config, splits=1) in listed
            weight_bytes = 4 * shape.k * shape.c // shape.groups * shape.r * shape.s
            assert config.splits == 1 or config.splits * weight_bytes <= MAX_PARTIAL_BYTES


def test_the_heuristic_fills_the_gpu_before_it_widens_the_tile():
    wide = conv_fprop_heuristic(problem(256, 64, 56, 56, 256, 1, 1), torch.float16, 90)
    small = conv_fprop_heuristic(problem(1, 512, 7, 7, 512, 3, 3, padding=(1, 1)), torch.float16, 90)
    assert wide.block_m * wide.block_n > small.block_m * small.block_n


def test_the_heuristic_splits_pixels_until_the_gpu_is_full():
    few_weights = conv_wgrad_heuristic(problem(256, 64, 56, 56, 64, 1, 1), torch.float16, 90)
    many_weights = conv_wgrad_heuristic(problem(256, 512, 7, 7, 512, 3, 3, padding=(1, 1)), torch.float16, 90)
    few_pixels = conv_wgrad_heuristic(problem(1, 64, 7, 7, 64, 1, 1), torch.float16, 90)
    assert few_weights.splits >= 132 and many_weights.splits <= 4 and few_pixels.splits == 1


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("int8")])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_fp32_is_exact_unless_pytorch_allows_tf32(precision, op, monkeypatch):
    launches = []
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_fused.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launches.append(options))
    torch.backends.cudnn.conv.fp32_precision = precision
    assert tf32_allowed() is (precision == "tf32")
    launch(op, sample(op, SHAPES["1x1"]))
    assert {options["PRECISION"] for options in launches if "PRECISION" in options} == {precision}


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
