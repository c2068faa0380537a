"""From partial rows to the affine map of a batch norm, and the running statistics."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import DTYPES
from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.ops.arithmetic import vector
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import name_of, refuse_vectors
from resnet_fused.ops.registry import Mutated, Size, register


class Args(NamedTuple):
    mean: Tensor  # [rows, C] fp64, contiguous
    m2: Tensor  # [rows, C] fp32, contiguous: sums of squared deviations
    count: Tensor  # type: ignore[assignment]  # [rows] fp32, contiguous: pixels of each row; 0 marks a row to pass over
    weight: Tensor | None  # [C], any stride, or None for 1
    bias: Tensor | None  # like weight, or None for 0
    running_mean: Annotated[Tensor | None, Mutated("a")]  # like weight, or None
    running_var: Annotated[Tensor | None, Mutated("b")]  # like weight, or None
    momentum: float  # the weight of this batch
    eps: float  # added to the biased variance


class Out(NamedTuple):
    scale: Tensor
    shift: Tensor
    save_mean: Tensor
    save_invstd: Tensor


def reference(a: Args) -> Out:
    """merges the rows (Chan, Golub, LeVeque 1979); scale = weight * invstd, shift = bias - mean * scale;
    running = (1 - momentum) * running + momentum * {mean, unbiased variance}
    """
    # Merging in float64 costs nothing here: [rows, C] is tiny beside the activations.
    rows_mean, rows_m2, n = a.mean.double(), a.m2.double(), a.count.double()[:, None]
    total = n.sum()
    merged = (rows_mean * n).sum(0) / total
    deviations = (rows_m2 + n * (rows_mean - merged).square()).sum(0)
    variance = deviations / total
    invstd = (variance + a.eps).rsqrt()
    out = a.m2.dtype
    # The shift takes the scale as it will be used, rounded: then its rounding costs nothing where the mean is large.
    scale = (invstd if a.weight is None else invstd * a.weight.double()).to(out)
    shift = (0.0 if a.bias is None else a.bias.double()) - merged * scale.double()
    # Through `data`: autograd does not count this mutation, as it does not count that of PyTorch's own batch norm.
    for running, new in ((a.running_mean, merged), (a.running_var, deviations / (total - 1))):
        if running is not None:
            running.data.copy_((1 - a.momentum) * running.double() + a.momentum * new)
    return Out(scale, shift.to(out), merged.to(out), invstd.to(out))


def fake(a: Args) -> Out:
    return Out(*(vector(a.m2, a.mean.shape[1]) for _ in Out._fields))


def refuse(a: Args) -> str | None:
    if a.mean.dim() != 2:
        return f"mean must be [rows, C], got {tuple(a.mean.shape)}"
    shape, device = a.mean.shape, a.mean.device
    for name, rows, dtype in (("mean", a.mean, torch.float64), ("m2", a.m2, torch.float32)):
        if rows.shape != shape or rows.dtype != dtype or rows.device != device or not rows.is_contiguous():
            got = f"{name_of(rows.dtype)} {tuple(rows.shape)} with strides {tuple(rows.stride())} on {rows.device}"
            return f"{name} must be contiguous {name_of(dtype)} {tuple(shape)} on {device}, got {got}"
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(a, name)
        if vector is None:
            continue
        if vector.shape != shape[1:] or vector.dtype not in DTYPES or vector.device != device:
            got = f"{name_of(vector.dtype)} {tuple(vector.shape)} on {vector.device}"
            return f"{name} must be a vector of {shape[1]} on {device}, got {got}"
        if name.startswith("running") and vector.stride(0) == 0 and vector.shape[0] > 1:
            return f"{name} is written, and its elements lie on one another: strides {tuple(vector.stride())}"
    return refuse_vectors(device, shape[0], torch.float32, count=a.count)


def case(make: Operands, size: Size) -> Args:
    n, c, h, w = size
    rows = partial_rows(n * h * w, c)
    count = torch.full((rows,), float(n * h * w // rows), device=make.device)
    vectors = (make.vector(c), make.vector(c), None, None)
    return Args(make.vector(rows, c).double(), make.vector(rows, c, positive=True), count, *vectors, 0.1, 1e-5)


register(__name__, triton="bn_finalize", cuda=True, cpu=True)
