"""The residual add with its ReLU, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import TILE, relu, round_to, to_fp32
from resnet_fused.ops import add_act as forward
from resnet_fused.ops import add_act_backward as backward


@triton.jit
def _add_act_kernel(x, other, y, numel, ACTIVATE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """y = round(act(x + other)); a program owns BLOCK consecutive elements of the memory, whatever its order."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = offset < numel
    value = to_fp32(tl.load(x + offset, mask=valid, other=0.0)) + to_fp32(
        tl.load(other + offset, mask=valid, other=0.0)
    )
    if ACTIVATE:
        value = relu(value)
    tl.store(y + offset, round_to(value, y.dtype.element_ty), mask=valid)


@triton.jit
def _add_act_backward_kernel(dy, y, dz, numel, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """dz = not (y <= 0) ? dy : 0; a program owns BLOCK consecutive elements of the memory."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = offset < numel
    dropped = to_fp32(tl.load(y + offset, mask=valid, other=0.0)) <= 0.0
    gradient = tl.load(dy + offset, mask=valid, other=0.0)
    tl.store(dz + offset, tl.where(dropped, tl.zeros_like(gradient), gradient), mask=valid)


def _block(numel: int, largest: int = TILE) -> int:
    return min(largest, triton.next_power_of_2(max(numel, 1)))


def add_act(a: forward.Args) -> Tensor:
    """Launch `ops.add_act`."""
    y, numel = torch.empty_like(a.x), a.x.numel()
    block = _block(numel)
    launch(
        _add_act_kernel,
        triton.cdiv(numel, block),
        a.x,
        a.other,
        y,
        numel,
        ACTIVATE=a.relu,
        INDEX=index_type(numel),
        BLOCK=block,
    )
    return y


def add_act_backward(a: backward.Args) -> Tensor:
    """Launch `ops.add_act_backward`."""
    dz, numel = torch.empty_like(a.y), a.y.numel()
    block = _block(numel, TILE // 2)  # a whole tile's selections spill with Triton 3.6
    grid = triton.cdiv(numel, block)
    launch(_add_act_backward_kernel, grid, a.dy, a.y, dz, numel, INDEX=index_type(numel), BLOCK=block)
    return dz
