"""Trace a module's forward into a graph without side effects, or say why that cannot be done.

Every call of a submodule is a leaf. What torch.fx would silently lose or bake in is refused instead: a context such as
`no_grad` or autocast around a part of the forward, random numbers, tensors made on the way, attributes that the forward
sets or that can change unnoticed, questions about the type of a value. (Whether an input is empty may be asked: a trace
holds for inputs that are not.) Nothing global is patched, so other threads may run modules meanwhile. What a forward
reads from outside the module and its class (globals) is taken as constant.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import inplace_methods

from resnet_fused.fusion.isolation import NoTensorWork, Untraceable, ambient, reproducible, surroundings
from resnet_fused.fusion.questions import erase_questions, is_number, read_of_input, says_full

Inputs = Literal["any", "list"]
Lookup = tuple[type, str, Any]  # a class, a name, what the class had under it


class AsksForInputType(Untraceable):
    """The forward depends on the type of its inputs."""


class AsksForGradient(Untraceable):
    """The forward depends on whether its input requires a gradient."""


@dataclass(frozen=True)
class Traced:
    """A traced forward of `arity` inputs.

    Attributes:
        reads: the names of the attributes that it looked up on its module.
        contents: what the lists and dicts among them held.
        full: whether it holds for inputs with elements only.
    """

    graph: fx.Graph
    arity: int
    reads: frozenset[str]
    contents: dict[str, Any]
    full: bool = False


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it: fused classes name theirs in `_original`."""
    return getattr(type(module), "_original", type(module))


def lookups(cls: type[nn.Module], names: Iterable[str]) -> list[Lookup]:
    """What a class and its bases have under these names; `super()` may ask any of them."""
    found = []
    for base in cls.__mro__[:-1]:
        for name in names:
            value = getattr(base, name, None)
            if value is not None and value is getattr(base, name):  # made anew each time: nothing to compare with
                found.append((base, name, value))
    return found


def functions(cls: type[nn.Module]) -> list[str]:
    """The names of the functions that a class and its bases define, PyTorch's modules apart, and of what calls them."""
    bases = [base for base in cls.__mro__ if not base.__module__.startswith("torch.nn.modules.")]
    names = (name for base in bases for name, value in vars(base).items() if isinstance(value, types.FunctionType))
    return ["__call__", "forward", *names]


def trace(
    module: nn.Module,
    training: bool,
    inputs: Inputs = "any",
    base: type[nn.Module] | None = None,
    gradient: bool | None = None,
) -> Traced:
    """Trace `module`'s own forward, called with its required arguments, in the given mode.

    Args:
        module: left untouched; what runs is a stand-in.
        training: the mode of the module itself; its children are leaves.
        inputs: `"list"` to trace what the forward does with lists, where it asks.
        base: stands between the module's class and the base that it shares with it, so that `super().forward` is
            `base.forward`.
        gradient: whether its input requires a gradient.

    Raises:
        AsksForInputType: with `"any"`, where it asks.
        AsksForGradient: with `gradient=None`, where it asks.
        Untraceable: with another reason.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward is overridden on the instance")
    # Twice: a forward that gives the same graph with gradients on and autocast off, and the other way round, asks for
    # neither and holds no context that changes either. So it is with the mode of its children.
    tracers = [_Tracer(inputs, ambient, gradient) for ambient in (True, False)]
    first, second = (_trace_once(module, training, tracer, base) for tracer in tracers)
    if str(first.graph) != str(second.graph):
        modes = next(iter(tracers[0].modes | tracers[1].modes), None)
        what = "depends on whether gradients or autocast are enabled" if modes is None else f"reads `{modes}`"
        raise Untraceable(f"its forward {what}")
    result = replace(first, reads=first.reads | second.reads, contents=first.contents | second.contents)
    if not tracers[0].asks_for_elements:
        return result
    try:
        empty = _trace_once(module, training, _Tracer(inputs, True, gradient, full=False), base)
    except Untraceable:  # raises, for one
        return replace(result, full=True)
    return replace(result, full=str(empty.graph) != str(first.graph))


def _trace_once(module: nn.Module, training: bool, tracer: _Tracer, base: type[nn.Module] | None) -> Traced:
    try:
        stand_in = _stand_in(module, "", tracer, {}, training, base)
        forward = type(stand_in).forward
        names = _required_inputs(forward)
        with reproducible(), surroundings(tracer.alternative), NoTensorWork():
            tracer.ambient = ambient()
            proxies = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
            # What is left out takes its default, as in a plain call.
            result = forward(stand_in, *proxies)
            tracer.create_node("output", "output", (tracer.create_arg(result),), {})
            erase_questions(tracer.graph, tracer.asked)
    except Untraceable:
        raise
    except Exception as error:  # a forward may raise anything when it is handed proxies
        if tracer.modes:  # not in the mode that it has, perhaps
            raise Untraceable(f"its forward reads `{next(iter(tracer.modes))}`") from error
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise Untraceable(f"its forward cannot be traced: {type(error).__name__}: {first_line}") from error
    if _registered(stand_in) != _registered(module):
        raise Untraceable("its forward registers parameters, buffers or modules")
    for name, handed_out in tracer.contents.items():
        if handed_out != module.__dict__[name]:
            raise Untraceable(f"its forward changes what is in the attribute `{name}`")
    return Traced(tracer.graph, len(names), frozenset(tracer.reads), tracer.contents)


def _required_inputs(forward: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise Untraceable(f"its forward takes {'**' if p.kind is p.VAR_KEYWORD else '*'}{p.name}")
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise Untraceable("its forward requires keyword arguments")
    return [p.name for p in required]


class _Value(fx.Proxy):
    """A proxy that does not hide what it is: asked for its type outside torch.fx, it refuses, or is a list."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.startswith(("torch.fx", "torch.utils._pytree", __name__)):
            return _Value
        if self.node.op != "placeholder":
            raise Untraceable(f"its forward asks for the type of an intermediate value (`{self.node.name}`)")
        if self.tracer.inputs == "any":  # never a claim to be a Tensor: C++ would believe it
            raise AsksForInputType("its forward asks for the type of its input")
        return list

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, fx.Proxy):  # called by its name: of two tensors, that adds in this order
            return self.tracer.create_proxy("call_method", "__radd__", (self, other), {})
        return self.tracer.create_proxy("call_function", operator.add, (other, self), {})


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    def operation(self: fx.Proxy, other: Any) -> Any:
        if is_number(self.node):  # numbers do not change in place
            return getattr(operator, name.removeprefix("i"))(self, other)
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operation


for _name in inplace_methods:  # torch.fx itself records `x += y` as `x + y`, which no longer changes x
    if _name != "setitem":
        setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Records nodes; the calls and parameters of modules come to it from their stand-ins.

    Attributes:
        alternative: which of two surroundings the forward is traced in, which must make no difference.
        gradient: the answer where it asks whether its input requires a gradient.
        modes: the modes of children that it looked up.
        full: whether its inputs have elements, and whether that was asked.
        asked: what it took for true or false.
    """

    def __init__(self, inputs: Inputs, alternative: bool, gradient: bool | None, full: bool = True) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.inputs = inputs
        self.alternative = alternative
        self.gradient = gradient
        self.full = full
        self.asks_for_elements = False
        self.reads: set[str] = set()
        self.modes: set[str] = set()
        self.asked: set[fx.Node] = set()
        self.contents: dict[str, Any] = {}
        self.ambient: tuple[Any, ...] = ()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        if ambient() != self.ambient:
            raise Untraceable(
                "a part of its forward runs under a context of its own (no_grad, autocast, checkpoint, ...)"
            )
        return super().create_proxy(kind, *args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if read_of_input(obj.node) == "requires_grad":
            answer = self.gradient
            if answer is None:
                raise AsksForGradient("its forward depends on whether its input requires a gradient")
        else:
            answer = says_full(obj.node)
            self.asks_for_elements |= answer is not None
            answer = answer if self.full or answer is None else not answer
        self.asked.add(obj.node)
        return super().to_bool(obj) if answer is None else answer

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            raise Untraceable("its forward uses a tensor that is neither an input nor an attribute")
        if type(a) is OrderedDict:  # torch.fx would make it a dict
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, nn.Module) or (isinstance(a, (list, dict)) and type(a) not in (list, dict)):
            raise Untraceable(f"its forward hands on or builds a {type(a).__name__}")
        return super().create_arg(a)


@dataclass(frozen=True)
class _Place:
    """Where a stand-in's module is, and who records its calls."""

    path: str
    tracer: _Tracer

    def attribute(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def record(stand_in: nn.Module, function: Callable[..., Any], *args: Any) -> fx.Proxy:
    """A call of `function` in the graph that a stand-in is traced into."""
    return _place(stand_in).tracer.create_proxy("call_function", function, args, {})


def _place(stand_in: Any) -> _Place:
    place: _Place = object.__getattribute__(stand_in, "__dict__")["_place"]
    return place


def _stand_in(
    module: nn.Module,
    path: str,
    tracer: _Tracer,
    known: dict[int, nn.Module],
    training: bool = False,
    base: type[nn.Module] | None = None,
) -> nn.Module:
    """A module of the same class, attributes and children which records calls and lets nothing be changed."""
    if id(module) not in known:
        stand_in = known[id(module)] = object.__new__(_probe_class(original_class(module), base))  # type: ignore[arg-type]
        place = _Place(path, tracer)
        state = dict(module.__dict__, training=training, _place=place)
        state["_parameters"], state["_buffers"] = dict(module._parameters), dict(module._buffers)
        state["_modules"] = {
            name: None if child is None else _stand_in(child, place.attribute(name), tracer, known)
            for name, child in module._modules.items()
        }
        object.__setattr__(stand_in, "__dict__", state)
    return known[id(module)]


def _registered(module: nn.Module) -> list[Any]:
    tensors = [[(name, id(t)) for name, t in module.__dict__[kind].items()] for kind in ("_parameters", "_buffers")]
    return [*tensors, list(module.__dict__["_modules"])]


_INTERNALS = frozenset(nn.Module().__dict__) | {"__dict__", "_place"}
_IMMUTABLE = (
    *(bool, int, float, complex, str, bytes, frozenset, type(None), type, enum.Enum),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)


def immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(immutable, value))
    return isinstance(value, _IMMUTABLE)


def _is_container(value: Any) -> bool:
    """Whether the value is a list or dict that can be compared with what it was."""
    if type(value) in (dict, OrderedDict):
        return all(map(immutable, value)) and all(map(immutable, value.values()))
    return type(value) is list and all(map(immutable, value))


class _Unregistered:
    """Keeps a class made here out of what its original's `__init_subclass__` does, such as a registry."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


@functools.lru_cache(maxsize=4096)
def _probe_class(original: type[nn.Module], base: type[nn.Module] | None = None) -> type[nn.Module]:
    """The class of stand-ins for modules of class `original`."""

    class Probe(_Unregistered, original, *([] if base is None else [base])):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            place = _place(self)
            if not place.path:
                raise Untraceable("its forward calls itself")
            return place.tracer.create_proxy("call_module", place.path, args, kwargs)

        def __getattribute__(self, name: str) -> Any:
            place = _place(self)
            if not place.path:
                place.tracer.reads.add(name)
            value = super().__getattribute__(name)
            if name == "training" and place.path:
                place.tracer.modes.add(place.attribute(name))
                return place.tracer.alternative
            if name in _INTERNALS or name not in object.__getattribute__(self, "__dict__"):
                return value
            if isinstance(value, Tensor):
                return place.tracer.create_proxy("get_attr", place.attribute(name), (), {})
            # An attribute of the module itself is watched; one of a child, or the inside of an object, can change
            # without being noticed.
            if not place.path and _is_container(value):
                return place.tracer.contents.setdefault(name, copy.copy(value))
            if place.path or not immutable(value):
                raise Untraceable(
                    f"its forward reads the {'' if place.path else 'mutable '}attribute `{place.attribute(name)}`"
                )
            return value

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            if isinstance(value, Tensor):
                return _place(self).tracer.create_proxy("get_attr", _place(self).attribute(name), (), {})
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            raise Untraceable(f"its forward sets the attribute `{_place(self).attribute(name)}`")

        def __delattr__(self, name: str) -> None:
            raise Untraceable(f"its forward deletes the attribute `{_place(self).attribute(name)}`")

    Probe.__name__ = Probe.__qualname__ = original.__name__
    return Probe
