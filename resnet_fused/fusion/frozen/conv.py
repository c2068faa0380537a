"""A convolution of a frozen network, its batch norm and ReLU with it, prepared for the backend that runs it."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from resnet_fused import ops, plan
from resnet_fused.functional.common import conv_operands
from resnet_fused.functional.statistics import constant_affine
from resnet_fused.ops import aten

from .plan import PlannedConv

# oneDNN's fused ReLU turns a NaN into 0. Where one shows up, the network runs again with ReLU as a pass of its own.
keep_nan: ContextVar[bool] = ContextVar("resnet_fused_keep_nan", default=False)


@dataclass(frozen=True)
class Example:
    """What a unit read and wrote when the example ran: tensors without memory, for questions about shapes."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Example:
        with FakeTensorMode():
            return cls(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (x, y)))


def backend_of(op: str, x: Tensor) -> str:
    """The backend that is to run `op`: the forced one, else the plan's."""
    return plan.forced_backend() or plan.default_backend(op, x.device.type)


class Kernel:
    """An op on one backend, with the question whether that backend takes the operands."""

    def __init__(self, op: str, backend: str) -> None:
        self.op, self.backend = op, backend
        self._last: tuple[Any, bool] | None = None  # the last operands asked about, and the answer

    def refusal(self, *args: Any) -> str | None:
        """Why the op cannot run on these arguments, its own in its order, or None."""
        x, weight = args[:2]
        reason = ops.refusal(self.backend, self.op, x)
        if reason is None and x.dtype != weight.dtype:
            reason = f"the input is {x.dtype}, the weight {weight.dtype}"
        if reason is None and self.backend == "triton":
            from resnet_fused import kernels

            if self.op not in kernels.OPS:
                return f"triton has no {self.op} kernel"
            reason = kernels.refuse(self.op, *args)
        return reason

    def takes(self, args: tuple[Any, ...], *activations: Tensor | None) -> bool:
        """Whether the op can run; `activations` are the arguments that change from call to call."""
        asked = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in activations]
        last = self._last
        if last is None or last[0] != asked:
            self._last = last = (asked, self.refusal(*args) is None)
        return last[1]

    def __call__(self, *args: Any) -> Any:
        return getattr(torch.ops.resnet_fused, self.op)(*args, backend=self.backend)


class Constants(nn.Module):
    """A module whose buffers are never written: copies of it share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Constants:
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin

    def constant(self, name: str, value: Tensor) -> None:
        """A buffer that no state_dict holds: a weight may be prepacked, and so opaque and of this machine only."""
        self.register_buffer(name, value.detach(), persistent=False)


class FrozenConv(Constants):
    """relu(bn(conv(x)) + residual).

    Attributes:
        layer: the name of the convolution in the model.
        backend: what runs it.
        planned: how it is run, which the block it is in may still change.
    """

    weight: Tensor

    def __init__(
        self, layer: str, conv: nn.Conv2d, relu: bool, with_residual: bool, example: Example, backend: str
    ) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)  # units.plain saw to it
        self.layer, self.relu, self.example, self.backend = layer, relu, example, backend
        self.filter = conv.kernel_size
        self.geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        self.nchw = conv.weight.is_contiguous()  # and not channels_last alone, which the result would take on
        parts = ["batch norm", *["residual"] * with_residual, *["relu"] * relu]
        self.planned = PlannedConv(layer, backend, "conv_fprop", ", ".join(parts))

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False) -> Tensor:
        """The unit; with `overwrite_residual` its result may take the place of `residual` in memory."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.geometry
        return f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, relu={self.relu}"


class FoldedConv(FrozenConv):
    """On PyTorch's own convolution: batch norm folded into the weight and the bias, prepacked for oneDNN on a CPU.

    Attributes:
        keeps_order: the result has the memory order of PyTorch's; a prepacked weight makes it NHWC otherwise.
    """

    bias: Tensor
    keeps_order = False

    def __init__(
        self, layer: str, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool, with_residual: bool, example: Example
    ) -> None:
        super().__init__(layer, conv, relu, with_residual, example, "aten")
        scale, shift = _affine(conv, bn)
        weight = aten.fold(conv.weight, scale)
        self.packed = aten.onednn_runs(weight, weight)
        if self.packed:
            weight = aten.onednn_pack(weight, *self.geometry, example.x.shape)
            shift = shift.to(aten.bias_dtype(conv.weight.dtype, with_residual))
        self.constant("weight", weight)
        self.constant("bias", shift)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False) -> Tensor:
        if not self.packed:
            return aten.conv_fprop(x, self.weight, None, self.bias, residual, *self.geometry, self.relu)
        relu_apart = self.relu and keep_nan.get()
        y = aten.onednn_conv(
            x, self.weight, self.bias, residual, *self.geometry, self.relu and not relu_apart, overwrite_residual
        )
        y = y.relu_() if relu_apart else y
        return in_format(y, x, self.nchw) if self.keeps_order else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'prepacked for oneDNN' if self.packed else 'folded'}"


class EpilogueConv(FrozenConv):
    """On one of our backends: batch norm is the affine map of the convolution's epilogue, in fp32.

    Operands that the backend refuses, such as an image of another size may bring, take PyTorch's own convolution.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        layer: str,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        relu: bool,
        with_residual: bool,
        example: Example,
        backend: str,
    ) -> None:
        super().__init__(layer, conv, relu, with_residual, example, backend)
        self.kernel = Kernel("conv_fprop", backend)
        scale, shift = _affine(conv, bn)
        self.constant("weight", conv_operands(backend, example.x, conv.weight, None)[1])
        self.constant("scale", scale)
        self.constant("shift", shift)
        args = self._arguments(example.x, example.y if with_residual else None)
        self.refusal = self.kernel.refusal(*args)

    @property
    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.scale, self.shift

    def _arguments(self, x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
        x, weight, residual = conv_operands(self.backend, x, self.weight, residual)
        return (x, weight, self.scale, self.shift, residual, *self.geometry, self.relu)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False) -> Tensor:
        raw: tuple[Any, ...] = (x, *self.affine, residual, *self.geometry, self.relu)
        args = self._arguments(x, residual) if x.dim() == 4 else None  # no NHWC order has fewer dimensions
        if args is None or not self.kernel.takes(args, args[0], args[4]):
            return aten.conv_fprop(*raw)
        return in_format(self.kernel(*args), x, self.nchw)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}"


def in_format(y: Tensor, x: Tensor, nchw: bool) -> Tensor:
    """`y` in the memory format of PyTorch's convolution of `x`, with weights in NCHW order or not."""
    return y.contiguous() if nchw and x.is_contiguous() else y


def _affine(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """bn(conv(x)) = scale * conv_without_bias(x) + shift, in the compute dtype."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale, shift, _, _ = constant_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, conv.weight.dtype)
    return scale, shift if conv.bias is None else shift + conv.bias.to(shift.dtype) * scale


def freeze_conv(
    layer: str, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool, with_residual: bool, example: Example
) -> FrozenConv:
    """The unit on the backend that is to run it, or on PyTorch's own convolution where that refuses."""
    unit = (layer, conv, bn, relu, with_residual, example)
    backend = backend_of("conv_fprop", example.x)
    if backend == "aten":
        return FoldedConv(*unit)
    ours = EpilogueConv(*unit, backend)
    if ours.refusal is None:
        return ours
    folded = FoldedConv(*unit)
    folded.planned = PlannedConv(layer, "aten", "conv_fprop", folded.planned.fused, ours.refusal)
    return folded
