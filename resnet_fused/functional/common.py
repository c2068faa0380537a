"""What the public functions share: argument checks, the choice of a backend, layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_map_only

from resnet_fused import dispatch, ops

P = ParamSpec("P")
R = TypeVar("R")
Act = Literal["relu"] | None
Pair = int | tuple[int, ...]
Padding = Pair | Literal["same", "valid"]
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def check_act(act: Act, function: str) -> bool:
    """Whether `act` is ReLU; anything but `"relu"` and None is an error."""
    if act not in ("relu", None):
        raise ValueError(f"{function}: unknown activation {act!r}; choose 'relu' or None")
    return act == "relu"


def pair(value: Padding) -> tuple[int, int] | None:
    """(vertical, horizontal) of one value or two; None where it is anything else, and PyTorch's to pad or to raise."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) and len(value) in (1, 2) else None


def geometry_of(stride: Pair, padding: Padding, dilation: Pair, groups: int) -> Geometry | None:
    """What the kernels are told of a convolution; None where only native PyTorch can run it."""
    pairs = pair(stride), pair(padding), pair(dilation)
    return None if None in pairs else (*pairs, groups)  # type: ignore[return-value]


def pixels(x: Tensor) -> int:
    """N * H * W."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def add_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """act(y + residual) of a freshly made `y`, whose memory the result takes where it can."""
    if residual is not None:
        in_place = fits(residual, y.shape, y.dtype, y.device) and not transformed()
        y = y.add_(residual) if in_place else y + residual
    return F.relu(y, inplace=True) if relu else y


def fits(residual: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the sum of a residual and a tensor of this shape and dtype is the same however it is written: `a + b`,
    `a += b`, either of them first. (No residual fits, too.)"""
    if residual is None:
        return True
    return residual.dtype == dtype and tuple(residual.shape) == tuple(shape) and residual.device == device


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd, a function transform or `torch.jit.trace` follows any of these tensors."""
    if transformed() or torch._C._get_tracing_state() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active: a custom op would give silent zeros there."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives a convolution's operands on this type of device; None where it is off."""
    enabled = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def operand_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes an operand, cast by autocast or not."""
    dtype = autocast_dtype(t.device.type)
    return t.dtype if dtype is None or not t.is_floating_point() or t.dtype == torch.float64 else dtype


def autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """A convolution's operands in the dtype autocast gives them; batch norm's parameters stay as they are."""
    return tuple(t.to(operand_dtype(t)) for t in operands)


def choose_batch_norm(
    op: str,
    function: str,
    x: Tensor,
    others: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
    training: bool,
    eps: float,
) -> str:
    """`choose` for a batch norm, whose arguments are those of `refuses_batch_norm`."""
    if x.numel() == 0 or refuses_batch_norm(x, vectors, training, eps):
        return "aten"
    if not training and x.device.type == "cpu" and dispatch.forced_backend() is None:
        return "aten"  # what native PyTorch does to constant statistics is as fast
    return choose(op, function, x, others, vectors)


SMALL = 1 << 19  # values of an activation: of fewer, Python between our passes on a CPU takes what they save


def choose(
    op: str, function: str, x: Tensor, others: tuple[Tensor | None, ...], vectors: tuple[Tensor | None, ...]
) -> str:
    """The backend of a pointwise or per-channel op; `"aten"` also where PyTorch itself is to raise.

    Raises:
        Refused: a forced backend has a kernel for `op` which cannot run on these tensors.
    """
    forced = dispatch.forced_backend()
    backend = forced or dispatch.default_backend(op, x.device.type)
    if backend == "aten" or not ops.implements(backend, op):
        return "aten"
    if x.dim() != 4 or any(v is not None and v.shape != x.shape[1:2] for v in vectors):
        return "aten"
    if forced is None and backend == "cpu" and (x.numel() < SMALL or torch.compiler.is_compiling()):
        return "aten"  # Inductor fuses such passes itself
    reason = common_reason(x, vectors) or ops.refusal(backend, op, x, *others)
    return backend if reason is None else refused(forced, function, reason)


def runs_plain(op: str, device_type: str) -> bool:
    """Whether nothing is forced and the plan has native PyTorch for `op`."""
    return dispatch.forced_backend() is None and dispatch.default_backend(op, device_type) == "aten"


def runs_apart(device_type: str) -> bool:
    """Whether no chain is to be asked for: on a CPU batch norm's kernels run beside native PyTorch's convolutions."""
    return (dispatch.forced_backend() or dispatch.default_backend("bn_apply", device_type)) == "cpu"


def choose_conv(
    function: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    geometry: Geometry,
    vectors: tuple[Tensor | None, ...],
) -> str | None:
    """The backend of `conv_fprop`, or None where the plain sequence is to run (or PyTorch to raise).

    The Triton kernel is asked about `x` as `_fprop` will hand it over, in channels_last order.

    Raises:
        Refused: a forced backend has a `conv_fprop` which cannot run on these tensors.
    """
    forced = dispatch.forced_backend()
    backend = forced or dispatch.default_backend("conv_fprop", x.device.type)
    if not ops.implements(backend, "conv_fprop"):
        forced, backend = None, "aten"
    shape = conv_shape(x.shape, weight, geometry)
    if shape is None or 0 in shape or weight.numel() == 0:
        return None
    if forced is None and backend == "aten":
        # Inductor sees through the plain sequence, and not through an op of ours that calls PyTorch's convolution.
        compiling = torch.compiler.is_compiling()
        if compiling or not dispatch.folding_pays(x.device.type, math.prod(shape), weight.numel()):
            return None
    if any(v is not None and v.shape != weight.shape[:1] for v in vectors):
        return None
    reason = common_reason(x, vectors) or operand_reason(x, weight, residual, shape)
    reason = reason or ops.refusal(backend, "conv_fprop", x)
    reason = reason or ops.conv_refusal(backend, *conv_operands(backend, x, weight, residual), geometry)
    if reason is None:
        return backend
    refused(None if forced == "aten" else forced, function, reason)
    return None


def conv_operands(
    backend: str, x: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the order in which `backend` reads them: channels_last for Triton, any for the others."""
    if backend != "triton":
        return x, weight, residual
    nhwc = torch.channels_last
    residual = None if residual is None else residual.contiguous(memory_format=nhwc)
    return x.contiguous(memory_format=nhwc), weight.contiguous(memory_format=nhwc), residual


