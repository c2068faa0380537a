"""A convolution of a frozen network, its batch norm and activation with it, prepared for the backend that runs it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from resnet_fused import dispatch, ops
from resnet_fused.dispatch.conv import ConvShape, uses_tf32
from resnet_fused.dispatch.device import arch
from resnet_fused.functional.common import (
    autocast,
    autocast_dtype,
    conv_operands,
    conv_shape,
    fits,
    operand_reason,
)
from resnet_fused.functional.statistics import constant_affine
from resnet_fused.inference import cudnn
from resnet_fused.inference.plan import PlannedConv
from resnet_fused.inference.value import Apart, Value
from resnet_fused.nn.convs import Conv
from resnet_fused.nn.norms import BatchNorm
from resnet_fused.nn.sums import PLUS, Sum
from resnet_fused.ops import conv_fprop, cpu, cudnn_graphs, onednn
from resnet_fused.ops.activations import activate
from resnet_fused.ops.arithmetic import fold

# oneDNN's fused ReLU turns a NaN into 0. Where one shows up, the network runs again with activations as passes of their
# own.
keep_nan: ContextVar[bool] = ContextVar("resnet_fused_keep_nan", default=False)


@dataclass(frozen=True)
class Example:
    """What a unit read, wrote and added when the example ran: tensors without memory, for questions about shapes.

    Attributes:
        x: what the convolution reads; autocast has been applied to it.
        y: the result.
        residual: what is added, or None.
        autocast: the dtype of autocast around the unit; None where it was off.
    """

    x: Tensor
    y: Tensor
    residual: Tensor | None
    autocast: torch.dtype | None

    @classmethod
    def of(cls, x: Tensor, y: Tensor, residual: Tensor | None = None) -> Example:
        (x,), setting = autocast(x), autocast_dtype(x.device.type)
        with FakeTensorMode():
            x, y, *rest = (
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
                for t in (x, y, residual)
                if t is not None
            )
        return cls(x, y, rest[0] if rest else None, setting)

    def problem(self, before: Example | str | None) -> str | None:
        """Why one frozen convolution cannot do what the unit did, now and when it ran before; None if it can."""
        if isinstance(before, Example) and (before.x.dtype, before.autocast) != (self.x.dtype, self.autocast):
            return "the example ran it in more than one dtype, or inside of autocast and outside"
        return before if isinstance(before, str) else None


@dataclass(frozen=True)
class Source:
    """What a frozen convolution is made from: act(bn(conv(x)) + residual) of a model.

    Attributes:
        layer: the name of the convolution in the model.
        act: the name of the activation, one of `ACTIVATIONS`, or None.
        add: how a residual is added; None where there is none.
        example: what it read, wrote and added.
    """

    layer: str
    conv: Conv
    bn: BatchNorm
    act: str | None
    add: Sum | None
    example: Example

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) with bn(conv(x)) = scale * conv_without_bias(x) + shift, in the compute dtype."""
        conv, bn = self.conv, self.bn
        assert bn.running_mean is not None and bn.running_var is not None
        statistics = (bn.running_mean, bn.running_var)
        scale, shift, _, _ = constant_affine(*statistics, bn.weight, bn.bias, bn.eps, conv.weight.dtype)
        return scale, shift if conv.bias is None else shift + conv.bias.to(shift.dtype) * scale

    def backend(self) -> str:
        """The backend that is to run it: the forced one, else what the plan has for this problem on this device."""
        x, conv = self.example.x, self.conv
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return dispatch.forced_backend() or planned_backend("conv_fprop", x, conv.weight.shape, *geometry)  # type: ignore[arg-type]


def planned_backend(
    op: str,
    x: Tensor,
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flags: tuple[str, ...] = (),
) -> str:
    """The backend that the plan has for a convolution of `x` under a filter [K, C/groups, R, S], on its device.

    Args:
        flags: what the plan must know of what else the op does.
    """
    if x.device.type != "cuda":
        return dispatch.default_backend(op, x.device.type)
    shape = ConvShape.of(x.shape, filter, stride, padding, dilation, groups)
    return dispatch.choose(dispatch.Problem(op, shape, x.dtype, uses_tf32(x.dtype), flags), arch(x.device)).backend


