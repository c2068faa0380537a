"""What a traced forward asks of its inputs - sizes, numbers, whether they are empty - and the nodes that it leaves."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx


def is_number(node: fx.Node) -> bool:
    """Whether a value derives from shapes and numbers only."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel", "nelement", "stride"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "requires_grad")
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(map(is_number, inputs))


def read_of_input(node: Any) -> str | None:
    """What the node looks up on an input: the name of the attribute or the method."""
    if not isinstance(node, fx.Node) or not node.args:
        return None
    source = node.args[0]
    if not (isinstance(source, fx.Node) and source.op == "placeholder"):
        return None
    if node.op == "call_method":
        return str(node.target)
    return str(node.args[1]) if node.op == "call_function" and node.target is getattr else None


_OF_A_POSITIVE_NUMBER = {operator.eq: False, operator.le: False, operator.ne: True, operator.gt: True}


def says_full(node: fx.Node) -> bool | None:
    """The answer to a question whether an input is empty, where it is not; None for any other question."""
    if _is_positive(node):
        return True
    if node.op != "call_function" or len(node.args) != 2 or node.args[1] != 0 or not _is_positive(node.args[0]):
        return None
    return _OF_A_POSITIVE_NUMBER.get(node.target)  # type: ignore[arg-type]


def _is_positive(node: Any) -> bool:
    """Whether the node is a size of an input that is not empty."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        return read_of_input(node.args[0]) in ("size", "shape")
    name = read_of_input(node)
    return name in ("numel", "nelement") or (name == "size" and len(node.args) == 2)


def erase_questions(graph: fx.Graph, asked: set[fx.Node]) -> None:
    """Take out what was only computed to be asked about."""
    for node in reversed(graph.nodes):
        if node in asked and is_number(node) and not node.users:
            asked |= set(node.all_input_nodes)
            graph.erase_node(node)
