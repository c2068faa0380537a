"""The arithmetic that the references share: fp32 for fp16, bf16 and fp32 data, fp64 for fp64, rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which data of `dtype` is accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def up(t: Tensor) -> Tensor:
    """`t` in the compute dtype."""
    return t.to(compute_dtype(t.dtype))


def per_channel(v: Tensor) -> Tensor:
    """[C] as it broadcasts over [N, C, H, W]."""
    return v.view(1, -1, 1, 1)


def round_to_grid(value: Tensor, scale: float, zero: int) -> Tensor:
    """The nearest q in int8, NHWC, with value ~ scale * (q - zero), ties to even; what lies beyond its ends becomes
    them.
    """
    q = (value * (1.0 / scale) + zero).round_().clamp_(-128, 127)
    return q.to(torch.int8, memory_format=torch.channels_last)


def nhwc(value: Tensor) -> Tensor:
    """`value` in NHWC order, whatever else its strides can be read as."""
    return torch.empty_like(value, memory_format=torch.channels_last).copy_(value)


def like(value: Tensor, x: Tensor) -> Tensor:
    """`value` rounded to the dtype of `x`, in the strides of `x`."""
    return torch.empty_like(x).copy_(value)


def rounded(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and the memory order of `like`, whose shape may be another."""
    return value.to(like.dtype).contiguous(memory_format=memory_format(like))


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where `x` is in that order and in no other."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def vector(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor in the compute dtype of `x`, on its device."""
    return x.new_empty(shape, dtype=compute_dtype(x.dtype))


def is_nhwc(t: Tensor) -> bool:
    """Whether `t` fills its memory in the order (n, h, w, c); it may fill it in the order (n, c, h, w) too."""
    return t.is_contiguous(memory_format=torch.channels_last)


def is_nchw(t: Tensor) -> bool:
    """Whether an activation with a bit mask is NCHW in memory; else it is NHWC.

    Raises:
        RuntimeError: it is neither, and so has no memory order that the bits could follow.
    """
    if t.is_contiguous():
        return True
    if t.is_contiguous(memory_format=torch.channels_last):
        return False
    raise RuntimeError(
        "the bits of a mask follow the memory of an activation that is dense in NCHW or NHWC order, got strides "
        f"{tuple(t.stride())} for shape {tuple(t.shape)}"
    )


def in_memory_order(t: Tensor) -> Tensor:
    """A dense NCHW or NHWC tensor as a 1-D tensor in the order of its memory."""
    return (t if is_nchw(t) else t.permute(0, 2, 3, 1)).reshape(-1)


def pack_bits(keep: Tensor) -> Tensor:
    """bool [n] -> uint8 [ceil(n/8)], element i in bit i%8 of byte i//8."""
    padded = F.pad(keep.to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
    return (padded * torch.tensor(_BITS, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack_bits`, as a bool tensor of the shape and memory order of `like`."""
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    flat = (mask[:, None] & bits).ne(0).reshape(-1)[: like.numel()]
    n, c, h, w = like.shape
    return flat.view(n, c, h, w) if is_nchw(like) else flat.view(n, h, w, c).permute(0, 3, 1, 2)


def select(keep: Tensor, dy: Tensor) -> Tensor:
    """dy where kept, else zero: a NaN gradient at a masked element is dropped, as ReLU's backward does."""
    return torch.where(keep, dy, torch.zeros((), dtype=dy.dtype, device=dy.device))


def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x*scale + shift in float64, which stands in for the kernels' fused multiply-add: the product is not rounded."""
    return x.double() * per_channel(scale.double()) + per_channel(shift.double())


def fold(weight: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """weight * scale per output channel, rounded once to `dtype` (None: the weight's), in its memory format."""
    if scale is not None:
        weight, dtype = weight * scale.view(-1, 1, 1, 1), dtype or weight.dtype
    return weight if dtype is None else weight.to(dtype)


def passes_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Where the gradient passes the ReLU behind x*scale + shift: not (y <= 0), of y as it was rounded."""
    return ~(normalise(x, scale, shift).to(x.dtype) <= 0)


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """round(relu(x*scale + shift)), as `bn_apply` would write it; x itself without a map."""
    return x if scale is None or shift is None else like(normalise(x, scale, shift).relu(), x)


def bn_gradient(dy: Tensor, x: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """round(a*dy + b*x + c), as `bn_backward_apply` would write it; dy itself without them."""
    if x is None or coefficients is None:
        return dy
    a, b, c = (per_channel(v.double()) for v in coefficients)
    return like(dy.double() * a + x.double() * b + c, dy)


def gradient_sums(dz: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """sum(dz) and sum(dz * (x - mean) * invstd), [C] each."""
    xhat = (up(x) - per_channel(mean)) * per_channel(invstd)
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))


def input_gradient(
    dz: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
) -> Tensor:
    """scale * (dz - sum_dy/count - (x - mean)*invstd * sum_dy_xhat/count); scale * dz without the sums."""
    if sum_dy is not None and sum_dy_xhat is not None:
        xhat = (up(x) - per_channel(mean)) * per_channel(invstd)
        dz = dz - per_channel(sum_dy) / count - xhat * (per_channel(sum_dy_xhat) / count)
    return like(dz * per_channel(scale), x)


def behind_relu(dy: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """dz in the compute dtype: dy behind ReLU's mask, stored or recomputed; differentiable in dy."""
    if not relu:
        return up(dy)
    return select(passes_relu(x, scale, shift) if mask is None else unpack_bits(mask, x), up(dy))


def window_corner(y: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column at which the window of each pixel of a 3x3, stride 2, padding 1 pool begins."""
    rows, cols = y.shape[2:]
    top = torch.arange(rows, device=y.device).view(-1, 1) * 2 - 1
    return top, torch.arange(cols, device=y.device).view(1, -1) * 2 - 1


def winners(index: Tensor, x: Tensor) -> Tensor:
    """Where in its plane of `x` each window's winner is, `[N, C, P * Q]`."""
    place = index.long()
    top, left = window_corner(index)
    return ((top + place // 3) * x.shape[3] + left + place % 3).flatten(2)


def unpool(dy: Tensor, index: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """dz in the compute dtype: each window's gradient at its winner, behind ReLU's mask."""
    n, c, h, w = x.shape
    gathered = torch.zeros(n, c, h * w, dtype=compute_dtype(x.dtype), device=x.device)
    gathered.scatter_add_(2, winners(index, x), up(dy).reshape(n, c, -1))
    # PyTorch rounds the pooled gradient to the data's dtype before ReLU and batch norm see it; the kernels do not.
    return select(passes_relu(x, scale, shift), gathered.view(n, c, h, w))
