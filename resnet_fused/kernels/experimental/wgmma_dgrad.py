"""Data gradient of stride 1 for sm_90 in Gluon: the copies and products of `wgmma.py`, of dy, and its own epilogues.

Compiled for sm_90 by Triton 3.6 and 3.9, never run on one. The tests run its source in a simulator of their own, with
adversarial schedules; that the warps of one role join where they must was read off the PTX.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import adjoint, gradient_tiling
from resnet_fused.kernels._dgrad import SUM_TILE
from resnet_fused.kernels.experimental._gluon import (
    copy_in,
    copy_out,
    descriptor,
    launch_boxes,
    pixels_of,
    place,
    produce,
    ring,
)
from resnet_fused.kernels.experimental.wgmma import product


@gluon.jit
def _passes_bits(
    mask,
    first,
    n0,
    h0,
    w0,
    c0,
    N,
    H,
    W,
    C,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
    rows: gl.constexpr,
):
    """ROWS pixels, from `first` on, of a tile of the ReLU mask as `bn_apply` has stored it: a byte for the eight
    channels of a thread of the layout `rows`. Nothing outside the image passes.
    """
    octets: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [4, 8, 1], [gl.num_warps() * 64 // BLOCK_N, BLOCK_N // 64, 1], [2, 1, 0]
    )
    bytes: gl.constexpr = gl.SliceLayout(2, octets)
    m = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, bytes))
    pixel, inside = pixels_of(m, n0, h0, w0, N, H, W, BOX_P, BOX_Q)
    octet = c0 // 8 + gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, bytes))
    valid = inside[:, None] & (octet < C // 8)[None, :]
    byte = gl.load(mask + (pixel[:, None] * (C // 8) + octet[None, :]), mask=valid, other=0).to(gl.int32)
    lane = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, octets)))
    bit = (byte[:, :, None] >> lane[None, None, :]) & 1
    return gl.convert_layout((bit != 0).reshape([ROWS, BLOCK_N]), rows)


@gluon.jit
def _vector(values, c, C):
    """Of a tile's channels c, as a row."""
    return gl.load(values + c, mask=c < C, other=0.0)[None, :]


@gluon.jit
def _store_sum(total, factor, to, row, c, C):
    """The sum over rows, times factor[c], to row `row`."""
    value = gl.sum(total, axis=0)
    if factor is not None:
        value = value * gl.load(factor + c, mask=c < C, other=0.0)
    gl.store(to + (row * C + c), value, mask=c < C)


