"""The data gradient of a convolution as an implicit matrix product, with the backward of the batch norm behind the
convolution in front, and behind it that of the one before: of the same block, or of the block before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch import conv_config
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.device import arch
from resnet_fused.kernels._conv import (
    add_product,
    bn_gradient,
    divide,
    dot_dtype,
    finished,
    reciprocal,
    taps_inside,
    uses_tf32,
)
from resnet_fused.kernels._dgrad import SUM_TILE, class_pixel, written_sums
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch
from resnet_fused.kernels._tile import channel_unit, passes_bit, passes_relu, round_to, to_fp32
from resnet_fused.kernels.reduce_rows import reduce_alike


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
    UNIT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,  # a tap can fall outside dy
    EVEN_K: tl.constexpr,  # the reduction's tiles divide K / groups
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
    if MASKED:
        inside = taps_inside(p0, q0, P, Q, -dilation_h, -dilation_w, R, S, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if dy_x is None else tl.int32)
    # Taps innermost: at stride 1 their number is a constant, and at any the loop divides by a reciprocal.
    taps = tl.maximum(taps_h, 0) * tl.maximum(taps_w, 0)
    per_tap, per_row = reciprocal(taps), reciprocal(taps_w)
    for step in range(taps * tl.cdiv(group_outputs, BLOCK_K)):
        tile_k = divide(step, per_tap)
        tap = step - tile_k * taps
        k = tile_k * BLOCK_K + lane
        t = divide(tap, per_row)
        u = tap - t * taps_w
        offset = dy_row[:, None] + (k - (t * dilation_h * Q + u * dilation_w) * K)[None, :]
        exists = k < group_outputs
        valid = exists[None, :]
        if MASKED:
            wanted = (1 << t) | (1 << (u + 16))
            inside_tap = ((inside & wanted) == wanted)[:, None]
            valid = inside_tap if EVEN_K else inside_tap & valid
        if MASKED or not EVEN_K:
            g = tl.load(dy + offset, mask=valid, other=0.0)
        else:
            g = tl.load(dy + offset)
        if dy_x is not None:
            if MASKED or not EVEN_K:
                g_x = tl.load(dy_x + offset, mask=valid, other=0.0)
            else:
                g_x = tl.load(dy_x + offset)
            # Past the last channel all three are zero, so that g is too.
            column = coefficients + (group * group_outputs + k)
            factor = tl.load(column, mask=exists, other=0.0)[None, :]
            factor_x = tl.load(column + K, mask=exists, other=0.0)[None, :]
            offset_x = tl.load(column + 2 * K, mask=exists, other=0.0)[None, :]
            value = bn_gradient(g, g_x, factor, factor_x, offset_x)
            if MASKED:
                value = tl.where(valid, value, 0.0)
            g = round_to(value, dy.dtype.element_ty)
        filter_tap = (r0 + t * stride_h) * S + s0 + u * stride_w
        w_row = (group * group_outputs + k) * (R * S * group_inputs) + filter_tap * group_inputs
        w_tile = weight + (w_row[:, None] + w_column[None, :])
        if EVEN_K:
            b = tl.load(w_tile)
        else:
            b = tl.load(w_tile, mask=exists[:, None], other=0.0)
        acc = add_product(acc, g, b, PRECISION, DOT_DTYPE)

    acc = finished(acc) if mask is None else acc.to(tl.float32, bitcast=True)
    channel = group * group_inputs + n
    stored = n < group_inputs
    pixel = (image * H + h * stride_h + i) * W + w * stride_w + j
    out = pixel[:, None] * C + channel[None, :]
    out_mask = (m < M)[:, None] & stored[None, :]
    if residual is not None:
        addend = to_fp32(tl.load(residual + out, mask=out_mask, other=0.0))
        if residual_mask is not None:
            addend = tl.where(passes_bit(residual_mask, out, out_mask), addend, 0.0)
        acc += addend
    if x is not None and mask is None:
        value = tl.load(x + out, mask=out_mask, other=0.0)
        channel_scale = tl.load(scale + channel, mask=stored, other=0.0)[None, :]
        channel_shift = tl.load(shift + channel, mask=stored, other=0.0)[None, :]
        acc = tl.where(passes_relu(value, channel_scale, channel_shift) & out_mask, acc, 0.0)
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


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = the gradient of conv(., weight) for g + residual, in fp32 and rounded once, where g = dy or the batch norm's
    gradient round(a * dy + b * dy_x + c); with x, behind the ReLU of the batch norm that made the convolution's input,
    and with that batch norm's two sums.

    Args:
        dy: [N, K, P, Q] in NHWC order; fp32, fp16 or bf16.
        weight: [K, C/groups, R, S], any strides (NHWC order is read in place, any other copied); the dtype of dy.
        dy_x: like dy, or None; both or neither of dy_x and dy_coefficients.
        dy_coefficients: (a, b, c), [3, K] fp32, contiguous.
        residual: [N, C, *size] in NHWC order, added to dx, or None.
        residual_mask: bits from `bn_apply`: residual counts only where they are set (a select). None: everywhere.
        x: [N, C, *size] in NHWC order, or None; excludes residual. dx passes only where not
            (round(x * scale + shift) <= 0), which a NaN does.
        scale: [C] fp32; so are shift, mean and invstd, all with x or none.
        shift: see scale.
        mean: see scale.
        invstd: see scale.
        size: (H, W) of the image.
        stride: of the filter, (h, w); so are padding (zeros) and dilation, which a strided filter may not have.
        padding: see stride.
        dilation: see stride.
        groups: of channels that see each other.
        config: the launch configuration; None takes the plan's.

    Returns:
        dx: [N, C, *size] in NHWC order, in the dtype of dy.
        sum_dx, sum_dx_xhat: with x [C] fp32, sum(dx) and sum(dx * (x - mean) * invstd) of dx as it was rounded, added
            in a fixed order; else empty.
    """
    operands = (dy_x, dy_coefficients, residual, residual_mask, x, scale, shift, mean, invstd, *(None,) * 4)
    dx, *partials = run(dy, weight, operands, size, stride, padding, dilation, groups, config)
    if not partials:
        return dx, dy.new_empty(0, dtype=torch.float32), dy.new_empty(0, dtype=torch.float32)
    sum_dx, sum_dx_xhat = reduce_alike(*partials)
    return dx, sum_dx, sum_dx_xhat


