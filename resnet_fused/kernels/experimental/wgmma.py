"""Forward convolution for sm_90 in Gluon: one warp copies boxes by TMA, the others multiply them with wgmma.

Compiled for sm_90 by Triton 3.6 and 3.9, never run on one. The tests run its source in a simulator of their own, with
adversarial schedules; that the warps of one role join where they must was read off the PTX.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from resnet_fused.kernels.experimental._gluon import (
    advance,
    affine,
    copy_in,
    copy_out,
    place,
    produce,
    ring,
    run_conv,
    store_statistics,
)


@gluon.jit
def product(
    a_slots,
    b_slots,
    empty,
    full,
    slot,
    phase,
    steps,
    layout: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GRADIENT: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """The sums of a tile, from `steps` slots on; and the slot behind them, with its phase."""
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    previous = slot
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        a = a_slots.index(slot).reshape([BLOCK_M, BLOCK_K])
        b = b_slots.index(slot)
        if not GRADIENT:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        # All products but the one just issued are done, so the slot before is free. The compiler joins the warps
        # before one thread of them arrives: without that, another warp group might still be reading.
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(previous), count=1, pred=step > 0)
        previous = slot
        slot, phase = advance(slot, phase, SLOTS)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index(previous), count=1)
    return acc, slot, phase


@gluon.jit
def _multiply(
    scale,
    shift,
    residual,
    y,
    mean,
    m2,
    count,
    a_slots,
    b_slots,
    empty,
    full,
    arrived,
    N,
    P,
    Q,
    K,
    tiles,
    steps,
    ACTIVATE: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """The warps that multiply, and finish and store every tile."""
    BLOCK_M: gl.constexpr = BOX_N * BOX_P * BOX_Q
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    staged = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
    slot = 0
    phase = 0
    residual_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n0, p0, q0, k0 = place(tile, P, Q, K, BOX_N, BOX_P, BOX_Q, BLOCK_N)
        if residual is not None:
            # The store of the last tile must have read the buffer before the copy of this one writes it.
            tma.store_wait(pendings=0)
            mbarrier.expect(arrived, residual.block_type.nbytes)
            copy_in(residual, [n0, p0, q0, k0], arrived, staged)
        acc, slot, phase = product(
            a_slots, b_slots, empty, full, slot, phase, steps, layout, BLOCK_M, BLOCK_N, BLOCK_K, False, SLOTS
        )
        k = k0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        acc = affine(acc, scale, shift, k, K)
        if residual is not None:
            mbarrier.wait(arrived, residual_phase)
            residual_phase = residual_phase ^ 1
            acc = acc + staged.reshape([BLOCK_M, BLOCK_N]).load(layout).to(gl.float32)
        else:
            tma.store_wait(pendings=0)
        if ACTIVATE:
            acc = gl.where(acc <= 0.0, 0.0, acc)  # a NaN stays
        rounded = acc.to(y.dtype)
        staged.reshape([BLOCK_M, BLOCK_N]).store(rounded)
        fence_async_shared()  # what the warps wrote, before the copy engine reads it
        copy_out(y, [n0, p0, q0, k0], staged)
        if mean is not None:
            row = tile // gl.cdiv(K, BLOCK_N)
            store_statistics(
                rounded.to(gl.float32), mean, m2, count, row, n0, p0, q0, k, N, P, Q, K, BOX_N, BOX_P, BOX_Q
            )
    tma.store_wait(pendings=0)


@gluon.jit
def _wgmma_conv_kernel(
    x,  # descriptor of [N, H, W, C], boxes [BOX_N, BOX_P, BOX_Q, BLOCK_K]; STRIDE2: of [N, H/2, 2, W/2, 2C]
    weight,  # descriptor of [K, R*S*C], boxes [BLOCK_N, BLOCK_K]
    scale,  # [K] or None
    shift,  # [K] or None
    residual,  # descriptor of [N, P, Q, K], boxes [BOX_N, BOX_P, BOX_Q, BLOCK_N], or None
    y,  # descriptor of [N, P, Q, K], boxes [BOX_N, BOX_P, BOX_Q, BLOCK_N]
    mean,  # [boxes, K] fp64 or None
    m2,  # [boxes, K] or None
    count,  # [boxes] or None
    N,
    P,
    Q,
    C,
    K,
    tiles,  # boxes of pixels times tiles of K
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: gl.constexpr,
    S: gl.constexpr,
    STRIDE2: gl.constexpr,
    ACTIVATE: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """y[n, p, q, k] = act(scale[k] * sum over (r, s, c) of x[n, p + r, q + s, c] * weight[k, r, s, c] + shift[k] +
    residual[n, p, q, k]), where x starts at minus the padding.
    """
    a_slots, b_slots, empty, full = ring(x, weight, SLOTS)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    fence_async_shared()  # the initialised barriers, before a copy signals one
    steps = R * S * (C // BLOCK_K)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply, (scale, shift, residual, y, mean, m2, count, a_slots, b_slots, empty, full, arrived,
                         N, P, Q, K, tiles, steps, ACTIVATE, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, SLOTS)),
            (produce, (x, weight, a_slots, b_slots, empty, full, P, Q, C, K, tiles, pad_h, pad_w,
                       dilation_h, dilation_w, R, S, STRIDE2, False, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, SLOTS)),
        ],
        [1],  # warps of the second role and those after it,
        [24],  # and their registers
    )
    # fmt: on


def run(*arguments: Any) -> None:
    """Of `run_conv`, by `wgmma_conv`."""
    run_conv(_wgmma_conv_kernel, *arguments)
