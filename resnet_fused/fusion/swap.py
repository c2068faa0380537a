"""Give a module the fused forward by changing its class, and give the original class back.

The class of a fused module is a subclass of its original, made once per original, under the same name: parameters,
buffers, children, hooks and attributes stay where they are. Its forward runs the plan as long as the plan is known to
hold, and the original forward otherwise. Copies stay fused; a pickle holds the original. `docs/design.md`, "The swap",
says what this way costs and what others would.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.module import _has_any_global_hook

from resnet_fused.fusion.convs import ConvForm, conv_form, conv_of
from resnet_fused.fusion.norms import norm_of, signature
from resnet_fused.fusion.plans import BlockPlan, Plan
from resnet_fused.fusion.recognise import Recognition, recognise
from resnet_fused.fusion.trace import functions, lookups, original_class
from resnet_fused.nn.call import conv_bn_act, conv_bn_act_max_pool, conv_bn_chain, plain
from resnet_fused.nn.convs import RecognisedConv
from resnet_fused.nn.eligibility import hooked, keeps_methods, overridden
from resnet_fused.nn.norms import Norm, RecognisedNorm
from resnet_fused.nn.scripting import NotScriptable
from resnet_fused.nn.sums import PLUS, Sum


class Binding:
    """A recognition tied to the modules it was made for; it holds as long as the owner would call just these.

    Attributes:
        units: the modules of each unit of the plan and its activation, as `_run_unit` counts them.
        pools: the max pool behind each unit, or None.
        sums: how each unit adds what it is handed, if anything.
        containers: the owner and the containers below it that its forward reads, each with the children it had.
        shortcut_pools: those that a block's shortcut begins with.
        bypassed: modules that the plan does not call although the plain forward does, or calls in another order, and
            the PyTorch class that each computes as.
        indivisible: units that cannot be run module by module where somebody watches: the plan runs them in another
            order than the plain forward (those around a sum), or runs only a part of what a batch norm's forward does.
        norms: the batch norms that were recognised by their forwards, and on what that depends.
        lookups: what the owner's forward, and those of `norms` and recognised convolutions, find on their classes.
        contents: lists and dicts that the forward reads, and what a convolution was recognised by: the attributes of
            their owner, their names, what they held.
        full: the modes in which the recognition holds for inputs with elements only.
    """

    def __init__(self, owner: nn.Module, recognition: Recognition | None) -> None:
        self.recognition = recognition or Recognition()
        self.plan: Plan | None = self.recognition.plan
        self.units: list[tuple[nn.Module | RecognisedConv | None, Norm, nn.Module | None, str | None]] = []
        self.pools: list[nn.Module | None] = []
        self.sums: list[Sum] = []
        paths: list[str] = []
        if self.plan is not None:
            for unit in self.plan.all_units:
                conv, bn, act = (
                    None if path is None else owner.get_submodule(path) for path in (unit.conv, unit.bn, unit.act)
                )
                assert bn is not None
                self.units.append((conv_of(conv, unit.conv == ""), norm_of(bn), act, unit.activation))
                self.sums.append(unit.add or PLUS)
                self.pools.append(None if unit.pool is None else owner.get_submodule(unit.pool))
                paths += (*unit.paths, *([] if unit.pool is None else [unit.pool]))
            paths += self.plan.pools if isinstance(self.plan, BlockPlan) else ()
        block = self.plan if isinstance(self.plan, BlockPlan) else None
        self.shortcut_pools = [owner.get_submodule(path) for path in (block.pools if block else ())]
        self.bypassed = [(pool, original_class(pool)) for pool in self.shortcut_pools]
        for module in map(owner.get_submodule, self.plan.bypassed if self.plan else ()):
            self.bypassed.append((module, nn.Sequential if isinstance(module, nn.Sequential) else nn.Identity))
        reordered = block is not None and (block.shortcut is not None or block.pools != ())
        self.indivisible = [
            unit
            for unit, planned in zip(self.units, self.plan.all_units if self.plan else (), strict=True)
            if reordered
            or (block is None and planned.add)
            or isinstance(unit[1], RecognisedNorm)
            or isinstance(unit[0], RecognisedConv)
        ]
        recognised = [bn.module for _, bn, _, _ in self.units if isinstance(bn, RecognisedNorm)]
        self.contents = [(vars(owner), name, then) for name, then in self.recognition.contents.items()]
        self.full = set(self.recognition.full)
        convs = [conv.module for conv, *_ in self.units if isinstance(conv, RecognisedConv)]
        for conv in convs:
            form = conv_form(conv)
            if conv is not owner and isinstance(form, ConvForm):
                self.contents += [(vars(conv), name, vars(conv)[name]) for name in form.reads]
                self.full |= form.full
        self.norms = [(module, signature(module)) for module in recognised]
        cls = original_class(owner)
        self.lookups = lookups(cls, {"forward", *(self.recognition.reads or ())})
        for cls in {original_class(module) for module in (*recognised, *convs)}:
            self.lookups += lookups(cls, functions(cls))
        self.containers = [(module, list(module._modules.items())) for module in _containers(owner, paths)]

    def __reduce__(self) -> Any:
        """Copied and pickled as None: a copy has other modules."""
        return type(None), ()

    def holds(self) -> bool:
        """Whether the owner still calls the modules that the recognition was made for."""
        for cls, name, value in self.lookups:
            if getattr(cls, name, None) is not value:
                return False
        return (
            all(list(module._modules.items()) == children for module, children in self.containers)
            and all(signature(module) == then for module, then in self.norms)
            and all(attributes.get(name) == then for attributes, name, then in self.contents)
        )

    def unobserved(self) -> bool:
        """Whether nobody would notice that these modules are not called. (The units see to their own.)"""
        if _has_any_global_hook() or torch._C._get_tracing_state() is not None:
            return False
        for module, cls in self.bypassed:
            if hooked(module) or overridden(module) or not keeps_methods(original_class(module), cls):
                return False
        return all(plain(*unit) is None for unit in self.indivisible)


def _containers(owner: nn.Module, paths: list[str]) -> list[nn.Module]:
    """The owner, its lists, dicts and Sequentials, and every module on the way to `paths`."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        if id(module) not in found:
            found[id(module)] = module
            for child in module.children():
                if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                    visit(child)

    visit(owner)
    for path in paths:
        while "." in path:
            path = path.rpartition(".")[0]
            visit(owner.get_submodule(path))
    return list(found.values())