def run(
    dy: Tensor,
    weight: Tensor,
    operands: tuple[Tensor | None, ...],
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: ConvConfig | None,
    activation: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Launch the kernel.

    Args:
        operands: the kernel's from `dy_x` to `shortcut_invstd`; the rest as in `conv_dgrad`.
        activation: like x, to be written, or None.

    Returns:
        dx, and with x the sums of every tile of pixels, [tiles, C] each: two, and with `shortcut` a third.
    """
    dy_x, x, shortcut = operands[0], operands[4], operands[10]
    image = (dy.shape[0], weight.shape[1] * groups, *size)
    shape = ConvShape.of(image, weight.shape, stride, padding, dilation, groups)
    tf32 = uses_tf32(dy.dtype)
    if config is None:
        flags = () if dy_x is None else ("prologue",)
        config = conv_config("conv_dgrad", shape, dy.dtype, arch(dy.device), tf32, flags)
    krsc = weight.contiguous(memory_format=torch.channels_last)
    dx = empty_nhwc(dy, shape.n, shape.c, shape.h, shape.w)
    classes = shape.stride[0] * shape.stride[1]
    pixels = shape.n * triton.cdiv(shape.h, shape.stride[0]) * triton.cdiv(shape.w, shape.stride[1])
    tiles = triton.cdiv(pixels, config.block_m) * classes
    # The sums of tiles, to be added in a fixed order.
    count = 0 if x is None else 2 if shortcut is None else 3
    partials = [dy.new_empty((tiles, shape.c), dtype=torch.float32) for _ in range(count)]
    group_inputs, group_outputs = shape.c // groups, shape.k // groups
    unit = channel_unit(group_inputs, group_outputs)
    launch(
        _conv_dgrad_kernel,
        tiles * triton.cdiv(group_inputs, config.block_n) * groups,
        dy,
        krsc,
        *operands,
        dx,
        *partials,
        *(None,) * (3 - count),
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
        UNIT=unit,
        R=shape.r,
        S=shape.s,
        MASKED=(shape.r, shape.s) != (1, 1) or shape.padding != (0, 0),
        EVEN_K=group_outputs % config.block_k == 0,
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
