"""What a launcher does for arguments of one description, watched once and then replayed.

A launcher makes grids, sizes and configurations of the shapes, strides, dtypes and devices of its arguments, and never
of their values. So its first run with a description is watched: what it allocates, what it launches on which tensors.
Later runs replay that, each launch with the binary that Triton chose for it, without binding and specialising again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

# Triton's versions whose binaries are launched as `Launch` does it; any other launches by itself.
_BINDABLE = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"], ["3", "9"])
ALIGNMENT = 16  # bytes: all that Triton's binaries for NVIDIA's GPUs assume of a pointer


class Allocation(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Launch:
    """A launch of `kernel`, bound to the binary for aligned pointers. Triton launches by itself where one is not
    aligned, or where somebody watches launches.

    All else that Triton specialises on - dtypes, and whether a number is 1 or a multiple of 16 - is the same in every
    replay.

    Args:
        kernel: the jitted function.
        grid: the number of programs.
        args: its positional arguments, None in place of tensors.
        places: (position, slot) of each tensor.
        options: its constants and the compiler's options, by name.
    """

    __slots__ = ("_args", "_compiled", "_grid", "_kernel", "_options", "_places", "_values")

    def __init__(
        self, kernel: Any, grid: int, args: list[Any], places: list[tuple[int, int]], options: dict[str, Any]
    ) -> None:
        self._kernel, self._grid, self._args, self._places, self._options = kernel, grid, args, places, options
        self._compiled: Any = None
        self._values: list[Any] = []

    def __call__(self, slots: list[Any], stream: int | None) -> None:
        """Launch on the tensors in these slots; where there is no `stream`, Triton does."""
        compiled = self._compiled
        if compiled is not None and stream is not None:
            values, addresses = self._values.copy(), 0
            for position, slot in self._places:
                values[position] = address = slots[slot].data_ptr()
                addresses |= address
            if addresses % ALIGNMENT == 0:
                function, metadata = compiled.function, compiled.packed_metadata
                compiled.run(self._grid, 1, 1, stream, function, metadata, None, None, None, *values)
                return
        args = self._args.copy()
        for position, slot in self._places:
            args[position] = slots[slot]
        launched = self._kernel[(self._grid,)](*args, **self._options)
        if stream is not None and all(slots[slot].data_ptr() % ALIGNMENT == 0 for _, slot in self._places):
            self._bind(launched)

    def _bind(self, compiled: Any) -> None:
        if compiled is not None and compiled.metadata.target.backend == "cuda" and not self._kernel.pre_run_hooks:
            constants = [self._options[name] for name in self._kernel.arg_names[len(self._args) :]]
            self._values, self._compiled = [*self._args, *constants], compiled


class Replay:
    """A launcher's run: slots hold the arguments and then what is allocated.

    Args:
        allocations: what is allocated, in the order of its slots.
        launches: in order.
        results: the slots of what is returned; one alone, not in a tuple, for a tensor.
        device: of the arguments.
    """

    def __init__(
        self,
        allocations: Sequence[Allocation],
        launches: Sequence[Launch],
        results: int | tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._allocations, self._launches, self._results = allocations, launches, results
        self._index = device.index if device.type == "cuda" else None

    def __call__(self, args: tuple[Any, ...]) -> Any:
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                return self._run(args)
        return self._run(args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        slots = list(args)
        for size, stride, dtype, device in self._allocations:
            slots.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        current = _stream()
        for launch in self._launches:
            launch(slots, current)
        results = self._results
        return slots[results] if isinstance(results, int) else tuple([slots[slot] for slot in results])


def _stream() -> int | None:
    """The current stream; None where Triton must launch by itself."""
    runtime = triton.knobs.runtime
    if not _BINDABLE or runtime.interpret or _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
        return None
    active = driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


def _hooked(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


_ALLOCATING = tuple(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)


class _Watch(TorchDispatchMode):
    """Watches a launcher run on `args`."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__()
        self._inputs = {id(a): slot for slot, a in enumerate(args) if isinstance(a, Tensor)}
        self._first = len(args)  # slot of an allocation
        # A launcher that got one tensor twice does not tell which of the two it used.
        self._replayable = len(self._inputs) == sum(isinstance(a, Tensor) for a in args)
        self._allocated: list[Tensor] = []
        self._launches: list[Launch] = []
        self._launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._launching or func.is_view:
            return result
        if func.overloadpacket in _ALLOCATING:
            self._allocated.append(result)
        else:
            self.give_up()  # something was computed
        return result

    def give_up(self) -> None:
        """This run cannot be replayed."""
        self._replayable = False

    def launch(self, kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch, and note how."""
        self._launching = True
        kernel[(grid,)](*args, **options)
        self._launching = False
        places = []
        for position, a in enumerate(args):
            if isinstance(a, Tensor):
                slot = self._slot(a)
                if slot is None:
                    return self.give_up()
                places.append((position, slot))
        constants = [None if isinstance(a, Tensor) else a for a in args]
        self._launches.append(Launch(kernel, grid, constants, places, options))

    def _slot(self, t: Tensor) -> int | None:
        """Where a tensor will be: an argument itself, or what was allocated, from its start on."""
        if id(t) in self._inputs:
            return self._inputs[id(t)]
        storages = [one.untyped_storage()._cdata for one in self._allocated]
        storage = t.untyped_storage()._cdata
        return self._first + storages.index(storage) if storage in storages and not t.storage_offset() else None

    def replay(self, returned: Any, device: torch.device) -> Replay | None:
        """What was done; None where it cannot be replayed."""
        results = (returned,) if isinstance(returned, Tensor) else returned
        allocations = [Allocation(tuple(t.shape), t.stride(), t.dtype, t.device) for t in self._allocated]
        slots: list[int] = []
        for t in results:
            slot = self._slot(t)
            if not self._replayable or slot is None or slot < self._first or slot in slots:
                return None
            made = self._allocated[slot - self._first]
            if (t.numel(), t.dtype) != (made.numel(), made.dtype):
                return None
            # A permutation of what was allocated is allocated as such.
            allocations[slot - self._first] = Allocation(tuple(t.shape), t.stride(), t.dtype, t.device)
            slots.append(slot)
        where = slots[0] if isinstance(returned, Tensor) else tuple(slots)
        return Replay(allocations, self._launches, where, device)


_watching = threading.local()


def watch(run: Callable[[], Any], args: tuple[Any, ...]) -> tuple[Any, Replay | None]:
    """The results of a launcher's run on `args`, and that run, to be replayed with others of the same description."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    _watching.by = watched = _Watch(args)
    try:
        with watched:
            returned = run()
    finally:
        _watching.by = None
    return returned, watched.replay(returned, device)


def watching() -> _Watch | None:
    """Who watches the launcher that runs, if anybody does."""
    return getattr(_watching, "by", None)


def never_replay() -> None:
    """The launcher that runs depends on more than what describes its arguments: it must run again next time."""
    watch = watching()
    if watch is not None:
        watch.give_up()
