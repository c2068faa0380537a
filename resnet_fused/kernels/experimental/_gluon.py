"""What the Gluon kernels share: the warp that copies operands, the place of a tile, the affine map, the launch.

These kernels have been compiled, never run on a GPU: see `wgmma.py` and `tcgen05.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import Tiling, View, tiling
from resnet_fused.kernels.experimental._grid import launch

# Renamed after Triton 3.6.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def descriptor(tensor: Tensor | None, view: View) -> TensorDescriptor | None:
    """A host descriptor of `view`, whose boxes lie in shared memory as wgmma and tcgen05 read them; None of None."""
    if tensor is None:
        return None
    layout = gl.NVMMASharedLayout.get_default_for(list(view.box), _TYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(view.shape), list(view.strides), list(view.box), layout)


@gluon.jit
def place(
    tile,
    P,
    Q,
    K,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The first image, row, column and channel of a tile. Tiles that share pixels are neighbours."""
    tiles_n = gl.cdiv(K, BLOCK_N)
    tiles_q = gl.cdiv(Q, BOX_Q)
    tiles_p = gl.cdiv(P, BOX_P)
    box = tile // tiles_n
    row = box // tiles_q
    return row // tiles_p * BOX_N, row % tiles_p * BOX_P, box % tiles_q * BOX_Q, tile % tiles_n * BLOCK_N


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and its phase, which turns with every round."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def ring(x, weight, SLOTS: gl.constexpr):
    """SLOTS slots of shared memory through which operands pass, and their barriers, of one arrival each: empty[i], by
    what multiplies, says that slot i has been multiplied; full[i], with the bytes of both copies, that it holds
    operands.
    """
    a_slots = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_type.shape, x.layout)
    b_slots = gl.allocate_shared_memory(weight.dtype, [SLOTS] + weight.block_type.shape, weight.layout)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    return a_slots, b_slots, empty, full


@gluon.jit
def affine(acc, scale, shift, n, K):
    """scale[n] * acc + shift[n], for a tile's columns n."""
    if scale is not None:
        acc = acc * gl.load(scale + n, mask=n < K, other=0.0).to(gl.float32)[None, :]
    if shift is not None:
        acc = acc + gl.load(shift + n, mask=n < K, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def pixels_of(m, n0, p0, q0, N, P, Q, BOX_P: gl.constexpr, BOX_Q: gl.constexpr):
    """The index in the output of a box's pixels m, and which are inside."""
    n, p, q = n0 + m // (BOX_P * BOX_Q), p0 + m // BOX_Q % BOX_P, q0 + m % BOX_Q
    return (n * P + p) * Q + q, (n < N) & (p < P) & (q < Q)


@gluon.jit
def store_statistics(
    value,
    mean,
    m2,
    count,
    row,
    n0,
    p0,
    q0,
    k,
    N,
    P,
    Q,
    K,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
):
    """Row `row` of the statistics, of the pixels of a box that are inside the output: `store_tile_statistics` of values
    in fp16 or bf16.
    """
    m = gl.arange(0, BOX_N * BOX_P * BOX_Q, layout=gl.SliceLayout(1, value.type.layout))
    _, inside = pixels_of(m, n0, p0, q0, N, P, Q, BOX_P, BOX_Q)
    pixels = gl.minimum(N - n0, BOX_N) * gl.minimum(P - p0, BOX_P) * gl.minimum(Q - q0, BOX_Q) * 1.0
    inverse = gl.cast(1.0 / pixels, gl.float64)
    inverse = inverse * (2.0 - gl.cast(pixels, gl.float64) * inverse)  # Newton's step, for a division in fp64
    exact = gl.sum(gl.where(inside[:, None], value, 0.0), axis=0).to(gl.float64) * inverse
    gl.store(mean + (row * K + k), exact, mask=k < K)
    deviation = gl.where(inside[:, None], value - exact.to(gl.float32)[None, :], 0.0)
    gl.store(m2 + (row * K + k), gl.sum(deviation * deviation, axis=0), mask=k < K)
    gl.store(count + row, pixels)  # by the tiles of all channels alike


@gluon.jit
def produce(
    x,
    weight,
    a_slots,
    b_slots,
    empty,
    full,
    P,
    Q,
    C,
    K,
    tiles,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: gl.constexpr,
    S: gl.constexpr,
    STRIDE2: gl.constexpr,
    GRADIENT: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_P: gl.constexpr,
    BOX_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """The warp that copies: for every tile, tap and BLOCK_K channels, a box of pixels and a box of weights; of a
    GRADIENT those of the convolution itself, [C, R*S*K], from the last tap to the first.

    A slot's first use does not wait: an mbarrier that no phase has completed counts as one whose phase 1 has.
    """
    tiles_c = C // BLOCK_K
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n0, p0, q0, k0 = place(tile, P, Q, K, BOX_N, BOX_P, BOX_Q, BLOCK_N)
        for i in range(R * S * tiles_c):
            tap = i // tiles_c
            c = (i - tap * tiles_c) * BLOCK_K
            h = tap // S * dilation_h - pad_h
            w = tap % S * dilation_w - pad_w
            mbarrier.wait(empty.index(slot), phase)
            ready = full.index(slot)
            mbarrier.expect(ready, x.block_type.nbytes + weight.block_type.nbytes)
            if STRIDE2:  # an arithmetic shift rounds down, also where h is negative
                at = [n0, p0 + (h >> 1), h & 1, q0 + (w >> 1), (w & 1) * C + c]
                copy_in(x, at, ready, a_slots.index(slot))
            else:
                copy_in(x, [n0, p0 + h, q0 + w, c], ready, a_slots.index(slot))
            if GRADIENT:
                copy_in(weight, [c, (R * S - 1 - tap) * K + k0], ready, b_slots.index(slot))
            else:
                copy_in(weight, [k0, tap * C + c], ready, b_slots.index(slot))
            slot, phase = advance(slot, phase, SLOTS)


def run_conv(
    kernel: Any,
    x: Tensor,
    krsc: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    statistics: tuple[Tensor | None, ...],
    shape: ConvShape,
    relu: bool,
    config: ConvConfig,
) -> None:
    """Write y, and statistics = (mean, m2, count) if they are not None, by a Gluon kernel; all take these arguments."""
    boxes = tiling(shape, config)
    vectors = (scale, shift, descriptor(residual, boxes.y), descriptor(y, boxes.y), *statistics)
    launch_boxes(kernel, x, krsc, vectors, shape, boxes, config, STRIDE2=boxes.stride2, ACTIVATE=relu)


def launch_boxes(
    kernel: Any,
    x: Tensor,
    krsc: Tensor,
    arguments: tuple[Any, ...],
    shape: ConvShape,
    boxes: Tiling,
    config: ConvConfig,
    **constants: Any,
) -> None:
    """Launch a Gluon kernel: descriptors of x and weight, its own arguments, then the sizes of a forward problem."""
    tiles = boxes.tiles * triton.cdiv(shape.k, config.block_n)
    launch(
        kernel,
        x,
        tiles,
        descriptor(x, boxes.x),
        descriptor(krsc, boxes.weight),
        *arguments,
        *boxes.grid,
        shape.c,
        shape.k,
        tiles,
        *shape.padding,
        *shape.dilation,
        R=shape.r,
        S=shape.s,
        **constants,
        BOX_N=boxes.box[0],
        BOX_P=boxes.box[1],
        BOX_Q=boxes.box[2],
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SLOTS=config.num_stages,
        num_warps=config.num_warps,
    )
