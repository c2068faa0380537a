"""Where one chain's backward meets the one before it: sums formed while the gradient is written, used if it arrives.

The gradient of a chain's result is written by the chain behind it, which could form the sums that the batch norms at
its join need on the way: reading what they normalised, and one bit an element, for reading all that and the gradient
again. But autograd gives no promise that what the one has written is what the other gets - other consumers of the
result, hooks, `autograd.grad` with part of the graph - so nothing is assumed. A chain *publishes* its operands, without
keeping them alive; the chain behind it *delivers* the sums together with the very tensor they belong to; they are
*claimed* if that tensor arrives and nobody has written to it (its version, which autograd counts). Else they are
reduced again, as if there were no chain behind.

The order of the summands differs between the two ways: the results agree within the numerics contract, not in every
bit, except in `reference`, which has one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Operands:
    """What the sums at a chain's join are formed from: x, mask, mean, invstd, and the projection's x, mean, invstd (or
    None three times), as `conv_dgrad_join` takes them.

    The references are weak. Autograd holds the tensors for the chain's backward, unless somebody packed them (to
    checkpoint or to offload them), and they are gone when that has run: then there is nothing to be had here.
    """

    def __init__(self, operands: Sequence[Tensor | None]) -> None:
        self._references = [None if t is None else TensorWeakRef(t) for t in operands]
        assert operands[0] is not None
        self._stream = _stream(operands[0].device)

    def get(self, like: Tensor, size: Sequence[int], nhwc: bool) -> list[Tensor | None] | None:
        """The operands, if they are here and fit a gradient of this size in the dtype and on the device of `like`.

        Args:
            nhwc: they must be in channels_last order.
        """
        found = [None if reference is None else reference() for reference in self._references]
        if any((reference is None) != (t is None) for reference, t in zip(self._references, found, strict=True)):
            return None
        x = found[0]
        assert x is not None
        fits = x.shape == torch.Size(size) and x.dtype == like.dtype and x.device == like.device
        if not fits or (nhwc and not x.is_contiguous(memory_format=torch.channels_last)):
            return None
        return found if _stream(x.device) == self._stream else None  # autograd knows nothing of the sums on another


class Sums(NamedTuple):
    """The sums of `conv_dgrad_join`, and which gradient they are of."""

    gradient: TensorWeakRef
    version: int
    sums: tuple[Tensor, ...]


def publish(ctx: Any, operands: Sequence[Tensor | None]) -> None:
    """Publish these operands for whoever computes the gradient of the result of `ctx`'s forward."""
    if not torch.compiler.is_compiling():
        ctx.published, ctx.delivered = Operands(operands), None


def producer(ctx: Any, x: Tensor | None) -> Any:
    """The node that made the first input of `ctx`, if it has published operands; None if not.

    Args:
        x: that input as it was saved, or None. A hook on it might write to the gradient without being seen to (as
            `torch.distributed` does), so a tensor with hooks, or one that was not saved, has no producer.
    """
    if torch.compiler.is_compiling() or x is None or x._backward_hooks:
        return None
    node = ctx.next_functions[0][0]
    return node if isinstance(getattr(node, "published", None), Operands) else None


def deliver(node: Any, gradient: Tensor, sums: Sequence[Tensor]) -> None:
    """Leave the sums of `gradient` with the node that is about to get it."""
    if not gradient.is_inference():  # which has no version
        node.delivered = Sums(TensorWeakRef(gradient), gradient._version, tuple(sums))


def claim(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...] | None:
    """The sums that were delivered to `ctx`, if they are those of this gradient."""
    if torch.compiler.is_compiling():
        return None
    delivered, ctx.delivered = getattr(ctx, "delivered", None), None
    if delivered is None or delivered.gradient() is not gradient or delivered.version != gradient._version:
        return None
    return delivered.sums  # type: ignore[no-any-return]
