"""What the Triton compile gate compiles: the launches of every kernel, and what their machine code must show."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resnet_fused.plan.conv import conv_fprop_configurations

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


@dataclass(frozen=True)
class Expect:
    """What the machine code must show beyond fitting and not spilling."""

    matrix: bool = False  # the architecture's matrix instruction
    copies: bool = False  # cp.async
    tma: bool = False  # cp.async.bulk.tensor
    specialized: bool = False  # warps of different roles
    wide_loads: bool = False  # LDG.128
    wide_stores: bool = False  # STG.128
    index64: bool = False  # 64-bit offsets, for a tensor of more than 2^31 elements


def _activation(shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> Tensor:
    order = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def _vector(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


Case = tuple[str, Expect, Callable[[], object]]


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
            yield _conv(dtype, tf32, config, odd if config.flat else even, 3, 1, True)
            if not quick:
                yield _conv(dtype, tf32, config, even, 3, 2, False)
                yield _conv(dtype, tf32, config, even if config.flat else odd, 3, 2, True)
                yield _conv(dtype, tf32, config, even, 1, 1, True)
                yield _conv(dtype, tf32, config, odd, 1, 1, True)
        if not quick:
            yield _conv(dtype, tf32, configs[-1], 64, 3, 1, True, batch=16384)
    yield "tf32 depthwise ones", Expect(matrix=True), _depthwise


def _depthwise() -> object:
    x, weight = _activation((1, 8, 1, 1), torch.float32, True), _activation((8, 1, 1, 1), torch.float32, True)
    with _tf32(True):
        return _op("conv_fprop", x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 8, False)


def _conv(
    dtype: torch.dtype,
    tf32: bool,
    config: Any,
    channels: int,
    filter_size: int,
    stride: int,
    epilogue: bool,
    batch: int = 64,
) -> Case:
    """A convolution of [batch, channels, 56, 56] to 256 channels; with `epilogue`, the whole of it."""
    pad, out = filter_size // 2, (56 + 2 * (filter_size // 2) - filter_size) // stride + 1
    x = _activation((batch, channels, 56, 56), dtype, True)
    weight = _activation((256, channels, filter_size, filter_size), dtype, True)
    affine = (_vector(256), _vector(256), _activation((batch, 256, out, out), dtype, True))
    args = (x, weight, *(affine if epilogue else (None, None, None)), [stride] * 2, [pad] * 2, [1, 1], 1, epilogue)
    tensor_cores = dtype != torch.float32 or tf32
    expect = Expect(
        matrix=tensor_cores,
        copies=tensor_cores and not config.flat,
        wide_loads=epilogue,
        wide_stores=True,
        index64=batch * 256 * out * out > 2**31,
    )
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    what = f"{'tf32' if tf32 else TYPES[dtype]} {tile} c{channels} {filter_size}x{filter_size}"

    def run() -> object:
        with _tf32(tf32):
            return _op("conv_fprop", *args, config)

    return f"{what}{' epilogue' if epilogue else ''}{' wide' if expect.index64 else ''}", expect, run


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def batch_norm_cases(arch: int, quick: bool) -> Iterator[Case]:
    """Every op of the family by dtype, memory order and size: even (vectors), ragged (none), narrow (few channels),
    wide (64-bit offsets), ones (arguments that triton turns into constants); every option at the even size, elsewhere
    the one that needs the most registers.
    """
    sizes = {"even": ((256, 256, 56, 56), (256, 64, 112, 112))}
    if not quick:
        sizes["ragged"] = ((64, 35, 7, 7), (64, 35, 17, 17))
        sizes["narrow"] = ((256, 16, 56, 56), (256, 8, 112, 112))
        sizes["wide"] = ((4096, 256, 56, 56), (4096, 64, 112, 112))
    if not quick or arch == 80:  # what a 1 does to a kernel does not depend on the architecture
        sizes["ones"] = ((1, 1, 1, 1), (1, 1, 1, 1))
    dtypes = (torch.bfloat16,) if quick else (torch.float32, torch.float16, torch.bfloat16)
    for size, nhwc, dtype in itertools.product(sizes, (True,) if quick else (True, False), dtypes):
        label = f"{TYPES[dtype]} {'NHWC' if nhwc else 'NCHW'} {size}"
        all_options = size == "even" and not quick
        yield from _family(
            dtype, nhwc, *sizes[size], label, vectors=size not in ("ragged", "ones"), all_options=all_options
        )
    yield (
        "rows 256",
        Expect(wide_loads=True),
        lambda: _op("bn_finalize", *(_vector(256, 256),) * 2, _vector(256), *(_vector(256),) * 4, 0.1, 1e-5),
    )
    yield "rows 256", Expect(wide_loads=True), lambda: _op("reduce_rows", _vector(256, 256))
    weight = _activation((256, 256, 3, 3), torch.bfloat16, True)
    for flip in (False,) if quick else (False, True):
        yield f"bf16 flip={flip}", Expect(wide_stores=True), functools.partial(_op, "pack_weight", weight, flip)


def _op(name: str, *args: Any) -> object:
    from resnet_fused.kernels import OPS

    return OPS[name](*args)


def _family(
    dtype: torch.dtype,
    nhwc: bool,
    block: tuple[int, ...],
    stem: tuple[int, ...],
    label: str,
    *,
    vectors: bool,
    all_options: bool,
) -> Iterator[Case]:
    wide = math.prod(block) > 2**31
    both = Expect(wide_loads=vectors, wide_stores=vectors, index64=wide)
    loads = replace(both, wide_stores=False)
    x, c = _activation(block, dtype, nhwc), _vector(block[1])
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device="meta")
    rows = 256

    def case(expect: Expect, what: str, op: str, *args: Any) -> Case:
        return f"{label} {what}".strip(), expect, functools.partial(_op, op, *args)

    yield case(loads, "", "bn_stats", x, rows)
    residuals = {"": (None, None, None), "+ residual": (x, None, None), "+ affine residual": (x, c, c)}
    for (what, residual), (relu, with_mask) in itertools.product(
        residuals.items(), ((False, False), (True, False), (True, True))
    ):
        if all_options or (residual[1] is not None and with_mask):
            yield case(both, f"{what} relu={relu} mask={with_mask}", "bn_apply", x, c, c, *residual, relu, with_mask)
    for what, bits, relu in (("", None, False), ("recomputed mask", None, True), ("mask", mask, True)):
        if not all_options and bits is None:
            continue
        yield case(loads, what, "bn_backward_reduce", x, x, bits, c, c, c, c, relu, rows)
        for sums, dresidual in itertools.product(((c, c), (None, None)), (True, False)):
            if all_options or (sums[0] is not None and dresidual):
                more = f"{what} sums={sums[0] is not None} dresidual={dresidual}"
                yield case(both, more, "bn_backward_apply", x, x, bits, c, c, c, c, *sums, 2.0, relu, dresidual)
    large = x.numel() > 1
    flat = replace(both, wide_loads=large, wide_stores=large)
    yield case(flat, "", "add_act", x, x, True)
    yield case(flat, "", "add_act_backward", x, x)
    # The pool strides through x, so in NCHW order it has no vectors to read.
    pooled = replace(both, wide_loads=vectors and nhwc, wide_stores=vectors and nhwc)
    x, c = _activation(stem, dtype, nhwc), _vector(stem[1])
    half = (*stem[:2], (stem[2] - 1) // 2 + 1, (stem[3] - 1) // 2 + 1)
    dy, index = _activation(half, dtype, nhwc), _activation(half, torch.uint8, nhwc)
    yield case(pooled, "", "bn_act_max_pool", x, c, c)
    yield case(
        replace(pooled, wide_stores=False), "", "bn_act_max_pool_backward_reduce", dy, index, x, c, c, c, c, rows
    )
    yield case(pooled, "", "bn_act_max_pool_backward_apply", dy, index, x, c, c, c, c, c, c, 2.0)
