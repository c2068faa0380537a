"""Which modules compute a batch norm, whatever their class, and what their forwards call behind it.

A class of its own is looked into: its forward is traced, and must read nothing but what belongs to a batch norm; what
of it stands before the first call of a child is then run on random numbers, and must do to them, and to the running
statistics, what a batch norm does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from resnet_fused.fusion.isolation import Untraceable
from resnet_fused.fusion.nodes import called_activation
from resnet_fused.fusion.trace import (
    AsksForGradient,
    Traced,
    functions,
    lookups,
    original_class,
    record,
    trace,
)
from resnet_fused.nn.call import plain
from resnet_fused.nn.eligibility import calls_forward, computes_as, not_plain, overridden
from resnet_fused.nn.norms import BATCH_NORMS, Norm, RecognisedNorm, says_plain

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SETTINGS = ("eps", "momentum", "affine", "track_running_stats", "num_features")
_KNOWN = {*_TENSORS, *_SETTINGS, "training", "process_group", "__dict__"}


@dataclass(frozen=True)
class NormForm:
    """What a module that computes a batch norm does.

    Attributes:
        constant: the statistics are the running ones in training, too.
        tail: the children that it calls behind the normalisation, one after the other; None for ReLU as a function.
    """

    constant: bool = False
    tail: tuple[str | None, ...] = ()


_PLAIN = NormForm()
_forms: dict[Any, NormForm | str] = {}  # by class and what else decides: see `signature`


def norm_form(module: nn.Module) -> NormForm | str | None:
    """What a module does as a batch norm; why it is none although it looks like one; None where it does not."""
    if _is_native(module):
        return _PLAIN
    if not looks_like_norm(module):
        return None
    if not overridden(module) and any(computes_as(module, expected) for expected in BATCH_NORMS):
        return _PLAIN
    cls = original_class(module)
    if cls in BATCH_NORMS:
        return not_plain(module, cls)
    if overridden(module) or not calls_forward(cls):
        return f"{cls.__name__} is called in a way of its own"
    if any(isinstance(getattr(cls, name, None), property) for name in _TENSORS):
        return f"{cls.__name__} computes its parameters"  # as a parametrization does
    code = tuple(lookups(cls, functions(cls)))
    key = (cls, code, tuple(module._modules), tuple(module.__dict__), *signature(module)[1:])
    if key not in _forms:
        _forms[key] = _look_into(module)
    return _forms[key]


def norm_of(module: nn.Module) -> Norm:
    """A batch norm as the functions of `nn.units` take it."""
    form = norm_form(module)
    if _is_native(module) or not isinstance(form, NormForm):
        return module
    return RecognisedNorm(module, form.constant, bool(form.tail))


_ANY = nn.BatchNorm2d(1, device="cpu")


def culprit(conv: Any, bn: Norm, act: nn.Module | None, activation: str | None = "relu") -> tuple[int, str] | None:
    """Which of (conv, bn, act) cannot be run in one fused call, and why; None if they can."""
    for k, modules in enumerate(((conv, _ANY, None), (conv, bn, None), (conv, bn, act))):
        reason = plain(*modules, activation, in_forward=False)
        if reason is not None:
            return k, reason
    return None


def other_norm(module: nn.Module) -> str | None:
    """The name of a normalisation that is not fused, whatever it follows."""
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
    other = isinstance(module, known) and not looks_like_norm(module)
    return original_class(module).__name__ if other else None


def _is_native(module: nn.Module) -> bool:
    """Whether the module is PyTorch's, or one of ours, which says of itself that its batch norm is PyTorch's."""
    cls = original_class(module)
    return computes_as(module, cls) if cls in BATCH_NORMS else says_plain(cls)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether the module has what a batch norm of pictures has."""
    if isinstance(module, BATCH_NORMS):
        return True
    if isinstance(module, (_NormBase, torch.jit.ScriptModule)):
        return False
    return all(isinstance(module._buffers.get(name), Tensor) for name in ("running_mean", "running_var"))


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What decides the form of modules of one class: children, settings, which parameters and buffers there are, and
    how many processes, which a norm may ask for."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    settings = tuple(module.__dict__.get(name) for name in _SETTINGS)
    tensors = {**module._parameters, **module._buffers}
    return (tuple(module._modules.items()), settings, tuple(tensors.get(name) is None for name in _TENSORS), world)


def _super_forward(x: Tensor) -> Tensor:
    """Stands in a graph for the forward of the PyTorch class that a module's class extends."""
    raise NotImplementedError


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return record(self, _super_forward, x)


class _SyncBatchNorm(nn.SyncBatchNorm):
    def forward(self, x: Any) -> Any:
        return record(self, _super_forward, x)


_STUBS: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm2d: _BatchNorm2d, nn.SyncBatchNorm: _SyncBatchNorm}