class Kernel:
    """An op on one backend, with the question whether that backend takes the operands."""

    def __init__(self, op: str, backend: str) -> None:
        self.op, self.backend = op, backend
        self._last: tuple[Any, bool] | None = None  # the last operands asked about, and the answer

    def refusal(self, args: Any) -> str | None:
        """Why the op cannot run on these arguments, those of its record, or None."""
        reason = ops.refusal(self.backend, self.op, args.x)
        for name, t in args._asdict().items():
            if reason is None and isinstance(t, Tensor) and t.dim() == 4 and t.dtype != args.x.dtype:
                reason = f"the input is {args.x.dtype}, the {name} {t.dtype}"
        if reason is None and self.backend == "triton":
            from resnet_fused import kernels

            reason = kernels.refuse(self.op, args)
        return reason

    def takes(self, args: Any, *activations: Tensor | None) -> bool:
        """Whether the op can run; `activations` are the arguments that change from call to call."""
        asked = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in activations]
        last = self._last
        if last is None or last[0] != asked:
            self._last = last = (asked, self.refusal(args) is None)
        return last[1]

    def __call__(self, *args: Any) -> Any:
        return getattr(torch.ops.resnet_fused, self.op)(*args, backend=self.backend)


class Constants(nn.Module):
    """A module whose buffers are never written: copies of it share them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Constants:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.copy(of) for name, of in vars(self).items() if isinstance(of, dict)})
        return twin

    def constant(self, name: str, value: Tensor) -> None:
        """A buffer that no state_dict holds: a weight may be prepacked, and so opaque and of this machine only."""
        self.register_buffer(name, value.detach(), persistent=False)


class FrozenConv(Constants):
    """act(bn(conv(x)) + residual).

    Attributes:
        layer: the name of the convolution in the model.
        backend: of the op that runs it alone.
        dtype: of the input that it was frozen for.
        autocast: the dtype of autocast around it on `device_type` then; None where it was off.
        refusal: why another backend, which was to run it, does not run it on the example; None if all is as asked.
        add: how a residual is added where its shape or dtype is not the convolution's.
        adds: whether the op adds the example's residual.
        planned: how it is run, which the block it is in may still change.
    """

    weight: Tensor
    refusal: str | None = None

    def __init__(self, source: Source, backend: str) -> None:
        super().__init__()
        conv = source.conv
        assert not isinstance(conv.padding, str)  # call.plain saw to it
        self.layer, self.act, self.example, self.backend = source.layer, source.act, source.example, backend
        self.dtype, self.autocast = source.example.x.dtype, source.example.autocast
        self.device_type = conv.weight.device.type
        self.filter, self.biased = conv.kernel_size, conv.bias is not None
        self.like = torch.empty(conv.weight.shape, dtype=self.dtype, device="meta")  # the weight, however it is packed
        self.geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        self.nchw = conv.weight.is_contiguous()  # and not channels_last alone, which the result would take on
        self.add, example = source.add or PLUS, source.example
        shape = conv_shape(example.x.shape, conv.weight, self.geometry)  # type: ignore[arg-type]
        apart = None
        if source.add is not None and shape is not None:
            folded = torch.empty(0, dtype=self.dtype, device=conv.weight.device)
            apart = operand_reason(example.x, folded, example.residual, shape)
        self.adds = source.add is not None and apart is None
        parts = ["batch norm", "residual" if self.adds else None, source.act if apart is None else None]
        fused = ", ".join(part for part in parts if part is not None)
        self.planned = PlannedConv(source.layer, backend, "conv_fprop", fused, apart or "")

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False) -> Tensor:
        """The unit; with `overwrite_residual` its result may take the place of `residual` in memory.

        Raises:
            What PyTorch raises of an input that it does not take either.
            RuntimeError: autocast is not what it was when the example ran.
        """
        if x.dtype is not self.dtype or x.dim() != 4:
            x = self._operand(x)
        try:
            if residual is None or fits(residual, self.result_shape(x.shape), x.dtype, x.device):
                return self._run(x, residual, self.act, overwrite_residual)
            y = self.add(self._run(x, None, act=None), residual)
        except Exception:
            self._explain(x)
            raise
        return activate(y, self.act, inplace=True)

    def result_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the convolution's result for an input of `shape`; empty where there is no batch."""
        return conv_shape(shape, self.like, self.geometry) or ()  # type: ignore[arg-type]

    def _run(self, x: Tensor, residual: Tensor | None, act: str | None, overwrite_residual: bool = False) -> Tensor:
        """The unit, with or without its activation, of an input of the rank and dtype that it was frozen for;
        `residual` has the shape and the dtype of the convolution's result.
        """
        raise NotImplementedError

    def join_call(self, x: Value, residual: Value | None = None) -> Value:
        """Its result in one call; `Apart` where it does not run so."""
        raise Apart

    def _operand(self, x: Tensor) -> Tensor:
        self.check_autocast()
        (x,) = autocast(x)
        if x.dtype is not self.dtype or x.dim() != 4:
            self._explain(x)
        return x

    def _explain(self, x: Tensor) -> None:
        """Raise what is wrong with an input, in the words of PyTorch's convolution and batch norm where they mind."""
        weight = torch.empty_like(self.like, device=self.device_type)
        bias = weight.new_zeros(weight.shape[0]) if self.biased else None
        y = F.conv2d(x, weight, bias, *self.geometry)
        nn.BatchNorm2d._check_input_dim(self, y)  # type: ignore[arg-type]
        frozen, given = ((len(t.shape), t.dtype, t.device) for t in (weight, x))
        if given != frozen:
            text = "{}-D {} input on {}"
            raise RuntimeError(f"{self.layer} was frozen for a {text.format(*frozen)}, got a {text.format(*given)}")

    def check_autocast(self) -> None:
        """Raise if autocast is not what it was when the example ran."""
        now = autocast_dtype(self.device_type)
        if now is not self.autocast:
            was, is_now = ("off" if dtype is None else str(dtype) for dtype in (self.autocast, now))
            raise RuntimeError(
                f"autocast was {was} around {self.layer} when the model was frozen, and is {is_now} in this call; "
                "freeze the model with an example_input that takes the same way through it"
            )

    def plan_in(self, op: str, company: str) -> None:
        """Say that a larger op runs it, with what."""
        self.planned = replace(self.planned, op=op, fused=f"{self.planned.fused}; {company}")

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.geometry
        return f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, act={self.act}"


