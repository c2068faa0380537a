"""What a fused module computes, as data: `Unit`, `BlockPlan`, `SequencePlan`.

A plan names modules by their path relative to the module that owns it, and holds no tensors and no modules. It runs on
any owner whose `_run_unit(k, x, residual)` computes `plan.all_units[k]`: the fused module itself, or a frozen copy with
prepacked units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, fx, nn

from resnet_fused.nn.sums import Sum


class Owner(Protocol):
    """What a plan needs of the object it runs on."""

    def _run_unit(self, k: int, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def _run_block(self, x: Tensor, branch: int) -> Tensor | None: ...

    def get_submodule(self, target: str) -> nn.Module: ...


@dataclass(frozen=True)
class Unit:
    """pool(act(bn(conv(x)) + residual)), with the absent parts left out.

    Args:
        conv: path of the `nn.Conv2d`, empty for the owner itself; None where no convolution precedes the batch norm.
        bn: path of the `nn.BatchNorm2d`.
        act: path of the activation; None where it is a function, or there is none.
        activation: its name, one of `ACTIVATIONS`; None where none follows.
        pool: path of the `nn.MaxPool2d` of a stem, behind conv, bn and ReLU; else None.
        add: how the forward adds a residual; None where it adds none.
    """

    conv: str | None
    bn: str
    act: str | None
    activation: str | None
    pool: str | None = None
    add: Sum | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that the unit runs in place of calling them, in order; the pool stays a module of its own."""
        return tuple(path for path in (self.conv, self.bn, self.act) if path is not None)

    def __str__(self) -> str:
        names = [
            "conv" if self.conv == "" else self.conv,
            self.bn,
            "add" if self.add else None,
            self.activation,
            self.pool,
        ]
        return "-".join(name for name in names if name is not None)


@dataclass(frozen=True)
class BlockPlan:
    """relu(units(x) + shortcut(pools(x))): the residual and the last ReLU belong to the last unit.

    Args:
        kind: `"BasicBlock"` (two units) or `"Bottleneck"` (three).
        units: the branch, first to last.
        shortcut: conv + bn of the shortcut; None for none.
        bypassed: paths of the `nn.Sequential` and `nn.Identity` modules that the plan does not call although the plain
            forward does.
        pools: paths of the pools that the shortcut begins with, such as the average pool of ResNet-D.
    """

    kind: Literal["BasicBlock", "Bottleneck"]
    units: tuple[Unit, ...]
    shortcut: Unit | None
    bypassed: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """The units in the order that `_run_unit` counts them: the branch, then the shortcut."""
        return self.units if self.shortcut is None else (*self.units, self.shortcut)

    def body(self, training: bool, inputs: tuple[Any, ...]) -> Callable[..., Tensor] | None:
        """The function of (owner, x) that computes the block; None where the plan does not hold for these inputs."""
        return self.run if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None

    def run(self, owner: Owner, x: Tensor) -> Tensor:
        whole = owner._run_block(x, len(self.units))
        if whole is not None:
            return whole
        last = len(self.units) - 1
        y = x
        for k in range(last):
            y = owner._run_unit(k, y)
        residual = x
        for path in self.pools:
            residual = owner.get_submodule(path)(residual)
        if self.shortcut is not None:
            residual = owner._run_unit(last + 1, residual)
        return owner._run_unit(last, y, residual)

    def __str__(self) -> str:
        text = f"{self.kind}: {', '.join(map(str, self.units))}"
        shortcut = [*self.pools, *([] if self.shortcut is None else [str(self.shortcut)])]
        return f"{text}; shortcut {'-'.join(shortcut)}" if shortcut else text


@dataclass(frozen=True)
class Forward:
    """A forward regenerated from its traced graph, with units in place of the chains they replace.

    Args:
        training: the mode that it was traced in; None where both modes compute the same.
        inputs: `"list"` where it holds for a list only, `"any"` where the forward never asks for the type of its
            inputs.
        arity: the number of inputs.
        source: the code.
        function: the code as a function of (owner, *inputs); the owner has `_run_unit` and the children of the fused
            module.
    """

    training: bool | None
    inputs: Literal["any", "list"]
    arity: int
    source: str
    function: Callable[..., Any] = field(compare=False, repr=False)

    def accepts(self, training: bool, inputs: tuple[Any, ...]) -> bool:
        if len(inputs) != self.arity or self.training not in (None, training):
            return False
        if self.inputs == "list":
            return type(inputs[0]) is list and _are_activations(inputs)
        return _are_activations(inputs)


def _are_activations(inputs: Iterable[Any]) -> bool:
    """Whether all are tensors, perhaps in lists or tuples with what else; a tracer's values are none."""
    return all(isinstance(x, Tensor) or (isinstance(x, (list, tuple)) and not any(map(_is_traced, x))) for x in inputs)


def _is_traced(value: Any) -> bool:
    return isinstance(value, fx.Proxy) or (isinstance(value, (list, tuple)) and any(map(_is_traced, value)))


@dataclass(frozen=True)
class SequencePlan:
    """A forward in which every chain conv-bn(-act(-pool)) or bn-relu is one unit, and the rest is as it was.

    Args:
        units: the chains, in the order of the forward.
        forwards: the regenerated forward for each case that was told apart.
        bypassed: paths of the `nn.Identity` modules inside chains, which the plan does not call although the plain
            forward does.
    """

    units: tuple[Unit, ...]
    forwards: tuple[Forward, ...]
    bypassed: tuple[str, ...] = ()

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """The units in the order that `_run_unit` counts them."""
        return self.units

    def body(self, training: bool, inputs: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The function of (owner, *inputs) for this mode and these inputs; None where the plan holds none."""
        for forward in self.forwards:
            if forward.accepts(training, inputs):
                return forward.function
        return None

    def __str__(self) -> str:
        return ", ".join(map(str, self.units))


Plan = BlockPlan | SequencePlan
