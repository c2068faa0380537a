"""Assertions of the numerics contract, whose judge is `resnet_fused.contract`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from resnet_fused import contract


def assert_within_contract(actual: Tensor, plain: Tensor, truth: Tensor, what: str = "result", **how: Any) -> None:
    """`actual` errs no more than the contract allows; what `how` may hold, `contract.breach` says.

    One run of plain PyTorch may be lucky: prefer `assert_no_worse`, which runs it again where it has to.
    """
    problem = contract.breach(actual, plain, truth, what, **how)
    assert problem is None, problem


def assert_no_worse(
    actual: Any,
    plain: Callable[..., Any],
    arguments: Sequence[Any],
    what: str = "result",
    *,
    addends: int | None = None,
    terms: Mapping[str, Tensor | None] | None = None,
    around: Sequence[Any] = (),
    norm: bool = False,
    joint: bool = False,
) -> None:
    """`actual` is what `plain(*arguments)` gives, within the contract: None for None, integers exactly.

    Args:
        actual: a tensor, or a dict or list of them and of None.
        plain: plain PyTorch. It gets fresh copies of `arguments`: as they are, in float64, and as `realisations` says.
        arguments: tensors, modules and whatever else, nested.
        what: names a single tensor; those of a dict have their keys.
        addends: of the longest sum; by default what `longest_sum` finds in the arguments.
        terms: by name, the terms of `contract.breach`.
        around: two results in float64 whose difference rounding may make.
        norm: by the Euclidean norm.
        joint: the floor is that of the largest of all results, and of 1: for gradients that are sums which cancel.
    """
    expected = _named(plain(*contract.changed(arguments, lambda t: t)), what)
    truth = _named(plain(*contract.in_double(arguments)), what)
    sides = [_named(side, what) for side in around]
    actual = _named(actual, what)
    assert list(actual) == list(expected)
    scale = max([1.0, *(largest(t) for t in truth.values() if t is not None)]) if joint else 0.0
    addends = contract.longest_sum(*arguments) if addends is None else addends
    for name, value in expected.items():
        if value is None or not value.is_floating_point():
            same = actual[name] is None if value is None else actual[name].equal(value)
            assert same, f"{name}: {actual[name]}, expected {value}"
            continue
        assert_within_contract(
            actual[name],
            value,
            truth[name],
            name,
            again=(
                (_named(run, what)[name], _named(exact, what)[name])
                for run, exact in contract.realisations(plain, arguments)
            ),
            addends=addends,
            scale=scale,
            terms=(terms or {}).get(name),
            around=[side[name] for side in sides],
            norm=norm,
        )


def largest(t: Tensor) -> float:
    """The largest finite magnitude."""
    finite = t[t.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _named(results: Any, what: str) -> dict[str, Tensor | None]:
    if isinstance(results, Mapping):
        return dict(results)
    if isinstance(results, (list, tuple)):
        return {f"{what} {k}": value for k, value in enumerate(results)}
    return {what: results}