class FusedMixin(NotScriptable):
    """The behaviour of a fused module, in front of its original class."""

    _way_out = "call resnet_fused.unfuse(model) first"
    _original: type[nn.Module]
    _fusion: Binding | Recognition | None = None  # a recognition: to be bound; None: to be recognised anew

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the fused class out of what the original's `__init_subclass__` does, such as a registry."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        binding = current(self)  # type: ignore[arg-type]
        if binding is not None and binding.plan is not None and not kwargs and binding.unobserved():
            body = binding.plan.body(self.training, args)  # type: ignore[attr-defined]
            if body is not None and not (self.training in binding.full and _any_empty(args)):  # type: ignore[attr-defined]
                return body(self, *args)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _run_unit(self, k: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Unit `k` of the plan: pool(act(bn(conv(x)) + residual))."""
        assert isinstance(self._fusion, Binding)
        conv, bn, act, activation = self._fusion.units[k]
        pool = self._fusion.pools[k]
        if pool is not None and conv is not None:
            return conv_bn_act_max_pool(x, conv, bn, act, pool)
        return conv_bn_act(x, conv, bn, act, activation=activation, residual=residual, add=self._fusion.sums[k])

    def _run_block(self, x: Tensor, branch: int) -> Tensor | None:
        """The whole block, whose first `branch` units are its branch; None where its units are to run one by one."""
        assert isinstance(self._fusion, Binding)
        layers = [unit[:3] for unit in self._fusion.units]
        shortcut = layers[branch][:2] if len(layers) > branch else None
        pools = self._fusion.shortcut_pools
        pool = None if not pools else lambda x: functools.reduce(lambda x, pool: pool(x), pools, x)
        return conv_bn_chain(x, layers[:branch], shortcut, pool, self._fusion.sums[branch - 1])  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        _forget(self, name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _forget(self, name)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().register_buffer(name, *args, **kwargs)  # type: ignore[misc]
        _forget(self, name)

    def register_parameter(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().register_parameter(name, *args, **kwargs)  # type: ignore[misc]
        _forget(self, name)

    def extra_repr(self) -> str:
        original = super().extra_repr()  # type: ignore[misc]
        plan = "to be seen when it runs" if self._fusion is None else self._fusion.plan
        if plan is None:
            return original
        separator = "\n" if "\n" in original else ", "
        return f"{original}{separator if original else ''}fused={plan}"

    def _replicate_for_data_parallel(self) -> Any:
        """A replica gets its own children afterwards, and is bound to them when it runs."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        binding = self._fusion
        known = isinstance(binding, Binding) and binding.holds()
        replica.__dict__["_fusion"] = binding.recognition if known else None  # type: ignore[union-attr]
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds a module of the original class, for processes that need not know of this package; a copy is
        fused, and recognised anew when it first runs."""
        copying = sys._getframe(1).f_globals.get("__name__") == "copy"  # which asks as pickle does
        # From protocol 2 on, pickle insists on the class that the module has.
        reduced = super().__reduce_ex__(protocol if copying else 1)
        if not isinstance(reduced, tuple):
            return reduced
        rebuild, arguments, *rest = reduced
        arguments = tuple(self._original if a is type(self) else a for a in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != "_fusion"}
        return (_rebuild, (rebuild, arguments), *rest) if copying else (rebuild, arguments, *rest)


class FusedGraphMixin(FusedMixin):
    """The behaviour of a fused `torch.fx.GraphModule`, which has a class of its own, and its forward on that."""

    @contextlib.contextmanager
    def _as_original(self) -> Iterator[Any]:
        self.__class__ = self._original  # type: ignore[assignment]
        try:
            yield self
        finally:
            self.__class__ = fused_class(type(self))  # type: ignore[assignment, arg-type]

    def recompile(self) -> Any:
        """Sets the forward of the original class, which is recognised anew."""
        self.__dict__["_fusion"] = None
        with self._as_original() as module:
            return module.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        with self._as_original() as module:
            return _fused_anew(copy.deepcopy(module, memo))

    def __copy__(self) -> nn.Module:
        with self._as_original() as module:
            return _fused_anew(copy.copy(module))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with self._as_original() as module:
            rebuild, (state, *arguments) = module.__reduce_ex__(protocol)
        state = {name: value for name, value in state.items() if name != "_fusion"}
        return _rebuild, (rebuild, (state, *arguments))


def _fused_anew(module: nn.Module) -> nn.Module:
    """A copy with the fused forward, to be recognised when it first runs."""
    module.__dict__.pop("_fusion", None)
    module.__class__ = fused_class(original_class(module))  # type: ignore[assignment]
    return module


def _any_empty(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.numel() == 0 for x in inputs)


def _forget(module: Any, name: str) -> None:
    """An attribute was changed: what was recognised no longer counts if the forward looks it up."""
    binding = module.__dict__.get("_fusion")
    if isinstance(binding, Binding) and name != "training":
        reads = binding.recognition.reads
        if reads is None or name in reads or name == "forward":
            module.__dict__["_fusion"] = None


def _rebuild(rebuild: Any, arguments: tuple[Any, ...]) -> nn.Module:
    return _fused_anew(rebuild(*arguments))


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The fused subclass of a class."""
    if issubclass(original, fx.GraphModule):  # one for each module, which nobody else is to keep alive
        return _make_class(original, FusedGraphMixin)
    return _shared_class(original)  # type: ignore[arg-type]


@functools.cache
def _shared_class(original: type[nn.Module]) -> type[nn.Module]:
    return _make_class(original, FusedMixin)


def _make_class(original: type[nn.Module], mixin: type[FusedMixin]) -> type[nn.Module]:

    @functools.wraps(original.forward)  # whoever looks at the signature sees the original's
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FusedMixin):  # somebody kept the bound method, to wrap it, and the module was unfused
            return original.forward(self, *args, **kwargs)
        return FusedMixin.forward(self, *args, **kwargs)

    namespace = {
        "_original": original,
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (mixin, original), namespace)


