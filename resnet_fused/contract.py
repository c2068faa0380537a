"""The numerics contract: against float64, at most twice plain PyTorch's error in the same dtype, plus a floor.

One judge for tests and for what checks kernels at a user's. One run of plain PyTorch can be lucky; where a result errs
more than that one run allows, plain PyTorch runs again, in other memory orders and on inputs moved by one unit in the
last place, each time beside float64 on the same inputs, and its largest error counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

FACTOR = 2.0
FLOOR_ULPS = 4

Change = Callable[[Tensor], Tensor]


def breach(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    name: str = "result",
    *,
    again: Iterable[tuple[Tensor, Tensor]] = (),
    addends: int = 1,
    scale: float = 0.0,
    terms: Tensor | None = None,
    norm: bool = False,
    around: Sequence[Tensor] = (),
) -> str | None:
    """How `actual` breaks the contract, in one line, or None.

    |actual - truth| <= 2 max |plain - truth| + max(4 eps(dtype), sqrt(n) eps(fp32)) max |truth|; the first maximum
    is over plain PyTorch's runs too; shapes, dtypes and the places of NaN and inf are plain PyTorch's.

    Args:
        actual: ours.
        plain: what plain PyTorch gives in the same dtype.
        truth: what plain PyTorch gives in float64.
        name: of the tensor, for the message.
        again: further runs of plain PyTorch and float64 (`realisations`); asked for only where one does not suffice.
        addends: how many numbers the longest sum behind an element adds up: the n of the floor.
        scale: what max |truth| in the floor is at least, where what was rounded cancels.
        terms: the same of sums in fp32: what the magnitudes of the addends add up to.
        norm: measure errors and magnitudes by the Euclidean norm of the tensor, not by its largest element.
        around: two results in float64 whose difference rounding may make: it is added to what is allowed.
    """
    if not actual.shape == plain.shape == truth.shape:
        return f"{name}: shape {list(actual.shape)}, expected {list(plain.shape)}"
    if actual.dtype != plain.dtype:
        return f"{name}: {actual.dtype}, expected {plain.dtype}"
    a, p, t = (v.detach().double() for v in (actual, plain, truth))
    if not torch.equal(a.isnan(), p.isnan()):
        return f"{name}: {int(a.isnan().sum())} NaN, plain PyTorch has {int(p.isnan().sum())}"
    if not torch.equal(a.isinf(), p.isinf()):
        return f"{name}: {int(a.isinf().sum())} inf, plain PyTorch has {int(p.isinf().sum())}"
    if not torch.equal(a[p.isinf()], p[p.isinf()]):
        return f"{name}: an inf of the other sign than plain PyTorch's"
    finite = p.isfinite() & t.isfinite()
    if not finite.any():
        return None

    def size(v: Tensor) -> float:
        v = torch.where(finite & v.isfinite(), v, 0) if v.shape == finite.shape else v
        return float(v.norm() if norm else v.abs().max())

    error, yardstick = size(a - t), size(p - t)
    slack = floor(actual.dtype, addends) * max(size(t), scale)
    if terms is not None:
        slack = max(slack, floor(torch.float32, addends) * size(terms.detach().double()))
    if around:
        above, below = (v.detach().double() for v in around)
        slack += size(above - below)
    for other, exact in again if error > FACTOR * yardstick + slack else ():
        yardstick = max(yardstick, size(other.detach().double() - exact.detach().double()))
    allowed = FACTOR * yardstick + slack
    if error <= allowed:
        return None
    return f"{name}: error {error:.3g} exceeds {allowed:.3g} (plain PyTorch errs by {yardstick:.3g})"


def floor(dtype: torch.dtype, addends: int = 1) -> float:
    """What rounding alone may do, relative to the magnitude of the result: max(4 eps(dtype), sqrt(n) eps(accumulator)).

    A sum of n numbers rounds n times, each time by at most eps / 2 of what has been added up. Where those roundings are
    independent, the sum is off by some sqrt(n / 8) eps of its magnitude, whether its addends share a sign or not;
    sqrt(n) eps is 2.8 times that.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return max(FLOOR_ULPS * torch.finfo(dtype).eps, addends**0.5 * torch.finfo(accumulator).eps)


def longest_sum(*arguments: Any) -> int:
    """How many numbers meet in one sum of a step of training: the pixels of a batch, or a filter's taps and channels.

    Args:
        arguments: activations [N, C, H, W] count N H W; modules count each filter [K, C, R, S]'s C R S and K R S.
    """
    lengths = [1]
    for value in arguments:
        if isinstance(value, nn.Module):
            for p in value.parameters():
                if p.dim() >= 2 and p.numel():
                    lengths += [p.numel() // p.shape[0], p.numel() // p.shape[1]]
        elif isinstance(value, Tensor) and value.dim() == 4 and value.numel():
            lengths.append(value.numel() // value.shape[1])
    return max(lengths)


def realisations(plain: Callable[..., Any], arguments: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """What plain PyTorch and float64 give when they run again: in NCHW, in NHWC, and on the neighbours of the inputs.

    Args:
        plain: called with fresh copies of `arguments`.
        arguments: tensors, modules, and whatever else; nested in lists, tuples and dicts.
    """
    for change in (_ordered(torch.contiguous_format), _ordered(torch.channels_last), _moved(1), _moved(-1)):
        again = changed(arguments, change)
        exact = in_double(again)
        yield plain(*again), plain(*exact)


def in_double(arguments: Sequence[Any]) -> Sequence[Any]:
    """Fresh copies of tensors and modules, nested as they come, in float64: with them plain PyTorch gives the truth."""
    return changed(arguments, lambda t: t.double())


def changed(arguments: Sequence[Any], change: Change) -> Any:
    """Fresh copies of arguments whose floating point tensors, parameters and buffers were changed by `change`."""

    def of(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value)._apply(lambda t: change(t) if t.is_floating_point() else t)
        if not isinstance(value, Tensor):
            return value
        fresh = value.detach().clone(memory_format=torch.preserve_format)
        return (change(fresh) if fresh.is_floating_point() else fresh).requires_grad_(value.requires_grad)

    return tree_map(of, arguments)


def _ordered(memory_format: torch.memory_format) -> Change:
    return lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t


def _moved(side: int) -> Change:
    """Every finite number's neighbour on one side. Zero stays: it is often exact, and a kink."""

    def move(t: Tensor) -> Tensor:
        neighbour = torch.nextafter(t, torch.full_like(t, side * torch.inf))
        return torch.where(t.isfinite() & neighbour.isfinite() & (t != 0), neighbour, t)

    return move
