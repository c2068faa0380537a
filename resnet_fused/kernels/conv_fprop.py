"""Forward convolution as an implicit matrix product: for inference with an affine map, residual and activation behind,
for training with a normalisation in front and statistics behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch import conv_config
from resnet_fused.dispatch.conv import ConvConfig, ConvShape, conv_fprop_heuristic
from resnet_fused.dispatch.device import arch
from resnet_fused.kernels._conv import (
    activation_tile,
    add_product,
    dot_dtype,
    finished,
    taps_inside,
    uses_tf32,
)
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch, never_replay
from resnet_fused.kernels._statistics import store_tile_statistics
from resnet_fused.kernels._tile import ACTIVATIONS, channel_unit, round_to, to_fp32
from resnet_fused.kernels.merge_statistics import merge_statistics


@triton.jit
def _conv_fprop_kernel(
    x,  # [N, H, W, C]
    weight,  # [K, R, S, C/groups]
    scale,  # [K] or None
    shift,  # [K] or None
    residual,  # [N, P, Q, K] or None
    x_scale,  # [C], or None: x is the activation itself
    x_shift,  # [C] or None
    y,  # [N, P, Q, K]
    mean,  # [tiles of pixels, K] fp64, or None: no statistics
    m2,  # [tiles of pixels, K] or None
    count,  # [tiles of pixels] or None
    M,  # N * P * Q
    H,
    W,
    channel_units,  # C / UNIT
    P,
    Q,
    K,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    groups,
    group_input_units,  # C / groups / UNIT
    group_outputs,  # K / groups
    FLAT_INPUTS: tl.constexpr,  # C / groups where the reduction is flat, to divide by a constant; else 0
    UNIT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # a tap can fall outside the image
    EVEN_K: tl.constexpr,  # the reduction's tiles divide it
    PIXEL_AXIS: tl.constexpr,  # 0: the product is [pixels, channels], 1: [channels, pixels]
    ACT: tl.constexpr,  # a function of the fp32 tile
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = act(scale[k] * sum over (r, s, c) of a[pixel(m, r, s), c] * weight[k, r, s, c] + shift[k] + residual[m,
    k]), where a = x, or round(relu(x * x_scale + x_shift)) inside the image and zero outside.

    A program owns BLOCK_M output pixels x BLOCK_N output channels of one group. Programs that share pixels are
    neighbours, so that x comes from L2 for all but the first of them.
    """
    C = channel_units * UNIT
    group_inputs = group_input_units * UNIT
    tiles_n = tl.cdiv(group_outputs, BLOCK_N)
    pid = tl.program_id(0)
    pid_m = pid // (tiles_n * groups)
    pid_n = pid - pid_m * (tiles_n * groups)
    group = pid_n // tiles_n

    m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid_n - group * tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows and columns past the end repeat the last one and are not stored: no mask on the operands.
    row = tl.minimum(m, M - 1)
    q = row % Q
    p = (row // Q) % P
    image = row // (Q * P)
    h0 = (p * stride_h - pad_h).to(tl.int32)
    w0 = (q * stride_w - pad_w).to(tl.int32)
    x_row = ((image * H + h0) * W + w0) * C + group * group_inputs
    w_column = (group * group_outputs + tl.minimum(n, group_outputs - 1)) * (R * S * group_inputs)
    if PADDED:
        inside = taps_inside(h0, w0, H, W, dilation_h, dilation_w, R, S, BLOCK_M)
        inside = tl.expand_dims(inside, 1 - PIXEL_AXIS)
    # What is per pixel lies along PIXEL_AXIS, what is per channel or per step of the reduction along the other one.
    x_row = tl.expand_dims(x_row, 1 - PIXEL_AXIS)
    w_column = tl.expand_dims(w_column, PIXEL_AXIS)

    acc_type: tl.constexpr = tl.float32 if x_scale is None else tl.int32
    acc = tl.zeros((BLOCK_M, BLOCK_N) if PIXEL_AXIS == 0 else (BLOCK_N, BLOCK_M), acc_type)
    if FLAT_INPUTS > 0:
        for k0 in range(0, R * S * FLAT_INPUTS, BLOCK_K):
            rsc = k0 + k
            tap = rsc // FLAT_INPUTS
            r = tap // S
            s = tap - r * S
            offset = (r * dilation_h * W + s * dilation_w) * C + (rsc - tap * FLAT_INPUTS)
            within = rsc < R * S * FLAT_INPUTS
            valid = tl.expand_dims(within, PIXEL_AXIS)
            if PADDED:
                wanted = tl.where(within, (1 << r) | (1 << (s + 16)), 1 << 15)  # bit 15 is never set
                wanted = tl.expand_dims(wanted, PIXEL_AXIS)
                valid = (inside & wanted) == wanted
            a = tl.load(x + (x_row + tl.expand_dims(offset, PIXEL_AXIS)), mask=valid, other=0.0)
            if x_scale is not None:
                c = group * FLAT_INPUTS + rsc - tap * FLAT_INPUTS
                a = activation_tile(a, x_scale + c, x_shift + c, within, valid, PADDED, PIXEL_AXIS)
            within = tl.expand_dims(within, 1 - PIXEL_AXIS)
            b = tl.load(weight + (w_column + tl.expand_dims(rsc, 1 - PIXEL_AXIS)), mask=within, other=0.0)
            if PIXEL_AXIS == 0:
                acc = add_product(acc, a, b, PRECISION, DOT_DTYPE)
            else:
                acc = add_product(acc, b, a, PRECISION, DOT_DTYPE)
    else:
        # Taps innermost: only constants are divided by, and neighbouring taps read the same pixels.
        for i in range(R * S * tl.cdiv(group_inputs, BLOCK_K)):
            tap = i % (R * S)
            c = i // (R * S) * BLOCK_K + k
            r = tap // S
            s = tap - r * S
            offset = (r * dilation_h * W + s * dilation_w) * C + c
            x_tile = x + (x_row + tl.expand_dims(offset, PIXEL_AXIS))
            w_tile = weight + (w_column + tl.expand_dims(tap * group_inputs + c, 1 - PIXEL_AXIS))
            valid = tl.expand_dims(c < group_inputs, PIXEL_AXIS)
            if PADDED:
                wanted = (1 << r) | (1 << (s + 16))
                inside_tap = (inside & wanted) == wanted
                valid = inside_tap if EVEN_K else inside_tap & valid
            if PADDED or not EVEN_K:
                a = tl.load(x_tile, mask=valid, other=0.0)
            else:
                a = tl.load(x_tile)
            if x_scale is not None:
                first = group * group_inputs + c
                a = activation_tile(a, x_scale + first, x_shift + first, c < group_inputs, valid, PADDED, PIXEL_AXIS)
            if EVEN_K:
                b = tl.load(w_tile)
            else:
                b = tl.load(w_tile, mask=tl.expand_dims(c < group_inputs, 1 - PIXEL_AXIS), other=0.0)
            if PIXEL_AXIS == 0:
                acc = add_product(acc, a, b, PRECISION, DOT_DTYPE)
            else:
                acc = add_product(acc, b, a, PRECISION, DOT_DTYPE)

    channel = group * group_outputs + n
    stored = n < group_outputs
    if shift is not None:
        bias = tl.expand_dims(to_fp32(tl.load(shift + channel, mask=stored, other=0.0)), PIXEL_AXIS)
    if scale is not None:
        factor = tl.expand_dims(to_fp32(tl.load(scale + channel, mask=stored, other=0.0)), PIXEL_AXIS)
        if shift is None:
            bias = tl.zeros_like(factor)
        acc = acc.to(tl.float32, bitcast=True)
        acc = tl.fma(acc, tl.broadcast_to(factor, acc.shape), tl.broadcast_to(bias, acc.shape))
    elif shift is not None:
        acc = acc.to(tl.float32, bitcast=True) + bias
    else:
        acc = finished(acc)
    out = tl.expand_dims(m * K, 1 - PIXEL_AXIS) + tl.expand_dims(channel, PIXEL_AXIS)
    out_mask = tl.expand_dims(m < M, 1 - PIXEL_AXIS) & tl.expand_dims(stored, PIXEL_AXIS)
    if residual is not None:
        acc = acc + to_fp32(tl.load(residual + out, mask=out_mask, other=0.0))
    acc = ACT(acc)
    rounded = round_to(acc, y.dtype.element_ty)
    tl.store(y + out, rounded, mask=out_mask)

    if mean is not None:
        row = pid_m.to(INDEX)
        pixels = tl.minimum(M - row * BLOCK_M, BLOCK_M)
        sums = (mean, m2, count, row, K, channel, stored, pid_n == 0)
        store_tile_statistics(rounded, m < M, pixels, *sums, PIXEL_AXIS)


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str | None,
    config: ConvConfig | None = None,
) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual), accumulated and finished in fp32, rounded once to the dtype
    of x.

    Grouped convolutions run group by group: right for every group size, efficient from 16 channels a group on.

    Args:
        x: [N, C, H, W] in NHWC order; fp32, fp16 or bf16.
        weight: [K, C/groups, R, S], any strides (NHWC order is read in place, any other copied); the dtype of x.
        scale, shift: [K], or None for 1 and 0.
        residual: [N, K, P, Q] in NHWC order, the dtype of x, or None.
        stride, padding, dilation: of the filter, (h, w); the padding is zero.
        groups: of channels that see each other.
        act: the name of the activation, one of `ops.activations`; None for the identity.
        config: the launch configuration; None takes the plan's.

    Returns:
        y: [N, K, P, Q] in NHWC order, in the dtype of x.
    """
    shape = ConvShape.of(x.shape, weight.shape, stride, padding, dilation, groups)
    krsc = weight.contiguous(memory_format=torch.channels_last)
    if config is None:
        config = _planned("conv_fprop", x, krsc, residual, shape, act=act)
    if config.kernel != "pointer":
        from resnet_fused.kernels import experimental

        y = experimental.conv_fprop(x, krsc, scale, shift, residual, shape, act == "relu", config)
    else:
        y = empty_nhwc(x, shape.n, shape.k, shape.p, shape.q)
        _launch(x, krsc, (scale, shift, residual, None, None), y, (None, None, None), shape, act, config)
    return y


def conv_fprop_stats(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = round(conv(a, weight)) and the statistics of y as it was rounded, where a = x or the activation
    round(relu(x * x_scale + x_shift)), zero outside the image, a NaN kept.

    Args:
        x: [N, C, H, W] in NHWC order; fp32, fp16 or bf16.
        weight, stride, dilation, groups: as in `conv_fprop`.
        x_scale, x_shift: [C] fp32, or None; both or neither.
        padding: zeros around the activation, not around x.
        rows: how many rows of statistics to return.
        config: the launch configuration; None takes the plan's.

    Returns:
        y: [N, K, P, Q] in NHWC order, in the dtype of x.
        mean: [rows, K] fp64, of consecutive parts of the pixels.
        m2: [rows, K] fp32, the sums of squared deviations from it.
        count: [rows] fp32, the numbers of pixels. A row left over is zero.

    Source: the tiles merge as in Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
        variances, 1979.
    """
    shape = ConvShape.of(x.shape, weight.shape, stride, padding, dilation, groups)
    krsc = weight.contiguous(memory_format=torch.channels_last)
    if config is None:
        config = _planned("conv_fprop_stats", x, krsc, None, shape, () if x_scale is None else ("prologue",))
    if config.kernel != "pointer":
        from resnet_fused.kernels import experimental

        if x_scale is not None:
            raise ValueError(f"conv_fprop_stats: the formulation {config.kernel!r} has no prologue; choose 'pointer'")
        y, mean, m2, count = experimental.conv_fprop_stats(x, krsc, shape, config)
        mean, m2, count = merge_statistics(mean, m2, count, rows)
        return y, mean, m2, count
    y = empty_nhwc(x, shape.n, shape.k, shape.p, shape.q)
    tiles = triton.cdiv(shape.n * shape.p * shape.q, config.block_m)
    # A row for each tile where they suffice: what is left over is zero from the start.
    new = x.new_zeros if tiles < rows else x.new_empty
    mean, m2 = (new((max(tiles, rows), shape.k), dtype=dtype) for dtype in (torch.float64, torch.float32))
    count = new(max(tiles, rows), dtype=torch.float32)
    _launch(x, krsc, (None, None, None, x_scale, x_shift), y, (mean, m2, count), shape, None, config)
    if tiles > rows:
        mean, m2, count = merge_statistics(mean, m2, count, rows)
    return y, mean, m2, count