@gluon.jit
def _multiply(
    residual,
    residual_mask,
    x,
    scale,
    shift,
    mean,
    invstd,
    mask,
    shortcut,
    shortcut_mean,
    shortcut_invstd,
    dx,
    sum_dx,
    sum_dx_xhat,
    sum_dx_shortcut,
    activation,
    a_slots,
    b_slots,
    empty,
    full,
    arrived,
    N,
    H,
    W,
    C,
    tiles,
    steps,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """The warps that multiply, and finish and store every tile.

    What needs vectors or bits of channels happens to the tile as it lies in shared memory, rounded, ROWS pixels at a
    time: a thread then has eight channels, not a quarter of them all; a select before or after rounding is the same.
    """
    BLOCK_M: gl.constexpr = BOX_N * BOX_P * BOX_Q
    OPERANDS: gl.constexpr = (residual is not None) + (x is not None) + (shortcut is not None)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps() * 64 // BLOCK_N, BLOCK_N // 64], [1, 0])
    staged = gl.allocate_shared_memory(dx.dtype, dx.block_type.shape, dx.layout)
    tile_dx = staged.reshape([BLOCK_M, BLOCK_N])
    if x is not None:
        staged_x = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
        tile_x = staged_x.reshape([BLOCK_M, BLOCK_N])
    if shortcut is not None:
        staged_shortcut = gl.allocate_shared_memory(shortcut.dtype, shortcut.block_type.shape, shortcut.layout)
        tile_shortcut = staged_shortcut.reshape([BLOCK_M, BLOCK_N])
    slot = 0
    phase = 0
    operands_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n0, h0, w0, c0 = place(tile, H, W, C, BOX_N, BOX_P, BOX_Q, BLOCK_N)
        if OPERANDS > 0:
            # The stores of the last tile must have read the buffers before the copies of this one write them.
            tma.store_wait(pendings=0)
            mbarrier.expect(arrived, OPERANDS * dx.block_type.nbytes)
        if residual is not None:
            copy_in(residual, [n0, h0, w0, c0], arrived, staged)
        if x is not None:
            copy_in(x, [n0, h0, w0, c0], arrived, staged_x)
        if shortcut is not None:
            copy_in(shortcut, [n0, h0, w0, c0], arrived, staged_shortcut)
        acc, slot, phase = product(
            a_slots, b_slots, empty, full, slot, phase, steps, layout, BLOCK_M, BLOCK_N, BLOCK_K, True, SLOTS
        )
        if OPERANDS > 0:
            mbarrier.wait(arrived, operands_phase)
            operands_phase = operands_phase ^ 1
        else:
            tma.store_wait(pendings=0)
        at = (n0, h0, w0, c0, N, H, W, C)
        if residual_mask is not None:
            for first in gl.static_range(0, BLOCK_M, ROWS):
                some = tile_dx.slice(first, ROWS)
                passes = _passes_bits(residual_mask, first, *at, BOX_P, BOX_Q, BLOCK_N, ROWS, rows)
                some.store(gl.where(passes, some.load(rows), 0.0))
        if residual is not None:
            acc = acc + tile_dx.load(layout).to(gl.float32)
        tile_dx.store(acc.to(dx.dtype))
        fence_async_shared()  # what the warps wrote, before they join and the copy engine reads it
        if x is not None:
            c = c0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, rows))
            if mask is None:
                factor, offset = _vector(scale, c, C), _vector(shift, c, C)
            centre = _vector(mean, c, C)
            total = gl.zeros([ROWS, BLOCK_N], gl.float32, rows)
            total_x = gl.zeros([ROWS, BLOCK_N], gl.float32, rows)
            if shortcut is not None:
                other_centre = _vector(shortcut_mean, c, C)
                total_shortcut = gl.zeros([ROWS, BLOCK_N], gl.float32, rows)
            for first in gl.static_range(0, BLOCK_M, ROWS):
                dz = tile_dx.slice(first, ROWS).load(rows)
                value = tile_x.slice(first, ROWS).load(rows).to(gl.float32)
                if mask is None:
                    normalised = gl.fma(value, factor, offset).to(x.dtype).to(gl.float32)
                    activated = gl.where(normalised <= 0.0, 0.0, normalised)  # a NaN stays
                    dz = gl.where(activated != 0.0, dz, 0.0)
                    tile_dx.slice(first, ROWS).store(dz)
                    if activation is not None:
                        tile_x.slice(first, ROWS).store(activated.to(x.dtype))
                    m = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows))
                    _, inside = pixels_of(m, n0, h0, w0, N, H, W, BOX_P, BOX_Q)
                    counts = inside[:, None]
                else:
                    counts = _passes_bits(mask, first, *at, BOX_P, BOX_Q, BLOCK_N, ROWS, rows)
                dz = gl.where(counts, dz.to(gl.float32), 0.0)
                total = total + dz
                total_x = gl.fma(dz, value - centre, total_x)
                if shortcut is not None:
                    other = tile_shortcut.slice(first, ROWS).load(rows).to(gl.float32)
                    total_shortcut = gl.fma(dz, other - other_centre, total_shortcut)
            if mask is None:
                fence_async_shared()
        copy_out(dx, [n0, h0, w0, c0], staged)
        if activation is not None:
            copy_out(activation, [n0, h0, w0, c0], staged_x)
        if x is not None:
            row = tile // gl.cdiv(C, BLOCK_N)
            _store_sum(total, None, sum_dx, row, c, C)
            _store_sum(total_x, invstd, sum_dx_xhat, row, c, C)
            if shortcut is not None:
                _store_sum(total_shortcut, shortcut_invstd, sum_dx_shortcut, row, c, C)
    tma.store_wait(pendings=0)


