"""The gradient of a convolution's weight as an implicit matrix product over the output pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.kernels._conv import add_product, dot_dtype, load_tile, load_vector, uses_tf32
from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import channel_unit
from resnet_fused.kernels.prologues import activation, bn_gradient, no_activation, no_bn_gradient
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.ops.conv_wgrad import Args, conv_shape


def _magic(divisor: int) -> tuple[int, int]:
    """(factor, shift) with n // divisor == n * factor >> shift for 0 <= n < 2^31 (Granlund and Montgomery 1994): the
    loop over pixels divides twice per pixel, and a GPU has no divider. The factor is the int32 with the bits of the
    uint32.
    """
    length = (divisor - 1).bit_length()
    factor = (1 << (31 + length)) // divisor + 1
    return factor - (1 << 32) if factor >> 31 else factor, 31 + length


@triton.jit
def _divide(n, factor, shift):
    wide = n.to(tl.uint64) * factor.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (wide >> shift.to(tl.uint64)).to(tl.int32)


@triton.jit
def _below(index, end, EVEN: tl.constexpr):
    """index < end, a constant where tiles divide it."""
    if EVEN:
        return tl.full(index.shape, 1, tl.int1)
    else:
        return index < end


@triton.jit
def _inside(position, size):
    """0 <= position < size."""
    return position.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)  # a size of 1 is a constant, not a tensor


@triton.jit(do_not_specialize=["image_factor", "image_shift", "row_factor", "row_shift"])
def _conv_wgrad_kernel(
    dy,  # [N, P, Q, K]
    x,  # [N, H, W, C]
    dy_x,  # [N, P, Q, K] or None
    dy_coefficients,  # [3, K] or None
    x_scale,  # [C] or None
    x_shift,  # [C] or None
    partial,  # [splits, K, R, S, C/groups] fp32
    M,  # N * P * Q
    span,  # output pixels a split, a multiple of BLOCK_K
    H,
    W,
    channel_units,  # C / UNIT
    P,
    Q,
    image_factor,  # of division by P * Q
    image_shift,
    row_factor,  # of division by Q
    row_shift,
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
    X_PROLOGUE: tl.constexpr,  # of `prologues`; so is DY_PROLOGUE
    DY_PROLOGUE: tl.constexpr,
    FLAT_INPUTS: tl.constexpr,  # C / groups where a tile's rows are (r, s, c), to divide by a constant; 0: c of one tap
    UNIT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DENSE: tl.constexpr,  # 1x1, stride 1, no padding: an output pixel is an input pixel
    PADDED: tl.constexpr,  # a tap can fall outside the image
    EVEN_M: tl.constexpr,  # tiles divide the pixels
    EVEN_C: tl.constexpr,  # tiles divide the rows
    EVEN_N: tl.constexpr,  # tiles divide the output channels of a group
    X_AXIS: tl.constexpr,  # 0: x is the left operand and the product [rows, k], 1: dy is, [k, rows]
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, k, r, s, c] = sum over the split's pixels m of g[m, k] * a[pixel(m, r, s), c].

    A program owns BLOCK_M rows x BLOCK_N output channels of one group, over one split. Programs of a split are
    neighbours, so that its pixels come from L2 for all but the first of them. Operands are loaded in the order in which
    they are multiplied: a transposed tile would have to pass through registers.
    """
    C = channel_units * UNIT
    K = output_units * UNIT
    group_inputs = group_input_units * UNIT
    group_outputs = group_output_units * UNIT
    weight_row = R * S * group_inputs
    if FLAT_INPUTS > 0:
        rows = R * S * FLAT_INPUTS
        taps = 1
    else:
        rows = group_inputs
        taps = R * S
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(group_outputs, BLOCK_N)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    tap = (pid // tiles_m) % taps
    tile_n = (pid // (tiles_m * taps)) % tiles_n
    group = (pid // (tiles_m * taps * tiles_n)) % groups
    split = pid // (tiles_m * taps * tiles_n * groups)

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * span
    end = tl.minimum(first + span, M)
    if FLAT_INPUTS > 0:
        c = row % FLAT_INPUTS
        row_tap = row // FLAT_INPUTS
        r = row_tap // S
        s = row_tap - r * S
        column = (r * dilation_h * W + s * dilation_w) * C + (group * group_inputs + c)
        top, left = -pad_h, -pad_w
        row_h = tl.expand_dims(r * dilation_h, 1 - X_AXIS)
        row_w = tl.expand_dims(s * dilation_w, 1 - X_AXIS)
    else:
        c = row
        r = tap // S
        s = tap - r * S
        column = group * group_inputs + c
        top, left = r * dilation_h - pad_h, s * dilation_w - pad_w
        if PADDED and x_scale is not None:
            # A tap that no pixel sees stays zero, also where the shift is NaN.
            lowest = tl.maximum(tl.cdiv(-top, stride_h), 0)
            leftmost = tl.maximum(tl.cdiv(-left, stride_w), 0)
            reached = (lowest < P) & (lowest * stride_h + top < H) & (leftmost < Q) & (leftmost * stride_w + left < W)
            end = tl.where(reached, end, first)
    k = group * group_outputs + n
    row_exists = _below(row, rows, EVEN_C)
    k_exists = _below(n, group_outputs, EVEN_N)
    scale = load_vector(x_scale, group * group_inputs + c, row_exists, 1 - X_AXIS)
    shift = load_vector(x_shift, group * group_inputs + c, row_exists, 1 - X_AXIS)
    dy_a = load_vector(dy_coefficients, k, k_exists, X_AXIS)
    dy_b = load_vector(dy_coefficients, K + k, k_exists, X_AXIS)
    dy_c = load_vector(dy_coefficients, 2 * K + k, k_exists, X_AXIS)
    row_exists = tl.expand_dims(row_exists, 1 - X_AXIS)
    k_exists = tl.expand_dims(k_exists, X_AXIS)

    acc = tl.zeros((BLOCK_M, BLOCK_N) if X_AXIS == 0 else (BLOCK_N, BLOCK_M), tl.float32)
    for start in range(first, end, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        in_range = _below(m, M, EVEN_M)
        if DENSE:
            x_pixel = m.to(INDEX) * C
        else:
            image = _divide(m, image_factor, image_shift)
            rest = m - image * (P * Q)
            p = _divide(rest, row_factor, row_shift)
            h = p * stride_h + top
            w = (rest - p * Q) * stride_w + left
            x_pixel = ((image.to(INDEX) * H + h) * W + w) * C
        seen = in_range
        if PADDED and FLAT_INPUTS == 0:
            seen = in_range & _inside(h, H) & _inside(w, W)
        x_mask = tl.expand_dims(seen, X_AXIS) & row_exists
        if PADDED and FLAT_INPUTS > 0:
            x_mask &= _inside(tl.expand_dims(h, X_AXIS) + row_h, H) & _inside(tl.expand_dims(w, X_AXIS) + row_w, W)
        a = load_tile(x, tl.expand_dims(column, 1 - X_AXIS) + tl.expand_dims(x_pixel, X_AXIS), x_mask, True)
        a = X_PROLOGUE(a, scale, shift, x_mask, FLAT_INPUTS > 0 and PADDED)
        g_place = tl.expand_dims(k, X_AXIS) + tl.expand_dims(m.to(INDEX) * K, 1 - X_AXIS)
        # A pixel that does not count must stay zero in one operand; a prologue makes something else of its zero.
        g_seen = tl.expand_dims(in_range if x_scale is None else seen, 1 - X_AXIS)
        g = load_tile(dy, g_place, g_seen & k_exists, True)
        g_x = load_tile(dy_x, g_place, g_seen & k_exists, True)
        g = DY_PROLOGUE(g, g_x, dy_a, dy_b, dy_c, g_seen, x_scale is not None and (PADDED or not EVEN_M))
        acc = add_product(acc, a, g, X_AXIS, PRECISION, DOT_DTYPE)

    place = (split.to(INDEX) * K + k) * weight_row
    within = row if FLAT_INPUTS > 0 else tap * group_inputs + row
    offset = tl.expand_dims(place, X_AXIS) + tl.expand_dims(within, 1 - X_AXIS)
    tl.store(partial + offset, acc, mask=k_exists & row_exists)


def conv_wgrad(a: Args, config: ConvConfig) -> Tensor:
    """Launch `ops.conv_wgrad`. The pixels are split into ranges whose partial sums are added in a fixed order:
    bit-identical run to run.

    A NaN or inf in x or dy reaches what it reaches in PyTorch, but that with x_scale a padded pixel is skipped, not
    zero times dy. An infinite x_shift gives NaN.
    """
    ranges = run(a, config)
    return (ranges[0] if ranges.shape[0] == 1 else reduce_alike(ranges)[0]).permute(0, 3, 1, 2)


def run(a: Args, config: ConvConfig) -> Tensor:
    """Launch the kernel.

    Returns:
        The sums of every range of pixels, [splits, K, R, S, C/groups] fp32.
    """
    dy, x, groups = a.dy, a.x, a.groups
    shape = conv_shape(a)
    tf32 = uses_tf32(x.dtype)
    x_prologue, dy_prologue = a.x_scale is not None, a.dy_x is not None
    group_inputs, group_outputs = shape.c // groups, shape.k // groups
    unit = channel_unit(shape.c, shape.k, group_inputs, group_outputs)
    pixels = shape.n * shape.p * shape.q
    rows = shape.r * shape.s * group_inputs if config.flat else group_inputs
    taps = 1 if config.flat else shape.r * shape.s
    span = max(1, triton.cdiv(pixels, config.splits * config.block_k)) * config.block_k
    splits = max(1, triton.cdiv(pixels, span))  # the last ranges may have run out of pixels
    partial = torch.empty((splits, shape.k, shape.r, shape.s, group_inputs), dtype=torch.float32, device=x.device)
    launch(
        _conv_wgrad_kernel,
        triton.cdiv(rows, config.block_m) * taps * triton.cdiv(group_outputs, config.block_n) * groups * splits,
        dy,
        x,
        a.dy_x,
        a.dy_coefficients,
        a.x_scale,
        a.x_shift,
        partial,
        pixels,
        span,
        shape.h,
        shape.w,
        shape.c // unit,
        shape.p,
        shape.q,
        *_magic(shape.p * shape.q),
        *_magic(shape.q),
        shape.k // unit,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        groups,
        group_inputs // unit,
        group_outputs // unit,
        X_PROLOGUE=activation if x_prologue else no_activation,
        DY_PROLOGUE=bn_gradient if dy_prologue else no_bn_gradient,
        FLAT_INPUTS=group_inputs if config.flat else 0,
        UNIT=unit,
        R=shape.r,
        S=shape.s,
        DENSE=(shape.r, shape.s, shape.stride, shape.padding) == (1, 1, (1, 1), (0, 0)),
        PADDED=shape.padding != (0, 0),
        EVEN_M=pixels % config.block_k == 0,
        EVEN_C=rows % config.block_m == 0,
        EVEN_N=group_outputs % config.block_n == 0,
        # Only the left operand may come from registers, where a prologue leaves it; wgmma takes it from 64 rows on.
        X_AXIS=1 if dy_prologue and not x_prologue and config.block_n >= 64 else 0,
        PRECISION="tf32" if tf32 else "ieee",
        DOT_DTYPE=dot_dtype(x.dtype),
        INDEX=index_type(x.numel(), dy.numel(), partial.numel()),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial
