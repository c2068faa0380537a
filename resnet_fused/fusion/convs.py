"""Which subclasses of `nn.Conv2d` compute a convolution, and what their forwards call behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.utils import _pair

from resnet_fused.fusion.isolation import Untraceable
from resnet_fused.fusion.norms import split
from resnet_fused.fusion.trace import functions, immutable, lookups, original_class, trace
from resnet_fused.nn.convs import RecognisedConv
from resnet_fused.nn.eligibility import calls_forward, computes_as, overridden


@dataclass(frozen=True)
class ConvForm:
    """What a module that computes a convolution does.

    Attributes:
        tail: the children that it calls behind the convolution, one after the other; None for ReLU as a function.
        reads: the attributes that its forward looks up.
        full: the modes in which it does so to inputs with elements only.
    """

    tail: tuple[str | None, ...] = ()
    reads: frozenset[str] = frozenset()
    full: frozenset[bool] = frozenset()


_PLAIN = ConvForm()
_forms: dict[Any, ConvForm | str] = {}  # by class and what else decides


def conv_form(module: nn.Module) -> ConvForm | str | None:
    """What a module does as a convolution; what it is instead although it is an `nn.Conv2d`; None where it is not."""
    if not isinstance(module, nn.Conv2d):
        return None
    cls = original_class(module)
    if computes_as(module, nn.Conv2d) and not overridden(module):
        return _PLAIN
    if cls is nn.Conv2d:
        return "is a Conv2d with a forward that was replaced"
    if overridden(module) or not calls_forward(cls):
        return f"is a {cls.__name__}, which is called in a way of its own"
    if any(isinstance(getattr(cls, name, None), property) for name in ("weight", "bias")):
        return f"is a {cls.__name__}, which computes its parameters"
    settings = [(name, v) for name, v in module.__dict__.items() if name != "training" and immutable(v)]
    children = [(name, None if child is None else original_class(child)) for name, child in module._modules.items()]
    key = (cls, tuple(lookups(cls, functions(cls))), tuple(settings), tuple(children), module.bias is None)
    if key not in _forms:
        _forms[key] = _look_into(module)
    return _forms[key]


def conv_of(module: nn.Module | None, own: bool = False) -> Any:
    """A convolution as the functions of `nn.units` take it.

    Args:
        module: the convolution.
        own: its own forward is running, and calls the convolution alone.
    """
    if own:
        return RecognisedConv(module)  # type: ignore[arg-type]
    if module is None or computes_as(module, nn.Conv2d):
        return module
    return RecognisedConv(module) if isinstance(conv_form(module), ConvForm) else module  # type: ignore[arg-type]


def _look_into(module: nn.Conv2d) -> ConvForm | str:
    name = original_class(module).__name__
    try:
        traces = [trace(module, training) for training in (True, False)]
        cores, tails = zip(*(split(traced.graph) for traced in traces), strict=True)
    except Untraceable as error:
        return f"is a {name}, a subclass of Conv2d that is not understood: {error}"
    if tails[0] != tails[1]:
        return f"is a {name}, which calls other modules in training than in evaluation"
    if any(traced.arity != 1 or traced.contents for traced in traces) or not all(
        _is_conv(core, module) for core in cores
    ):
        return f"is a {name}, a subclass of Conv2d with a forward of its own"
    reads = (traces[0].reads | traces[1].reads) & module.__dict__.keys() - {"training"}
    full = {training for training, traced in zip((True, False), traces, strict=True) if traced.full}
    return ConvForm(tails[0], frozenset(reads), frozenset(full))


def _is_conv(core: fx.Graph, module: nn.Conv2d) -> bool:
    """Whether a graph is the convolution of its input with the module's own parameters and geometry."""
    call = own_call(core, module)
    if call is None or any(node.op.startswith("call") and node is not call for node in core.nodes):
        return False
    return isinstance(call.args[0], fx.Node) and call.args[0].op == "placeholder"


def own_call(graph: fx.Graph, module: nn.Conv2d) -> fx.Node | None:
    """The only convolution in the graph of a module's forward, if it has the module's own parameters and geometry."""
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target is F.conv2d]
    return calls[0] if len(calls) == 1 and calls[0].args and _is_own(calls[0], module) else None


def _is_own(call: fx.Node, module: nn.Conv2d) -> bool:
    given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), call.args, strict=False))
    given |= call.kwargs
    tensors = [given.get(name) for name in ("weight", "bias")]
    found = [(node.op, str(node.target)) if isinstance(node, fx.Node) else node for node in tensors]
    if found != [("get_attr", "weight"), None if module.bias is None else ("get_attr", "bias")]:
        return False
    padding = given.get("padding", 0)
    return bool(
        _pair(given.get("stride", 1)) == module.stride
        and (padding if isinstance(padding, str) else _pair(padding)) == module.padding
        and _pair(given.get("dilation", 1)) == module.dilation
        and given.get("groups", 1) == module.groups
    )
