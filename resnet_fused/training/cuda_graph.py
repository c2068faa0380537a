"""A training step as a CUDA graph, which one call launches in place of some thousand."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from resnet_fused.dispatch import forced_backend

P = ParamSpec("P")
R = TypeVar("R")
Gradients = list[Tensor | None]

WARM_UP = 3
WARM_UP_DDP = 11  # DistributedDataParallel rebuilds its buckets and times its first iterations
MAX_GRAPHS = 4  # each keeps the memory of a step


def graphed(step: Callable[P, R], model: nn.Module, *, pool: tuple[int, int] | None = None) -> Callable[P, R]:
    """`step` as a CUDA graph, to be called in its place; on a CPU `step` itself.

        @functools.partial(resnet_fused.graphed, model=model)
        def step(images, labels):
            with torch.autocast("cuda", torch.bfloat16):
                loss = criterion(model(images), labels)
            scaler.scale(loss).backward()
            return loss

        for images, labels in loader:
            optimizer.zero_grad()
            loss = step(images, labels)
            scaler.step(optimizer)
            scaler.update()

    The first calls with inputs of a shape are ordinary steps, which compile and choose what there is to compile and
    choose; then the step is captured, and from there on replayed. A step runs as it is written where its inputs have
    another shape, as a last batch may, until that shape has come several times in a row.

    Args:
        step: forward, loss and backward on the GPU. It takes tensors on the GPU, nested as one likes, and values that
            compare equal where they are equal; it returns tensors and such values. Once captured it is not run again:
            no Python in it, no printing, no decision on the values of tensors. Gradient clipping and an optimizer made
            with `capturable=True` may be part of it; `GradScaler.step` waits for the GPU, and may not.
        model: what it trains; the gradients of its parameters arrive in `.grad`, added to what is there.
        pool: of `torch.cuda.graph_pool_handle()`: memory that the graphs of several steps share. Each keeps its
            gradients and results there; all else is gone once another has run.

    Returns:
        The callable. Its results hold no graph and are copies, good until they are dropped; so are gradients that were
        accumulated. A gradient that was None before a step lies in memory that the next step overwrites.

    Raises:
        TypeError: `step` is not callable, or `model` is not an `nn.Module`.
        Whatever `step` raises. What cannot be captured - a wait for the GPU, an input on the CPU - is a warning, once,
        and the step runs as it is written.
    """
    if not callable(step):
        raise TypeError(f"graphed: step must be callable, got {type(step).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed: model must be a torch.nn.Module, got {type(model).__name__}")
    if not torch.cuda.is_available():
        return step
    return functools.wraps(step)(_Graphed(step, model, pool))  # type: ignore[return-value]


@dataclass
class _Replay:
    """A captured step.

    Attributes:
        run: launches it.
        inputs: the tensors that it reads.
        outputs: what it returned.
        gradients: of each parameter, where it writes them; None where it gives none.
    """

    run: Callable[[], object]
    inputs: list[Tensor]
    outputs: Any
    gradients: Gradients


@dataclass
class _Graphed:
    """`step`, by graph for inputs that have come often enough."""

    step: Callable[..., Any]
    model: nn.Module
    pool: tuple[int, int] | None
    graphs: dict[Any, _Replay | None] = field(default_factory=dict)  # None: cannot be captured
    key: Any = None  # of the last call
    repeats: int = 0  # calls with that key, in a row

    def __post_init__(self) -> None:
        ddp = any(isinstance(module, DistributedDataParallel) for module in self.model.modules())
        self.warm_up = WARM_UP_DDP if ddp else WARM_UP
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        parameters = list(self.model.parameters())
        if not parameters or not _on_gpu(parameters[0]):
            return self.step(*args, **kwargs)
        key = self._key(leaves, spec, parameters)
        self.repeats = self.repeats + 1 if key == self.key else 1
        self.key = key
        if key not in self.graphs and self.repeats > self.warm_up and len(self.graphs) < MAX_GRAPHS:
            self.graphs[key] = self._captured(leaves, spec, parameters)
        replay = self.graphs.get(key)
        if replay is None:
            with self._side_stream():
                return _detached(self.step(*args, **kwargs))
        if replay.inputs:
            torch._foreach_copy_(replay.inputs, _tensors(leaves))
        with _accumulating(parameters, replay.gradients):
            replay.run()
        return tree_map_only(Tensor, torch.clone, replay.outputs)

    def _key(self, leaves: Sequence[Any], spec: TreeSpec, parameters: Sequence[Tensor]) -> Any:
        """All that a captured step depends on beside the values of tensors."""
        inputs = tuple((t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)
        weights = tuple((p.data_ptr(), p.requires_grad) for p in parameters)
        buffers = tuple(b.data_ptr() for b in self.model.buffers())
        modes = tuple((m.training, getattr(m, "require_backward_grad_sync", None)) for m in self.model.modules())
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_grad_enabled())
        return inputs, str(spec), weights, buffers, modes, autocast, forced_backend()

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        """The stream of the capture: backward runs where forward ran, and nothing may wait for the default stream."""
        if self.stream is None:
            self.stream = torch.cuda.Stream() if self.pool is None else _stream_of(self.pool)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _no_autocast_cache():
            yield
        current.wait_stream(self.stream)

    def _captured(self, leaves: Sequence[Any], spec: TreeSpec, parameters: Sequence[Tensor]) -> _Replay | None:
        """The step as a graph; None, and a warning, where it cannot be captured."""
        tensors = _tensors(leaves)
        if not all(map(_on_gpu, tensors)):
            return _as_written("an input is on the CPU; move it to the GPU before the step")
        if any(t.requires_grad for t in tensors):
            return _as_written("an input requires a gradient, which its copy in the graph would get")
        kept = [p.grad for p in parameters]
        static = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        args, kwargs = tree_unflatten(static, spec)
        try:
            for p in parameters:
                p.grad = None
            with self._side_stream():
                run, outputs = record(lambda: self.step(*args, **kwargs), self.stream, self.pool)
            gradients = [p.grad for p in parameters]
        except Exception as error:  # of an ordinary step it would have come before
            return _as_written((str(error).strip() or type(error).__name__).splitlines()[0])
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
        return _Replay(run, _tensors(static), _detached(outputs), gradients)


@functools.cache
def _stream_of(pool: tuple[int, int]) -> torch.cuda.Stream:
    """Of all steps that share a pool: memory that was freed on one stream is not allocated on another."""
    return torch.cuda.Stream()


def record(
    call: Callable[[], R], stream: torch.cuda.Stream | None, pool: tuple[int, int] | None
) -> tuple[Callable[[], object], R]:
    """A call as a CUDA graph, and where it leaves its results.

    Args:
        call: has run on that stream before.
        stream: of the capture.
        pool: of memory; None: one of its own.
    """
    graph = torch.cuda.CUDAGraph()
    # A loader's thread pins memory meanwhile: what other threads do is not part of the capture, and may not break it.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        results = call()
    return graph.replay, results


@contextmanager
def _accumulating(parameters: Sequence[Tensor], gradients: Gradients) -> Iterator[None]:
    """Around a replay, which writes `gradients`: they are added to what the parameters have."""
    before = [p.grad for p in parameters]
    own = [i for i, (b, g) in enumerate(zip(before, gradients, strict=True)) if b is g and b is not None]
    for i in own:  # not cleared since the last replay: this one overwrites it
        before[i] = gradients[i].clone()  # type: ignore[union-attr]
    yield
    sums, addends = [], []
    for p, b, g in zip(parameters, before, gradients, strict=True):
        if b is not None and g is not None:
            sums.append(b)
            addends.append(g)
        p.grad = g if b is None else b
    if sums:
        torch._foreach_add_(sums, addends)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast without its cache, whose copies of the weights a graph would go on reading."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _detached(outputs: Any) -> Any:
    return tree_map_only(Tensor, torch.Tensor.detach, outputs)


def _as_written(reason: str) -> _Replay | None:
    warnings.warn(f"graphed: no CUDA graph, the step runs as it is written: {reason}", stacklevel=4)
    return None


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda
