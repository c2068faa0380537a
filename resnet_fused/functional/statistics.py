"""From batch norm's parameters and statistics to the affine map `scale * x + shift` that the kernels apply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.functional.common import pixels
from resnet_fused.ops import called, implements
from resnet_fused.ops.arithmetic import compute_dtype

Affine = tuple[Tensor, Tensor, Tensor, Tensor]
_bn_stats, _bn_finalize, _bn_apply = map(called, ("bn_stats", "bn_finalize", "bn_apply"))


def affine_of(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> Affine:
    """`(scale, shift, mean, invstd)`, `[C]` each, of the batch `x` or of the running statistics.

    Mutates:
        `running_mean` and `running_var` in training. They change here and not inside an `autograd.Function`, where a
        mutation under `torch.compile` gave wrong gradients (pytorch#180642).
    """
    with torch.no_grad():
        if not training:
            assert running_mean is not None and running_var is not None
            return constant_affine(running_mean, running_var, weight, bias, eps, x.dtype)
        if x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        rows = _bn_stats(x, dispatch.partial_rows(pixels(x), x.shape[1]), backend=backend)
        return finalize(rows, running_mean, running_var, weight, bias, momentum, eps, backend)


def finalize(
    rows: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    backend: str,
) -> Affine:
    """`(scale, shift, mean, invstd)` of a batch whose partial statistics are `rows`, as `bn_stats` returns them.

    Mutates:
        `running_mean` and `running_var`.
    """
    with _packed(weight, bias, running_mean, running_var) as vectors:
        affine: Affine = _bn_finalize(*rows, *vectors, momentum, eps, backend=backend)
    return affine


def finalize_apply(
    x: Tensor,
    rows: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    backend: str,
) -> tuple[Affine, Tensor]:
    """`finalize`, and relu(scale * x + shift).

    Mutates:
        `running_mean` and `running_var`.
    """
    if not implements(backend, "bn_finalize_apply"):
        affine = finalize(rows, running_mean, running_var, weight, bias, momentum, eps, backend)
        return affine, activation(x, affine, backend)
    with _packed(weight, bias, running_mean, running_var) as vectors:
        *found, y = torch.ops.resnet_fused.bn_finalize_apply(x, *rows, *vectors, momentum, eps, backend=backend)
    scale, shift, mean, invstd = found
    return (scale, shift, mean, invstd), y


def activation(x: Tensor, affine: Affine, backend: str) -> Tensor:
    """relu(scale * x + shift)."""
    y: Tensor = _bn_apply(x, *affine[:2], None, None, None, True, False, backend=backend)[0]
    return y


@contextmanager
def _packed(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> Iterator[list[Tensor | None]]:
    """The vectors, contiguous; what is written to the running statistics arrives in the originals."""
    vectors = (weight, bias, running_mean, running_var)
    packed = [v if v is None else v.contiguous() for v in vectors]
    yield packed
    for original, copy in zip(vectors[2:], packed[2:], strict=True):
        if original is not None and copy is not None and copy is not original:
            original.data.copy_(copy)  # not counted by autograd, as native batch norm is not


def constant_affine(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Affine:
    """`(scale, shift, mean, invstd)` of a batch norm with constant statistics, in the compute dtype of `dtype`."""
    up = compute_dtype(dtype)
    mean = running_mean.to(up, copy=True)  # saved for backward, before which a training forward may come
    invstd = (running_var.to(up) + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.to(up)
    shift = -mean * scale if bias is None else bias.to(up) - mean * scale
    return scale, shift, mean, invstd
