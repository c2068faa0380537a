"""Trace a module's forward into a graph of its direct computation, without side effects, or say why that cannot be done.

Every call of a submodule is a leaf. What torch.fx would silently lose or bake in is refused instead: a context such as `no_grad` or
autocast around a part of the forward, random numbers, tensors made on the way, attributes that the forward sets or that can change
without being set, questions about the type of a value. What a forward reads from outside the module (globals, class attributes, plain
attributes of its children) is taken as constant.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

InputType = Literal["tensor", "list"]


class Untraceable(Exception):
    """The forward is not the graph that tracing would give; the message says why."""


@dataclass(frozen=True)
class Traced:
    """A traced forward; `asked` tells whether it depends on the type of its inputs."""

    graph: fx.Graph
    arity: int
    asked: bool


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it: fused classes name theirs in `_original`."""
    return getattr(type(module), "_original", type(module))


def trace(module: nn.Module, training: bool, inputs: InputType = "tensor") -> Traced:
    """Trace `module`'s own forward, called with its required arguments, in the given mode.

    Args:
        module: left untouched; what is traced is a stand-in that shares its parameters, buffers and children.
        training: the mode of the module itself; its children are leaves.
        inputs: what the inputs claim to be when asked.

    Raises:
        Untraceable: with the reason.
    """
    if "forward" in module.__dict__:
        raise Untraceable("its forward is overridden on the instance")
    # Twice: a forward that gives the same graph with gradients on and autocast off, and the other way round, asks for neither and
    # holds no context that changes either.
    first, second = (_trace_once(module, training, inputs, ambient) for ambient in (True, False))
    if str(first.graph) != str(second.graph):
        raise Untraceable("its forward depends on whether gradients or autocast are enabled")
    return first


def _trace_once(module: nn.Module, training: bool, inputs: InputType, ambient: bool) -> Traced:
    tracer = _Tracer(original_class(module), list if inputs == "list" else Tensor)
    try:
        stand_in = _stand_in(module, training)
        with _reproducible(), _surroundings(ambient), _NoTensorWork():
            tracer.ambient = _ambient()
            graph = tracer.trace(stand_in)
    except Untraceable:
        raise
    except Exception as error:  # a forward may raise anything when it is handed proxies
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise Untraceable(f"its forward cannot be traced: {type(error).__name__}: {first_line}") from error
    return Traced(graph, tracer.arity, tracer.asked)


class _Value(fx.Proxy):
    """A proxy that outside torch.fx has the type of the value it stands for."""

    tracer: _Tracer
    _is_param = False  # nn.Parameter's isinstance asks

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.startswith(("torch.fx", "torch.utils._pytree", __name__)):
            return _Value
        return self.tracer.type_of(self.node)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, original: type[nn.Module], input_type: type) -> None:
        super().__init__()
        self.original = original
        self.input_type = input_type
        self.asked = False
        self.arity = 0
        self.ambient: tuple[Any, ...] = ()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        forward = self.original.forward
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise Untraceable(f"its forward takes {'**' if p.kind is p.VAR_KEYWORD else '*'}{p.name}")
        required = [p for p in parameters if p.default is p.empty]
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            raise Untraceable("its forward requires keyword arguments")
        self.arity = len(required)
        # What is left out takes its default, as in a plain call.
        return forward, [self.root] + [self.create_proxy("placeholder", p.name, (), {}) for p in required]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        if _ambient() != self.ambient:
            raise Untraceable("a part of its forward runs under a context of its own (no_grad, autocast, checkpoint, ...)")
        return super().create_proxy(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, (list, dict)) and type(a) not in (list, dict):
            raise Untraceable(f"its forward builds a {type(a).__name__}")
        return super().create_arg(a)

    def type_of(self, node: fx.Node) -> type:
        if node.op == "placeholder":
            self.asked = True
            return self.input_type
        if node.op == "get_attr":
            return Tensor
        if node.op == "call_module" and type(self.root.get_submodule(str(node.target))) in _TENSOR_MODULES:
            return Tensor
        raise Untraceable(f"its forward asks for the type of an intermediate value (`{node.name}`)")


_TENSOR_MODULES = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear)


def _stand_in(module: nn.Module, training: bool) -> nn.Module:
    """A module of the same forward and children that a trace cannot change `module` through."""
    stand_in = object.__new__(_probe_class(original_class(module)))
    state = dict(module.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        state[name] = copy.copy(state[name])
    state["training"] = training
    object.__setattr__(stand_in, "__dict__", state)
    return stand_in


_INTERNALS = frozenset(nn.Module().__dict__)
_IMMUTABLE = (
    *(bool, int, float, complex, str, bytes, frozenset, type(None), type, enum.Enum),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    *(Tensor, nn.Module),  # these are named in the graph, not copied into it
)


def _immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_immutable, value))
    return isinstance(value, _IMMUTABLE)


class _Unregistered:
    """Keeps a class made here out of what its original's `__init_subclass__` does, such as a registry."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


@functools.cache
def _probe_class(original: type[nn.Module]) -> type[nn.Module]:
    """`original`, but setting an attribute, or reading one that can change without being set, is refused."""

    class Probe(_Unregistered, original):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name not in _INTERNALS and name != "__dict__":
                if name in object.__getattribute__(self, "__dict__") and not _immutable(value):
                    raise Untraceable(f"its forward reads the mutable attribute `{name}`")
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            raise Untraceable(f"its forward sets the attribute `{name}`")

        def __delattr__(self, name: str) -> None:
            raise Untraceable(f"its forward deletes the attribute `{name}`")

    Probe.__name__ = Probe.__qualname__ = original.__name__
    return Probe


class _NoTensorWork(TorchDispatchMode):
    """A trace handles proxies only; a tensor made or changed on the way would be a constant afterwards."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes on tensors that do not come from its inputs ({func})")


def _ambient() -> tuple[Any, ...]:
    """The thread's state that contexts such as no_grad, autocast or saved-tensor hooks change."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@contextlib.contextmanager
def _surroundings(ambient: bool) -> Iterator[None]:
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, not ambient)
        with torch.inference_mode(False), torch.set_grad_enabled(ambient):
            yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Random generators are put back; a forward that used one is refused."""
    generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (_torch_state, _set_torch_state),
    ]
    if "numpy.random" in sys.modules:
        numpy_random = sys.modules["numpy.random"]
        generators.append((lambda: _comparable(numpy_random.get_state()), numpy_random.set_state))
    before = [get() for get, _ in generators]
    try:
        yield
    finally:
        changed = False
        for (get, put), state in zip(generators, before, strict=True):
            if get() != state:
                put(state)
                changed = True
    if changed:
        raise Untraceable("its forward draws random numbers")


def _torch_state() -> list[int]:
    return torch.default_generator.get_state().tolist()


def _set_torch_state(state: list[int]) -> None:
    torch.default_generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _comparable(state: Any) -> tuple[Any, ...]:
    return tuple(part.tolist() if hasattr(part, "tolist") else part for part in state)
