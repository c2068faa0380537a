"""The convolutions that the Triton compile gate compiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from resnet_fused.dispatch import Problem, formulation
from resnet_fused.dispatch.conv import (
    MAX_REGISTERS,
    ConvConfig,
    ConvShape,
    conv_dgrad_configurations,
    conv_fprop_configurations,
)
from resnet_fused.dispatch.conv_chain import conv_join_configurations
from resnet_fused.ops import conv_fprop
from resnet_fused.ops.activations import ACTIVATIONS
from resnet_fused.tuning.candidates import configurations
from tools.compile_gate.expect import TYPES, Case, Expect, activation, op, sample, tf32_switch, vector

STATISTICS, DGRAD, _ = formulation.OPS


def conv_cases(arch: int, quick: bool) -> Iterator[Case]:
    """Every configuration of the heuristic, with the filters and epilogues that compile to different code."""
    for dtype, tf32 in ((torch.float16, False), (torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        configs = conv_fprop_configurations(dtype, arch, tf32)
        if quick:  # the largest tile tap by tap, and for the stem the flat one
            tap_by_tap = [config for config in configs if not config.flat]
            stem = [config for config in configs if config.flat and dtype == torch.bfloat16]
            configs = [max(tap_by_tap, key=lambda config: config.block_k), *stem[:1]]
        for config in configs:
            # A reduction that the tiles divide, and one that they do not.
            even, odd = (24, 3) if config.flat else (2 * config.block_k, 2 * config.block_k - 8)
            yield _conv(dtype, tf32, config, odd if config.flat else even, 3, 1, "relu")
            if dtype == torch.bfloat16 and config == configs[0]:
                yield from (_conv(dtype, tf32, config, even, 1, 1, act) for act in ACTIVATIONS if act != "relu")
            if not quick:
                yield _conv(dtype, tf32, config, even, 3, 2, "")
                yield _conv(dtype, tf32, config, even if config.flat else odd, 3, 2, "relu")
                yield _conv(dtype, tf32, config, even, 1, 1, "relu")
                yield _conv(dtype, tf32, config, odd, 1, 1, "relu")
        if not quick:
            yield _conv(dtype, tf32, configs[-1], 64, 3, 1, "relu", batch=16384)
        if not quick or dtype == torch.bfloat16:
            yield from _training_cases(dtype, tf32, arch, quick)
    yield "tf32 depthwise ones", Expect(matrix=True), _depthwise
    # One image of one pixel, one unit of channels: arguments that triton turns into constants.
    one: tuple[tuple[str, dict[str, Any]], ...]
    one = ((STATISTICS, {"rows": 1}), (DGRAD, {"epilogue": "batch norm"}))
    for name, options in one:
        args = sample(name, torch.bfloat16, ConvShape(1, 8, 1, 1, 8, 3, 3, padding=(1, 1)), prologue=True, **options)
        yield f"bf16 {name} ones", Expect(matrix=True), functools.partial(op, name, args)
    merge = functools.partial(_merge, 6272, 256, 256)
    yield "6272 tiles to 256", Expect(wide_loads=True), merge


def int8_cases(arch: int, quick: bool) -> Iterator[Case]:
    """Every configuration of the convolutions of int8: padded and not, with channels that the tiles divide and others,
    to int8 and to floats; quickly the widest, and for the stem the flat one.
    """
    configs = conv_fprop_configurations(torch.int8, arch)
    flat = [config for config in configs if config.flat]
    if quick:
        configs = [_widest(configs), flat[0]]
    for config in configs:
        even, odd = (16, 3) if config.flat else (2 * config.block_k, 2 * config.block_k - 16)
        yield _int8(config, odd if config.flat else even, 3, 1)
        if not quick:
            yield _int8(config, even, 1, 1)
            yield _int8(config, even, 3, 2, rounded=False)
            yield _int8(config, odd, 3, 1)
            yield _int8(config, odd, 1, 2)
    if not quick:
        yield _int8(configs[0], configs[0].block_k, 3, 1, batch=16384)
    joins = conv_join_configurations(torch.int8, arch)
    for config in [_widest(joins)] if quick else joins:
        for channels, shortcut_channels in ((256, 512),) if quick else ((256, 512), (80, 48)):
            yield _int8_join(config, channels, shortcut_channels)


def candidate_cases(arch: int, quick: bool) -> Iterator[Case]:
    """All that `tune` can choose for a large problem, in bf16; quickly, of sm_90, whose products ptxas may serialise,
    the narrowest tiles with the most to do around a product, and the tile of which two fit onto a multiprocessor.
    """
    dtype = torch.bfloat16
    if quick:
        if arch == 90:
            narrow, small = ConvConfig(64, 16, 64, 4, 4), ConvConfig(64, 64, 64, 4, 4)
            pair = ConvConfig(128, 128, 64, 8, 2, max_registers=128)
            yield _dgrad(dtype, False, narrow, False, "batch norm", 128, 3, 1)
            yield from (_dgrad(dtype, False, config, True, "batch norm", 128, 1, 1) for config in (narrow, small))
            yield from (_statistics(dtype, False, config, True, 128, 1, 1) for config in (narrow, small, pair))
            yield _statistics(dtype, False, pair, False, 128, 3, 1)
        return
    for filter_size, channels in ((3, 64), (3, 256), (1, 256)):
        for prologue in (False, True):
            flags = ("prologue",) if prologue else ()
            for name in ("conv_fprop", STATISTICS, DGRAD)[prologue:]:
                shape = _shape(256, channels, 256, filter_size, 1)
                if name == DGRAD:
                    shape = _shape(256, 256, channels, filter_size, 1)
                for config in configurations(Problem(name, shape, dtype, False, flags), arch):
                    if config.kernel != "pointer":  # of which `experimental_cases` has all
                        continue
                    if name == "conv_fprop":
                        yield _conv(dtype, False, config, channels, filter_size, 1, "relu")
                    elif name == STATISTICS:
                        yield _statistics(dtype, False, config, prologue, channels, filter_size, 1)
                    else:
                        for epilogue in ("batch norm, activation", "join"):
                            yield _dgrad(dtype, False, config, prologue, epilogue, channels, filter_size, 1)


def _merge(tiles: int, channels: int, rows: int) -> object:
    from resnet_fused.kernels.merge_statistics import merge_statistics

    return merge_statistics(vector(tiles, channels).double(), vector(tiles, channels), vector(tiles), rows)


def _training_cases(dtype: torch.dtype, tf32: bool, arch: int, quick: bool) -> Iterator[Case]:
    """Statistics and data gradients: every configuration of the heuristics with the most that it is asked to hold, the
    widest of them with every prologue and epilogue.
    """
    for prologue in (False, True):
        configs = conv_fprop_configurations(dtype, arch, tf32, prologue=prologue, statistics=True)
        widest = max(config.block_k for config in configs)
        for config in configs[:1] if quick else configs:
            even, odd = (24, 3) if config.flat else (2 * config.block_k, 2 * config.block_k - 8)
            yield _statistics(dtype, tf32, config, prologue, odd if config.flat else even, 3, 1)
            if not quick and config.block_k == widest:
                yield _statistics(dtype, tf32, config, prologue, even, 1, 1)
                yield _statistics(dtype, tf32, config, prologue, odd, 3, 2)
        if not quick:
            yield _statistics(dtype, tf32, configs[-1], prologue, 64, 3, 1, batch=16384)
        configs = conv_dgrad_configurations(dtype, arch, tf32, prologue=prologue)
        for config in configs[:1] if quick else configs:
            even, odd = 2 * config.block_k, 2 * config.block_k - 8
            yield _dgrad(dtype, tf32, config, prologue, "batch norm, activation", even, 3, 1)
            if not quick and config.block_k == widest:
                yield _dgrad(dtype, tf32, config, prologue, "batch norm", even, 3, 1)
                yield _dgrad(dtype, tf32, config, prologue, "", even, 3, 2)
                yield _dgrad(dtype, tf32, config, prologue, "residual", even, 1, 1)
                yield _dgrad(dtype, tf32, config, prologue, "masked residual", even, 1, 1)
                yield _dgrad(dtype, tf32, config, prologue, "masked residual", odd, 3, 2)
                yield _dgrad(dtype, tf32, config, prologue, "batch norm", even, 1, 1)
                yield _dgrad(dtype, tf32, config, prologue, "batch norm", odd, 3, 2)
                yield _dgrad(dtype, tf32, config, prologue, "join", odd, 3, 2)
            yield _dgrad(dtype, tf32, config, prologue, "join", even, 1, 1)
            if not quick:
                yield _dgrad(dtype, tf32, config, prologue, "join behind a projection", even, 1, 1)
        if not quick:
            yield _dgrad(dtype, tf32, configs[-1], prologue, "batch norm", 64, 3, 1, batch=16384)


def _shape(batch: int, channels: int, outputs: int, filter_size: int, stride: int) -> ConvShape:
    """Of an image [batch, channels, 56, 56]."""
    square = (filter_size, filter_size)
    return ConvShape(batch, channels, 56, 56, outputs, *square, (stride, stride), (filter_size // 2, filter_size // 2))


def _statistics(
    dtype: torch.dtype,
    tf32: bool,
    config: ConvConfig,
    prologue: bool,
    channels: int,
    filter_size: int,
    stride: int,
    batch: int = 64,
) -> Case:
    """A convolution of [batch, channels, 56, 56] to 256 channels, with a row of statistics for every tile."""
    shape = _shape(batch, channels, 256, filter_size, stride)
    tiles = -(-batch * shape.p * shape.q // config.block_m)
    args = sample(STATISTICS, dtype, shape, prologue=prologue, rows=tiles)
    tensor_cores = dtype != torch.float32 or tf32
    expect = Expect(
        matrix=tensor_cores,
        copies=tensor_cores and not config.flat,
        wide_stores=True,
        index64=math.prod(shape.output) > 2**31,
    )
    return _case(STATISTICS, args, expect, dtype, tf32, config, channels, filter_size, stride, prologue, "")


def _dgrad(
    dtype: torch.dtype,
    tf32: bool,
    config: ConvConfig,
    prologue: bool,
    epilogue: str,
    outputs: int,
    filter_size: int,
    stride: int,
    batch: int = 64,
) -> Case:
    """The gradient of [batch, 256, 56, 56] from `outputs` channels."""
    shape, name = _shape(batch, 256, outputs, filter_size, stride), DGRAD
    options: dict[str, Any] = {"epilogue": epilogue}
    if "join" in epilogue:
        name, options = "conv_dgrad_join", {"epilogue": "masked residual", "projection": "projection" in epilogue}
    if "activation" in epilogue:  # and the weight gradient beside it, whose loads are copies
        name, options = "conv_backward", {}
    args = sample(name, dtype, shape, prologue=prologue, **options)
    tensor_cores = dtype != torch.float32 or tf32
    expect = Expect(
        matrix=tensor_cores,
        copies=tensor_cores,
        wide_loads=epilogue != "" and name != "conv_backward",
        wide_stores=True,
        index64=math.prod(shape.image) > 2**31,
    )
    return _case(name, args, expect, dtype, tf32, config, outputs, filter_size, stride, prologue, epilogue)


def _case(
    name: str,
    args: tuple[Any, ...],
    expect: Expect,
    dtype: torch.dtype,
    tf32: bool,
    config: ConvConfig,
    channels: int,
    filter_size: int,
    stride: int,
    prologue: bool,
    epilogue: str,
) -> Case:
    tile = _tile(config)
    tile += f" r{config.max_registers}" if config.max_registers < MAX_REGISTERS else ""
    what = f"{'tf32' if tf32 else TYPES[dtype]} {tile} c{channels} {filter_size}x{filter_size}/{stride}"
    what += " prologue" * prologue + f" {epilogue}" * bool(epilogue) + " wide" * expect.index64

    def run() -> object:
        with tf32_switch(tf32):
            return op(name, args, config)

    return what, expect, run


def _int8(
    config: ConvConfig, channels: int, filter_size: int, stride: int, rounded: bool = True, batch: int = 64
) -> Case:
    """An int8 convolution of [batch, channels, 56, 56] to 256 channels with the whole epilogue."""
    shape = _shape(batch, channels, 256, filter_size, stride)
    args = sample("conv_fprop_int8", torch.bfloat16, shape, residual=True, rounded=rounded)
    large, bits = math.prod(shape.output) > 2**31, _bits(config)
    expect = Expect(
        matrix=True,
        eight=True,
        copies=not config.flat,
        wide_loads=bits >= 128,
        wide_stores=bits * args.dtype.itemsize >= 128,
        index64=large,
    )
    label = f"i8 {_tile(config)} c{channels} {filter_size}x{filter_size}/{stride}"
    label += " to bf16" * (not rounded) + " wide" * large
    return label, expect, functools.partial(op, "conv_fprop_int8", args, config)


def _int8_join(config: ConvConfig, channels: int, shortcut_channels: int) -> Case:
    shape = ConvShape(64, channels, 28, 28, 512, 1, 1)
    args = sample("conv_join_int8", torch.bfloat16, shape, shortcut_channels=shortcut_channels, shortcut_stride=2)
    expect = Expect(matrix=True, eight=True, copies=True, wide_stores=_bits(config) >= 128)
    label = f"i8 {_tile(config)} c{channels}+{shortcut_channels}"
    return label, expect, functools.partial(op, "conv_join_int8", args, config)


def _widest(configs: list[ConvConfig]) -> ConvConfig:
    return max(configs, key=lambda config: config.block_m * config.block_n * config.block_k)


def _bits(config: ConvConfig) -> int:
    """Of int8, in a tile of the result what a thread has."""
    return 8 * config.block_m * config.block_n // (32 * config.num_warps)


def _tile(config: ConvConfig) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"


def _depthwise() -> object:
    x, weight = activation((1, 8, 1, 1), torch.float32, True), activation((8, 1, 1, 1), torch.float32, True)
    with tf32_switch(True):
        return op("conv_fprop", conv_fprop.Args(x, weight, None, None, None, (1, 1), (0, 0), (1, 1), 8, None))


def _conv(
    dtype: torch.dtype,
    tf32: bool,
    config: ConvConfig,
    channels: int,
    filter_size: int,
    stride: int,
    act: str,
    batch: int = 64,
) -> Case:
    """A convolution of [batch, channels, 56, 56] to 256 channels; with an activation, the whole epilogue."""
    shape = _shape(batch, channels, 256, filter_size, stride)
    args = sample("conv_fprop", dtype, shape, scaled=bool(act), residual=bool(act), act=act or None)
    if not act:
        args = args._replace(shift=None)
    tensor_cores = dtype != torch.float32 or tf32
    expect = Expect(
        matrix=tensor_cores,
        copies=tensor_cores and not config.flat,
        wide_loads=bool(act),
        wide_stores=True,
        index64=math.prod(shape.output) > 2**31,
    )
    tile = _tile(config)
    what = f"{'tf32' if tf32 else TYPES[dtype]} {tile} c{channels} {filter_size}x{filter_size}"

    def run() -> object:
        with tf32_switch(tf32):
            return op("conv_fprop", args, config)

    return f"{what}{f' {act}' if act else ''}{' wide' if expect.index64 else ''}", expect, run
