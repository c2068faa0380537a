"""Forward convolution as an implicit matrix product, with the affine + residual + ReLU epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.kernels._launch import (
    INTERPRETED,
    compute_capability,
    index_type,
    is_nhwc,
    launch,
    name_of,
    refuse_activations,
)
from resnet_fused.kernels._tile import channel_unit, relu, round_to, to_fp32
from resnet_fused.plan.conv import ConvConfig, ConvShape, conv_fprop_heuristic

# A pixel's mask of taps keeps filter rows in bits 0-14 and filter columns in bits 16-30 of an int32.
MAX_FILTER = 15


def tf32_allowed() -> bool:
    """PyTorch's own switch for convolutions; `torch.backends.cudnn.allow_tf32` sets it too."""
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


@triton.jit
def _taps_inside(h0, w0, H, W, dilation_h, dilation_w, R: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr):
    """Per output pixel, which taps fall inside the image: filter row r in bit r, filter column s in bit 16 + s."""
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for r in tl.static_range(R):
        h = h0 + r * dilation_h
        inside |= ((h >= 0) & (h < H)).to(tl.int32) << r
    for s in tl.static_range(S):
        w = w0 + s * dilation_w
        inside |= ((w >= 0) & (w < W)).to(tl.int32) << (16 + s)
    return inside


@triton.jit
def _conv_fprop_kernel(
    x,  # [N, H, W, C]
    weight,  # [K, R, S, C/groups]
    scale,  # [K] or None
    shift,  # [K] or None
    residual,  # [N, P, Q, K] or None
    y,  # [N, P, Q, K]
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
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, k] = act(scale[k] * sum over (r, s, c) of x[pixel(m, r, s), c] * weight[k, r, s, c] + shift[k] + residual[m,
    k]).

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
        inside = _taps_inside(h0, w0, H, W, dilation_h, dilation_w, R, S, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FLAT_INPUTS > 0:
        for k0 in range(0, R * S * FLAT_INPUTS, BLOCK_K):
            rsc = k0 + k
            tap = rsc // FLAT_INPUTS
            r = tap // S
            s = tap - r * S
            x_tile = x + (
                x_row[:, None] + ((r * dilation_h * W + s * dilation_w) * C + (rsc - tap * FLAT_INPUTS))[None, :]
            )
            within = rsc < R * S * FLAT_INPUTS
            if PADDED:
                wanted = tl.where(within, (1 << r) | (1 << (s + 16)), 1 << 15)  # bit 15 is never set
                a = tl.load(x_tile, mask=(inside[:, None] & wanted[None, :]) == wanted[None, :], other=0.0)
            else:
                a = tl.load(x_tile, mask=within[None, :], other=0.0)
            b = tl.load(weight + (w_column[None, :] + rsc[:, None]), mask=within[:, None], other=0.0)
            acc = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc, input_precision=PRECISION)
    else:
        tiles_c = tl.cdiv(group_inputs, BLOCK_K)
        for i in range(R * S * tiles_c):
            tap = i // tiles_c
            c = (i - tap * tiles_c) * BLOCK_K + k
            r = tap // S
            s = tap - r * S
            x_tile = x + (x_row[:, None] + ((r * dilation_h * W + s * dilation_w) * C + c)[None, :])
            w_tile = weight + (w_column[None, :] + (tap * group_inputs + c)[:, None])
            if PADDED:
                wanted = (1 << r) | (1 << (s + 16))
                valid = ((inside & wanted) == wanted)[:, None]
                if not EVEN_K:
                    valid = valid & (c < group_inputs)[None, :]
                a = tl.load(x_tile, mask=valid, other=0.0)
            elif EVEN_K:
                a = tl.load(x_tile)
            else:
                a = tl.load(x_tile, mask=(c < group_inputs)[None, :], other=0.0)
            if EVEN_K:
                b = tl.load(w_tile)
            else:
                b = tl.load(w_tile, mask=(c < group_inputs)[:, None], other=0.0)
            acc = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc, input_precision=PRECISION)

    channel = group * group_outputs + n
    stored = n < group_outputs
    if shift is not None:
        bias = to_fp32(tl.load(shift + channel, mask=stored, other=0.0))[None, :]
    else:
        bias = tl.zeros((1, BLOCK_N), tl.float32)
    if scale is not None:
        factor = to_fp32(tl.load(scale + channel, mask=stored, other=0.0))[None, :]
        acc = tl.fma(acc, tl.broadcast_to(factor, BLOCK_M, BLOCK_N), tl.broadcast_to(bias, BLOCK_M, BLOCK_N))
    else:
        acc = acc + bias
    out = m[:, None] * K + channel[None, :]
    out_mask = (m < M)[:, None] & stored[None, :]
    if residual is not None:
        acc = acc + to_fp32(tl.load(residual + out, mask=out_mask, other=0.0))
    if ACTIVATE:
        acc = relu(acc)
    tl.store(y + out, round_to(acc, y.dtype.element_ty), mask=out_mask)


