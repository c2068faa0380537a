"""Forward convolution for sm_100 in Gluon: one warp copies boxes by TMA, one multiplies them with tcgen05 into tensor
memory, the others finish and store the tile before.

Compiled for sm_100 by Triton 3.6 and 3.9, never run on one. The tests run its source in a simulator of their own, with
adversarial schedules; that the warps of one role join where they must was read off the PTX.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tma,
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

# How registers hold what is loaded from tensor memory; newer Tritons choose it by themselves.
get_tmem_reg_layout: Any = getattr(blackwell, "get_tmem_reg_layout", None)
_CHOOSE_LAYOUT = gl.constexpr(get_tmem_reg_layout is not None)
ACCUMULATORS = gl.constexpr(2)  # one to multiply into while the other is finished


@gluon.jit
def _multiply(
    a_slots,
    b_slots,
    empty,
    full,
    accumulators,
    free,
    done,
    tiles,
    steps,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """The warp that issues the products."""
    slot = 0
    phase = 0
    which = 0
    free_phase = 1  # the first use of an accumulator does not wait
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        mbarrier.wait(free.index(which), free_phase)
        acc = accumulators.index(which)
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            a = a_slots.index(slot).reshape([BLOCK_M, BLOCK_K])
            b = b_slots.index(slot).permute((1, 0))
            # The slot is free once the product has read it, which is what the barrier of the product says.
            tcgen05_mma(a, b, acc, use_acc=step > 0, mbarriers=[empty.index(slot)])
            slot, phase = advance(slot, phase, SLOTS)
        tcgen05_commit(done.index(which))  # arrives when all products of the tile are done
        which, free_phase = advance(which, free_phase, ACCUMULATORS)


@gluon.jit
def _finish(
    scale,
    shift,
    residual,
    y,
    mean,
    m2,
    count,
    accumulators,
    free,
    done,
    arrived,
    N,
    P,
    Q,
    K,
    tiles,
    ACTIVATE: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The warps that load a finished accumulator, apply the epilogue and store the tile."""
    BLOCK_M: gl.constexpr = BOX_N * BOX_P * BOX_Q
    staged = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
    which = 0
    phase = 0
    residual_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n0, p0, q0, k0 = place(tile, P, Q, K, BOX_N, BOX_P, BOX_Q, BLOCK_N)
        # The store of the last tile must have read the buffer before anything writes it again.
        tma.store_wait(pendings=0)
        if residual is not None:
            mbarrier.expect(arrived, residual.block_type.nbytes)
            copy_in(residual, [n0, p0, q0, k0], arrived, staged)
        mbarrier.wait(done.index(which), phase)
        if _CHOOSE_LAYOUT:
            acc = accumulators.index(which).load(
                get_tmem_reg_layout(gl.float32, [BLOCK_M, BLOCK_N], accumulators.layout, gl.num_warps())
            )
        else:
            acc = accumulators.index(which).load()
        mbarrier.arrive(free.index(which), count=1)
        which, phase = advance(which, phase, ACCUMULATORS)
        layout: gl.constexpr = acc.type.layout
        k = k0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        acc = affine(acc, scale, shift, k, K)
        if residual is not None:
            mbarrier.wait(arrived, residual_phase)
            residual_phase = residual_phase ^ 1
            acc = acc + staged.reshape([BLOCK_M, BLOCK_N]).load(layout).to(gl.float32)
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
def _tcgen05_conv_kernel(
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

    Operands pass through a `ring`, results through two accumulators in tensor memory. Barriers, each of one arrival:
    done[j], by all products of a tile: accumulator j holds it; free[j], by the warps that finish: they have loaded it.
    """
    BLOCK_M: gl.constexpr = BOX_N * BOX_P * BOX_Q
    a_slots, b_slots, empty, full = ring(x, weight, SLOTS)
    tensor_memory: gl.constexpr = TensorMemoryLayout([BLOCK_M, BLOCK_N], col_stride=1)
    accumulators = allocate_tensor_memory(gl.float32, [ACCUMULATORS, BLOCK_M, BLOCK_N], tensor_memory)
    free = gl.allocate_shared_memory(gl.int64, [ACCUMULATORS, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [ACCUMULATORS, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ACCUMULATORS):
        mbarrier.init(free.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    mbarrier.init(arrived, count=1)
    fence_async_shared()  # the initialised barriers, before a copy signals one
    steps = R * S * (C // BLOCK_K)
    # fmt: off
    gl.warp_specialize(
        [
            (_finish, (scale, shift, residual, y, mean, m2, count, accumulators, free, done, arrived,
                       N, P, Q, K, tiles, ACTIVATE, BOX_N, BOX_P, BOX_Q, BLOCK_N)),
            (_multiply, (a_slots, b_slots, empty, full, accumulators, free, done, tiles, steps,
                         BLOCK_M, BLOCK_K, SLOTS)),
            (produce, (x, weight, a_slots, b_slots, empty, full, P, Q, C, K, tiles, pad_h, pad_w,
                       dilation_h, dilation_w, R, S, STRIDE2, False, BOX_N, BOX_P, BOX_Q, BLOCK_N, BLOCK_K, SLOTS)),
        ],
        [1, 1],  # warps of the second role and those after it,
        [24, 24],  # and their registers
    )
    # fmt: on


def run(*arguments: Any) -> None:
    """Of `run_conv`, by `tcgen05_conv`."""
    run_conv(_tcgen05_conv_kernel, *arguments)
