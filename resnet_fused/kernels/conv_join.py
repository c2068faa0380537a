"""The end of a bottleneck with a projection: both 1x1 convolutions into one accumulator."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.kernels._conv import accumulator, add_product, dot_dtype, load_tile, uses_tf32
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch
from resnet_fused.kernels._tile import channel_unit, identity, relu, round_to
from resnet_fused.kernels.epilogues import exact_sums, requantise, scale_shift
from resnet_fused.ops import conv_join as plain
from resnet_fused.ops import conv_join_int8 as int8


@triton.jit
def _accumulate(
    acc,
    x,
    x_row,
    weight,
    output,
    channels,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc[m, k] + sum over c of x[x_row[m] + c] * weight[output[k], c]."""
    for start in range(0, channels, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        exists = c < channels
        a = load_tile(x, x_row[:, None] + c[None, :], exists[None, :], not EVEN)
        b = load_tile(weight, (output * channels)[None, :] + c[:, None], exists[:, None], not EVEN)
        acc = add_product(acc, a, b, 0, PRECISION, DOT_DTYPE)
    return acc


@triton.jit
def _conv_join_kernel(
    x,  # [N, P, Q, C]
    weight,  # [K, C]
    shortcut,  # [N, H, W, D]
    shortcut_weight,  # [K, D]
    shift,  # [K]
    offset,  # [K] int32, of int8 operands; None else, as the five behind it
    scale,  # [K]
    shortcut_offset,  # [K] int32
    shortcut_scale,  # [K]
    y_steps,  # 1 / scale of the result's grid, or None: a float result
    y_zero,
    y,  # [N, P, Q, K]
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    K,
    channel_units,  # C / UNIT
    shortcut_units,  # D / UNIT
    stride_h,
    stride_w,
    UNIT: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    EVEN_D: tl.constexpr,  # BLOCK_K divides D
    ACT: tl.constexpr,  # a function of the fp32 tile
    ACC_DTYPE: tl.constexpr,  # of `accumulator`
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = act(sum over c of x[m, c] * weight[k, c] + sum over d of shortcut[pixel(m), d] * shortcut_weight[k, d]
    + shift[k]). A program owns BLOCK_M pixels x BLOCK_N channels; those that share pixels are neighbours. Of int8
    operands each sum has an offset and a scale of its own, and y is on a grid.
    """
    C = channel_units * UNIT
    D = shortcut_units * UNIT
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid // tiles_n
    m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid - pid_m * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat the last one and are not stored: no mask on the operands.
    row = tl.minimum(m, M - 1)
    output = tl.minimum(n, K - 1)
    q = row % Q
    p = (row // Q) % P
    shortcut_row = ((row // (Q * P) * H + p * stride_h) * W + q * stride_w) * D

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    acc = _accumulate(acc, x, row * C, weight, output, C, EVEN_C, PRECISION, DOT_DTYPE, BLOCK_K)
    value = acc
    if scale is not None:
        value = scale_shift(exact_sums(acc, offset, n, n < K), scale, shift, n, n < K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    acc = _accumulate(acc, shortcut, shortcut_row, shortcut_weight, output, D, EVEN_D, PRECISION, DOT_DTYPE, BLOCK_K)
    if scale is not None:
        value += scale_shift(exact_sums(acc, shortcut_offset, n, n < K), shortcut_scale, None, n, n < K)
    else:
        value = scale_shift(acc, None, shift, n, n < K)
    value = requantise(ACT(value), y_steps, y_zero)
    stored = (m < M)[:, None] & (n < K)[None, :]
    tl.store(y + (m[:, None] * K + n[None, :]), round_to(value, y.dtype.element_ty), mask=stored)


def conv_join(a: plain.Args, config: ConvConfig) -> Tensor:
    """Launch `ops.conv_join`: both products in one fp32 accumulator, so that the projection never touches memory."""
    return _launch(a, a.x.dtype, (None,) * 6, config)


def conv_join_int8(a: int8.Args, config: ConvConfig) -> Tensor:
    """Launch `ops.conv_join_int8`: the products in int32, each times its scale in fp32."""
    grid = (1.0 / a.y_scale, float(a.y_zero)) if a.dtype == torch.int8 else (None, None)
    return _launch(a, a.dtype, (a.offset, a.scale, a.shortcut_offset, a.shortcut_scale, *grid), config)


def _launch(a: plain.Args | int8.Args, dtype: torch.dtype, grids: tuple[Any, ...], config: ConvConfig) -> Tensor:
    """Launch the kernel for a result of this dtype; `grids` are its arguments of int8 operands."""
    x, shortcut = a.x, a.shortcut
    batch, channels, height, width = x.shape
    outputs, shortcut_channels = a.shortcut_weight.shape[:2]
    y = empty_nhwc(x, batch, outputs, height, width, dtype=dtype)
    unit = channel_unit(channels, shortcut_channels, most=16 if x.dtype == torch.int8 else 8)
    pixels = batch * height * width
    launch(
        _conv_join_kernel,
        triton.cdiv(pixels, config.block_m) * triton.cdiv(outputs, config.block_n),
        x,
        a.weight.contiguous(),
        shortcut,
        a.shortcut_weight.contiguous(),
        a.shift,
        *grids,
        y,
        pixels,
        *shortcut.shape[2:],
        height,
        width,
        outputs,
        channels // unit,
        shortcut_channels // unit,
        *a.shortcut_stride,
        UNIT=unit,
        EVEN_C=channels % config.block_k == 0,
        EVEN_D=shortcut_channels % config.block_k == 0,
        ACT=relu if a.relu else identity,
        ACC_DTYPE=accumulator(x.dtype),
        PRECISION="tf32" if uses_tf32(x.dtype) else "ieee",
        DOT_DTYPE=dot_dtype(x.dtype),
        INDEX=index_type(x.numel(), shortcut.numel(), y.numel()),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
    return y
