"""Frozen convolutions in int8 on our Triton kernels, which multiply signed activations."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from resnet_fused import dispatch
from resnet_fused.dispatch.device import arch
from resnet_fused.functional.common import autocast
from resnet_fused.inference.block import FrozenBlock
from resnet_fused.inference.conv import FrozenConv, Source, in_format
from resnet_fused.inference.int8 import Grids, Quantised, int8_weight, on_grid
from resnet_fused.inference.tail import Refused, check_pointwise, note
from resnet_fused.ops import OPS, conv_fprop_int8, conv_join_int8
from resnet_fused.ops.onednn import Grid


class TritonInt8Conv(FrozenConv):
    """In int8: batch norm in the weight and the shift; residual, activation and the rounding to int8 in the epilogue.

    The weight is symmetric, with a scale for each output channel. A float input or residual is rounded to int8 first.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_sums: Tensor
    shift: Tensor

    def __init__(self, source: Source, grids: Grids) -> None:
        super().__init__(source, "triton")
        self.grids = grids
        weight, scales, shift = int8_weight(source)
        self.constant("weight", weight.contiguous(memory_format=torch.channels_last))
        self.constant("weight_scale", scales)
        self.constant("weight_sums", weight.sum((1, 2, 3), dtype=torch.int32))
        self.constant("shift", shift)
        self._operands: dict[Grid, tuple[Tensor, Tensor, Tensor]] = {}
        self.planned = replace(self.planned, op="conv_fprop_int8", fused=f"{self.planned.fused}, requantisation")
        residual = source.example.y if self.adds else None
        self.refusal = _refusal("conv_fprop_int8", self._arguments(self.sample(), grids.x, _sample(residual), self.act))

    def sample(self) -> Tensor:
        """The example's input in int8, without memory."""
        x = _sample(self.example.x)
        assert x is not None
        return x

    def operands(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """(x_zero, offset, scale) for an input on this grid; a pool may hand on another than that of calibration."""
        if grid not in self._operands:
            channels, device = self.like.shape[1] * self.geometry[3], self.weight.device
            zero = torch.full((channels,), grid.zero_point, dtype=torch.int8, device=device)
            self._operands[grid] = zero, -grid.zero_point * self.weight_sums, grid.scale * self.weight_scale
        return self._operands[grid]

    def _arguments(self, x: Tensor, grid: Grid, residual: Tensor | None, act: str | None) -> conv_fprop_int8.Args:
        zero, offset, scale = self.operands(grid)
        residual_grid = self.grids.residual or Grid(1.0, 0)
        # a residual that is to be added apart, to what was not calibrated
        dtype = self.dtype if self.adds and residual is None else torch.int8
        tensors = (x, zero, self.weight, offset, scale, self.shift, residual, *residual_grid)
        return conv_fprop_int8.Args(*tensors, *self.geometry, act, *self.grids.y, dtype)  # type: ignore[arg-type]

    def _run(self, x: Tensor, residual: Tensor | None, act: str | None, overwrite_residual: bool = False) -> Tensor:
        if x.device != self.weight.device:
            self._explain(x)  # a meta tensor would pass
        given, grid = on_grid(x, self.grids.x, signed=True)
        args = self._arguments(given, grid, None, act)
        if residual is not None:
            assert self.grids.residual is not None
            added, (scale, zero) = on_grid(residual, self.grids.residual, signed=True)
            args = args._replace(residual=added, residual_scale=scale, residual_zero=zero, dtype=torch.int8)
        y = torch.ops.resnet_fused.conv_fprop_int8(*args, backend="triton")
        if args.dtype != torch.int8:
            return in_format(y, x, self.nchw)
        return Quantised(y, self.grids.y, self.dtype, self.nchw and x.is_contiguous())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


class Int8Join(nn.Module):
    """`conv_join_int8`: relu(bn3(conv3(x)) + bn(projection(shortcut))), rounded once.

    Raises:
        Refused: the kernel does not run it on the example.
    """

    def __init__(self, conv3: TritonInt8Conv, projection: TritonInt8Conv) -> None:
        super().__init__()
        if not conv3.adds:
            raise Refused("")  # its own reason says why
        if conv3.act not in (None, "relu"):
            raise Refused(f"it adds before ReLU, not before {conv3.act}")
        check_pointwise(conv3, any_stride=False)
        check_pointwise(projection, any_stride=True)
        self.conv3, self.projection = conv3, projection
        self.shift = conv3.shift + projection.shift
        given = (conv3.sample(), conv3.grids.x, projection.sample(), projection.grids.x)
        reason = _refusal("conv_join_int8", self._arguments(*given))
        if reason is not None:
            raise Refused(reason)
        conv3.plan_in("conv_join_int8", f"{projection.layer} along its input channels")
        projection.plan_in("conv_join_int8", f"with {conv3.layer}")

    def _arguments(self, x: Tensor, grid: Grid, shortcut: Tensor, shortcut_grid: Grid) -> conv_join_int8.Args:
        conv3, projection = self.conv3, self.projection
        of_x = (x, conv3.weight, *conv3.operands(grid)[1:])
        of_shortcut = (shortcut, projection.weight, *projection.operands(shortcut_grid)[1:])
        grids = (*conv3.grids.y, torch.int8)
        return conv_join_int8.Args(*of_x, *of_shortcut, self.shift, projection.geometry[0], conv3.act == "relu", *grids)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        conv3, projection = self.conv3, self.projection
        if shortcut.dtype is not x.dtype:
            (shortcut,) = autocast(shortcut)
        shape = conv3.result_shape(x.shape)
        alike = bool(shape) and shape == projection.result_shape(shortcut.shape)
        if not alike or {x.dtype, shortcut.dtype} != {conv3.dtype}:
            return conv3(x, projection(shortcut))  # which says what is wrong, or adds as PyTorch does
        given = (*on_grid(x, conv3.grids.x, signed=True), *on_grid(shortcut, projection.grids.x, signed=True))
        y = torch.ops.resnet_fused.conv_join_int8(*self._arguments(*given), backend="triton")
        return Quantised(y, conv3.grids.y, conv3.dtype, conv3.nchw and x.is_contiguous())


def plan_joins(network: nn.Module) -> None:
    """Each block's last convolution and its projection as one op, where both are in int8 and the kernel runs them."""
    for block in network.modules():
        if not isinstance(block, FrozenBlock):
            continue
        conv3, projection = block.branch[-1], block.shortcut
        if isinstance(conv3, TritonInt8Conv) and isinstance(projection, TritonInt8Conv):
            try:
                block.join = Int8Join(conv3, projection)
            except Refused as reason:
                note(conv3, "conv_join_int8", reason)
            else:
                block.branch, block.shortcut = nn.ModuleList(block.branch[:-1]), None


def _sample(t: Any) -> Any:
    """An activation like `t` in int8 and without memory; None of None."""
    if t is None:
        return None
    with FakeTensorMode():
        return torch.empty(t.shape, dtype=torch.int8, device=t.device, memory_format=torch.channels_last)


def _refusal(op: str, args: Any) -> str | None:
    """Why the kernel is not to run on these arguments, or None: it cannot, or others were faster."""
    reason: str | None = importlib.import_module("resnet_fused.kernels").refuse(op, args)
    if reason is not None or dispatch.forced_backend() is not None or args.x.device.type != "cuda":
        return reason
    (problem,) = OPS[op].problems(args)
    backend = dispatch.choose(problem, arch(args.x.device)).backend
    return None if backend == "triton" else "native PyTorch was measured to be faster"
