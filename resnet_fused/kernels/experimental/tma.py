"""Forward convolution with operands that the tensor memory accelerator copies, box by box, through host descriptors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.experimental import View, tiling
from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.kernels._statistics import store_statistics_in_two_steps
from resnet_fused.kernels._tile import relu, round_to, to_fp32
from resnet_fused.kernels.experimental._grid import launch


@triton.jit
def _affine(acc, scale, shift, n, K):
    """scale[n] * acc + shift[n], for a tile's columns n."""
    bias = tl.zeros(n.shape, tl.float32)
    if shift is not None:
        bias = to_fp32(tl.load(shift + n, mask=n < K, other=0.0))
    if scale is not None:
        factor = to_fp32(tl.load(scale + n, mask=n < K, other=0.0))
        return tl.fma(acc, tl.broadcast_to(factor[None, :], acc.shape), tl.broadcast_to(bias[None, :], acc.shape))
    else:
        return acc + bias[None, :]


@triton.jit
def _tma_gemm_kernel(
    x,  # descriptor of [M, C], boxes [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [K, C], boxes [BLOCK_N, BLOCK_K]
    scale,  # [K] or None
    shift,  # [K] or None
    residual,  # descriptor of [M, K], boxes [BLOCK_M, BLOCK_N], or None
    y,  # descriptor of [M, K], boxes [BLOCK_M, BLOCK_N]
    mean,  # [tiles of M, K] fp64 or None
    m2,  # [tiles of M, K] or None
    count,  # [tiles of M] or None
    M,
    C,
    K,
    ACTIVATE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPECIALIZE: tl.constexpr,  # sm_100: warps for copies, products and the epilogue, by the compiler
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[m, k] = act(scale[k] * sum over c of x[m, c] * weight[k, c] + shift[k] + residual[m, k]).

    A program owns every num_programs-th tile; tiles that share pixels are neighbours. The descriptors fill what lies
    outside with zeros and drop what is stored there.
    """
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=SPECIALIZE, warp_specialize=SPECIALIZE):
        m0 = (tile // tiles_n) * BLOCK_M
        n0 = (tile % tiles_n) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in tl.range(0, C, BLOCK_K, num_stages=STAGES):
            a = x.load([m0, c]).to(DOT_DTYPE)
            b = weight.load([n0, c]).to(DOT_DTYPE)
            acc = tl.dot(a, b.T, acc)
        acc = _affine(acc, scale, shift, n0 + tl.arange(0, BLOCK_N), K)
        if residual is not None:
            acc = acc + to_fp32(residual.load([m0, n0]))
        if ACTIVATE:
            acc = relu(acc)
        rounded = round_to(acc, y.dtype)
        y.store([m0, n0], rounded)
        if mean is not None:
            inside = m0 + tl.arange(0, BLOCK_M) < M
            pixels = tl.minimum(M - m0, BLOCK_M)
            n = n0 + tl.arange(0, BLOCK_N)
            store_statistics_in_two_steps(
                rounded, inside, pixels, mean, m2, count, tile // tiles_n, K, n, n < K, n0 == 0
            )


@triton.jit
def _tma_conv_kernel(
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
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE2: tl.constexpr,
    ACTIVATE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[n, p, q, k] = act(scale[k] * sum over (r, s, c) of x[n, p + r, q + s, c] * weight[k, r, s, c] + shift[k] +
    residual[n, p, q, k]), where x starts at minus the padding.

    A tile is a box of output pixels; the pixels that one tap of the filter sees are a box of the input, and the padding
    is what lies outside the image. With stride 2 they are a box of its even or odd rows and columns.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles_q = tl.cdiv(Q, BOX_Q)
    tiles_p = tl.cdiv(P, BOX_P)
    tiles = tl.cdiv(N, BOX_N) * tiles_p * tiles_q * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=SPECIALIZE, warp_specialize=SPECIALIZE):
        box = tile // tiles_n
        k0 = (tile % tiles_n) * BLOCK_N
        q0 = (box % tiles_q) * BOX_Q
        p0 = (box // tiles_q % tiles_p) * BOX_P
        n0 = (box // tiles_q // tiles_p) * BOX_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(R * S * (C // BLOCK_K), num_stages=STAGES):
            tap = i % (R * S)  # taps innermost: only constants are divided by
            c = i // (R * S) * BLOCK_K
            h = tap // S * dilation_h - pad_h
            w = tap % S * dilation_w - pad_w
            if STRIDE2:  # an arithmetic shift rounds down, also where h is negative
                a = x.load([n0, p0 + (h >> 1), h & 1, q0 + (w >> 1), (w & 1) * C + c])
            else:
                a = x.load([n0, p0 + h, q0 + w, c])
            b = weight.load([k0, tap * C + c])
            acc = tl.dot(a.reshape(BLOCK_M, BLOCK_K).to(DOT_DTYPE), b.to(DOT_DTYPE).T, acc)
        acc = _affine(acc, scale, shift, k0 + tl.arange(0, BLOCK_N), K)
        if residual is not None:
            acc = acc + to_fp32(residual.load([n0, p0, q0, k0]).reshape(BLOCK_M, BLOCK_N))
        if ACTIVATE:
            acc = relu(acc)
        rounded = round_to(acc, y.dtype)
        y.store([n0, p0, q0, k0], rounded.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_N))
        if mean is not None:
            m = tl.arange(0, BLOCK_M)
            inside = (n0 + m // (BOX_P * BOX_Q) < N) & (p0 + m // BOX_Q % BOX_P < P) & (q0 + m % BOX_Q < Q)
            pixels = tl.minimum(N - n0, BOX_N) * tl.minimum(P - p0, BOX_P) * tl.minimum(Q - q0, BOX_Q)
            k = k0 + tl.arange(0, BLOCK_N)
            store_statistics_in_two_steps(rounded, inside, pixels, mean, m2, count, box, K, k, k < K, k0 == 0)


def _descriptor(tensor: Tensor, view: View) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(view.shape), list(view.strides), list(view.box))


def run(
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
    """Write y, and statistics = (mean, m2, count) if they are not None, by `tma_gemm`, `tma_conv` or their
    warp-specialised forms.
    """
    tiles = tiling(shape, config)
    # The interpreter multiplies the bit patterns of bf16; in fp32 the product is the same.
    dot_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}[x.dtype]
    options = {
        "ACTIVATE": relu,
        "DOT_DTYPE": dot_dtype,
        "SPECIALIZE": config.kernel.endswith("_ws") and not INTERPRETED,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    programs = tiles.tiles * triton.cdiv(shape.k, config.block_n)
    if config.kernel.startswith("tma_gemm"):
        pixels = shape.n * shape.p * shape.q
        x_view = View((pixels, shape.c), (shape.c, 1), (config.block_m, config.block_k))
        y_view = View((pixels, shape.k), (shape.k, 1), (config.block_m, config.block_n))
        launch(
            _tma_gemm_kernel,
            x,
            programs,
            _descriptor(x, x_view),
            _descriptor(krsc, tiles.weight),
            scale,
            shift,
            None if residual is None else _descriptor(residual, y_view),
            _descriptor(y, y_view),
            *statistics,
            pixels,
            shape.c,
            shape.k,
            BLOCK_M=config.block_m,
            **options,
        )
        return
    launch(
        _tma_conv_kernel,
        x,
        programs,
        _descriptor(x, tiles.x),
        _descriptor(krsc, tiles.weight),
        scale,
        shift,
        None if residual is None else _descriptor(residual, tiles.y),
        _descriptor(y, tiles.y),
        *statistics,
        *tiles.grid,
        shape.c,
        shape.k,
        *shape.padding,
        *shape.dilation,
        R=shape.r,
        S=shape.s,
        STRIDE2=tiles.stride2,
        BOX_N=tiles.box[0],
        BOX_P=tiles.box[1],
        BOX_Q=tiles.box[2],
        **options,
    )