def _planned(
    op: str,
    x: Tensor,
    krsc: Tensor,
    residual: Tensor | None,
    shape: ConvShape,
    flags: tuple[str, ...] = (),
    act: str | None = None,
) -> ConvConfig:
    """The plan's configuration; the heuristic's where these operands do not suit the formulation that was measured."""
    problem = (shape, x.dtype, arch(x.device), uses_tf32(x.dtype))
    config = conv_config(op, *problem, flags)
    if config.kernel == "pointer":
        return config
    from resnet_fused.kernels import experimental

    never_replay()  # of what depends on addresses
    if act in (None, "relu") and experimental.refuse(x, krsc, residual, shape, config) is None:
        return config
    return conv_fprop_heuristic(*problem, prologue=bool(flags), statistics=op == "conv_fprop_stats")


def _launch(
    x: Tensor,
    krsc: Tensor,
    inputs: tuple[Tensor | None, ...],
    y: Tensor,
    statistics: tuple[Tensor | None, ...],
    shape: ConvShape,
    act: str | None,
    config: ConvConfig,
) -> None:
    group_inputs, group_outputs = shape.c // shape.groups, shape.k // shape.groups
    unit = channel_unit(shape.c, group_inputs)
    pixels = shape.n * shape.p * shape.q
    reduction = shape.r * shape.s * group_inputs if config.flat else group_inputs
    launch(
        _conv_fprop_kernel,
        triton.cdiv(pixels, config.block_m) * triton.cdiv(group_outputs, config.block_n) * shape.groups,
        x,
        krsc,
        *inputs,
        y,
        *statistics,
        pixels,
        shape.h,
        shape.w,
        shape.c // unit,
        shape.p,
        shape.q,
        shape.k,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        shape.groups,
        group_inputs // unit,
        group_outputs,
        FLAT_INPUTS=group_inputs if config.flat else 0,
        UNIT=unit,
        R=shape.r,
        S=shape.s,
        PADDED=shape.padding != (0, 0),
        EVEN_K=reduction % config.block_k == 0,
        # Statistics are sums over pixels: along the second axis they need no other warp. wgmma takes 64 rows.
        PIXEL_AXIS=1 if statistics[0] is not None and config.block_n >= 64 else 0,
        ACT=ACTIVATIONS[act],
        PRECISION="tf32" if uses_tf32(x.dtype) else "ieee",
        DOT_DTYPE=dot_dtype(x.dtype),
        INDEX=index_type(x.numel(), y.numel()),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )
