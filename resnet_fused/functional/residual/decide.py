"""How a chain of convolutions runs: which backends, which fusions; decided from shapes, dtypes and what is forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import dispatch, ops
from resnet_fused.dispatch import Fusion, formulation
from resnet_fused.dispatch.conv import ConvShape, training_refusal, uses_tf32
from resnet_fused.dispatch.device import arch
from resnet_fused.functional.common import (
    Geometry,
    autocast_dtype,
    common_reason,
    conv_shape,
    fits,
    operand_dtype,
    refused,
    refuses_batch_norm,
    transformed,
)


class Layer(NamedTuple):
    """What is fixed about one convolution and the batch norm behind it."""

    geometry: Geometry
    eps: float | None  # None where the statistics are constants
    fprop: str  # the backends of the three convolution ops
    dgrad: str
    wgrad: str
    fusion: Fusion
    rows: int  # of statistics that its convolution leaves

    @property
    def batch_statistics(self) -> bool:
        return self.eps is not None

    @property
    def forms_statistics(self) -> bool:
        """Whether its convolution forms the statistics of what it writes."""
        return self.fprop != "aten" and self.batch_statistics and self.fusion.statistics

    @property
    def normalises(self) -> bool:
        """Whether its convolution normalises what it reads."""
        return self.forms_statistics and self.fusion.prologue

    @property
    def applies_gradient(self) -> bool:
        """Whether its dgrad and wgrad run the backward of its batch norm on their way in."""
        return self.fusion.dgrad_prologue and self.batch_statistics and self.dgrad != "aten" and self.wgrad != "aten"


class Chain(NamedTuple):
    """What is fixed about the whole: relu(z[-1] normalised + shortcut), where z[i] = conv(relu(z[i - 1] normalised)).

    Attributes:
        branch: the layers in order.
        shortcut: the projection, or None.
        identity: the shortcut is the input itself.
        relu: a ReLU ends the chain.
        backend: of the ops that are not convolutions.
    """

    branch: tuple[Layer, ...]
    shortcut: Layer | None
    identity: bool
    relu: bool
    backend: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.branch if self.shortcut is None else (*self.branch, self.shortcut)


class ConvBN(NamedTuple):
    """A convolution without bias and the batch norm behind it.

    Args:
        weight: `[K, C / groups, R, S]`.
        running_mean, running_var, bn_weight, bn_bias: `[K]`, as `batch_norm_act` takes them.
        geometry: (stride, padding, dilation, groups), the first three `(vertical, horizontal)`.
        training, momentum, eps: as in `batch_norm_act`.
    """

    weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    geometry: Geometry
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self.running_mean, self.running_var, self.bn_weight, self.bn_bias

    @property
    def described(self) -> tuple[Any, ...]:
        """All of it that a decision depends on."""
        tensors = map(_described, (self.weight, *self.vectors))
        return (*tensors, self.geometry, self.training, self.eps)


def _described(t: Tensor | None) -> Any:
    return None if t is None else (type(t), t.shape, t.dtype, t.device)


_decisions: dict[Any, Chain | None] = {}
_MOST_DECISIONS = 10_000
dispatch.forget_with_plan(_decisions.clear)


def choose_chain(
    function: str,
    x: Tensor,
    branch: Sequence[ConvBN],
    shortcut: ConvBN | None = None,
    *,
    identity: bool = False,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Chain | None:
    """How to run these layers as one chain, or None where they are to be run one by one (or PyTorch to raise). A chain
    that was measured to be slower than native PyTorch layers is one of no layers: `run_chain` runs those.

    Raises:
        Refused: a forced backend has the kernels, and cannot run them on these tensors.
    """
    if residual is x:
        identity, residual = True, None
    forced = dispatch.forced_backend()
    dtype = operand_dtype(x)
    if torch.compiler.is_compiling() or transformed():
        return _decide(function, x, dtype, branch, shortcut, identity, residual, relu, forced)
    layers = (*branch, shortcut) if shortcut is not None else branch
    setting = autocast_dtype(x.device.type)  # which decides whether these dtypes meet
    described = (_described(x), setting, dtype, uses_tf32(dtype), *[layer.described for layer in layers])
    key = (described, len(branch), identity, _described(residual), relu, forced)
    if key not in _decisions:
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = _decide(function, x, dtype, branch, shortcut, identity, residual, relu, forced)
    return _decisions[key]


def _decide(
    function: str,
    x: Tensor,
    dtype: torch.dtype,
    branch: Sequence[ConvBN],
    shortcut: ConvBN | None,
    identity: bool,
    residual: Tensor | None,
    relu: bool,
    forced: str | None,
) -> Chain | None:
    added = x if identity else residual
    measured = None if forced else _measured(x, dtype, branch, shortcut, added)
    if measured == "aten":
        return Chain((), None, identity, relu, "aten")
    backend = forced or measured or dispatch.default_backend("bn_apply", x.device.type)
    if backend in ("aten", "cpu") or x.dim() != 4 or x.numel() == 0:
        return None  # on a CPU it takes longer to compute again what a chain does not keep than to read it
    layers: list[Layer] = []
    shape: tuple[int, ...] | None = tuple(x.shape)
    for layer in branch:
        assert shape is not None
        first = layer is branch[0]
        chosen, shape = _choose_layer(function, x, dtype, shape, layer, first, first and identity, forced)
        if chosen is None:
            return None
        layers.append(chosen)
    projection = None
    if shortcut is not None:
        projection, projected = _choose_layer(function, x, dtype, tuple(x.shape), shortcut, True, False, forced)
        if projection is None or projected != shape:
            return None
    if shape is None or not fits(added, shape, dtype, x.device):
        return None  # a sum that depends on how it is written
    if residual is not None and ops.subclassed(residual):
        return None
    reason = ops.refusal(backend, "bn_apply", x if x.dtype == dtype else x.new_empty(1, 1, 1, 1, dtype=dtype))
    for layer in (*branch, *(() if shortcut is None else (shortcut,))):
        reason = reason or common_reason(x if x.dtype == dtype else x.new_empty(0, dtype=dtype), layer.vectors)
    if reason is not None:
        refused(forced, function, reason)
        return None
    return Chain(tuple(layers), projection, identity, relu, backend)


def _measured(
    x: Tensor, dtype: torch.dtype, branch: Sequence[ConvBN], shortcut: ConvBN | None, added: Tensor | None
) -> str | None:
    """What was fastest of a chain of this shape, or None where none was measured (or PyTorch is to raise)."""
    if x.device.type != "cuda" or x.dim() != 4 or torch.compiler.is_compiling():  # which cannot see through the tables
        return None
    shapes: list[ConvShape] = []
    out: tuple[int, ...] | None = tuple(x.shape)
    for layer in branch:
        shape = out
        out = None if shape is None else conv_shape(shape, layer.weight, layer.geometry)
        if shape is None or out is None or not layer.training:
            return None
        shapes.append(_problem(shape, layer))
    if out is None or not fits(added, out, dtype, x.device):
        return None
    projection = None
    if shortcut is not None:
        if conv_shape(tuple(x.shape), shortcut.weight, shortcut.geometry) != out or not shortcut.training:
            return None
        projection = _problem(tuple(x.shape), shortcut)
    block = dispatch.BlockShape(tuple(shapes), projection, added is x)
    return dispatch.block(block, dtype, arch(x.device), uses_tf32(dtype))


def _problem(shape: tuple[int, ...], layer: ConvBN) -> ConvShape:
    return ConvShape.of(shape, layer.weight.shape, *layer.geometry)


def _choose_layer(
    function: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layer: ConvBN,
    first: bool,
    residual: bool,
    forced: str | None,
) -> tuple[Layer | None, tuple[int, ...] | None]:
    """How to run one layer on an input of `shape`, and the shape of its result."""
    weight = layer.weight
    out = conv_shape(shape, weight, layer.geometry)
    if out is None or 0 in out or refuses_batch_norm(x, layer.vectors, layer.training, layer.eps):
        return None, None
    if any(v is not None and v.shape != weight.shape[:1] for v in layer.vectors):
        return None, None
    if layer.training and out[0] * out[2] * out[3] == 1:
        return None, None  # an error, and PyTorch's to raise
    if weight.device != x.device or operand_dtype(weight) != dtype or ops.subclassed(weight):
        return None, None
    problem, capability = _problem(shape, layer), arch(x.device)
    plans = forced is None and not torch.compiler.is_compiling() and ops.unavailable("triton", x.device.type) is None
    if plans and training_refusal(problem, dtype) is None:
        chosen = dispatch.layer(problem, dtype, capability, uses_tf32(dtype), first, residual)
    else:
        fusion = dispatch.training(problem, dtype, capability)
        fusion = replace(fusion, prologue=fusion.prologue and not first)
        chosen = dispatch.LayerPlan(*_conv_backends(function, problem, dtype, x.device, forced), fusion)
    eps = layer.eps if layer.training else None
    rows = _statistics_rows(problem, dtype, capability, chosen)
    return Layer(layer.geometry, eps, chosen.fprop, chosen.dgrad, chosen.wgrad, chosen.fusion, rows), out


def _statistics_rows(problem: ConvShape, dtype: torch.dtype, capability: int, chosen: dispatch.LayerPlan) -> int:
    if chosen.fprop != "triton" or torch.compiler.is_compiling():
        return dispatch.partial_rows(problem.n * problem.p * problem.q, problem.k)
    flags = ("prologue",) if chosen.fusion.prologue else ()
    asked = dispatch.Problem("conv_fprop_stats", problem, dtype, uses_tf32(dtype), flags)
    return dispatch.statistics_rows(problem, dispatch.conv_config(asked, capability))


def _conv_backends(
    function: str, problem: ConvShape, dtype: torch.dtype, device: torch.device, forced: str | None
) -> tuple[str, str, str]:
    """The backends of fprop, dgrad and wgrad where the plan's tables cannot tell."""
    if forced is not None and not ops.implements(forced, "conv_fprop_stats"):
        return "aten", "aten", "aten"
    if forced is not None and forced != "triton":
        return forced, forced, forced
    reason = ops.unavailable("triton", device.type) or training_refusal(problem, dtype)
    if reason is not None:
        refused(forced, function, reason)
        return "aten", "aten", "aten"
    if forced is not None:
        return forced, forced, forced
    return tuple(dispatch.default_backend(op, device.type) for op in formulation.OPS)  # type: ignore[return-value]
