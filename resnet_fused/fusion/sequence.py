"""Rewrite the chains conv-bn(-add)(-act(-pool)) and bn-relu of a traced forward into units."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.fusion.convs import ConvForm, conv_form, conv_of, own_call
from resnet_fused.fusion.nodes import (
    IN_PLACE_ADDS,
    activation,
    is_activation,
    is_identity,
    is_sequential,
    is_sum,
    module_activation,
    sum_function,
)
from resnet_fused.fusion.norms import NormForm, culprit, norm_form, norm_of
from resnet_fused.fusion.plans import Unit
from resnet_fused.nn.call import plain_pool
from resnet_fused.nn.sums import Sum


@dataclass
class Rewritten:
    """A graph whose chains became calls of `_run_unit`, and what stood in the way of the others."""

    graph: fx.Graph
    units: list[Unit] = field(default_factory=list)
    bypassed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether units are all that the forward runs."""
        return all(node.op in ("placeholder", "output") or node.target == "_run_unit" for node in self.graph.nodes)

    @property
    def sums(self) -> int:
        """How many sums are no part of a unit."""
        return sum(map(is_sum, self.graph.nodes))


@dataclass
class _Chain:
    """The nodes of a unit, and what the batch norm itself calls behind the normalisation.

    Attributes:
        above: identities between conv and bn, last first.
        inner: paths of identities inside the batch norm.
        inner_act: path of the activation inside the batch norm.
        rest: what else the batch norm calls, which follows the unit; None for ReLU as a function.
        below: identities between bn and what follows, first first.
        branch_first: whether the chain's own value is the first summand of `add`.
        residual: the other summand.
    """

    conv: fx.Node | None
    bn: fx.Node
    above: list[fx.Node] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)
    inner_act: str | None = None
    rest: list[str | None] = field(default_factory=list)
    below: list[fx.Node] = field(default_factory=list)
    add: fx.Node | None = None
    branch_first: bool = True
    residual: fx.Node | None = None
    act: fx.Node | None = None
    activation: str | None = None
    pool: fx.Node | None = None

    def nodes(self) -> list[fx.Node]:
        """All nodes of the chain, last first, so that each can be erased in turn."""
        nodes = [self.pool, self.act, self.add, *self.below[::-1], self.bn, *self.above, self.conv]
        return [node for node in nodes if node is not None]

    @property
    def first(self) -> fx.Node:
        return self.conv or self.bn

    @property
    def last(self) -> fx.Node:
        return self.pool or self.act or self.add or self.bn


def rewrite(graph: fx.Graph, owner: nn.Module) -> Rewritten:
    """Replace, in `graph` itself, every chain whose values between its modules have one user."""
    result = Rewritten(graph)
    result.bypassed += open_sequentials(graph, owner)
    rewriter = _Rewriter(owner, graph)
    rewriter.open_convs()
    for node in list(graph.nodes):
        if rewriter.is_norm(node):
            rewriter.replace(node, result)
    return result


def open_sequentials(graph: fx.Graph, owner: nn.Module) -> list[str]:
    """Put the modules of a Sequential in its place, in `graph` itself, where a chain crosses its end.

    Returns:
        The paths of the Sequentials that are not called any more.
    """
    opened: list[str] = []

    def call(path: str, module: nn.Module, value: fx.Node) -> fx.Node:
        if not is_sequential(module):
            return graph.create_node("call_module", path, (value,))
        opened.append(path)
        for name, child in module.named_children():
            value = call(f"{path}.{name}", child, value)
        return value

    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and calls[node.target] == 1:
            module = owner.get_submodule(str(node.target))
            if is_sequential(module) and _crosses_end(module, _only_user(node), owner):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(call(str(node.target), module, node.args[0]))
                graph.erase_node(node)
    return opened


def _crosses_end(module: nn.Module, user: fx.Node | None, owner: nn.Module) -> bool:
    """Whether the last module of a Sequential and what its result goes to belong in one chain."""
    last = module
    while is_sequential(last) and len(last._modules):
        last = list(last.children())[-1]
    if user is None:
        return False
    conv = conv_form(last)
    if isinstance(conv, ConvForm) and len(conv.tail) == 1 and conv.tail[0] is not None:
        last = last.get_submodule(conv.tail[0])
    if isinstance(last, nn.Conv2d):
        return user.op == "call_module" and norm_form(owner.get_submodule(str(user.target))) is not None
    form = norm_form(last)
    ends = isinstance(form, NormForm) and all(name and is_identity(last.get_submodule(name)) for name in form.tail)
    return ends and (is_sum(user) or activation(user, owner) is not None)


class _Rewriter:
    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        self.owner = owner
        self.calls = Counter(self.module(node) for node in graph.nodes if node.op == "call_module")
        self.opened: dict[fx.Node, list[fx.Node]] = {}
        self.graph = graph
        self.owner_conv = self.own_conv()
        self.read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def own_conv(self) -> fx.Node | None:
        """Where the owner is a convolution itself, which calls its norm: the node that becomes a call of it alone."""
        call = own_call(self.graph, self.owner) if isinstance(self.owner, nn.Conv2d) else None
        if call is None:
            return None
        with self.graph.inserting_before(call):
            node = self.graph.create_node("call_module", "", (call.args[0],))
        call.replace_all_uses_with(node)
        for unused in (call, *call.all_input_nodes[1:]):
            if not unused.users:
                self.graph.erase_node(unused)
        return node

    def open_convs(self) -> None:
        """Put in the graph what the forwards of convolutions call behind them, such as a norm."""
        for node in list(self.graph.nodes):
            form = conv_form(self.module(node)) if self.is_call(node) else None
            if node is self.owner_conv or not isinstance(form, ConvForm) or not form.tail or form.tail[0] is None:
                continue
            if norm_form(self.module(node).get_submodule(form.tail[0])) is None or self.calls[self.module(node)] > 1:
                continue
            value, users = node, list(node.users)
            self.opened[node] = []
            for name in form.tail:
                with self.graph.inserting_after(value):
                    if name is None:
                        value = self.graph.create_node("call_function", F.relu, (value,))
                    else:
                        value = self.graph.create_node("call_module", f"{node.target}.{name}", (value,))
                        self.calls[self.module(value)] += 1
                self.opened[node].append(value)
            for user in users:
                user.replace_input_with(node, value)

    def close(self, conv: fx.Node) -> None:
        """Take out again what `open_convs` put behind a convolution."""
        for value in reversed(self.opened.pop(conv)):
            value.replace_all_uses_with(value.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(value)

    def module(self, node: fx.Node) -> nn.Module:
        return self.owner.get_submodule(str(node.target))

    def is_call(self, node: object) -> TypeGuard[fx.Node]:
        return isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs

    def is_norm(self, node: fx.Node) -> bool:
        return self.is_call(node) and norm_form(self.module(node)) is not None

    def replace(self, bn: fx.Node, result: Rewritten) -> None:
        form, conv = norm_form(self.module(bn)), bn.args[0]
        chain = self.chain(bn)
        reason = (str(bn.target), form) if isinstance(form, str) else self.refusal(chain)
        if (
            reason is not None and isinstance(conv, fx.Node) and conv in self.opened
        ):  # it is called whole, and looked at by itself
            self.close(conv)
            return
        if isinstance(form, str):
            result.skipped.append((str(bn.target), form))
            return
        if reason is not None:
            result.skipped.append(reason)
            if chain.conv is None:
                return
            chain = replace(chain, conv=None, above=[], pool=None)  # the convolution may be all that stands in the way
            if self.refusal(chain) is not None:
                return
        if chain.conv is not None or chain.activation == "relu" or chain.add is not None:
            self.substitute(chain, result)
        elif reason is None:
            result.skipped.append((str(bn.target), "no convolution belongs to it alone, and no ReLU follows it"))

    def chain(self, bn: fx.Node) -> _Chain:
        """The longest chain around a batch norm."""
        chain = _Chain(None, bn)
        conv = bn.args[0]
        above: list[fx.Node] = []
        while self.is_call(conv) and is_identity(self.module(conv)) and len(conv.users) == 1:
            above.append(conv)
            conv = conv.args[0]
        if self.is_call(conv) and self.is_conv(conv) and len(conv.users) == 1:
            chain.conv, chain.above = conv, above
        self.look_inside(chain)
        if not chain.rest:
            self.look_below(chain)
        return chain

    def look_inside(self, chain: _Chain) -> None:
        """What the batch norm's own forward calls."""
        form = norm_form(self.module(chain.bn))
        tail = form.tail if isinstance(form, NormForm) else ()
        for k, name in enumerate(tail):
            path = None if name is None else f"{chain.bn.target}.{name}"
            child = None if path is None else self.owner.get_submodule(path)
            if child is not None and is_identity(child):
                chain.inner.append(str(path))
            elif chain.activation is None and (name := "relu" if child is None else module_activation(child)):
                chain.activation, chain.inner_act = name, path
            else:
                chain.rest = list(tail[k:])
                return

    def look_below(self, chain: _Chain) -> None:
        """What the forward calls behind the batch norm."""
        user, below = _only_user(chain.bn), []
        while chain.activation is None and self.is_call(user) and is_identity(self.module(user)):
            below.append(user)
            user = _only_user(user)
        if chain.activation is None and user is not None:
            value = below[-1] if below else chain.bn
            if is_sum(user) and self.joins(chain, user, value):
                chain.add, chain.below, chain.branch_first = user, below, user.args[0] is value
                chain.residual = next(a for a in user.args if a is not value)  # type: ignore[assignment]
                user = _only_user(user)
            name = None if user is None else activation(user, self.owner)
            if name is not None:
                chain.act, chain.activation, chain.below = user, name, below
        stem = chain.activation == "relu" and chain.conv is not None and chain.add is None
        pool = _only_user(chain.act or chain.bn) if stem else None
        if pool is not None and self.is_call(pool) and self.pools(pool):
            chain.pool = pool

    def joins(self, chain: _Chain, add: fx.Node, value: fx.Node) -> bool:
        """Whether a sum can be part of the chain, which then runs where the sum stands."""
        other = next((a for a in add.args if a is not value), None)
        if not is_activation(other):
            return False
        if add.args[0] is other and sum_function(add) in IN_PLACE_ADDS:  # the result is to be in the other's memory
            return False
        mine = {id(node) for node in (chain.conv, *chain.above, chain.bn)}
        source = self.storage(chain.first.args[0])
        node = chain.first.next
        while node is not add:  # nobody may change the chain's input before it is read there
            harmless = id(node) in mine or self.is_fresh(node)
            if not harmless and source & self.storage(*node.all_input_nodes):
                return False
            node = node.next
        return True

    def storage(self, *values: Any) -> set[Any]:
        """The values whose memory these may share; the inputs of the forward count as one."""
        found: set[Any] = set()
        stack, seen = list(values), set()
        while stack:
            node = stack.pop()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                found.add("input")
            elif self.is_fresh(node) or not node.all_input_nodes:
                found.add(node)
            else:
                stack.extend(node.all_input_nodes)
        return found

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether the node's result has memory of its own, and its inputs stay as they are."""
        if not self.is_call(node):
            return node.op == "call_module" and node.target == "_run_unit"
        module = self.module(node)
        known = node is self.owner_conv or isinstance(conv_form(module), ConvForm)
        return (self.is_conv(node) and known) or norm_form(module) == NormForm()

    def is_conv(self, node: fx.Node) -> bool:
        """Whether the call is a convolution, perhaps one that is not understood, with nothing called behind it."""
        form = conv_form(self.module(node))
        alone = node is self.owner_conv or node in self.opened
        return form is not None and (alone or not isinstance(form, ConvForm) or not form.tail)

    def pools(self, node: fx.Node) -> bool:
        """Whether the node is a stem's max pool, called nowhere else."""
        return self.calls[self.module(node)] == 1 and plain_pool(self.module(node)) is None

    def refusal(self, chain: _Chain) -> tuple[str, str] | None:
        """Which module of the chain cannot be part of a unit, and why; None if all can."""
        called = [node for node in (chain.conv, chain.bn) if node is not None]
        for node in called:
            path, calls = str(node.target), self.calls[self.module(node)]
            if calls > 1:
                return path, f"`{path}` is called {calls} times"
            if path in self.read:
                return path, f"the forward that calls `{path}` also reads its parameters"
            form = conv_form(self.module(node))
            if isinstance(form, str) and node is not self.owner_conv:
                return path, f"`{path}` {form}"
        conv = None if chain.conv is None else conv_of(self.module(chain.conv), chain.conv is self.owner_conv)
        act = self.act(chain)
        act_module = self.owner.get_submodule(act) if act else None
        found = culprit(conv, norm_of(self.module(chain.bn)), act_module, chain.activation)
        if found is None:
            return None
        k, reason = found
        return str((chain.conv.target if chain.conv else None, chain.bn.target, act)[k]), reason

    def act(self, chain: _Chain) -> str | None:
        """Path of the activation that ends the chain, where it is a module."""
        if chain.act is None:
            return chain.inner_act
        return str(chain.act.target) if chain.act.op == "call_module" else None

    def substitute(self, chain: _Chain, result: Rewritten) -> None:
        graph, conv, pool, last = chain.bn.graph, chain.conv, chain.pool, chain.last
        arguments = [len(result.units), chain.first.args[0]]
        if chain.residual is not None:
            arguments.append(chain.residual)
        # In place of its first node: what the forward does to the chain's input afterwards must not reach the chain.
        with graph.inserting_before(chain.add or chain.first):
            value = graph.create_node("call_module", "_run_unit", tuple(arguments))
            for name in chain.rest:
                if name is None:
                    value = graph.create_node("call_function", F.relu, (value,))
                else:
                    value = graph.create_node("call_module", f"{chain.bn.target}.{name}", (value,))
        last.replace_all_uses_with(value)
        result.units.append(
            Unit(
                str(conv.target) if conv is not None else None,
                str(chain.bn.target),
                self.act(chain),
                chain.activation,
                str(pool.target) if pool is not None else None,
                add=None if chain.add is None else Sum(sum_function(chain.add), chain.branch_first),
            )
        )
        result.bypassed += [*(str(node.target) for node in (*chain.above, *chain.below)), *chain.inner]
        for node in chain.nodes():
            graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