def _look_into(module: nn.Module) -> NormForm | str:
    name = original_class(module).__name__
    base = next((stub for cls, stub in _STUBS.items() if isinstance(module, cls)), None)
    try:
        modes, traces = zip(*_traces(module, base), strict=True)
        for traced in traces:
            _check_reads(module, traced)
        cores, tails = zip(*(split(traced.graph) for traced in traces), strict=True)
    except Untraceable as error:
        return f"{name} is no batch norm that is understood: {error}"
    if len(set(tails)) > 1:
        return f"{name} calls other modules in training than in evaluation"
    for constant in (False, True):
        if all(_computes(module, core, training, constant) for core, training in zip(cores, modes, strict=True)):
            return NormForm(constant, tails[0])
    return f"{name} computes something else than a batch norm"


def _traces(module: nn.Module, base: type[nn.Module] | None) -> Iterator[tuple[bool, Traced]]:
    """The forward in each mode and, where it asks for that, for inputs with and without a gradient."""
    for training in (True, False):
        try:
            yield training, trace(module, training, base=base)
        except AsksForGradient:
            for gradient in (True, False):
                yield training, trace(module, training, base=base, gradient=gradient)


def _check_reads(module: nn.Module, traced: Traced) -> None:
    """What the form depends on must be what the signature tells."""
    if traced.arity != 1:
        raise Untraceable(f"its forward takes {traced.arity} inputs")
    if traced.full:
        raise Untraceable("its forward treats empty inputs in a way of its own")
    if not isinstance(getattr(module, "eps", None), float):
        raise Untraceable("it has no eps")
    for name in sorted(traced.reads - _KNOWN - set(module._modules) - set(nn.Module().__dict__)):
        if name in module.__dict__ or not callable(getattr(type(module), name, None)):
            raise Untraceable(f"its forward reads the attribute `{name}`")


def split(graph: fx.Graph) -> tuple[fx.Graph, tuple[str | None, ...]]:
    """The graph up to the first call of a child, and what is called from there on."""
    output = next(iter(reversed(graph.nodes)))
    value = output.args[0]
    tail: list[str | None] = []
    behind = {output}
    while isinstance(value, fx.Node) and len(value.all_input_nodes) == 1 and len(value.users) == 1:
        if value.op == "call_module" and len(value.args) == 1 and not value.kwargs:
            tail.insert(0, str(value.target))
        elif called_activation(value) == "relu":
            tail.insert(0, None)
        else:
            break
        behind.add(value)
        value = value.args[0]
    if not isinstance(value, fx.Node) or len(value.users) > 1:
        raise Untraceable("its forward returns more than one value")
    core = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in behind:
            continue
        if node.op == "call_module":
            raise Untraceable(f"its forward calls `{node.target}` and goes on")
        if all(used in copies for used in node.all_input_nodes):
            copies[node] = copy = core.node_copy(node, lambda n: copies[n])
            if node.target is _super_forward:
                copy.op, copy.target = "call_module", "own"
    core.output(copies[value])
    return core, tuple(tail)


def _computes(module: nn.Module, core: fx.Graph, training: bool, constant: bool) -> bool:
    """Whether a graph does to random numbers, and to the running statistics, what a batch norm does."""
    channels = len(module.running_mean if module.running_mean is not None else module.weight)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator, device="cpu") + 0.5

    tensors = {**module._parameters, **module._buffers}
    root = nn.Module()
    own, expected = (nn.BatchNorm2d(channels, device="cpu").train(training) for _ in range(2))
    for name in _TENSORS:
        present = tensors.get(name) is not None
        value = (torch.tensor(3, device="cpu") if name == _TENSORS[-1] else random(channels)) if present else None
        for owner in (root, own, expected):
            owner._parameters.pop(name, None)
            owner._buffers[name] = value if owner is not expected or value is None else value.clone()
    for name in ("eps", "momentum", "track_running_stats"):
        for owner in (own, expected):
            setattr(owner, name, getattr(module, name, getattr(owner, name)))
    root.own = own
    x = random(2, channels, 2, 2)
    given = x.clone()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            y = fx.Interpreter(fx.GraphModule(root, core)).run(given)
            if constant:
                vectors = (expected.running_mean, expected.running_var, expected.weight, expected.bias)
                z = F.batch_norm(x, *vectors, False, 0.0, expected.eps)
            else:
                z = expected(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):  # what a forward may raise
        return False
    same = isinstance(y, Tensor) and y.shape == z.shape and torch.allclose(y, z, rtol=1e-10, atol=1e-10)
    kept = [(root._buffers[name], expected._buffers[name]) for name in _TENSORS]
    return same and torch.equal(given, x) and all(a is b or torch.allclose(a, b, rtol=1e-10) for a, b in kept)  # type: ignore[arg-type]