def current(module: nn.Module) -> Binding | None:
    """What is known about a fused module, recognised anew where something was changed; None while it cannot be."""
    binding = module._fusion
    if isinstance(binding, Binding) and binding.holds():
        return binding
    # Not for a compiler's or a tracer's eyes; the plain forward is always right.
    if torch.compiler.is_compiling() or is_fx_symbolic_tracing() or torch._C._get_tracing_state() is not None:
        return None
    return bind(module, binding if isinstance(binding, Recognition) else recognise(module))


def bind(module: nn.Module, recognition: Recognition | None) -> Binding:
    """Make a recognition what a fused module's forward goes by."""
    binding = Binding(module, recognition)
    module.__dict__["_fusion"] = binding
    return binding


def is_fused(module: nn.Module) -> bool:
    """Whether the module has the fused forward, whatever its plan."""
    return isinstance(module, FusedMixin)


def swap_in(module: nn.Module, recognition: Recognition) -> None:
    """Make a module fused.

    Raises:
        TypeError: if its class cannot be subclassed or exchanged.
    """
    if not is_fused(module):
        module.__class__ = fused_class(original_class(module))  # type: ignore[arg-type]
    bind(module, recognition)


def swap_out(module: nn.Module) -> None:
    """Give a fused module its original class back.

    Raises:
        RuntimeError: if something else changed its class after it was fused.
    """
    if "_original" not in type(module).__dict__:
        raise RuntimeError(
            f"cannot unfuse a module whose class was changed to {type(module).__name__} after it was fused"
        )
    module.__class__ = original_class(module)
    module.__dict__.pop("_fusion", None)
