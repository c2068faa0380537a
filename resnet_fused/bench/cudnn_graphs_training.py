"""The training graphs of cuDNN that its Python package can express, in fp16, and autograd over them.

Forward, a convolution forms the sum and the sum of squares of its result (genstats), and reads the result before it
through that one's batch norm and ReLU (scale, bias, ReLU). Where an activation must be written, one pointwise graph
normalises, adds and rectifies, and keeps the mask. Backward, the batch norm's gradient recomputes the ReLU or takes the
mask, and the weight gradient reads through the same prologue. The data gradient is plain: cuDNN's pattern of it with
the batch norm's sums has no binding, nor has the one that finalises statistics, here a few operations of PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .cudnn_graphs import Graph, Library, Recording, Shape, Spec

HALF = torch.float16


class Graphs:
    """Graphs of one network, each recorded, and timed, when it is first asked for; they share a workspace."""

    def __init__(self, library: Library, timed: bool = True) -> None:
        self.library, self.timed = library, timed
        self._graphs: dict[Hashable, Graph] = {}
        self._workspace = torch.empty(1, dtype=torch.uint8, device=library.device)

    def get(self, record: Callable[..., None], *args: Hashable) -> Graph:
        """The graph that `record(recording, *args)` writes.

        Raises:
            Unavailable: cuDNN has no engine for it.
        """
        key = (record, *args)
        if key not in self._graphs:
            recording = Recording(self.library, HALF)
            record(recording, *args)
            what = f"{record.__name__} of {', '.join(map(str, args))}"
            self._graphs[key] = Graph(self.library, recording, what, self.timed)
        return self._graphs[key]

    def __call__(self, record: Callable[..., None], *args: Hashable, **operands: Tensor) -> dict[str, Tensor]:
        """Run it; what is not among `operands` is output.

        Raises:
            ValueError: an operand is not of the shape or dtype that was recorded.
        """
        graph = self.get(record, *args)
        for name, operand in operands.items():
            if (tuple(operand.shape), operand.dtype) != graph.recording.operands[name]:
                what = f"{record.__name__}: {name} is {list(operand.shape)} {operand.dtype}"
                raise ValueError(f"{what}, recorded as {graph.recording.operands[name]}")
        if graph.workspace_bytes > self._workspace.numel():
            self._workspace = graph.workspace()
        device = self.library.device
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
            for name, (shape, dtype) in graph.recording.operands.items()
            if name not in operands
        }
        graph.run({**operands, **outputs}, self._workspace)
        return outputs


def _channels(shape: Shape) -> Shape:
    return 1, shape[1], 1, 1


def _vector(recording: Recording, name: str, shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    return recording.input(name, _channels(shape), dtype)


def _activation(recording: Recording, spec: Spec, prologue: bool) -> Any:
    """The convolution's input: x, or relu(x * scale + shift), whose vectors this pattern takes in fp16 only."""
    graph, x = recording.graph, recording.input("x", spec.x)
    if not prologue:
        return x
    scale, shift = (_vector(recording, name, spec.x, HALF) for name in ("scale", "shift"))
    return graph.relu(input=graph.bias(input=graph.scale(input=x, scale=scale), bias=shift))


def convolution(recording: Recording, spec: Spec, prologue: bool) -> None:
    """y = conv(a, weight), the sums of y and of its squares; a = x or relu(x * scale + shift)."""
    image = _activation(recording, spec, prologue)
    weight = recording.input("weight", spec.weight)
    y = recording.graph.conv_fprop(image=image, weight=weight, **spec.geometry)
    recording.output("y", y, spec.y)
    for name, value in zip(("sum", "sum_of_squares"), recording.graph.genstats(input=y), strict=True):
        recording.output(name, value, _channels(spec.y), torch.float32)


def weight_gradient(recording: Recording, spec: Spec, prologue: bool) -> None:
    """dweight for dy and the same a."""
    image = _activation(recording, spec, prologue)
    loss = recording.input("dy", spec.y)
    dweight = recording.graph.conv_wgrad(image=image, loss=loss, **spec.geometry)
    recording.output("dweight", dweight, spec.weight)


