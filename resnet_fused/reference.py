"""Every op in plain PyTorch: the oracle of the tests and the fallback of last resort.

Each function has the name, the arguments and the meaning of the op in `docs/design.md`. Arithmetic is fp32 for fp16,
bf16 and fp32 data and fp64 for fp64 data, rounded once to the data's dtype; any device, any strides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which data of `dtype` is accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _up(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] as [M, C], pixels in (n, h, w) order, in the compute dtype."""
    return _up(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _like(value: Tensor, x: Tensor) -> Tensor:
    """`value` rounded to the dtype of `x`, in the strides of `x`."""
    return torch.empty_like(x).copy_(value)


def _is_nchw(t: Tensor) -> bool:
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
    return (t if _is_nchw(t) else t.permute(0, 2, 3, 1)).reshape(-1)


def pack_bits(keep: Tensor) -> Tensor:
    """bool [n] -> uint8 [ceil(n/8)], element i in bit i%8 of byte i//8."""
    padded = F.pad(keep.to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
    return (padded * torch.tensor(_BITS, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack_bits`, as a bool tensor of the shape and memory order of `like`."""
    bits = torch.tensor(_BITS, dtype=torch.uint8, device=mask.device)
    flat = (mask[:, None] & bits).ne(0).reshape(-1)[: like.numel()]
    n, c, h, w = like.shape
    return flat.view(n, c, h, w) if _is_nchw(like) else flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _select(keep: Tensor, dy: Tensor) -> Tensor:
    """dy where kept, else zero: a NaN gradient at a masked element is dropped, as ReLU's backward does."""
    return torch.where(keep, dy, torch.zeros((), dtype=dy.dtype, device=dy.device))


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
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(_up(x), _up(weight), None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * _per_channel(scale)
    if shift is not None:
        y = y + _per_channel(shift)
    if residual is not None:
        y = y + _up(residual)
    return (y.relu() if relu else y).to(x.dtype)


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """round(relu(x*scale + shift)) in the compute dtype, as `bn_apply` would write it; x itself without a map."""
    if scale is None or shift is None:
        return _up(x)
    return _up(_like(_normalise(x, scale, shift).relu(), x))


def _gradient(dy: Tensor, x: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """round(a*dy + b*x + c) in the compute dtype, as `bn_backward_apply` would write it; dy itself without them."""
    if x is None or coefficients is None:
        return _up(dy)
    a, b, c = (_per_channel(v.double()) for v in coefficients)
    return _up(_like(dy.double() * a + x.double() * b + c, dy))


def conv_fprop_stats(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(_activation(x, x_scale, x_shift), _up(weight), None, stride, padding, dilation, groups).to(x.dtype)
    return (y, *bn_stats(y, rows))


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = [dy.shape[0], weight.shape[1] * groups, *size]
    with torch.autocast(dy.device.type, enabled=False):
        dx = conv2d_input(shape, _up(weight), _gradient(dy, dy_x, dy_coefficients), stride, padding, dilation, groups)
    if residual is not None:
        addend = _up(residual)
        dx = dx + (addend if residual_mask is None else _select(unpack_bits(residual_mask, residual), addend))
    if x is None or scale is None or shift is None or mean is None or invstd is None:
        return rounded(dx, dy), dx.new_empty(0), dx.new_empty(0)
    dx = rounded(_select(~(_normalise(x, scale, shift).to(x.dtype) <= 0), dx), dy)
    return (dx, *_sums(_up(dx), x, mean, invstd))


def conv_dgrad_join(
    dy: Tensor,
    weight: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    invstd: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_invstd: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    before = (dy, weight, dy_x, dy_coefficients, residual, residual_mask)
    dx = conv_dgrad(*before, None, None, None, None, None, size, stride, padding, dilation, groups)[0]
    dz = _select(unpack_bits(mask, x), _up(dx))
    sums = _sums(dz, x, mean, invstd)
    if shortcut is None or shortcut_mean is None or shortcut_invstd is None:
        return (dx, *sums, sums[0].new_empty(0))
    return (dx, *sums, _sums(dz, shortcut, shortcut_mean, shortcut_invstd)[1])


def rounded(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype and the memory order of `like`, whose shape may be another."""
    nhwc = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return value.to(like.dtype).contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    filter: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    shape = [dy.shape[1], x.shape[1] // groups, *filter]
    with torch.autocast(x.device.type, enabled=False):
        dweight = conv2d_weight(
            _activation(x, x_scale, x_shift),
            shape,
            _gradient(dy, dy_x, dy_coefficients),
            stride,
            padding,
            dilation,
            groups,
        )
    return dweight.contiguous(memory_format=torch.channels_last)


def bn_backward_finalize(
    sum_dy: Tensor, sum_dy_xhat: Tensor, scale: Tensor, mean: Tensor, invstd: Tensor, count: float
) -> Tensor:
    a, mean_dy, mean_dy_xhat = scale.double(), sum_dy.double() / count, sum_dy_xhat.double() / count
    b = -a * mean_dy_xhat * invstd.double()
    return torch.stack([a, b, -a * mean_dy - b * mean.double()]).to(scale.dtype)


def conv_chain(
    x: Tensor,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor | None,
    shift3: Tensor,
    residual: Tensor,
    weight1: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    a = conv_fprop(x, weight2, scale2, shift2, None, stride, padding, dilation, 1, True)
    one, zero = [1, 1], [0, 0]
    y = conv_fprop(a, weight3, scale3, shift3, residual, one, zero, one, 1, True)
    if weight1 is None:
        return y, x.new_empty(0)
    return y, conv_fprop(y, weight1, scale1, shift1, None, one, zero, one, 1, True)


def conv_join(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    shift: Tensor,
    shortcut_stride: list[int],
    relu: bool,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(_up(x), _up(weight)) + F.conv2d(_up(shortcut), _up(shortcut_weight), None, shortcut_stride)
    y = y + _per_channel(shift)
    return (y.relu() if relu else y).to(x.dtype)


def bn_stats(x: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    # float64, and so the mean: else a mean that is large beside the deviations loses the digits that they are made of.
    pixels = _pixels(x).double()
    total, channels = pixels.shape
    chunk = -(-total // rows)
    starts = torch.arange(rows, device=x.device) * chunk
    count = (total - starts).clamp(0, chunk).to(pixels.dtype)
    tiles = F.pad(pixels, (0, 0, 0, rows * chunk - total)).view(rows, chunk, channels)
    inside = torch.arange(chunk, device=x.device)[None, :, None] < count[:, None, None]
    at_least_one = count.clamp(min=1)[:, None]
    mean = torch.where(inside, tiles, 0).sum(1) / at_least_one
    m2 = torch.where(inside, tiles - mean[:, None], 0).square().sum(1)
    out = compute_dtype(x.dtype)
    return mean, m2.to(out), count.to(out)


def bn_finalize(
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Merging in float64 costs nothing here: [rows, C] is tiny beside the activations.
    rows_mean, rows_m2, n = mean.double(), m2.double(), count.double()[:, None]
    total = n.sum()
    merged = (rows_mean * n).sum(0) / total
    deviations = (rows_m2 + n * (rows_mean - merged).square()).sum(0)
    variance = deviations / total
    invstd = (variance + eps).rsqrt()
    out = m2.dtype
    # The shift takes the scale as it will be used, rounded: then its rounding costs nothing where the mean is large.
    scale = (invstd if weight is None else invstd * weight.double()).to(out)
    shift = (0.0 if bias is None else bias.double()) - merged * scale.double()
    # Through `data`: autograd does not count this mutation, as it does not count that of PyTorch's own batch norm.
    if running_mean is not None:
        running_mean.data.copy_((1 - momentum) * running_mean.double() + momentum * merged)
    if running_var is not None:
        running_var.data.copy_((1 - momentum) * running_var.double() + momentum * deviations / (total - 1))
    return scale, shift.to(out), merged.to(out), invstd.to(out)


def _normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x*scale + shift in float64, which stands in for the kernels' fused multiply-add: the product is not rounded."""
    return x.double() * _per_channel(scale.double()) + _per_channel(shift.double())


def bn_apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    relu: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    value = _normalise(x, scale, shift)
    if residual is not None:
        if residual_scale is not None and residual_shift is not None:
            value = value + _normalise(residual, residual_scale, residual_shift)
        else:
            value = value + _up(residual)
    y = _like(value.relu() if relu else value, x)
    if not with_mask:
        return y, x.new_empty(0, dtype=torch.uint8)
    _is_nchw(x)  # the bits are read beside x
    return y, pack_bits(~(in_memory_order(y) <= 0))


def behind_relu(dy: Tensor, x: Tensor, mask: Tensor | None, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """dz in the compute dtype: dy behind ReLU's mask, stored or recomputed; differentiable in dy."""
    if not relu:
        return _up(dy)
    if mask is not None:
        return _select(unpack_bits(mask, x), _up(dy))
    return _select(~(_normalise(x, scale, shift).to(x.dtype) <= 0), _up(dy))


def _sums(dz: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    xhat = (_up(x) - _per_channel(mean)) * _per_channel(invstd)
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))


def _input_gradient(
    dz: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
) -> Tensor:
    if sum_dy is not None and sum_dy_xhat is not None:
        xhat = (_up(x) - _per_channel(mean)) * _per_channel(invstd)
        dz = dz - _per_channel(sum_dy) / count - xhat * (_per_channel(sum_dy_xhat) / count)
    return _like(dz * _per_channel(scale), x)


def bn_backward_reduce(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    rows: int,
) -> tuple[Tensor, Tensor]:
    return _sums(behind_relu(dy, x, mask, scale, shift, relu), x, mean, invstd)


def bn_backward_apply(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
    relu: bool,
    with_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    dz = behind_relu(dy, x, mask, scale, shift, relu)
    dx = _input_gradient(dz, x, scale, mean, invstd, sum_dy, sum_dy_xhat, count)
    return dx, _like(dz, x) if with_dresidual else x.new_empty(0)


def add_act(x: Tensor, other: Tensor, relu: bool) -> Tensor:
    value = _up(x) + _up(other)
    return _like(value.relu() if relu else value, x)


def add_act_backward(dy: Tensor, y: Tensor) -> Tensor:
    return _like(_select(~(y <= 0), dy), y)


def bn_act_max_pool(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    activation = _like(_normalise(x, scale, shift).relu(), x)
    y, flat = F.max_pool2d(activation, 3, 2, 1, return_indices=True)
    width, (rows, cols) = x.shape[3], y.shape[2:]
    top = torch.arange(rows, device=x.device).view(-1, 1) * 2 - 1
    left = torch.arange(cols, device=x.device).view(1, -1) * 2 - 1
    index = 3 * (flat // width - top) + (flat % width - left)
    return y, torch.empty_like(y, dtype=torch.uint8).copy_(index)


def winners(index: Tensor, x: Tensor) -> Tensor:
    """Where in its plane of `x` each window's winner is, `[N, C, P * Q]`."""
    rows, cols = index.shape[2:]
    place = index.long()
    top = torch.arange(rows, device=x.device).view(-1, 1) * 2 - 1
    left = torch.arange(cols, device=x.device).view(1, -1) * 2 - 1
    return ((top + place // 3) * x.shape[3] + left + place % 3).flatten(2)


def _unpool(dy: Tensor, index: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """dz in the compute dtype: each window's gradient at its winner, behind ReLU's mask."""
    n, c, h, w = x.shape
    gathered = torch.zeros(n, c, h * w, dtype=compute_dtype(x.dtype), device=x.device)
    gathered.scatter_add_(2, winners(index, x), _up(dy).reshape(n, c, -1))
    # PyTorch rounds the pooled gradient to the data's dtype before ReLU and batch norm see it; the kernels do not.
    return _select(~(_normalise(x, scale, shift).to(x.dtype) <= 0), gathered.view(n, c, h, w))


def bn_act_max_pool_backward_reduce(
    dy: Tensor, index: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, invstd: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    return _sums(_unpool(dy, index, x, scale, shift), x, mean, invstd)


def bn_act_max_pool_backward_apply(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
) -> Tensor:
    return _input_gradient(_unpool(dy, index, x, scale, shift), x, scale, mean, invstd, sum_dy, sum_dy_xhat, count)


def reduce_rows(partials: Tensor) -> Tensor:
    return partials.sum(0)


def pack_weight(weight: Tensor, flip: bool) -> Tensor:
    if flip:
        return weight.flip(2, 3).permute(1, 2, 3, 0).contiguous()
    return weight.permute(0, 2, 3, 1).contiguous()
