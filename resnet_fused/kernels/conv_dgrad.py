"""The data gradient of a convolution as an implicit matrix product, with the backward of the batch norm behind the
convolution in front, and behind it that of the one before: of the same block, or of the block before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import gradient_tiling
from resnet_fused.kernels import experimental
from resnet_fused.kernels._conv import (
    accumulator,
    add_product,
    divide,
    dot_dtype,
    load_tile,
    load_vector,
    reciprocal,
    sees_tap,
    taps_inside,
    uses_tf32,
)
from resnet_fused.kernels._dgrad import SUM_TILE, class_pixel, written_sums
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch
from resnet_fused.kernels._tile import channel_unit, round_to
from resnet_fused.kernels.epilogues import add_residual, apply_relu_mask, no_gradient_epilogue
from resnet_fused.kernels.prologues import bn_gradient, no_bn_gradient
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.ops import conv_dgrad_join
from resnet_fused.ops.conv_dgrad import Args, Out, conv_shape


@triton.jit
def _conv_dgrad_kernel(
    dy,  # [N, P, Q, K]
    weight,  # [K, R, S, C/groups]
    dy_x,  # [N, P, Q, K], or None: dy is the gradient itself
    coefficients,  # [3, K] or None
    residual,  # [N, H, W, C] or None
    residual_mask,  # one bit an element of residual, or None
    x,  # [N, H, W, C], or None: no batch norm in front; so are the vectors that follow, [C]
    scale,
    shift,
    mean,
    invstd,
    mask,  # one bit an element of x, or None: dx is masked with the ReLU recomputed from x; else the sums alone are
    shortcut,  # [N, H, W, C], the input of a second batch norm behind the same mask, or None; so are its vectors, [C]
    shortcut_mean,
    shortcut_invstd,
    dx,  # [N, H, W, C]
    sum_dx,  # [tiles of pixels, C] or None; so are the others
    sum_dx_xhat,
    sum_dx_shortcut,
    activation,  # [N, H, W, C], round(relu(x * scale + shift)), or None: written where the sums read x
    N,
    H,
    W,
    channel_units,  # C / UNIT
    P,
    Q,
    output_units,  # K / UNIT
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    groups,
    group_input_units,  # C / groups / UNIT
    group_output_units,  # K / groups / UNIT
    PROLOGUE: tl.constexpr,  # of `prologues`
    EPILOGUE: tl.constexpr,  # of `epilogues`
    UNIT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,  # a tap can fall outside dy
    EVEN_K: tl.constexpr,  # the reduction's tiles divide K / groups
    ACC_DTYPE: tl.constexpr,  # of `accumulator`
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_ROWS: tl.constexpr,  # pixels of a step of the sums
):
    """dx[n, h, w, c] = sum over (r, s, k) of g[n, p, q, k] * weight[k, r, s, c] where h + pad = p * stride + r *
    dilation, likewise w; g = dy, or round(a * dy + b * dy_x + c) inside the image and zero outside.

    The pixels with h % stride_h = i and w % stride_w = j see every stride-th tap only, and among them the problem has
    stride 1: a parity class. A program owns BLOCK_M pixels of one class x BLOCK_N input channels of one group; programs
    that read the same dy are neighbours.
    """
    C = channel_units * UNIT
    K = output_units * UNIT
    group_inputs = group_input_units * UNIT
    group_outputs = group_output_units * UNIT
    tiles_n = tl.cdiv(group_inputs, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid // (tiles_n * groups)
    pid_n = pid - tile * (tiles_n * groups)
    group = pid_n // tiles_n
    parity = tile % (stride_h * stride_w)
    i = parity // stride_w
    j = parity - i * stride_w
    class_h = tl.cdiv(H - i, stride_h)
    class_w = tl.cdiv(W - j, stride_w)
    M = tl.cast(N, INDEX) * class_h * class_w  # none where the image is smaller than the stride

    first = (tile // (stride_h * stride_w)).to(INDEX) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = (pid_n - group * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)

    # Rows past the end repeat the last one, columns the first ones (so that octets stay octets), and neither is
    # stored: no mask on the operands.
    row = tl.minimum(m, tl.maximum(M, 1) - 1)
    image, h, w = class_pixel(row, class_h, class_w)
    # Tap t of the class is r = r0 + t * stride and meets p = p0 - t * dilation.
    r0 = (i + pad_h) % stride_h
    s0 = (j + pad_w) % stride_w
    p0 = (h + (i + pad_h - r0) // stride_h).to(tl.int32)
    q0 = (w + (j + pad_w - s0) // stride_w).to(tl.int32)
    taps_h = tl.cdiv(R - r0, stride_h)
    taps_w = tl.cdiv(S - s0, stride_w)
    dy_row = ((image * P + p0) * Q + q0) * K + group * group_outputs
    w_column = n % group_inputs
    inside = taps_inside(p0, q0, P, Q, -dilation_h, -dilation_w, R, S, BLOCK_M, MASKED)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    # Taps innermost: at stride 1 their number is a constant, and at any the loop divides by a reciprocal.
    taps = tl.maximum(taps_h, 0) * tl.maximum(taps_w, 0)
    per_tap, per_row = reciprocal(taps), reciprocal(taps_w)
    for step in range(taps * tl.cdiv(group_outputs, BLOCK_K)):
        tile_k = divide(step, per_tap)
        tap = step - tile_k * taps
        k = tile_k * BLOCK_K + lane
        t = divide(tap, per_row)
        u = tap - t * taps_w
        exists = k < group_outputs
        valid = sees_tap(inside, t, u, exists, MASKED, EVEN_K, False, 0)
        place = dy_row[:, None] + (k - (t * dilation_h * Q + u * dilation_w) * K)[None, :]
        g = load_tile(dy, place, valid, MASKED or not EVEN_K)
        g_x = load_tile(dy_x, place, valid, MASKED or not EVEN_K)
        # Past the last channel all three are zero, so that g is too.
        channel = group * group_outputs + k
        factor = load_vector(coefficients, channel, exists, 0)
        factor_x = load_vector(coefficients, K + channel, exists, 0)
        offset_x = load_vector(coefficients, 2 * K + channel, exists, 0)
        g = PROLOGUE(g, g_x, factor, factor_x, offset_x, valid, MASKED)
        filter_tap = (r0 + t * stride_h) * S + s0 + u * stride_w
        w_row = channel * (R * S * group_inputs) + filter_tap * group_inputs
        b = load_tile(weight, w_row[:, None] + w_column[None, :], exists[:, None], not EVEN_K)
        acc = add_product(acc, g, b, 0, PRECISION, DOT_DTYPE)

    channel = group * group_inputs + n
    stored = n < group_inputs
    pixel = (image * H + h * stride_h + i) * W + w * stride_w + j
    out = pixel[:, None] * C + channel[None, :]
    out_mask = (m < M)[:, None] & stored[None, :]
    acc = EPILOGUE(acc, residual, residual_mask, x, scale, shift, channel, stored, out, out_mask)
    tl.store(dx + out, round_to(acc, dx.dtype.element_ty), mask=out_mask)

    if x is not None:
        place = (first, M, class_h, class_w, i, j, H, W, stride_h, stride_w, C, channel, stored)
        total, total_x, total_shortcut = written_sums(
            dx, x, mask, mean, shortcut, shortcut_mean, activation, scale, shift, *place, BLOCK_M, BLOCK_N, SUM_ROWS
        )
        partial = tile.to(INDEX) * C + channel
        tl.store(sum_dx + partial, total, mask=stored)
        channel_invstd = tl.load(invstd + channel, mask=stored, other=0.0)
        tl.store(sum_dx_xhat + partial, total_x * channel_invstd, mask=stored)
        if shortcut is not None:
            channel_invstd = tl.load(shortcut_invstd + channel, mask=stored, other=0.0)
            tl.store(sum_dx_shortcut + partial, total_shortcut * channel_invstd, mask=stored)


# What the kernel reads beside dy and the weight: arguments of its ops, by their names.
_OPERANDS = (
    *("dy_x", "dy_coefficients", "residual", "residual_mask", "x", "scale", "shift", "mean", "invstd"),
    *("mask", "shortcut", "shortcut_mean", "shortcut_invstd"),
)


def conv_dgrad(a: Args, config: ConvConfig) -> Out:
    """Launch `ops.conv_dgrad`."""
    dx, *partials = run(a, conv_shape(a), config)
    sums = reduce_alike(*partials) if partials else (dx.new_empty(0, dtype=torch.float32) for _ in range(2))
    return Out(dx, *sums)


def run(
    a: Args | conv_dgrad_join.Args, shape: ConvShape, config: ConvConfig, activation: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Launch the kernel.

    Args:
        a: the arguments of one of its ops; shape is their problem.
        config: the launch configuration.
        activation: like x, to be written, or None.

    Returns:
        dx, and with x the sums of every tile of pixels, [tiles, C] each: two, and with a shortcut a third.
    """
    dy, operands = a.dy, [getattr(a, name, None) for name in _OPERANDS]
    groups, tf32 = a.groups, uses_tf32(dy.dtype)
    krsc = a.weight.contiguous(memory_format=torch.channels_last)
    dx = empty_nhwc(dy, *shape.image)
    if config.kernel == "pointer":
        classes = shape.stride[0] * shape.stride[1]
        pixels = shape.n * triton.cdiv(shape.h, shape.stride[0]) * triton.cdiv(shape.w, shape.stride[1])
        tiles = triton.cdiv(pixels, config.block_m) * classes
    else:
        tiles = gradient_tiling(shape, config).tiles
    # The sums of tiles, to be added in a fixed order.
    count = 0 if a.x is None else 2 if getattr(a, "shortcut", None) is None else 3
    partials = [dy.new_empty((tiles, shape.c), dtype=torch.float32) for _ in range(count)]
    sums = (*partials, *(None,) * (3 - count))
    if config.kernel != "pointer":
        experimental.data_gradient(dy, krsc, operands, dx, sums, activation, shape, config)
        return dx, *partials
    masks = a.x is not None and isinstance(a, Args)  # with the ReLU recomputed from x
    epilogue = apply_relu_mask if masks else no_gradient_epilogue if a.residual is None else add_residual
    group_inputs, group_outputs = shape.c // groups, shape.k // groups
    unit = channel_unit(group_inputs, group_outputs)
    launch(
        _conv_dgrad_kernel,
        tiles * triton.cdiv(group_inputs, config.block_n) * groups,
        dy,
        krsc,
        *operands,
        dx,
        *sums,
        activation,
        shape.n,
        shape.h,
        shape.w,
        shape.c // unit,
        shape.p,
        shape.q,
        shape.k // unit,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        groups,
        group_inputs // unit,
        group_outputs // unit,
        PROLOGUE=no_bn_gradient if a.dy_x is None else bn_gradient,
        EPILOGUE=epilogue,
        UNIT=unit,
        R=shape.r,
        S=shape.s,
        MASKED=(shape.r, shape.s) != (1, 1) or shape.padding != (0, 0),
        EVEN_K=group_outputs % config.block_k == 0,
        ACC_DTYPE=accumulator(a.dy.dtype, a.dy_x is not None),
        PRECISION="tf32" if tf32 else "ieee",
        DOT_DTYPE=dot_dtype(dy.dtype),
        INDEX=index_type(dx.numel(), dy.numel()),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SUM_ROWS=min(config.block_m, SUM_TILE * config.num_warps // config.block_n),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
    return dx, *partials