class FoldedConv(FrozenConv):
    """Batch norm folded into the weight and the bias: on a CPU prepacked for our convolution or for oneDNN's; on a GPU
    cuDNN adds the bias and the residual and applies ReLU where that was tried and found right.

    On the backend `"cudnn"` it does so by a graph of its own, and where there is none native PyTorch runs.

    Attributes:
        packed: `"cpu"` or `"onednn"`, whose convolution the weight is prepacked for; None for native PyTorch.
        keeps_order: the result has the memory order of PyTorch's; a prepacked weight makes it NHWC otherwise.
    """

    bias: Tensor
    keeps_order = False

    def __init__(self, source: Source, backend: str = "aten") -> None:
        super().__init__(source, backend)
        scale, shift = source.affine()
        weight = fold(source.conv.weight, scale, self.dtype)
        refusal = cpu.refusal(weight, *self.geometry, self.act)
        self.packed = "cpu" if refusal is None else "onednn" if onednn.runs(weight, weight) else None
        self.planned = replace(self.planned, reason=self.planned.reason or refusal or "")
        if self.packed == "cpu":
            winograd = source.conv.groups == 1 and cpu.winograd(weight, source.conv.stride, source.example.y.shape)
            weight, shift = (cpu.pack_winograd if winograd else cpu.pack)(weight), cpu.pack_channels(shift)
            algorithm = "; by Winograd's algorithm" if winograd else ""
            self.planned = replace(self.planned, backend="cpu", fused=self.planned.fused + algorithm)
        elif self.packed == "onednn":
            shift = shift.to(onednn.bias_dtype(weight.dtype, source.add is not None))
            weight = onednn.pack(weight, *self.geometry, source.example.x.shape)
        else:
            shift = shift.to(weight.dtype)
        self.constant("weight", weight)
        self.constant("bias", shift)
        self._tried: dict[Any, str | None] = {}  # why cuDNN's fused convolution is not to run on these operands
        example = source.example
        reason = None
        if cudnn.runs(backend, weight, self.act):
            residual = example.residual if self.adds else None
            reason = self._cudnn_refusal(example.x, residual, self.act)
            op = cudnn.name(backend, residual) if reason is None else self.planned.op
            self.planned = replace(self.planned, op=op, reason=self.planned.reason or reason or "")
        elif backend == "cudnn":
            reason = cudnn_graphs.unavailable(weight.device.type) or f"no graph for {weight.dtype}, {self.act}"
            self.planned = replace(self.planned, reason=self.planned.reason or reason)
        if reason is not None:
            self.planned = replace(self.planned, backend="aten")

    def _cudnn_refusal(self, x: Tensor, residual: Tensor | None, act: str | None) -> str | None:
        key = (x.shape, x.stride(), None if residual is None else residual.stride(), uses_tf32(x.dtype), act)
        if key not in self._tried:
            if torch.cuda.is_current_stream_capturing():
                return "it was not tried before the capture"
            operands = (x, self.weight, self.bias, self.result_shape(x.shape), residual)
            self._tried[key] = cudnn.refusal(self.backend, *operands, self.geometry, act)  # type: ignore[arg-type]
        return self._tried[key]

    def _run(self, x: Tensor, residual: Tensor | None, act: str | None, overwrite_residual: bool = False) -> Tensor:
        if self.packed is None:
            if cudnn.runs(self.backend, x, act) and self._cudnn_refusal(x, residual, act) is None:
                return cudnn.conv(self.backend, x, self.weight, self.bias, residual, self.geometry, act)  # type: ignore[arg-type]
            return conv_fprop.native(
                conv_fprop.Args(x, self.weight, None, self.bias, residual, *self.geometry, act=act)
            )
        if self.packed == "cpu":
            shape, groups = (self.like.shape[0], self.filter, *self.geometry[:2]), self.geometry[3]
            y = cpu.conv(x, self.weight, self.bias, residual, *shape, act, overwrite_residual, groups=groups)
            return in_format(y, x, self.nchw) if self.keeps_order else y
        fused = None if keep_nan.get() else act
        y = onednn.conv(x, self.weight, self.bias, residual, *self.geometry, fused, overwrite_residual)
        if fused is not act:
            y = activate(y, act, inplace=True)
        return in_format(y, x, self.nchw) if self.keeps_order else y

    def join_call(self, x: Value, residual: Value | None = None) -> Value:
        if self.packed != "cpu" or self.keeps_order or self.adds != (residual is not None):
            raise Apart
        added = None if residual is None else residual.floats(self.dtype)
        shape = (self.like.shape[0], self.filter, *self.geometry[:2], self.geometry[3], self.act)
        y = x.steps.conv(x.floats(self.dtype), added, (self.weight, None, self.bias), *shape, self.dtype)
        return Value(x.steps, y, self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {f'prepacked for {self.packed}' if self.packed else 'folded'}"


class EpilogueConv(FrozenConv):
    """On one of our backends: batch norm is the affine map of the convolution's epilogue, in fp32.

    Operands that the backend refuses, such as an image of another size may bring, take native PyTorch convolution.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Source, backend: str) -> None:
        super().__init__(source, backend)
        example, self.kernel = source.example, Kernel("conv_fprop", backend)
        scale, shift = source.affine()
        weight = source.conv.weight.to(self.dtype)
        self.constant("weight", conv_operands(backend, example.x, weight, None)[1])
        self.constant("scale", scale)
        self.constant("shift", shift)
        args = self._arguments(example.x, example.residual if self.adds else None, self.act)
        self.refusal = self.kernel.refusal(args)

    @property
    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.scale, self.shift

    def _arguments(self, x: Tensor, residual: Tensor | None, act: str | None) -> conv_fprop.Args:
        x, weight, residual = conv_operands(self.backend, x, self.weight, residual)
        return conv_fprop.Args(x, weight, self.scale, self.shift, residual, *self.geometry, act=act)

    def _run(self, x: Tensor, residual: Tensor | None, act: str | None, overwrite_residual: bool = False) -> Tensor:
        args = self._arguments(x, residual, act)
        if not self.kernel.takes(args, args.x, args.residual):
            return conv_fprop.native(args._replace(x=x, weight=self.weight, residual=residual))
        return in_format(self.kernel(*args), x, self.nchw)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}"


def in_format(y: Tensor, x: Tensor, nchw: bool) -> Tensor:
    """`y` in the memory format of PyTorch's convolution of `x`, with weights in NCHW order or not."""
    return y.contiguous() if nchw and x.is_contiguous() else y


def freeze_conv(source: Source) -> FrozenConv:
    """The convolution on the backend that is to run it, or on native PyTorch where that refuses."""
    backend = source.backend()
    if backend in cudnn.BACKENDS:
        return FoldedConv(source, backend)
    ours = EpilogueConv(source, backend)
    if ours.refusal is None:
        return ours
    folded = FoldedConv(source)
    folded.refusal = ours.refusal
    folded.planned = replace(folded.planned, reason=ours.refusal)
    return folded
