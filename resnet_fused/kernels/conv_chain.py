"""The tail of a bottleneck and the head of the next one in one kernel: inference without the activations between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.dispatch.conv_chain import chain_tile
from resnet_fused.kernels._conv import add_product, dot_dtype, load_tile, reduction_step, sees_tap, taps_inside
from resnet_fused.kernels._launch import empty_nhwc, index_type, launch
from resnet_fused.kernels._tile import relu, round_to, to_fp32
from resnet_fused.kernels.epilogues import scale_shift
from resnet_fused.ops.conv_chain import Args, Out, conv_shape


@triton.jit
def _conv_chain_kernel(
    x,  # [N, H, W, C]
    weight2,  # [C2, R, S, C]
    scale2,  # [C2] or None
    shift2,  # [C2]
    weight3,  # [K, C2]
    scale3,  # [K] or None
    shift3,  # [K]
    residual,  # [N, P, Q, K]
    weight1,  # [C1, K] or None
    scale1,  # [C1] or None
    shift1,  # [C1] or None
    y,  # [N, P, Q, K]
    following,  # [N, P, Q, C1] or None
    M,  # N * P * Q
    H,
    W,
    input_octets,  # C / 8: triton by itself sees only multiples of 16
    P,
    Q,
    inner_octets,  # C2 / 8
    output_octets,  # K / 8
    next_octets,  # C1 / 8
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,  # a tap can fall outside the image
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    EVEN_INNER: tl.constexpr,  # INNER is C2
    EVEN_N: tl.constexpr,  # BLOCK_N divides K
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    INNER: tl.constexpr,  # tile of C2
    NEXT: tl.constexpr,  # tile of C1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a = round(relu(conv2(x))), y = round(relu(conv3(a) + residual)), following = round(relu(conv1(y))).

    A program owns BLOCK_M pixels and all their channels: a is the left operand of conv3, which yields BLOCK_N channels
    of y at a time, each stored and multiplied into the sums of conv1.
    """
    C = input_octets * 8
    C2 = inner_octets * 8
    K = output_octets * 8
    C1 = next_octets * 8
    pid = tl.program_id(0)
    m = pid.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_exists = (m < M)[:, None]
    inner = tl.arange(0, INNER)
    lane = tl.arange(0, BLOCK_K)

    # Rows past the end repeat the last one and are not stored.
    row = tl.minimum(m, M - 1)
    q = row % Q
    p = (row // Q) % P
    h0 = (p * stride_h - pad_h).to(tl.int32)
    w0 = (q * stride_w - pad_w).to(tl.int32)
    x_row = ((row // (Q * P) * H + h0) * W + w0) * C
    inside = taps_inside(h0, w0, H, W, dilation_h, dilation_w, R, S, BLOCK_M, PADDED)[:, None]

    acc = tl.zeros((BLOCK_M, INNER), tl.float32)
    for step in range(R * S * tl.cdiv(C, BLOCK_K)):
        r, s, c, w_place, exists = reduction_step(step, lane, C, S, R * S, 0)
        valid = sees_tap(inside, r, s, exists, PADDED, EVEN_C, False, 0)
        x_place = x_row[:, None] + ((r * dilation_h * W + s * dilation_w) * C + c)[None, :]
        left = load_tile(x, x_place, valid, PADDED or not EVEN_C)
        w_place = (inner * (R * S * C))[None, :] + w_place[:, None]
        right = load_tile(weight2, w_place, exists[:, None] & (inner < C2)[None, :], not (EVEN_C and EVEN_INNER))
        acc = add_product(acc, left, right, 0, "ieee", DOT_DTYPE)
    acc = relu(scale_shift(acc, scale2, shift2, inner, inner < C2))
    if not EVEN_INNER:  # zero times an infinite pixel is none
        acc = tl.where((inner < C2)[None, :], acc, 0.0)
    a = round_to(acc, x.dtype.element_ty).to(DOT_DTYPE)

    # As bits: a product that only the next round reads would be left running, and on sm_90
    # ptxas, which cannot set the other accumulator to zero meanwhile, would wait for every wgmma of the kernel.
    following_bits = tl.zeros((BLOCK_M, NEXT), tl.int32)
    head = tl.arange(0, NEXT)
    for start in range(0, K, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_exists = n < K
        w_place = (n * C2)[None, :] + inner[:, None]
        right = load_tile(weight3, w_place, (inner < C2)[:, None] & n_exists[None, :], not (EVEN_INNER and EVEN_N))
        out = scale_shift(tl.dot(a, right.to(DOT_DTYPE)), scale3, shift3, n, n_exists)
        place = m[:, None] * K + n[None, :]
        stored = pixel_exists
        if not EVEN_N:
            stored = stored & n_exists[None, :]
        out = relu(out + to_fp32(tl.load(residual + place, mask=stored, other=0.0)))
        if not EVEN_N:
            out = tl.where(n_exists[None, :], out, 0.0)
        rounded = round_to(out, y.dtype.element_ty)
        tl.store(y + place, rounded, mask=stored)
        if weight1 is not None:
            w_tile = weight1 + ((head * K)[None, :] + n[:, None])
            right = tl.load(w_tile, mask=(head < C1)[None, :] & n_exists[:, None], other=0.0)
            following_bits = add_product(following_bits, rounded, right, 0, "ieee", DOT_DTYPE)
    if weight1 is not None:
        value = relu(scale_shift(following_bits, scale1, shift1, head, head < C1))
        place = m[:, None] * C1 + head[None, :]
        stored = pixel_exists & (head < C1)[None, :]
        tl.store(following + place, round_to(value, following.dtype.element_ty), mask=stored)


def conv_chain(a: Args, config: ConvConfig) -> Out:
    """Launch `ops.conv_chain`: the activations between the convolutions stay on the multiprocessor."""
    x, shape = a.x, conv_shape(a)
    outputs = a.weight3.shape[0]
    next_channels = None if a.weight1 is None else a.weight1.shape[0]
    pixels = shape.n * shape.p * shape.q
    y = empty_nhwc(x, shape.n, outputs, shape.p, shape.q)
    following = None if next_channels is None else empty_nhwc(x, shape.n, next_channels, shape.p, shape.q)
    launch(
        _conv_chain_kernel,
        triton.cdiv(pixels, config.block_m),
        x,
        a.weight2.contiguous(memory_format=torch.channels_last),
        a.scale2,
        a.shift2,
        a.weight3.contiguous(),
        a.scale3,
        a.shift3,
        a.residual,
        None if a.weight1 is None else a.weight1.contiguous(),
        a.scale1,
        a.shift1,
        y,
        following,
        pixels,
        shape.h,
        shape.w,
        shape.c // 8,
        shape.p,
        shape.q,
        shape.k // 8,
        outputs // 8,
        (next_channels or 8) // 8,
        *shape.stride,
        *shape.padding,
        *shape.dilation,
        R=shape.r,
        S=shape.s,
        PADDED=shape.padding != (0, 0),
        EVEN_C=shape.c % config.block_k == 0,
        EVEN_INNER=shape.k == chain_tile(shape.k),
        EVEN_N=outputs % config.block_n == 0,
        DOT_DTYPE=dot_dtype(x.dtype),
        INDEX=index_type(x.numel(), y.numel()),
        INNER=chain_tile(shape.k),
        NEXT=chain_tile(next_channels or 1),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Out(y, x.new_empty(0) if following is None else following)
