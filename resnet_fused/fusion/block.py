"""Recognise the residual block relu(conv-bn-relu-...-conv-bn(x) + shortcut(x)): every operation accounted for."""

from __future__ import annotations

import itertools
from typing import Literal

from resnet_fused.fusion.convs import conv_form, conv_of
from resnet_fused.fusion.flow import Flow, Op, ancestors
from resnet_fused.fusion.nodes import IN_PLACE_ADDS
from resnet_fused.fusion.norms import culprit, norm_form, norm_of
from resnet_fused.fusion.plans import BlockPlan, Unit
from resnet_fused.nn.sums import Sum

_KINDS: dict[int, Literal["BasicBlock", "Bottleneck"]] = {2: "BasicBlock", 3: "Bottleneck"}


class Mismatch(Exception):
    """The dataflow is not that of a block; the message says what stands in the way."""


class NoReluAfterSum(Mismatch):
    """As in a network of linear bottlenecks, or of pre-activation blocks."""


def joins(flow: Flow, direct: bool) -> bool:
    """Whether branches meet after a convolution or batch norm (with `direct`: one that the forward itself calls)."""
    for op in flow.ops:
        if len({id(x) for x in op.inputs}) < 2 or op.label == "the output":
            continue
        if any(a.kind in ("conv", "bn") and (a.direct or not direct) for a in ancestors(op.inputs)):
            return True
    return False


def match_block(flow: Flow) -> BlockPlan:
    """The block that `flow` computes.

    Raises:
        Mismatch: if it computes anything else.
    """
    inputs = [op for op in flow.ops if op.kind == "input"]
    if len(inputs) != 1:
        raise Mismatch(f"its forward takes {len(inputs)} inputs")
    if flow.output is None:
        raise Mismatch("it returns more than one activation")
    final, total = _sum_of(flow.output)
    if total.function in IN_PLACE_ADDS and total.inputs[0].kind == "input":
        raise Mismatch("it adds into its own input in place")
    if total.inputs[0] is total.inputs[1]:
        raise Mismatch("it adds a value to itself")
    branch, shortcut = sorted(
        map(_branch, total.inputs), key=lambda ops: sum(op.kind == "conv" for op in ops), reverse=True
    )
    _check_all_used_once(flow, [*branch, *shortcut, total, final])
    for ops in (branch, shortcut):
        unknown = next((op for op in ops if op.kind == "other"), None)
        if unknown is not None:
            raise Mismatch(_between(unknown, ops))
    units = _units(branch)
    if len(units) not in _KINDS:
        raise Mismatch(f"its branch has {len(units)} convolution{'s' * (len(units) != 1)}, a block has two or three")
    pools = list(itertools.takewhile(lambda op: op.kind == "pool", shortcut))
    projection = _units(shortcut[len(pools) :])
    if len(projection) > 1:
        raise Mismatch(f"its shortcut has {len(projection)} convolutions")
    add = Sum(total.function, branch_first=branch[-1] is total.inputs[0])
    units[-1] = Unit(units[-1].conv, units[-1].bn, final.path, "relu", add=add)
    plan = BlockPlan(
        _KINDS[len(units)],
        tuple(units),
        projection[0] if projection else None,
        flow.bypassed,
        tuple(str(op.path) for op in pools),
    )
    _check_plain(flow, plan)
    return plan


def _sum_of(output: Op) -> tuple[Op, Op]:
    """The last ReLU and the sum below it."""
    trailing = []
    op = output
    while op.kind != "add":
        if len(op.inputs) != 1:
            raise Mismatch("no sum of two branches" if not op.inputs else f"its branches meet in {op.label}")
        trailing.append(op)
        op = op.inputs[0]
    if not trailing:
        raise NoReluAfterSum("no relu follows the sum")
    culprit = next((t for t in reversed(trailing) if t.kind != "relu"), trailing[0] if len(trailing) > 1 else None)
    if culprit is not None and culprit.constant is not None:
        raise Mismatch(f"the sum is multiplied by {culprit.constant}")
    if culprit is not None:
        raise Mismatch(f"{culprit.label} follows the sum")
    return trailing[0], op


def _branch(op: Op) -> list[Op]:
    """The operations from the input to `op`, one after the other."""
    ops = []
    while op.kind != "input":
        if op.kind == "add":
            raise Mismatch("it has more than one sum")
        if len(op.inputs) != 1:
            raise Mismatch(
                f"{op.label} joins branches before the sum" if op.inputs else f"{op.label} does not depend on the input"
            )
        ops.append(op)
        op = op.inputs[0]
    return ops[::-1]


def _check_all_used_once(flow: Flow, used: list[Op]) -> None:
    calls = flow.calls()
    for op in used:
        if op.kind in ("conv", "bn") and calls[id(op.module)] > 1:
            raise Mismatch(f"{op.name} is called {calls[id(op.module)]} times")
        if len(op.users) > (0 if op is flow.output else 1):
            raise Mismatch(f"the result of {op.name} is used more than once")
    mine = {id(op) for op in used}
    for op in flow.ops:
        if op.kind != "input" and id(op) not in mine:
            raise Mismatch(f"{op.label} is computed beside the block")


def _units(branch: list[Op]) -> list[Unit]:
    """The branch as conv-bn-relu units, the last one without ReLU."""
    units: list[Unit] = []
    rest = list(branch)
    while rest:
        conv = rest.pop(0)
        if conv.kind != "conv":
            raise Mismatch(_between(conv, branch))
        assert conv.module is not None
        known = conv_form(conv.module)
        if isinstance(known, str):
            raise Mismatch(f"{conv.name} {known}")
        if not rest or rest[0].kind == "conv":
            raise Mismatch(f"no batch norm follows {conv.name}")
        bn = rest.pop(0)
        if bn.kind != "bn":
            raise Mismatch(_between(bn, branch))
        assert bn.module is not None
        form = norm_form(bn.module)
        if isinstance(form, str):
            raise Mismatch(f"{bn.name}: {form}")
        act = rest.pop(0) if rest else None
        if act is not None and act.kind == "conv":
            raise Mismatch(f"no relu between {bn.name} and {act.name}")
        if act is not None and (act.kind != "relu" or not rest):
            raise Mismatch(_between(act, branch))
        units.append(Unit(conv.path, str(bn.path), act.path if act else None, "relu" if act else None))
    return units


def _between(op: Op, branch: list[Op]) -> str:
    k = branch.index(op)
    before = branch[k - 1].name if k else "the input"
    after = branch[k + 1].name if k + 1 < len(branch) else "the sum"
    what = op.label if op.constant is None else f"a multiplication by {op.constant}"
    return f"{what} between {before} and {after}"


def _check_plain(flow: Flow, plan: BlockPlan) -> None:
    modules = {op.path: op.module for op in flow.ops if op.path is not None}
    for unit in plan.all_units:
        conv, bn, act = (modules[path] if path is not None else None for path in (unit.conv, unit.bn, unit.act))
        assert bn is not None
        found = culprit(conv_of(conv), norm_of(bn), act)
        if found is not None:
            k, reason = found
            raise Mismatch(f"`{(unit.conv, unit.bn, unit.act)[k]}`: {reason}")
