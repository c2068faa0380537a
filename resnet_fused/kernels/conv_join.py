"""The end of a bottleneck with a projection: both 1x1 convolutions into one accumulator."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch import conv_config
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.conv_chain import join_flags
from resnet_fused.dispatch.device import arch
from resnet_fused.kernels._conv import dot_dtype, uses_tf32
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch
from resnet_fused.kernels._tile import channel_unit, relu, round_to, to_fp32


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
        x_tile = x + (x_row[:, None] + c[None, :])
        w_tile = weight + ((output * channels)[None, :] + c[:, None])
        if EVEN:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=(c < channels)[None, :], other=0.0)
            b = tl.load(w_tile, mask=(c < channels)[:, None], other=0.0)
        acc = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_join_kernel(
    x,  # [N, P, Q, C]
    weight,  # [K, C]
    shortcut,  # [N, H, W, D]
    shortcut_weight,  # [K, D]
    shift,  # [K]
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
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = act(sum over c of x[m, c] * weight[k, c] + sum over d of shortcut[pixel(m), d] * shortcut_weight[k, d]
    + shift[k]). A program owns BLOCK_M pixels x BLOCK_N channels; those that share pixels are neighbours.
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

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(acc, x, row * C, weight, output, C, EVEN_C, PRECISION, DOT_DTYPE, BLOCK_K)
    acc = _accumulate(acc, shortcut, shortcut_row, shortcut_weight, output, D, EVEN_D, PRECISION, DOT_DTYPE, BLOCK_K)
    acc += to_fp32(tl.load(shift + n, mask=n < K, other=0.0))[None, :]
    if ACTIVATE:
        acc = relu(acc)
    stored = (m < M)[:, None] & (n < K)[None, :]
    tl.store(y + (m[:, None] * K + n[None, :]), round_to(acc, y.dtype.element_ty), mask=stored)


def conv_join(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    shift: Tensor,
    shortcut_stride: list[int],
    relu: bool,
    config: ConvConfig | None = None,
) -> Tensor:
    """y = round(act(conv1x1(x, weight) + conv1x1(shortcut, shortcut_weight, shortcut_stride) + shift)), both products
    in one fp32 accumulator: the projection never touches memory.

    Args:
        x: [N, C, P, Q] in NHWC order; fp32, fp16 or bf16.
        weight: [K, C, 1, 1], the dtype of x.
        shortcut: [N, D, H, W] in NHWC order, the dtype of x; P = ceil(H / stride), Q likewise.
        shortcut_weight: [K, D, 1, 1], the dtype of x.
        shift: [K].
        shortcut_stride: of the shortcut's convolution, (h, w).
        relu: whether act is ReLU, which keeps NaN; else the identity.
        config: the launch configuration; None takes the plan's.

    Returns:
        y: [N, K, P, Q] in NHWC order, in the dtype of x.
    """
    batch, channels, height, width = x.shape
    outputs, shortcut_channels = shortcut_weight.shape[:2]
    tf32 = uses_tf32(x.dtype)
    if config is None:
        shape = ConvShape(batch, channels, height, width, outputs, 1, 1)
        flags = join_flags(shortcut_channels, shortcut_stride[0])
        config = conv_config("conv_join", shape, x.dtype, arch(x.device), tf32, flags)
    y = empty_nhwc(x, batch, outputs, height, width)
    unit = channel_unit(channels, shortcut_channels)
    pixels = batch * height * width
    launch(
        _conv_join_kernel,
        triton.cdiv(pixels, config.block_m) * triton.cdiv(outputs, config.block_n),
        x,
        weight.contiguous(),
        shortcut,
        shortcut_weight.contiguous(),
        shift,
        y,
        pixels,
        shortcut.shape[2],
        shortcut.shape[3],
        height,
        width,
        outputs,
        channels // unit,
        shortcut_channels // unit,
        shortcut_stride[0],
        shortcut_stride[1],
        UNIT=unit,
        EVEN_C=channels % config.block_k == 0,
        EVEN_D=shortcut_channels % config.block_k == 0,
        ACTIVATE=relu,
        PRECISION="tf32" if tf32 else "ieee",
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
