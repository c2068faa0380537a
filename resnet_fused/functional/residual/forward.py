"""A chain of convolutions with batch norm and ReLU between them - a residual block - as one differentiable call.

Between two convolutions the activation is never stored normalised: it is the pair (raw convolution output z, affine
map), and its value is relu(scale * z + shift). A convolution forms the statistics of its z as it writes it, and
normalises the z before it as it reads that, wherever the plan says that this pays; a pass of its own does it elsewhere.
Backward mirrors this. What is saved for it: raw outputs, per-channel vectors, the chain's input, and one bit an element
of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch, ops
from resnet_fused._compiling import constant
from resnet_fused.dispatch.conv import ConvShape, training_refusal, uses_tf32
from resnet_fused.functional.block_autograd import Chain, ConvChain, Layer, Made
from resnet_fused.functional.common import (
    Geometry,
    add_relu,
    channels_last,
    common_reason,
    conv_shape,
    convolves_to_nchw,
    dense,
    fits,
    in_layout_of,
    operand_dtype,
    pixels,
    refused,
    refuses_batch_norm,
)
from resnet_fused.functional.statistics import constant_affine, finalize

_op = torch.ops.resnet_fused


@dataclass(frozen=True)
class ConvBN:
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
    that was measured to be slower than PyTorch's own layers is one of no layers: `run_chain` runs those.

    Raises:
        Refused: a forced backend has the kernels, and cannot run them on these tensors.
    """
    if residual is x:
        identity, residual = True, None
    forced = dispatch.forced_backend()
    dtype = operand_dtype(x)
    added = x if identity else residual
    measured = None if forced else _measured(x, dtype, branch, shortcut, added)
    if measured == "aten":
        return Chain((), None, identity, relu, "aten")
    backend = forced or measured or dispatch.default_backend("bn_apply", x.device.type)
    if backend == "aten" or x.dim() != 4 or x.numel() == 0:
        return None
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
    return dispatch.block(block, dtype, _arch(x.device), uses_tf32(dtype))


def _problem(shape: tuple[int, ...], layer: ConvBN) -> ConvShape:
    return ConvShape(*shape, layer.weight.shape[0], *layer.weight.shape[2:], *layer.geometry)  # type: ignore[call-arg, arg-type]


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
    problem, arch = _problem(shape, layer), _arch(x.device)
    plans = forced is None and not torch.compiler.is_compiling() and ops.unavailable("triton", x.device.type) is None
    if plans and training_refusal(problem, dtype) is None:
        chosen = dispatch.layer(problem, dtype, arch, uses_tf32(dtype), first, residual)
    else:
        fusion = dispatch.training(problem, dtype, arch)
        fusion = replace(fusion, prologue=fusion.prologue and not first)
        chosen = dispatch.LayerPlan(*_conv_backends(function, problem, dtype, x.device, forced), fusion)
    eps = layer.eps if layer.training else None
    return Layer(layer.geometry, eps, chosen.fprop, chosen.dgrad, chosen.wgrad, chosen.fusion), out


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
    return tuple(dispatch.default_backend(op, device.type) for op in ("conv_fprop_stats", "conv_dgrad", "conv_wgrad"))  # type: ignore[return-value]


@constant
def _arch(device: torch.device) -> int:
    """80 for sm_80 and so on; without a GPU, the smallest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run_chain(
    chain: Chain, x: Tensor, branch: Sequence[ConvBN], shortcut: ConvBN | None = None, residual: Tensor | None = None
) -> Tensor:
    """The chain that `choose_chain` found for these tensors.

    Mutates:
        The running statistics of the layers that train.
    """
    if not chain.branch:
        return _plain(chain, x, branch, shortcut, residual)
    residual = None if chain.identity else residual
    x = dense(x.to(operand_dtype(x)))
    nchw = convolves_to_nchw(x, *(layer.weight for layer in branch))
    nhwc = any("triton" in layer[2:5] for layer in chain.layers)  # whose convolutions read channels_last
    if nhwc:
        x, residual = channels_last(x), None if residual is None else channels_last(residual)
    with torch.no_grad():
        made = []
        value, affine = x, None
        for layer, static in zip(branch, chain.branch, strict=True):
            made.append(_layer(value, affine, layer, static, chain.backend, nhwc))
            value, affine = made[-1].z, (made[-1].scale, made[-1].shift)
        if shortcut is not None and chain.shortcut is not None:
            projected = _layer(x, None, shortcut, chain.shortcut, chain.backend, nhwc)
            # At the join both lie alike in memory, as the bits of its ReLU do.
            made.append(projected._replace(z=in_layout_of(projected.z, made[-1].z)))
    layers = [*branch, *([] if shortcut is None else [shortcut])]
    parameters = [p for layer in layers for p in (layer.weight, layer.bn_weight, layer.bn_bias)]
    y: Tensor = ConvChain.apply(chain, x, residual, *parameters, *(t for one in made for t in one))
    return y.contiguous() if nchw else y


def _plain(
    chain: Chain, x: Tensor, branch: Sequence[ConvBN], shortcut: ConvBN | None, residual: Tensor | None
) -> Tensor:
    """The same on PyTorch's own layers."""

    def normalised(value: Tensor, layer: ConvBN) -> Tensor:
        z = F.conv2d(value, layer.weight, None, *layer.geometry)
        return F.batch_norm(z, *layer.vectors, layer.training, layer.momentum, layer.eps)  # type: ignore[arg-type, call-arg]

    value = x
    for layer in branch[:-1]:
        value = F.relu(normalised(value, layer), inplace=True)
    added = normalised(x, shortcut) if shortcut is not None else x if chain.identity else residual
    return add_relu(normalised(value, branch[-1]), added, chain.relu)


def _layer(
    x: Tensor, affine: tuple[Tensor, Tensor] | None, layer: ConvBN, static: Layer, backend: str, nhwc: bool
) -> Made:
    """z = conv(relu(x normalised)) and the affine map of the batch norm behind it."""
    weight = layer.weight.to(x.dtype)
    fused = static.fprop != "aten" and layer.training and static.fusion.statistics
    if affine is not None and not (fused and static.fusion.prologue):
        x, _ = _op.bn_apply(x, *affine, None, None, None, True, False, backend=backend)
        affine = None
    if fused:
        out = conv_shape(tuple(x.shape), weight, static.geometry)
        assert out is not None
        rows = dispatch.partial_rows(out[0] * out[2] * out[3], out[1])
        z, *statistics = _op.conv_fprop_stats(
            x, weight, *(affine or (None, None)), *static.geometry, rows, backend=static.fprop
        )
    else:
        z = _op.conv_fprop(x, weight, None, None, None, *static.geometry, False, backend=static.fprop)
        z = dense(z)
        if layer.training:
            statistics = _op.bn_stats(z, dispatch.partial_rows(pixels(z), z.shape[1]), backend=backend)
    if nhwc:  # where PyTorch's convolution ran beside Triton's
        z = z.contiguous(memory_format=torch.channels_last)
    if layer.training:
        vectors = finalize(
            statistics,
            layer.running_mean,
            layer.running_var,
            layer.bn_weight,
            layer.bn_bias,
            layer.momentum,
            layer.eps,
            backend,
        )
    else:
        assert layer.running_mean is not None and layer.running_var is not None
        vectors = constant_affine(
            layer.running_mean, layer.running_var, layer.bn_weight, layer.bn_bias, layer.eps, z.dtype
        )
    return Made(None if weight is layer.weight else weight, z, *vectors)
