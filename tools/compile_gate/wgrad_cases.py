"""What the Triton compile gate compiles of the weight gradient and of the inference chain and join: every configuration
that the plan can choose.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.conv_chain import conv_chain_candidates, conv_chain_configurations, conv_join_configurations
from resnet_fused.dispatch.conv_wgrad import conv_wgrad_candidates, conv_wgrad_configurations
from resnet_fused.ops import bn_backward_finalize
from tools.compile_gate.expect import TYPES, Case, Expect, op, sample, tf32_switch, vector

_PRECISIONS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False))
# Prologues of x and of dy.
_PROLOGUES = ((False, False), (True, False), (False, True), (True, True))


def wgrad_cases(arch: int, quick: bool) -> Iterator[Case]:
    """Every configuration, prologue and precision, with pixels that the tiles do not divide; 16-bit 1x1 convolutions,
    which need no pixel's coordinates; 64-bit offsets. fp16 differs from bf16 in its conversions only.
    """
    for (dtype, tf32), (x_prologue, dy_prologue), aligned in itertools.product(_PRECISIONS, _PROLOGUES, (True, False)):
        configs = conv_wgrad_configurations(
            dtype, arch, tf32, x_prologue=x_prologue, dy_prologue=dy_prologue, aligned=aligned
        )
        case = functools.partial(_wgrad, dtype, tf32, x_prologue=x_prologue, dy_prologue=dy_prologue)
        if quick:  # a wide layer with all that there is, and the stem
            if dtype == torch.bfloat16 and aligned == dy_prologue == x_prologue:
                yield case(next(config for config in configs if config.flat != aligned), aligned, size=57)
            continue
        for config in configs[:1] if dtype == torch.float16 else configs:
            yield case(config, aligned, size=57)
            if dtype == torch.bfloat16 and aligned and not config.flat:
                yield case(config, aligned, size=56, pointwise=True)
        if dtype == torch.bfloat16 and aligned:
            yield case(configs[0], aligned, size=56, batch=4096)
            for channels in (32, 256):  # those of 32 are flat
                shape = ConvShape(256, channels, 57, 57, 256, 3, 3, padding=(1, 1))
                for config in conv_wgrad_candidates(shape, dtype, arch):
                    yield case(config, aligned, size=57)
    if not quick or arch == 80:
        yield from _wgrad_ones()
        sums = bn_backward_finalize.Args(*(vector(256),) * 5, 2.0)
        yield "channels 256", Expect(), functools.partial(op, "bn_backward_finalize", sums)


def chain_cases(arch: int, quick: bool) -> Iterator[Case]:
    """ResNet's widths, and some that no tile divides, with and without a next convolution; all tiles of the join."""
    widths: tuple[tuple[int, int, int | None], ...] = ((64, 256, 64), (64, 256, None), (64, 256, 128))
    widths += ((128, 512, 128), (128, 512, None), (24, 104, 40), (120, 504, 120))
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
        for inner, outputs, following in widths[:1] if quick or dtype == torch.float16 else widths:
            for config in conv_chain_candidates(inner, following, dtype, arch)[: 1 if quick else None]:
                yield _chain(dtype, config, inner, outputs, following)
        if not quick:
            yield _chain(dtype, conv_chain_configurations(64, 64, dtype, arch)[0], 64, 256, 64, batch=4096)
    for dtype, tf32 in _PRECISIONS[:1] if quick else _PRECISIONS:
        for config in conv_join_configurations(dtype, arch, tf32)[: 1 if quick else None]:
            yield _join(dtype, tf32, config, 256, 512)
            if not quick:
                yield _join(dtype, tf32, config, 72, 40)
    if not quick or arch == 80:
        yield from _chain_ones()


def _label(dtype: torch.dtype, tf32: bool, config: ConvConfig, *more: str) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    return " ".join([f"{'tf32' if tf32 else TYPES[dtype]} {tile}", *filter(None, more)])


