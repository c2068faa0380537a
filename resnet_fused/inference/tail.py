"""The tail of a bottleneck as one op: a chain with the 1x1 convolutions around it, or a join with its projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.dispatch.conv_chain import chain_flags, join_flags
from resnet_fused.functional.common import autocast, conv_operands, conv_shape, fits
from resnet_fused.inference import cudnn
from resnet_fused.inference.conv import Constants, EpilogueConv, FrozenConv, Kernel, in_format, planned_backend
from resnet_fused.inference.plan import LAYER_BY_LAYER
from resnet_fused.ops import conv_chain, conv_fprop, conv_join
from resnet_fused.ops.arithmetic import fold

Result = tuple[Tensor, Tensor | None]


class Refused(Exception):
    """Why a tail is not run as one op; empty where its convolutions say so themselves."""


class Chain:
    """`conv_chain`: conv2, conv3 + residual, and with `head` the first convolution of the block after.

    y = relu(bn3(conv3(relu(bn2(conv2(x))))) + residual) and, with `head`, next = relu(bn(head(y))): what lies between
    them never touches memory.

    Raises:
        Refused: the backend does not run it on the example.
    """

    def __init__(self, conv2: EpilogueConv, conv3: EpilogueConv, head: EpilogueConv | None, backend: str) -> None:
        self.conv2, self.conv3, self.head = conv2, conv3, head
        self.kernel = Kernel("conv_chain", backend)
        self.nchw = conv2.nchw and conv3.nchw and (head is None or head.nchw)
        reason = self.kernel.refusal(self._arguments(conv2.example.x, conv3.example.y, head))
        if reason is not None:
            raise Refused(reason)
        members = [conv3] if head is None else [conv3, head]
        for conv in members:
            conv.plan_in("conv_chain", f"in the chain of {conv2.layer}")
        conv2.plan_in("conv_chain", ", ".join(conv.layer for conv in members))

    def _arguments(self, x: Tensor, residual: Tensor, head: EpilogueConv | None) -> conv_chain.Args:
        x, _, y = conv_operands(self.kernel.backend, x, self.conv2.weight, residual)
        assert y is not None
        (weight2, scale2, shift2), (weight3, scale3, shift3) = self.conv2.affine, self.conv3.affine
        weight1, scale1, shift1 = (None, None, None) if head is None else head.affine
        stride, padding, dilation, _ = self.conv2.geometry
        return conv_chain.Args(
            x, weight2, scale2, shift2, weight3, scale3, shift3, y, weight1, scale1, shift1, stride, padding, dilation
        )

    def __call__(self, x: Tensor, residual: Tensor, with_head: bool) -> Result:
        """The result of the block and, with `with_head`, the first activation of the one after."""
        head = self.head if with_head else None
        shape = self.conv3.result_shape(self.conv2.result_shape(x.shape))
        args = self._arguments(x, residual, head) if fits(residual, shape, x.dtype, x.device) else None
        if args is None or not self.kernel.takes(args, args.x, args.residual, args.weight1):
            return self.conv3(self.conv2(x), residual), None
        y, following = self.kernel(*args)
        if head is None:
            return in_format(y, x, self.nchw), None
        return in_format(y, x, self.nchw), in_format(following, x, self.nchw)


class Join(Constants):
    """`conv_join`: relu(bn3(conv3(x)) + bn(projection(shortcut))), both products in one accumulator.

    Both batch norms' scales are folded into the weights, rounded to their dtype.

    Attributes:
        planned: how the two convolutions, which are not kept, are run.

    Raises:
        Refused: the backend does not run it on the example.
    """

    weight: Tensor
    shortcut_weight: Tensor
    shift: Tensor

    def __init__(self, conv3: EpilogueConv, projection: EpilogueConv, backend: str) -> None:
        super().__init__()
        self.backend, self.kernel = backend, Kernel("conv_join", backend)
        self.stride, self.add = projection.geometry[0], conv3.add
        self.nchw = conv3.nchw and projection.nchw
        weights = [fold(conv.weight, conv.scale) for conv in (conv3, projection)]
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise Refused(f"a weight with its scale folded in is not finite in {weights[0].dtype}")
        for name, weight in zip(("weight", "shortcut_weight"), weights, strict=True):
            self.constant(name, conv_operands(backend, projection.example.x, weight, None)[1])
        self.constant("shift", conv3.shift + projection.shift)
        reason = self.kernel.refusal(self._arguments(conv3.example.x, projection.example.x))
        if reason is not None:
            raise Refused(reason)
        conv3.plan_in("conv_join", f"{projection.layer} along its input channels")
        projection.plan_in("conv_join", f"with {conv3.layer}")
        self.planned = (conv3.planned, projection.planned)

    def _arguments(self, x: Tensor, shortcut: Tensor) -> conv_join.Args:
        x, weight, _ = conv_operands(self.backend, x, self.weight, None)
        shortcut = conv_operands(self.backend, shortcut, weight, None)[0]
        return conv_join.Args(x, weight, shortcut, self.shortcut_weight, self.shift, self.stride, relu=True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if shortcut.dtype is not x.dtype:
            (shortcut,) = autocast(shortcut)
        pointwise = ([0, 0], [1, 1], 1)
        shape = conv_shape(x.shape, self.weight, ([1, 1], *pointwise))  # type: ignore[arg-type]
        if shape == conv_shape(shortcut.shape, self.shortcut_weight, (self.stride, *pointwise)):  # type: ignore[arg-type]
            args = self._arguments(x, shortcut)
            if self.kernel.takes(args, args.x, args.shortcut):
                return in_format(self.kernel(*args), x, self.nchw)
        one, zero = (1, 1), (0, 0)
        last = conv_fprop.Args(x, self.weight, None, self.shift, None, one, zero, one, 1, act=None)
        projection = last._replace(x=shortcut, weight=self.shortcut_weight, shift=None, stride=self.stride)
        return self.add(conv_fprop.native(last), conv_fprop.native(projection)).relu_()

    def extra_repr(self) -> str:
        return f"shortcut_stride={self.stride}, backend={self.backend}"


Remake = Callable[[FrozenConv, str], EpilogueConv]


def plan_join(branch: list[FrozenConv], projection: FrozenConv | None, remake: Remake) -> Join | None:
    """The block's last convolution and its projection as one op; None where that is not to be, as `planned` says.

    Args:
        branch: of the block.
        projection: of its shortcut, or None for the identity.
        remake: makes a convolution on another backend.
    """
    if projection is None:
        return None
    conv3 = branch[-1]
    try:
        _check_any("conv_join", conv3)
        flags = join_flags(projection.example.x.shape[1], projection.geometry[0][0])
        backend = _backend("conv_join", flags, conv3, projection)
        check_pointwise(conv3, any_stride=False)
        check_pointwise(projection, any_stride=True)
        join = Join(remake(conv3, backend), remake(projection, backend), backend)
    except Refused as reason:
        note(conv3, "conv_join", reason)
        return None
    for conv in branch[1:-1]:
        note(conv, "conv_chain", f"{conv3.layer} is joined with {projection.layer} instead")
    return join


def plan_chain(branch: list[FrozenConv], head: FrozenConv | None, remake: Remake) -> Chain | None:
    """The block's tail, and `head` of the block after, as one op; None where that is not to be, as `planned` says.

    Args:
        branch: of the block.
        head: the first convolution of the block after, or None if the result does not go to one block alone.
        remake: makes a convolution on another backend.
    """
    if len(branch) != 3:  # a BasicBlock: its second convolution is no 1x1, and needs its neighbours' pixels
        return None
    _, conv2, conv3 = branch
    try:
        outputs = conv3.example.y.shape[1]
        _check_any("conv_chain", conv3)
        if conv2.geometry[3] != 1:
            raise Refused(f"it has {conv2.geometry[3]} groups")
        check_pointwise(conv3, any_stride=False)
        if head is not None:
            try:
                check_pointwise(head, any_stride=False)
                backend = _backend("conv_chain", chain_flags(outputs, head.example.y.shape[1]), conv2, conv3)
                return Chain(remake(conv2, backend), remake(conv3, backend), remake(head, backend), backend)
            except Refused as reason:
                note(head, f"conv_chain of {conv2.layer}", reason)
        backend = _backend("conv_chain", chain_flags(outputs, None), conv2, conv3)
        return Chain(remake(conv2, backend), remake(conv3, backend), None, backend)
    except Refused as reason:
        note(conv2, "conv_chain", reason)
        return None


def _check_any(op: str, conv3: FrozenConv) -> None:
    """Raise where there is nothing to add, or native PyTorch runs the convolutions of every shape."""
    device = conv3.device_type
    backend = dispatch.forced_backend() or (None if device == "cuda" else dispatch.default_backend(op, device))
    if not conv3.adds:
        raise Refused("")
    if backend in cudnn.BACKENDS:
        raise Refused(LAYER_BY_LAYER)


def _backend(op: str, flags: tuple[str, ...], *convs: FrozenConv) -> str:
    """The backend of `op`: the forced one, else the plan's for this shape.

    Args:
        op: `"conv_chain"` or `"conv_join"`.
        flags: what the plan must know of the other convolutions.
        convs: those it would run; the problem is that of the first.

    Raises:
        Refused: it is native PyTorch, which has no such op; or it refused one of the convolutions, which says why.
    """
    backend = dispatch.forced_backend() or _planned(op, flags, convs[0])
    refused = any(conv.refusal is not None for conv in convs)
    if refused or backend in cudnn.BACKENDS:
        raise Refused("" if refused else LAYER_BY_LAYER)
    return backend


def _planned(op: str, flags: tuple[str, ...], conv: FrozenConv) -> str:
    x, groups = conv.example.x, conv.geometry[3]
    filter = (conv.example.y.shape[1], x.shape[1] // groups, *conv.filter)
    return planned_backend(op, x, filter, *conv.geometry, flags=flags)


def check_pointwise(conv: FrozenConv, any_stride: bool) -> None:
    """Raise `Refused` where it is no 1x1 convolution that a join or a chain could have."""
    stride, padding, _, groups = conv.geometry
    if tuple(conv.filter) != (1, 1):
        raise Refused(f"{conv.layer} is {conv.filter[0]}x{conv.filter[1]}, not 1x1")
    if groups != 1 or any(padding) or not (any_stride or stride == [1, 1]):
        raise Refused(f"{conv.layer} has stride {stride}, padding {padding}, {groups} groups")


def note(conv: FrozenConv, op: str, refused: Refused | str) -> None:
    """Say why a convolution is not in `op`, unless what is said of it already explains that."""
    if str(refused):
        reasons = [*filter(None, [conv.planned.reason]), f"{op}: {refused}"]
        conv.planned = dataclasses.replace(conv.planned, reason="; ".join(reasons))