@gluon.jit
def _wgmma_dgrad_kernel(
    dy,  # descriptor of [N, P, Q, K], boxes [BOX_N, BOX_P, BOX_Q, BLOCK_K]
    weight,  # descriptor of [K, R*S*C], boxes [BLOCK_K, BLOCK_N]
    residual,  # descriptor like dx, or None
    residual_mask,  # one bit an element of residual, or None
    x,  # descriptor like dx, or None: no batch norm in front; so are the vectors that follow, [C]
    scale,  # None with a mask
    shift,
    mean,
    invstd,
    mask,  # one bit an element of x, or None: dx is masked with the ReLU recomputed from x; else the sums alone are
    shortcut,  # descriptor like dx, of a second batch norm behind the same mask, or None; so are its vectors, [C]
    shortcut_mean,
    shortcut_invstd,
    dx,  # descriptor of [N, H, W, C], boxes [BOX_N, BOX_P, BOX_Q, BLOCK_N]
    sum_dx,  # [boxes, C] or None; so are the others
    sum_dx_xhat,
    sum_dx_shortcut,
    activation,  # descriptor like dx, round(relu(x * scale + shift)), or None
    N,
    H,
    W,
    K,
    C,
    tiles,  # boxes of pixels times tiles of C
    pad_h,  # of the forward problem that dx is the output of; so are the others
    pad_w,
    dilation_h,
    dilation_w,
    R: gl.constexpr,
    S: gl.constexpr,
    ROWS: gl.constexpr,  # of pixels, of a step of the sums
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """dx[n, h, w, c] = sum over (r, s, k) of dy[n, h + r, w + s, k] * weight[k, R - 1 - r, S - 1 - s, c], where dy
    starts at minus the padding; with the residual or the mask, and the sums, of the record.
    """
    a_slots, b_slots, empty, full = ring(dy, weight, SLOTS)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    fence_async_shared()  # the initialised barriers, before a copy signals one
    steps = R * S * (K // BLOCK_K)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (residual, residual_mask, x, scale, shift, mean, invstd, mask, shortcut, shortcut_mean,
                         shortcut_invstd, dx, sum_dx, sum_dx_xhat, sum_dx_shortcut, activation,
                         a_slots, b_slots, empty, full, arrived, N, H, W, C, tiles, steps,
                         BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, ROWS, SLOTS)),
            (produce, (dy, weight, a_slots, b_slots, empty, full, H, W, K, C, tiles, pad_h, pad_w,
                       dilation_h, dilation_w, R, S, False, True, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, SLOTS)),
        ],
        [1],  # warps of the second role and those after it,
        [24],  # and their registers
    )
    # fmt: on


def run(
    dy: Tensor,
    krsc: Tensor,
    operands: Sequence[Tensor | None],
    dx: Tensor,
    sums: Sequence[Tensor | None],
    activation: Tensor | None,
    shape: ConvShape,
    config: ConvConfig,
) -> None:
    """Write dx, and the three sums and the activation that are not None.

    Args:
        dy: [N, K, P, Q], NHWC.
        krsc: the weight, [K, C, R, S], NHWC.
        operands: from `residual` on, in the kernel's order.
        dx: [N, C, H, W], NHWC.
        sums: [boxes, C] each.
        activation: like dx.
        shape: the problem, as of the forward.
        config: of `wgmma_conv`.
    """
    boxes = gradient_tiling(shape, config)
    given = (t if t is None or t.dim() < 4 else descriptor(t, boxes.y) for t in operands)
    arguments = (*given, descriptor(dx, boxes.y), *sums, descriptor(activation, boxes.y))
    rows = min(config.block_m, SUM_TILE * config.num_warps // config.block_n)
    launch_boxes(_wgmma_dgrad_kernel, dy, krsc, arguments, adjoint(shape), boxes, config, ROWS=rows)