def _wgrad(
    dtype: torch.dtype,
    tf32: bool,
    config: ConvConfig,
    aligned: bool,
    *,
    x_prologue: bool,
    dy_prologue: bool,
    size: int,
    pointwise: bool = False,
    batch: int = 64,
) -> Case:
    """The weight gradient of a 3x3 convolution of 32 (flat) or 256 channels, without alignment of a 7x7 one, stride 2,
    of 3 or a 3x3 one of 67; or of a 1x1 one.
    """
    channels = (32 if aligned else 3) if config.flat else (256 if aligned else 67)
    outputs = 256 if aligned else 61
    filter_size, stride = (7, 2) if config.flat and not aligned else (1 if pointwise else 3, 1)
    filter, strides, pad = (filter_size, filter_size), (stride, stride), (filter_size // 2, filter_size // 2)
    shape = ConvShape(batch, channels, size, size, outputs, *filter, strides, pad)
    args = sample("conv_wgrad", dtype, shape, x_prologue=x_prologue, dy_prologue=dy_prologue)
    tensor_cores = dtype != torch.float32 or tf32
    expect = Expect(
        matrix=tensor_cores,
        copies=tensor_cores and aligned,
        wide_stores=aligned,
        index64=math.prod(shape.output) > 2**31,
    )

    def run() -> object:
        with tf32_switch(tf32):
            return op("conv_wgrad", args, config)

    geometry = f"c{channels} {filter_size}x{filter_size}"
    prologues = "+".join(name for name, on in (("x", x_prologue), ("dy", dy_prologue)) if on)
    wide = "wide" if expect.index64 else ""
    return _label(dtype, tf32, config, "flat" * config.flat, geometry, prologues, wide), expect, run


def _wgrad_ones() -> Iterator[Case]:
    """Sizes of 1, which triton turns into constants: of the image, of the channels, of the vectors in them."""
    for flat, channels, filter_size in ((False, 1, 1), (False, 8, 3), (True, 1, 3)):
        pad = (filter_size // 2, filter_size // 2)
        shape = ConvShape(1, channels, 1, 1, channels, filter_size, filter_size, padding=pad)
        args = sample("conv_wgrad", torch.bfloat16, shape, x_prologue=True, dy_prologue=True)
        label = f"ones c{channels} {filter_size}x{filter_size}"
        yield label, Expect(matrix=True), functools.partial(op, "conv_wgrad", args, ConvConfig(64, 16, 32, 4, 2, flat))


def _chain_ones() -> Iterator[Case]:
    config = ConvConfig(64, 32, 32, 4, 2)
    shape, v = ConvShape(1, 8, 1, 1, 8, 3, 3, padding=(1, 1)), vector(8)
    chain = sample("conv_chain", torch.bfloat16, shape, outputs=8, following=8)._replace(scale2=v, scale3=v, scale1=v)
    join = sample("conv_join", torch.bfloat16, ConvShape(1, 1, 1, 1, 1, 1, 1))
    for name, args in (("conv_chain", chain), ("conv_join", join)):
        yield "ones", Expect(matrix=True), functools.partial(op, name, args, config)


def _chain(
    dtype: torch.dtype, config: ConvConfig, inner: int, outputs: int, following: int | None, batch: int = 64
) -> Case:
    shape = ConvShape(batch, inner, 56, 56, inner, 3, 3, padding=(1, 1))
    args = sample("conv_chain", dtype, shape, outputs=outputs, following=following or 0)
    args = args._replace(scale2=args.shift2, scale3=args.shift3, scale1=args.shift1)
    wide = args.residual.numel() > 2**31
    label = _label(dtype, False, config, f"c{inner} {outputs} {following or '-'}", "wide" * wide)
    expect = Expect(matrix=True, copies=True, wide_stores=True, index64=wide)
    return label, expect, functools.partial(op, "conv_chain", args, config)


def _join(dtype: torch.dtype, tf32: bool, config: ConvConfig, channels: int, shortcut_channels: int) -> Case:
    shape = ConvShape(64, channels, 28, 28, 512, 1, 1)
    args = sample("conv_join", dtype, shape, shortcut_channels=shortcut_channels, shortcut_stride=2)
    tensor_cores = dtype != torch.float32 or tf32

    def run() -> object:
        with tf32_switch(tf32):
            return op("conv_join", args, config)

    label = _label(dtype, tf32, config, f"c{channels}+{shortcut_channels}")
    return label, Expect(matrix=tensor_cores, copies=tensor_cores, wide_stores=True), run