def data_gradient(recording: Recording, spec: Spec) -> None:
    """da for dy."""
    loss, weight = recording.input("dy", spec.y), recording.input("weight", spec.weight)
    da = recording.graph.conv_dgrad(loss=loss, filter=weight, **spec.geometry)
    recording.output("da", da, spec.x)


def normalise(recording: Recording, shape: Shape, residual: str, relu: bool) -> None:
    """y = act(x * scale + shift + r), and the mask of the ReLU; r: nothing, `residual`, or that through its own map."""
    graph = recording.graph

    def affine(x: str, scale: str, shift: str) -> Any:
        scaled = graph.scale(input=recording.input(x, shape), scale=_vector(recording, scale, shape))
        return graph.bias(input=scaled, bias=_vector(recording, shift, shape))

    value = affine("x", "scale", "shift")
    if residual == "tensor":
        value = graph.add(a=value, b=recording.input("residual", shape))
    elif residual == "batch norm":
        value = graph.add(a=value, b=affine("residual", "residual_scale", "residual_shift"))
    if relu:
        value = graph.relu(input=value)
        zero = recording.input("zero", (1, 1, 1, 1), torch.float32)
        recording.output("mask", graph.cmp_gt(input=value, comparison=zero), shape, torch.bool)
    recording.output("y", value, shape)


def batch_norm_gradient(recording: Recording, shape: Shape, relu: str) -> None:
    """dx, dweight, dbias of a batch norm, for dy behind no ReLU, one that is `recomputed`, or one with a `mask`.

    With a mask the gradient behind it, which is the residual's, is an output too: `da`.
    """
    graph, x, value = recording.graph, recording.input("x", shape), recording.input("dy", shape)
    weight, mean, invstd = (_vector(recording, name, shape) for name in ("weight", "mean", "invstd"))
    if relu == "recomputed":
        bias = _vector(recording, "bias", shape)
        y = graph.batchnorm_inference(input=x, mean=mean, inv_variance=invstd, scale=weight, bias=bias)
        value = graph.relu_backward(loss=value, input=y)
        value.set_data_type(recording.type(HALF))
    elif relu == "mask":
        value = graph.scale(input=value, scale=recording.input("mask", shape, torch.bool))
        recording.output("da", value, shape)
    gradients = graph.batchnorm_backward(grad=value, input=x, scale=weight, mean=mean, inv_variance=invstd)
    recording.output("dx", gradients[0], shape)
    for name, gradient in zip(("dweight", "dbias"), gradients[1:], strict=True):
        recording.output(name, gradient, _channels(shape), torch.float32)


@dataclasses.dataclass(frozen=True)
class Pending:
    """bn(z), not computed: z and [1, C, 1, 1] vectors in fp32; weight and bias are the parameters."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.z, self.weight, self.bias, self.mean, self.invstd, self.scale, self.shift

    def vectors(self) -> dict[str, Tensor]:
        """For a batch norm's gradient."""
        return {"x": self.z, "weight": self.weight, "mean": self.mean, "invstd": self.invstd}