class Refused(RuntimeError):
    """A forced backend has the kernels, and cannot run them on these tensors."""


def refused(forced: str | None, function: str, reason: str) -> str:
    """What runs where a backend cannot, for this reason: native PyTorch, `"aten"`.

    Raises:
        Refused: the backend was forced, and is not `"reference"`, which runs what PyTorch runs.
    """
    if forced in (None, "reference"):
        return "aten"
    if forced == "cudnn":
        others = ", ".join(repr(name) for name in dispatch.BACKENDS if name != forced)
        raise Refused(f"{function}: backend 'cudnn' runs frozen models only; choose one of {others}")
    raise Refused(f"{function}: backend {forced!r} cannot run here: {reason}")


def raises_as_pytorch(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function which may be `Refused`: what PyTorch refuses, too, is PyTorch's to name."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Refused:
            copies = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            with dispatch.use_backend("aten"):
                function(*copies[0], **copies[1])
            raise

    return run


def common_reason(x: Tensor, vectors: tuple[Tensor | None, ...]) -> str | None:
    """Why no op of ours can run on `x` with these per-channel tensors, or None."""
    if transformed():
        return "a torch.func transform or forward-mode AD is active"
    for v in vectors:
        if v is None:
            continue
        if ops.subclassed(v):
            return f"a per-channel tensor is a {type(v).__name__}, not a plain tensor"
        if v.dtype != x.dtype and (v.dtype != torch.float32 or x.dtype == torch.float64):
            return f"per-channel tensors must be {x.dtype} or torch.float32, got {v.dtype}"
        if v.device != x.device:
            return f"devices differ: {x.device} and {v.device}"
    return None


def refuses_batch_norm(x: Tensor, vectors: tuple[Tensor | None, ...], training: bool, eps: float) -> bool:
    """Whether PyTorch refuses a batch norm, which the kernels would run, or may: then it is PyTorch's to decide.

    Args:
        x: its device counts.
        vectors: running mean and variance, weight, bias.
        training, eps: as in `torch.nn.functional.batch_norm`.
    """
    if eps <= 0 or (vectors[0] is None) != (vectors[1] is None) or (vectors[0] is None and not training):
        return True
    return x.device.type == "cpu" and len({v.dtype for v in vectors if v is not None}) > 1


def operand_reason(x: Tensor, weight: Tensor, residual: Tensor | None, shape: tuple[int, ...]) -> str | None:
    """Why these are no operands of one convolution whose result has this shape, or None."""
    if not x.is_floating_point():
        return f"activations must be floating point, got {x.dtype}"
    if ops.subclassed(weight) or (residual is not None and ops.subclassed(residual)):
        return "the weight or the residual is not a plain tensor"
    if weight.dtype != x.dtype or weight.device != x.device:
        return f"the weight is {weight.dtype} on {weight.device}, the input {x.dtype} on {x.device}"
    if residual is not None and (
        tuple(residual.shape) != shape or residual.dtype != x.dtype or residual.device != x.device
    ):
        return f"the residual is {list(residual.shape)} {residual.dtype}, the result {list(shape)} {x.dtype}"
    return None


def conv_shape(shape: Sequence[int], weight: Tensor, geometry: Geometry) -> tuple[int, ...] | None:
    """The shape of the convolution's result for an input of `shape`, or None where PyTorch raises."""
    stride, padding, dilation, groups = geometry
    if len(shape) != 4 or weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        return None
    if shape[1] != weight.shape[1] * groups:
        return None
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1:
        return None
    extent = [
        (shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return (shape[0], weight.shape[0], *extent) if min(extent) > 0 else None


def dense(x: Tensor) -> Tensor:
    """`x` itself if it is dense in NCHW or channels_last order, else a copy that is."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def convolves_to_nchw(*operands: Tensor) -> bool:
    """Whether PyTorch's convolutions of these give an NCHW result: none of them is channels_last. Where one is both, or
    neither, PyTorch goes by its strides.
    """
    for t in operands:
        nchw, nhwc = t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)
        if nhwc if nchw != nhwc else suggest_memory_format(t) == torch.channels_last:
            return False
    return True


def in_layout_of(t: Tensor, x: Tensor) -> Tensor:
    """`t` with the strides of the dense tensor `x`."""
    t = t.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    # Where dimensions of size 1 make the order ambiguous, equal memory may still carry other strides.
    return t if t.stride() == x.stride() else t.as_strided(x.shape, x.stride())


def channels_last(x: Tensor) -> Tensor:
    """`x` in channels_last order; its gradient has the order of `x`, which `Tensor.contiguous` forgets."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else _ChannelsLast.apply(x)


class _ChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.contiguous()
