"""The tail of a bottleneck as one op: a chain with the 1x1 convolutions around it, or a join with its projection."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from resnet_fused.functional.common import conv_operands
from resnet_fused.ops import aten

from .conv import Constants, EpilogueConv, FrozenConv, Kernel, backend_of, in_format

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
        reason = self.kernel.refusal(*self._arguments(conv2.example.x, conv3.example.y, head))
        if reason is not None:
            raise Refused(reason)

    def _arguments(self, x: Tensor, residual: Tensor, head: EpilogueConv | None) -> tuple[Any, ...]:
        x, _, y = conv_operands(self.kernel.backend, x, self.conv2.weight, residual)
        first = (None, None, None) if head is None else head.affine
        return (x, *self.conv2.affine, *self.conv3.affine, y, *first, *self.conv2.geometry[:3])

    def __call__(self, x: Tensor, residual: Tensor, with_head: bool) -> Result:
        """The result of the block and, with `with_head`, the first activation of the one after."""
        head = self.head if with_head else None
        args = self._arguments(x, residual, head)
        if not self.kernel.takes(args, args[0], args[7], args[8]):
            return self.conv3(self.conv2(x), residual), None
        y, following = self.kernel(*args)
        if head is None:
            return in_format(y, x, self.nchw), None
        return in_format(y, x, self.nchw), in_format(following, x, self.nchw)


class Join(Constants):
    """`conv_join`: relu(bn3(conv3(x)) + bn(projection(shortcut))), both products in one accumulator.

    Both batch norms' scales are folded into the weights, rounded to their dtype.

    Raises:
        Refused: the backend does not run it on the example.
    """

    weight: Tensor
    shortcut_weight: Tensor
    shift: Tensor

    def __init__(self, conv3: EpilogueConv, projection: EpilogueConv, backend: str) -> None:
        super().__init__()
        self.kernel = Kernel("conv_join", backend)
        self.stride = projection.geometry[0]
        self.nchw = conv3.nchw and projection.nchw
        weights = [aten.fold(conv.weight, conv.scale) for conv in (conv3, projection)]
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise Refused(f"a weight with its scale folded in is not finite in {weights[0].dtype}")
        for name, weight in zip(("weight", "shortcut_weight"), weights, strict=True):
            self.constant(name, conv_operands(backend, projection.example.x, weight, None)[1])
        self.constant("shift", conv3.shift + projection.shift)
        reason = self.kernel.refusal(*self._arguments(conv3.example.x, projection.example.x))
        if reason is not None:
            raise Refused(reason)

    def _arguments(self, x: Tensor, shortcut: Tensor) -> tuple[Any, ...]:
        x, weight, _ = conv_operands(self.kernel.backend, x, self.weight, None)
        shortcut = conv_operands(self.kernel.backend, shortcut, weight, None)[0]
        return (x, weight, shortcut, self.shortcut_weight, self.shift, self.stride, True)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        args = self._arguments(x, shortcut)
        if not self.kernel.takes(args, args[0], args[2]):
            return aten.conv_join(*args)
        return in_format(self.kernel(*args), x, self.nchw)

    def extra_repr(self) -> str:
        return f"shortcut_stride={self.stride}, backend={self.kernel.backend}"


def plan_join(branch: list[FrozenConv], projection: FrozenConv | None) -> Join | None:
    """The block's last convolution and its projection as one op; None where that is not to be, as `planned` says."""
    if projection is None:
        return None
    *_, conv3 = branch
    try:
        backend = _backend("conv_join", conv3, projection)
        _check_pointwise(conv3, any_stride=False)
        _check_pointwise(projection, any_stride=True)
        join = Join(conv3, projection, backend)  # type: ignore[arg-type]
    except Refused as reason:
        _note(conv3, "conv_join", reason)
        return None
    _move(conv3, "conv_join", f"{conv3.planned.fused}; {projection.layer} along its input channels")
    _move(projection, "conv_join", f"{projection.planned.fused}; with {conv3.layer}")
    for conv in branch[1:-1]:
        _note(conv, "conv_chain", f"{conv3.layer} is joined with {projection.layer} instead")
    return join


def plan_chain(branch: list[FrozenConv], head: FrozenConv | None) -> Chain | None:
    """The block's tail, and `head` of the block after, as one op; None where that is not to be, as `planned` says."""
    if len(branch) != 3:  # a BasicBlock: two 3x3 convolutions cannot hand a pixel on
        return None
    _, conv2, conv3 = branch
    try:
        backend = _backend("conv_chain", conv2, conv3)
        if conv2.geometry[3] != 1:
            raise Refused(f"{conv2.layer} has {conv2.geometry[3]} groups")
        _check_pointwise(conv3, any_stride=False)
    except Refused as reason:
        _note(conv2, "conv_chain", reason)
        return None
    chain = _chain(conv2, conv3, head, backend)
    if chain is None:
        return None
    members: list[FrozenConv] = [conv3] if chain.head is None else [conv3, chain.head]
    _move(conv2, "conv_chain", f"{conv2.planned.fused}; {', '.join(conv.layer for conv in members)}")
    for conv in members:
        _move(conv, "conv_chain", f"{conv.planned.fused}; in the chain of {conv2.layer}")
    return chain


def _chain(conv2: Any, conv3: Any, head: FrozenConv | None, backend: str) -> Chain | None:
    """The longest chain that the backend runs."""
    if head is not None:
        try:
            if not isinstance(head, EpilogueConv) or head.backend != backend:
                raise Refused(f"{head.layer} runs on {head.backend}")
            _check_pointwise(head, any_stride=False)
            return Chain(conv2, conv3, head, backend)
        except Refused as reason:
            _note(head, f"conv_chain of {conv2.layer}", reason)
    try:
        return Chain(conv2, conv3, None, backend)
    except Refused as reason:
        _note(conv2, "conv_chain", reason)
        return None


def _backend(op: str, *convs: FrozenConv) -> str:
    """The backend of `op`, if all its convolutions are on it too."""
    backend = backend_of(op, convs[0].example.x)
    for conv in convs:
        if not isinstance(conv, EpilogueConv):
            raise Refused("aten runs layer by layer" if not conv.planned.reason else "")
        if conv.backend != backend:
            raise Refused(f"it runs on {backend}, {conv.layer} on {conv.backend}")
    return backend


def _check_pointwise(conv: FrozenConv, any_stride: bool) -> None:
    stride, padding, _, groups = conv.geometry
    if tuple(conv.filter) != (1, 1):
        raise Refused(f"{conv.layer} is {conv.filter[0]}x{conv.filter[1]}, not 1x1")
    if groups != 1 or any(padding) or not (any_stride or stride == [1, 1]):
        raise Refused(f"{conv.layer} has stride {stride}, padding {padding}, {groups} groups")


def _move(conv: FrozenConv, op: str, fused: str) -> None:
    conv.planned = dataclasses.replace(conv.planned, op=op, fused=fused)


def _note(conv: FrozenConv, op: str, refused: Refused | str) -> None:
    """Say why a convolution is not in `op`, unless what is said of it already explains that."""
    if str(refused):
        reasons = [*filter(None, [conv.planned.reason]), f"{op}: {refused}"]
        conv.planned = dataclasses.replace(conv.planned, reason="; ".join(reasons))