def _nhwc(x: Tensor) -> Tensor:
    return x.to(HALF).contiguous(memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    """(y, sum, sum_of_squares) of a tensor, or of relu(Pending)."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, spec: Spec, weight: Tensor, *source: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs, ctx.spec = graphs, spec
        vectors = {}
        if len(source) > 1:
            vectors = {"scale": source[5].to(HALF), "shift": source[6].to(HALF)}
        out = graphs(convolution, spec, bool(vectors), x=source[0], weight=weight, **vectors)
        ctx.save_for_backward(weight, *source, *vectors.values())
        ctx.mark_non_differentiable(out["sum"], out["sum_of_squares"])
        return out["y"], out["sum"], out["sum_of_squares"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        graphs, spec, dy = ctx.graphs, ctx.spec, _nhwc(dy)
        weight, x, *rest = ctx.saved_tensors
        vectors = dict(zip(("scale", "shift"), rest[-2:], strict=True)) if rest else {}
        dweight = graphs(weight_gradient, spec, bool(rest), x=x, dy=dy, **vectors)["dweight"]
        da = graphs(data_gradient, spec, dy=dy, weight=weight)["da"]
        if not rest:
            return None, None, dweight, da
        pending = Pending(x, *rest[:6])
        back = graphs(batch_norm_gradient, spec.x, "recomputed", dy=da, bias=pending.bias, **pending.vectors())
        return None, None, dweight, back["dx"], back["dweight"], back["dbias"], None, None, None, None


class _Normalise(torch.autograd.Function):
    """act(Pending + residual), where the residual is nothing, a tensor, or a Pending of its own."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, relu: bool, *tensors: Tensor) -> Tensor:
        pending, rest = Pending(*tensors[:7]), tensors[7:]
        shape = tuple(pending.z.shape)
        operands = {"x": pending.z, "scale": pending.scale, "shift": pending.shift}
        residual = {0: "nothing", 1: "tensor", 7: "batch norm"}[len(rest)]
        if rest:
            operands["residual"] = rest[0]
        if len(rest) == 7:
            operands |= {"residual_scale": rest[5], "residual_shift": rest[6]}
        if relu:
            operands["zero"] = pending.scale.new_zeros(1, 1, 1, 1)
        out = graphs(normalise, shape, residual, relu, **operands)
        ctx.graphs, ctx.relu, ctx.count = graphs, relu, len(rest)
        ctx.save_for_backward(*tensors[:7], *(rest if len(rest) == 7 else ()), *([out["mask"]] if relu else []))
        return out["y"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        graphs, saved, dy = ctx.graphs, ctx.saved_tensors, _nhwc(dy)
        pending = Pending(*saved[:7])
        shape = tuple(pending.z.shape)
        if ctx.relu:
            back = graphs(batch_norm_gradient, shape, "mask", dy=dy, mask=saved[-1], **pending.vectors())
            dy = back["da"]
        else:
            back = graphs(batch_norm_gradient, shape, "none", dy=dy, **pending.vectors())
        gradients = (None, None, back["dx"], back["dweight"], back["dbias"], None, None, None, None)
        if ctx.count == 0:
            return gradients
        if ctx.count == 1:
            return (*gradients, dy)
        own = Pending(*saved[7:14])
        back = graphs(batch_norm_gradient, shape, "none", dy=dy, **own.vectors())
        return (*gradients, back["dx"], back["dweight"], back["dbias"], None, None, None, None)


class ConvolutionBatchNorm(nn.Module):
    """bn(conv(x)) as a Pending, with the batch's statistics; the model's own parameters and buffers."""

    def __init__(self, graphs: Graphs, spec: Spec, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.graphs, self.spec = graphs, spec
        self.own = (conv, bn)  # in a tuple: they stay where they are in the model

    def forward(self, source: Tensor | Pending) -> Pending:
        conv, bn = self.own
        inputs = source.tensors() if isinstance(source, Pending) else (_nhwc(source),)
        z, total, squares = _Convolution.apply(self.graphs, self.spec, _nhwc(conv.weight), *inputs)
        weight, bias = bn.weight.view(1, -1, 1, 1), bn.bias.view(1, -1, 1, 1)
        with torch.no_grad():
            count = z.numel() // z.shape[1]
            mean = total / count
            variance = torch.addcmul(squares / count, mean, mean, value=-1).clamp_(min=0)
            invstd = (variance + bn.eps).rsqrt_()
            assert bn.momentum is not None and bn.running_mean is not None and bn.running_var is not None
            bn.running_mean.lerp_(mean.view(-1), bn.momentum)
            bn.running_var.lerp_(variance.view(-1) * (count / max(count - 1, 1)), bn.momentum)
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
            scale = weight * invstd
            shift = torch.addcmul(bias, mean, scale, value=-1)
        return Pending(z, weight, bias, mean, invstd, scale, shift)


class Normalise(nn.Module):
    """act(bn + residual), written."""

    def __init__(self, graphs: Graphs, relu: bool) -> None:
        super().__init__()
        self.graphs, self.relu = graphs, relu

    def forward(self, pending: Pending, residual: Tensor | Pending | None = None) -> Tensor:
        rest: tuple[Tensor, ...] = ()
        if isinstance(residual, Pending):
            rest = residual.tensors()
        elif residual is not None:
            rest = (_nhwc(residual),)
        y: Tensor = _Normalise.apply(self.graphs, self.relu, *pending.tensors(), *rest)
        return y
