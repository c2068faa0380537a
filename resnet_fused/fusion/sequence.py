"""Rewrite the chains conv-bn(-relu(-pool)) and bn-relu of a traced forward into units, and generate code from it."""

from __future__ import annotations

import linecache
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import fx, nn

from resnet_fused.nn.units import plain, plain_pool

from .flow import NORMS, is_identity, is_relu
from .plans import Unit


@dataclass
class Rewritten:
    """A graph whose chains became calls of `_run_unit`, and what stood in the way of the others."""

    graph: fx.Graph
    units: list[Unit] = field(default_factory=list)
    bypassed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Chain:
    conv: fx.Node | None
    bn: fx.Node
    relu: fx.Node | None
    pool: fx.Node | None
    above: list[fx.Node]  # identities between conv and bn, last first
    below: list[fx.Node]  # identities between bn and relu, first first

    def nodes(self) -> list[fx.Node]:
        """All nodes of the chain, last first, so that each can be erased in turn."""
        nodes = [self.pool, self.relu, *self.below[::-1], self.bn, *self.above, self.conv]
        return [node for node in nodes if node is not None]


def rewrite(graph: fx.Graph, owner: nn.Module) -> Rewritten:
    """Replace, in `graph` itself, every chain whose values between its modules have one user."""
    result = Rewritten(graph)
    rewriter = _Rewriter(owner, graph)
    for node in list(graph.nodes):
        if rewriter.is_norm(node):
            rewriter.replace(node, result)
    return result


class _Rewriter:
    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        self.owner = owner
        self.calls = Counter(self.module(node) for node in graph.nodes if node.op == "call_module")
        self.read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def module(self, node: fx.Node) -> nn.Module:
        return self.owner.get_submodule(str(node.target))

    def is_call(self, node: object) -> TypeGuard[fx.Node]:
        return isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs

    def is_norm(self, node: fx.Node) -> bool:
        return self.is_call(node) and isinstance(self.module(node), NORMS)

    def replace(self, bn: fx.Node, result: Rewritten) -> None:
        chain = self.chain(bn)
        reason = self.refusal(chain)
        if reason is not None and chain.conv is not None:  # the convolution may be what stands in the way
            shorter = _Chain(None, bn, chain.relu, None, [], chain.below)
            if chain.relu is not None and self.refusal(shorter) is None:
                result.skipped.append((str(chain.conv.target), reason))
                chain, reason = shorter, None
        if reason is not None:
            result.skipped.append((str(bn.target), reason))
            return
        if chain.conv is None and chain.relu is None:
            return
        self.substitute(chain, result)

    def chain(self, bn: fx.Node) -> _Chain:
        """The longest chain around a batch norm."""
        above: list[fx.Node] = []
        conv = bn.args[0]
        while self.is_call(conv) and is_identity(self.module(conv)) and len(conv.users) == 1:
            above.append(conv)
            conv = conv.args[0]
        if not (self.is_call(conv) and isinstance(self.module(conv), nn.Conv2d) and len(conv.users) == 1):
            conv, above = None, []
        below: list[fx.Node] = []
        relu = _only_user(bn)
        while self.is_call(relu) and is_identity(self.module(relu)):
            below.append(relu)
            relu = _only_user(relu)
        if relu is None or not is_relu(relu, self.owner):
            relu, below = None, []
        pool = _only_user(relu) if relu is not None and conv is not None else None
        if pool is not None and not (self.is_call(pool) and self.pools(pool)):
            pool = None
        return _Chain(conv, bn, relu, pool, above, below)

    def pools(self, node: fx.Node) -> bool:
        """Whether the node is a stem's max pool, called nowhere else."""
        return self.calls[self.module(node)] == 1 and plain_pool(self.module(node)) is None

    def refusal(self, chain: _Chain) -> str | None:
        called = [node for node in (chain.conv, chain.bn) if node is not None]
        for node in called:
            calls = self.calls[self.module(node)]
            if calls > 1:
                return f"`{node.target}` is called {calls} times"
            if str(node.target) in self.read:
                return f"its forward also reads the parameters of `{node.target}`"
        conv = self.module(chain.conv) if chain.conv is not None else None
        act = self.module(chain.relu) if chain.relu is not None and chain.relu.op == "call_module" else None
        return plain(conv, self.module(chain.bn), act, in_forward=False)

    def substitute(self, chain: _Chain, result: Rewritten) -> None:
        conv, bn, relu = chain.conv, chain.bn, chain.relu
        first, last = conv or bn, chain.pool or relu or bn
        act = str(relu.target) if relu is not None and relu.op == "call_module" else None
        # In place of its first node: what the forward does to the chain's input afterwards must not reach the chain.
        with bn.graph.inserting_before(first):
            unit = bn.graph.create_node("call_module", "_run_unit", (len(result.units), first.args[0]))
        last.replace_all_uses_with(unit)
        pool = str(chain.pool.target) if chain.pool is not None else None
        result.units.append(
            Unit(str(conv.target) if conv is not None else None, str(bn.target), act, relu is not None, pool)
        )
        result.bypassed += [str(node.target) for node in (*chain.above, *chain.below)]
        for node in chain.nodes():
            bn.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def generate(graph: fx.Graph, name: str) -> tuple[str, Callable[..., Any]]:
    """The graph's source, and that source as a function of (owner, *inputs)."""
    code = graph.python_code("self")
    filename = f"<resnet_fused {name} {zlib.crc32(code.src.encode()):08x}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)  # for tracebacks
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # noqa: S102 - how torch.fx runs a graph, too
    return code.src.strip(), namespace["forward"]
