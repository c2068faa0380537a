"""Frozen convolutions in int8, and the tensors that they hand to each other."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401  registers quantized_decomposed
from torch import Tensor
from torch.ao.quantization.observer import PerChannelMinMaxObserver
from torch.utils._pytree import tree_map_only

from resnet_fused.inference.conv import FrozenConv, Source
from resnet_fused.inference.value import Apart, Value
from resnet_fused.ops import cpu, onednn
from resnet_fused.ops.arithmetic import fold, round_to_grid
from resnet_fused.ops.onednn import Grid


class Quantised(Tensor):
    """A float tensor in 8 bits: scale * (q - zero_point).

    Whoever does not know it reads it as float: any op of PyTorch's is given the float tensor. From then on that counts,
    for it may be written to.
    """

    grid: Grid
    nchw: bool
    signed: bool
    _eight: Tensor | None
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, eight: Tensor, grid: Grid, dtype: torch.dtype, nchw: bool) -> Quantised:
        """`eight`: q as uint8, or int8, NHWC; `nchw`: the float tensor is in that order."""
        strides = torch.empty(eight.shape, device="meta").stride() if nchw else eight.stride()
        made: Quantised = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, eight.shape, strides=strides, dtype=dtype, device=eight.device
        )
        made.grid, made.nchw, made._eight, made._dense = grid, nchw, eight, None
        made.signed = eight.dtype == torch.int8
        return made

    def eight(self) -> Tensor:
        """q, as it was made, or rounded again where the float tensor was read."""
        return quantise(self.dense(), self.grid, self.signed) if self._eight is None else self._eight

    def dense(self) -> Tensor:
        """The float tensor."""
        if self._dense is None:
            assert self._eight is not None
            y = self._eight.to(torch.float32)
            y = y.sub_(self.grid.zero_point).mul_(self.grid.scale).to(self.dtype)
            self._dense, self._eight = y.contiguous() if self.nchw else y, None
        return self._dense

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantise(x: Tensor, grid: Grid, signed: bool = False) -> Tensor:
    """`x` as uint8, or int8, in NHWC order."""
    if signed:
        return round_to_grid(x.float(), *grid)
    if cpu.quantises(x):
        return cpu.quantise(x, grid)
    return onednn.quantise(x.contiguous(memory_format=torch.channels_last), grid)


class Grids(NamedTuple):
    """What 8 bits stand for in a convolution's input, result and residual."""

    x: Grid
    y: Grid
    residual: Grid | None


