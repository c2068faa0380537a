"""Forward convolution as an implicit matrix product: for inference with an affine map, residual and activation behind,
of floats or of int8, for training with a normalisation in front and statistics behind.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.kernels import experimental
from resnet_fused.kernels._conv import (
    accumulator,
    add_product,
    dot_dtype,
    load_padded,
    load_tile,
    load_vector,
    reduction_step,
    sees_tap,
    taps_inside,
    uses_tf32,
)
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch
from resnet_fused.kernels._statistics import store_tile_statistics
from resnet_fused.kernels._tile import ACTIVATIONS, channel_unit, round_to
from resnet_fused.kernels.epilogues import affine_act, affine_add_act, int8_affine_add_act, no_epilogue
from resnet_fused.kernels.merge_statistics import merge_statistics
from resnet_fused.kernels.prologues import activation, no_activation
from resnet_fused.ops import conv_fprop as plain
from resnet_fused.ops import conv_fprop_int8 as int8
from resnet_fused.ops import conv_fprop_stats as stats


@triton.jit
def _conv_fprop_kernel(
    x,  # [N, H, W, C]
    weight,  # [K, R, S, C/groups]
    scale,  # [K] or None
    shift,  # [K] or None
    residual,  # [N, P, Q, K] or None
    x_scale,  # [C], or None: x is the activation itself
    x_shift,  # [C] or None
    x_zero,  # [C] what pads, or None for 0
    offset,  # [K] int32, of int8 operands; None else, as the four behind it
    residual_scale,  # of the residual's grid
    residual_zero,
    y_steps,  # 1 / scale of the result's grid, or None: a float result
    y_zero,
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
    PROLOGUE: tl.constexpr,  # of `prologues`
    EPILOGUE: tl.constexpr,  # of `epilogues`
    ACT: tl.constexpr,  # a function of the fp32 tile
    FLAT_INPUTS: tl.constexpr,  # C / groups where the reduction is flat, to divide by a constant; else 0
    UNIT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # a tap can fall outside the image
    EVEN_K: tl.constexpr,  # the reduction's tiles divide it
    PIXEL_AXIS: tl.constexpr,  # 0: the product is [pixels, channels], 1: [channels, pixels]
    ACC_DTYPE: tl.constexpr,  # of `accumulator`
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = act(scale[k] * sum over (r, s, c) of a[pixel(m, r, s), c] * weight[k, r, s, c] + shift[k] + residual[m,
    k]), where a = x, or round(relu(x * x_scale + x_shift)) inside the image and zero outside. Of int8 operands the sums
    have an offset, and a residual and y are on grids: see `int8_affine_add_act`.

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
    lane = tl.arange(0, BLOCK_K)

    # Rows and columns past the end repeat the last one and are not stored: no mask on the operands.
    row = tl.minimum(m, M - 1)
    q = row % Q
    p = (row // Q) % P
    image = row // (Q * P)
    h0 = (p * stride_h - pad_h).to(tl.int32)
    w0 = (q * stride_w - pad_w).to(tl.int32)
    # What is per pixel lies along PIXEL_AXIS, what is per channel or per step of the reduction along the other one.
    x_row = tl.expand_dims(((image * H + h0) * W + w0) * C + group * group_inputs, 1 - PIXEL_AXIS)
    w_column = (group * group_outputs + tl.minimum(n, group_outputs - 1)) * (R * S * group_inputs)
    w_column = tl.expand_dims(w_column, PIXEL_AXIS)
    inside = taps_inside(h0, w0, H, W, dilation_h, dilation_w, R, S, BLOCK_M, PADDED)
    inside = tl.expand_dims(inside, 1 - PIXEL_AXIS)

    acc = tl.zeros((BLOCK_M, BLOCK_N) if PIXEL_AXIS == 0 else (BLOCK_N, BLOCK_M), ACC_DTYPE)
    if FLAT_INPUTS > 0:
        steps = tl.cdiv(R * S * FLAT_INPUTS, BLOCK_K)
    else:
        steps = R * S * tl.cdiv(group_inputs, BLOCK_K)
    for step in range(steps):
        r, s, c, w_place, exists = reduction_step(step, lane, group_inputs, S, R * S, FLAT_INPUTS)
        valid = sees_tap(inside, r, s, exists, PADDED, EVEN_K, FLAT_INPUTS > 0, PIXEL_AXIS)
        x_place = x_row + tl.expand_dims((r * dilation_h * W + s * dilation_w) * C + c, PIXEL_AXIS)
        channel = group * group_inputs + c
        a = load_padded(x, x_place, x_zero, channel, valid, exists, PADDED, EVEN_K, PIXEL_AXIS)
        channel_scale = load_vector(x_scale, channel, exists, PIXEL_AXIS)
        channel_shift = load_vector(x_shift, channel, exists, PIXEL_AXIS)
        a = PROLOGUE(a, channel_scale, channel_shift, valid, PADDED)
        w_place = w_column + tl.expand_dims(w_place, 1 - PIXEL_AXIS)
        b = load_tile(weight, w_place, tl.expand_dims(exists, 1 - PIXEL_AXIS), not EVEN_K)
        acc = add_product(acc, a, b, PIXEL_AXIS, PRECISION, DOT_DTYPE)

    channel = group * group_outputs + n
    stored = n < group_outputs
    place = tl.expand_dims(m * K, 1 - PIXEL_AXIS) + tl.expand_dims(channel, PIXEL_AXIS)
    valid = tl.expand_dims(m < M, 1 - PIXEL_AXIS) & tl.expand_dims(stored, PIXEL_AXIS)
    grids = (offset, residual_scale, residual_zero, y_steps, y_zero)
    value = EPILOGUE(acc, scale, shift, residual, grids, channel, stored, place, valid, ACT, PIXEL_AXIS)
    rounded = round_to(value, y.dtype.element_ty)
    tl.store(y + place, rounded, mask=valid)
    if mean is not None:
        row = pid_m.to(INDEX)
        pixels = tl.minimum(M - row * BLOCK_M, BLOCK_M)
        sums = (mean, m2, count, row, K, channel, stored, pid_n == 0)
        store_tile_statistics(rounded, m < M, pixels, *sums, PIXEL_AXIS)


def conv_fprop(a: plain.Args, config: ConvConfig) -> Tensor:
    """Launch `ops.conv_fprop`; accumulated and finished in fp32."""
    if config.kernel != "pointer":
        return experimental.conv_fprop(a, config)
    shape = plain.conv_shape(a)
    y = empty_nhwc(a.x, *shape.output)
    affine = {"scale": a.scale, "shift": a.shift, "residual": a.residual}
    plain_sums = a.act is None and not any(t is not None for t in affine.values())
    epilogue = no_epilogue if plain_sums else affine_act if a.residual is None else affine_add_act
    _launch(a.x, a.weight, y, shape, config, epilogue, a.act, **affine)
    return y


def conv_fprop_int8(a: int8.Args, config: ConvConfig) -> Tensor:
    """Launch `ops.conv_fprop_int8`; accumulated in int32, finished in fp32."""
    shape = int8.conv_shape(a)
    y = empty_nhwc(a.x, *shape.output, dtype=a.dtype)
    grids: dict[str, Any] = {"x_zero": a.x_zero, "offset": a.offset}
    if a.residual is not None:  # as floats: of integers triton compiles a kernel for each kind
        grids |= {"residual_scale": a.residual_scale, "residual_zero": float(a.residual_zero)}
    if a.dtype == torch.int8:
        grids |= {"y_steps": 1.0 / a.y_scale, "y_zero": float(a.y_zero)}
    affine = {"scale": a.scale, "shift": a.shift, "residual": a.residual}
    _launch(a.x, a.weight, y, shape, config, int8_affine_add_act, a.act, **affine, **grids)
    return y


def conv_fprop_stats(a: stats.Args, config: ConvConfig) -> stats.Out:
    """Launch `ops.conv_fprop_stats`.

    Source: the tiles merge as in Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
        variances, 1979.
    """
    if config.kernel != "pointer":
        y, mean, m2, count = experimental.conv_fprop_stats(a, config)
        return stats.Out(y, *merge_statistics(mean, m2, count, a.rows))
    x, shape = a.x, stats.conv_shape(a)
    y = empty_nhwc(x, *shape.output)
    tiles = triton.cdiv(shape.n * shape.p * shape.q, config.block_m)
    # A row for each tile where they suffice: what is left over is zero from the start.
    new = x.new_zeros if tiles < a.rows else x.new_empty
    mean, m2 = (new((max(tiles, a.rows), shape.k), dtype=dtype) for dtype in (torch.float64, torch.float32))
    count = new(max(tiles, a.rows), dtype=torch.float32)
    sums = {"mean": mean, "m2": m2, "count": count}
    _launch(x, a.weight, y, shape, config, no_epilogue, None, x_scale=a.x_scale, x_shift=a.x_shift, **sums)
    if tiles > a.rows:
        mean, m2, count = merge_statistics(mean, m2, count, a.rows)
    return stats.Out(y, mean, m2, count)


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    shape: ConvShape,
    config: ConvConfig,
    epilogue: Any,
    act: str | None,
    **given: Any,
) -> None:
    """Launch the kernel; `given` are those of its arguments that are not None."""
    group_inputs, group_outputs = shape.c // shape.groups, shape.k // shape.groups
    unit = channel_unit(shape.c, group_inputs, most=16 if x.dtype == torch.int8 else 8)
    pixels = shape.n * shape.p * shape.q
    prologue, statistics = given.get("x_scale") is not None, "mean" in given
    reduction = shape.r * shape.s * group_inputs if config.flat else group_inputs
    launch(
        _conv_fprop_kernel,
        triton.cdiv(pixels, config.block_m) * triton.cdiv(group_outputs, config.block_n) * shape.groups,
        x,
        weight.contiguous(memory_format=torch.channels_last),
        *map(given.get, ("scale", "shift", "residual", "x_scale", "x_shift")),
        *map(given.get, ("x_zero", "offset", "residual_scale", "residual_zero", "y_steps", "y_zero")),
        y,
        *map(given.get, ("mean", "m2", "count")),
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
        PROLOGUE=activation if prologue else no_activation,
        EPILOGUE=epilogue,
        ACT=ACTIVATIONS[act],
        FLAT_INPUTS=group_inputs if config.flat else 0,
        UNIT=unit,
        R=shape.r,
        S=shape.s,
        PADDED=shape.padding != (0, 0),
        EVEN_K=reduction % config.block_k == 0,
        # Statistics are sums over pixels: along the second axis they need no other warp. wgmma takes 64 rows.
        PIXEL_AXIS=1 if statistics and config.block_n >= 64 else 0,
        ACC_DTYPE=accumulator(x.dtype, prologue),
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