def refuse(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> str | None:
    """Why `conv_fprop` cannot run on these arguments, or None."""
    reason = refuse_activations(x)
    if reason is not None:
        return reason
    if not is_nhwc(x):
        strides, shape = tuple(x.stride()), tuple(x.shape)
        return f"the Triton convolution reads NHWC (channels_last) activations, got strides {strides} for shape {shape}"
    if weight.dim() != 4:
        return f"the weight must be 4-D [K, C/groups, R, S], got {weight.dim()}-D"
    if weight.dtype != x.dtype:
        return f"weight is {name_of(weight.dtype)}, x is {name_of(x.dtype)}: one dtype for both"
    if weight.device != x.device:
        return f"weight is on {weight.device}, x on {x.device}"
    k, group_inputs, r, s = weight.shape
    if groups < 1 or k % groups or x.shape[1] != group_inputs * groups:
        return f"groups={groups} and weight {tuple(weight.shape)} do not fit {x.shape[1]} input channels"
    if k == 0 or group_inputs == 0:
        return f"a convolution without channels: weight {tuple(weight.shape)}"
    if max(r, s) > MAX_FILTER:
        return f"filters are at most {MAX_FILTER}x{MAX_FILTER}, got {r}x{s}"
    problem = _shape(x, weight, stride, padding, dilation, groups)
    if problem.p < 1 or problem.q < 1:
        image = f"{problem.h}x{problem.w} + 2 * {tuple(padding)}"
        return f"the filter {r}x{s} with dilation {tuple(dilation)} is larger than the padded image {image}"
    if residual is not None:
        out = (problem.n, k, problem.p, problem.q)
        agrees = residual.dtype == x.dtype and residual.device == x.device and is_nhwc(residual)
        if tuple(residual.shape) != out or not agrees:
            got = f"{name_of(residual.dtype)} {tuple(residual.shape)} with strides {tuple(residual.stride())}"
            return f"residual must be {name_of(x.dtype)} {out} in NHWC order on {x.device}, got {got}"
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (tuple(vector.shape) != (k,) or vector.stride(0) != 1 or vector.device != x.device):
            got = f"shape {tuple(vector.shape)} on {vector.device}"
            return f"{name} must be a contiguous vector of {k} on {x.device}, got {got}"
    return None


def _shape(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> ConvShape:
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    return ConvShape(
        n, c, h, w, k, r, s, (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups
    )


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
    relu: bool,
    config: ConvConfig | None = None,
) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual), accumulated and finished in fp32, rounded once to the dtype
    of x.

    Grouped convolutions run group by group: right for every group size, efficient from 16 channels a group on.

    Args:
        x: [N, C, H, W] in NHWC order; fp32, fp16 or bf16.
        weight: [K, C/groups, R, S], any strides (NHWC order is read in place, any other copied); the dtype of x.
        scale: [K], or None for 1.
        shift: [K], or None for 0.
        residual: [N, K, P, Q] in NHWC order, the dtype of x, or None.
        stride: of the filter, (h, w); so are padding (zeros) and dilation.
        padding: zeros around the image.
        dilation: distance of the filter's taps.
        groups: of channels that see each other.
        relu: whether act is ReLU, which keeps NaN; else the identity.
        config: the launch configuration; None takes the plan's.

    Returns:
        y: [N, K, P, Q] in NHWC order, in the dtype of x.
    """
    shape = _shape(x, weight, stride, padding, dilation, groups)
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    if config is None:
        config = conv_fprop_heuristic(shape, x.dtype, compute_capability(x.device), tf32)
    krsc = weight.contiguous(memory_format=torch.channels_last)
    y = torch.empty(
        (shape.n, shape.k, shape.p, shape.q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    group_inputs, group_outputs = shape.c // groups, shape.k // groups
    unit = channel_unit(shape.c, group_inputs)
    pixels = shape.n * shape.p * shape.q
    # The interpreter multiplies the bit patterns of bf16; in fp32 the product is the same.
    upcast = x.dtype == torch.float32 or (INTERPRETED and x.dtype == torch.bfloat16)
    dot_dtype = tl.float32 if upcast else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
    reduction = shape.r * shape.s * group_inputs if config.flat else group_inputs
    launch(
        _conv_fprop_kernel,
        triton.cdiv(pixels, config.block_m) * triton.cdiv(group_outputs, config.block_n) * groups,
        x,
        krsc,
        scale,
        shift,
        residual,
        y,
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
        groups,
        group_inputs // unit,
        group_outputs,
        FLAT_INPUTS=group_inputs if config.flat else 0,
        UNIT=unit,
        R=shape.r,
        S=shape.s,
        PADDED=shape.padding != (0, 0),
        EVEN_K=reduction % config.block_k == 0,
        ACTIVATE=relu,
        PRECISION="tf32" if tf32 else "ieee",
        DOT_DTYPE=dot_dtype,
        INDEX=index_type(x.numel(), y.numel()),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    ambiguous = x.is_contiguous()  # NCHW and NHWC at once: PyTorch's rule decides the strides of the result
    if ambiguous and torch.contiguous_format == suggest_memory_format(x) == suggest_memory_format(weight):
        return y.contiguous()
    return y