class Int8Conv(FrozenConv):
    """In int8: batch norm folded; residual, activation and the rounding to 8 bits in the epilogue.

    The weight is symmetric, with a scale for each output channel. A float input or residual is rounded to 8 bits first.

    Attributes:
        ours: our convolution runs it, not oneDNN's.
    """

    weight_scale: Tensor
    weight_sums: Tensor
    bias: Tensor

    def __init__(self, source: Source, grids: Grids, keeps_order: bool) -> None:
        super().__init__(source, "aten")
        self.grids, self.keeps_order = grids, keeps_order
        weight, scales, bias = int8_weight(source)
        refusal = cpu.refusal(weight, *self.geometry, self.act)
        self.ours = refusal is None
        how = {"backend": "cpu", "op": "int8_conv"} if self.ours else {"op": "qconv2d_pointwise"}
        self._epilogues: dict[Grid, tuple[Tensor, Tensor]] = {}  # by the input's grid, which a pool may hand on
        if self.ours:
            packed = cpu.pack(weight)
            self.constant("weight_sums", weight.sum(dim=(1, 2, 3), dtype=torch.float64))
        else:
            packed = onednn.int8_pack(weight, scales, grids.x, *self.geometry, source.example.x.shape)
        self.constant("weight", packed)
        self.constant("weight_scale", scales)
        self.constant("bias", bias)
        fused, reason = f"{self.planned.fused}, requantisation", self.planned.reason or refusal or ""
        self.planned = dataclasses.replace(self.planned, **how, fused=fused, reason=reason)  # type: ignore[arg-type]

    def _run(self, x: Tensor, residual: Tensor | None, act: str | None, overwrite_residual: bool = False) -> Tensor:
        if x.numel() == 0 or not x.is_cpu:
            self._explain(x)  # oneDNN's op itself minds neither
        x, x_grid = on_grid(x, self.grids.x)
        if self.adds and residual is None:  # it is to be added apart, to what was not calibrated
            return self._conv(x, x_grid, None, None, act, None, False)
        added, added_grid = None, None
        if residual is not None:
            assert self.grids.residual is not None
            overwrite_residual |= not isinstance(residual, Quantised)  # then its 8 bits are ours
            added, added_grid = on_grid(residual, self.grids.residual)
        y = self._conv(x, x_grid, added, added_grid, act, self.grids.y, overwrite_residual)
        return Quantised(y, self.grids.y, self.dtype, self.keeps_order)

    def _conv(
        self,
        x: Tensor,
        x_grid: Grid,
        residual: Tensor | None,
        residual_grid: Grid | None,
        act: str | None,
        y_grid: Grid | None,
        overwrite_residual: bool,
    ) -> Tensor:
        """The result on `y_grid`, or without one in the float dtype."""
        stride, padding, _, groups = self.geometry
        if self.ours:
            args = (x, x_grid, self.weight, *self._epilogue(x_grid), residual, residual_grid)
            shape = (self.like.shape[0], self.filter, stride, padding)
            y = cpu.int8_conv(*args, *shape, act, y_grid, overwrite_residual, groups=groups)  # type: ignore[arg-type]
            return y if y_grid is not None else y.to(self.dtype)
        if residual is not None and not overwrite_residual:
            residual = residual.clone()
        args = (x, x_grid, self.weight, self.weight_scale, self.bias, residual, residual_grid)
        return onednn.int8_conv(*args, *self.geometry, act, y_grid or self.dtype)  # type: ignore[arg-type]

    def _epilogue(self, x_grid: Grid) -> tuple[Tensor, Tensor]:
        if x_grid not in self._epilogues:
            self._epilogues[x_grid] = cpu.int8_epilogue(self.weight_sums, self.weight_scale, self.bias, x_grid)
        return self._epilogues[x_grid]

    def join_call(self, x: Value, residual: Value | None = None) -> Value:
        if not self.ours or self.keeps_order or self.adds != (residual is not None) or x.dtype is not self.dtype:
            raise Apart
        read, x_grid = x.eight(self.grids.x)
        added, added_grid = (None, None) if residual is None else residual.eight(self.grids.residual or x_grid)
        tensors, grids = (self.weight, *self._epilogue(x_grid)), (x_grid, added_grid, self.grids.y)
        shape = (self.like.shape[0], self.filter, *self.geometry[:2], self.geometry[3], self.act)
        y = x.steps.conv(read, added, tensors, *shape, torch.uint8, grids)
        return Value(x.steps, y, self.dtype, self.grids.y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"


def int8_weight(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, scale, shift) of a convolution: int8 [K, C/groups, R, S] with batch norm folded in, fp32 [K] twice."""
    scale, shift = source.affine()
    weight = fold(source.conv.weight, scale, torch.float32).contiguous()
    observer = PerChannelMinMaxObserver(0, torch.qint8, torch.per_channel_symmetric).to(weight.device)
    observer(weight)
    scales, zeros = observer.calculate_qparams()
    weight = torch.ops.quantized_decomposed.quantize_per_channel(weight, scales, zeros, 0, -128, 127, torch.int8)
    return weight, scales, shift.to(torch.float32)


def on_grid(x: Tensor, grid: Grid, signed: bool = False) -> tuple[Tensor, Grid]:
    """`x` in 8 bits and what they stand for: its own grid, or of a float tensor this one."""
    return (x.eight(), x.grid) if isinstance(x, Quantised) else (quantise(x, grid, signed), grid)
