"""Runs the project's warp-specialised Gluon kernels on a CPU, as threads over numpy, with adversarial asynchrony.

Each role of a kernel is a thread; one runs at a time, and which one is drawn at every operation. Copies, products and
stores are queued and take effect as late as the draw wants, but never after what waits for them: a copy poisons its
destination with NaN until it arrives, a product reads its operands and a store its source only when it happens. So a
missing or misplaced barrier, a wrong phase or arrival count shows as a wrong result, an error or a deadlock. mbarriers
count arrivals and bytes as PTX says. Not simulated: the warps of one role (the compiler joins those), layouts, rounding
of products.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch


class Tensor(np.ndarray):
    """A block in registers."""

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def to(self, dtype):
        if str(dtype) in ("fp64", "fp32", "int32"):
            return self.astype({"fp64": np.float64, "fp32": np.float32, "int32": np.int32}[dtype]).view(Tensor)
        return self.astype(np.float16).astype(np.float32).view(Tensor) if "16" in str(dtype) else self


def _tensor(values):
    return np.asarray(values, dtype=np.float32).view(Tensor)


class Pointer:
    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, offsets):
        return Pointer(self.values, offsets)


class Descriptor:
    """A tensor through a `plan.experimental.View`."""

    def __init__(self, tensor, view):
        memory = tensor.permute(0, 2, 3, 1).numpy()
        strides = [stride * memory.itemsize for stride in view.strides]
        self.array = np.lib.stride_tricks.as_strided(memory, view.shape, strides)
        self.box, self.dtype, self.layout = list(view.box), "fp16", None
        self.block_type = SimpleNamespace(shape=self.box, nbytes=2 * math.prod(self.box))

    def _overlap(self, start):
        inside = [
            (min(max(0, -a), b), max(0, min(b, n - a)))
            for a, b, n in zip(start, self.box, self.array.shape, strict=True)
        ]
        source = tuple(slice(a + low, a + max(low, high)) for a, (low, high) in zip(start, inside, strict=True))
        return tuple(slice(low, max(low, high)) for low, high in inside), source

    def read(self, start):
        box = np.zeros(self.box, np.float32)
        inside, source = self._overlap(start)
        if all(part.start < part.stop for part in inside):
            box[inside] = self.array[source]
        return box

    def write(self, start, box):
        inside, target = self._overlap(start)
        if all(part.start < part.stop for part in inside):
            self.array[target] = box[inside]


def descriptor(tensor, view):
    return None if tensor is None else Descriptor(tensor, view)


class Memory:
    """Shared or tensor memory, or a view of it."""

    def __init__(self, machine, data, root=None):
        self.machine, self.data, self.root = machine, data, root or self
        self.unfenced = False  # written by threads, not yet visible to copies
        self.layout = None

    def _view(self, data):
        return Memory(self.machine, data, self.root)

    def index(self, i):
        return self._view(self.data[int(i)])

    def slice(self, start, length):
        return self._view(self.data[start : start + length])

    def reshape(self, shape):
        view = self.data.reshape(shape)
        assert np.shares_memory(view, self.data)
        return self._view(view)

    def permute(self, order):
        return self._view(self.data.transpose(order))

    def load(self, layout=None):
        self.machine.step()
        return _tensor(self.data.copy())

    def store(self, value):
        self.machine.step()
        self.data[...] = value
        self.root.unfenced = True


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self):
        self.count = self.pending = self.bytes = self.parity = None

    def init(self, count):
        self.count, self.pending, self.bytes, self.parity = count, count, 0, 0

    def _check(self):
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.parity, self.pending = 1 - self.parity, self.count

    def arrive(self, expected=0):
        self.pending -= 1
        self.bytes += expected
        self._check()

    def complete(self, arrived):
        self.bytes -= arrived
        self._check()

    def ended(self, phase):
        return self.parity != phase

    def index(self, _):
        return self


class Barriers:
    def __init__(self, number):
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, i):
        return self.barriers[int(i)]


class Deadlock(AssertionError):
    pass


class Machine:
    """One program: its threads, one of which runs, and what is in flight."""

    def __init__(self, program, programs, seed):
        self.program, self.programs, self.draw = program, programs, random.Random(seed)
        self.turn = threading.Condition()
        self.alive, self.waiting, self.running = [0], {}, 0
        # How soon what is in flight happens, and how often each role runs: prompt, or almost starved.
        self.prompt = self.draw.choice([0.01, 0.3, 0.9])
        self.weights = [self.draw.choice([0.02, 1.0]) for _ in range(4)]
        self.local = threading.local()
        self.local.me = 0
        self.flight = {"copies": [], "stores": deque(), "products": deque()}  # only copies overtake one another
        self.error = None

    # -- scheduling

    def step(self):
        """Something may happen; another thread may go on."""
        while self._in_flight() and self.draw.random() < self.prompt:
            self._something_happens()
        self._switch()

    def _in_flight(self):
        return [kind for kind, queue in self.flight.items() if queue]

    def _something_happens(self):
        kind = self.draw.choice(self._in_flight())
        queue = self.flight[kind]
        (queue.pop(self.draw.randrange(len(queue))) if kind == "copies" else queue.popleft())()

    def _next(self):
        ready = [role for role in self.alive if role not in self.waiting or self.waiting[role]()] or self.alive
        return self.draw.choices(ready, [self.weights[role] for role in ready])[0]

    def _switch(self):
        with self.turn:
            me = self.local.me
            self.running = self._next()
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.running == me or self.error)
            if self.error:
                raise self.error

    def wait_until(self, condition, what):
        me = self.local.me
        while not condition():
            self.waiting[me] = condition
            if self._in_flight():
                self._something_happens()
            elif all(role in self.waiting and not self.waiting[role]() for role in self.alive):
                raise Deadlock(f"every role waits and nothing is in flight; the last waits for {what}")
            self._switch()
        self.waiting.pop(me, None)

    def drain(self, kind, left):
        while len(self.flight[kind]) > left:
            self.flight[kind].popleft()()

    def run_roles(self, roles):
        def body(me, function, arguments):
            self.local.me = me
            try:
                with self.turn:
                    self.turn.wait_for(lambda: self.running == me or self.error)
                if not self.error:
                    function(*arguments)
            except BaseException as error:
                self.error = self.error or error
            with self.turn:
                self.alive.remove(me)
                self.waiting.pop(me, None)
                if self.alive:
                    self.running = self._next()
                self.turn.notify_all()

        self.alive = list(range(len(roles)))
        self.running = self._next()
        threads = [threading.Thread(target=body, args=(i, *role)) for i, role in enumerate(roles)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        assert not self._in_flight(), f"{self._in_flight()} in flight when the program ends"

    # -- copies and products

    def copy_in(self, source, at, barrier, target):
        self.step()
        assert not target.root.unfenced, "a copy into memory that threads wrote without a fence"
        at = [int(a) for a in at]
        target.data[...] = np.nan

        def happen():
            target.data[...] = source.read(at)
            barrier.complete(source.block_type.nbytes)

        self.flight["copies"].append(happen)

    def copy_out(self, target, at, source):
        self.step()
        assert not source.root.unfenced, "a copy out of memory that threads wrote without a fence"
        at = [int(a) for a in at]
        self.flight["stores"].append(lambda: target.write(at, source.data))

    def fence(self):
        for memory in self.memories:
            memory.unfenced = False

    def warpgroup_mma(self, a, b, acc, is_async):
        self.step()
        assert is_async

        def happen():
            acc[...] += a.data @ b.data

        self.flight["products"].append(happen)
        return acc

    def warpgroup_mma_wait(self, num_outstanding, deps):
        self.step()
        self.drain("products", num_outstanding)
        return deps[0]

    def tcgen05_mma(self, a, b, acc, use_acc, mbarriers):
        self.step()

        def happen():
            product = a.data @ b.data
            acc.data[...] = acc.data + product if use_acc else product

        self.flight["products"].append(happen)
        for barrier in mbarriers:
            self.tcgen05_commit(barrier)

    def tcgen05_commit(self, barrier):
        self.step()
        self.flight["products"].append(barrier.arrive)

    # -- the modules that a kernel sees

    def allocate(self, dtype, shape, layout):
        if "int64" in str(dtype):
            return Barriers(shape[0]) if len(shape) == 2 else Barrier()
        self.memories.append(Memory(self, np.full(shape, np.nan, np.float32)))
        return self.memories[-1]

    def modules(self):
        self.memories = []

        def barrier_wait(barrier, phase):
            self.step()
            self.wait_until(lambda: barrier.ended(int(phase)), f"phase {phase}")

        def stepping(function):
            def call(*args, **options):
                self.step()
                return function(*args, **options)

            return call

        def arrive(barrier, count, pred=True):
            if pred:
                assert count == 1
                barrier.arrive()

        def load(pointer, mask, other):
            values = np.where(mask, pointer.values[np.where(mask, pointer.at, 0)], other)
            return values.astype(pointer.values.dtype).view(Tensor)

        def store(pointer, value, mask=True):
            at, value, mask = np.broadcast_arrays(pointer.at, value, mask)
            pointer.values[at[mask]] = value[mask]

        gl = SimpleNamespace(
            float32="fp32",
            float64="fp64",
            int32="int32",
            int64="int64",
            constexpr=lambda value: value,
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            num_warps=lambda: 4,
            cdiv=lambda a, b: -(-a // b),
            where=lambda c, a, b: np.where(c, a, b).astype(np.float32).view(Tensor) if np.ndim(c) else (a if c else b),
            zeros=lambda shape, dtype, layout: _tensor(np.zeros(shape)),
            arange=lambda start, end, layout: np.arange(start, end),
            load=load,
            store=store,
            minimum=min,
            cast=lambda value, dtype: np.float64(value),
            sum=lambda value, axis: value.sum(axis),
            fma=lambda a, b, c: (np.float64(a) * b + c).astype(np.float32).view(Tensor),
            convert_layout=lambda value, layout: value,
            static_range=range,
            allocate_shared_memory=self.allocate,
            warp_specialize=lambda roles, warps, registers: self.run_roles(roles),
            NVMMADistributedLayout=lambda **options: None,
            SliceLayout=lambda dim, parent: None,
            BlockedLayout=lambda *sizes: None,
        )
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.init(count),
            expect=stepping(lambda barrier, bytes: barrier.arrive(bytes)),
            arrive=stepping(arrive),
            wait=barrier_wait,
        )
        tma = SimpleNamespace(store_wait=stepping(lambda pendings: self.drain("stores", pendings)))
        return {
            "gl": gl,
            "mbarrier": mbarrier,
            "tma": tma,
            "copy_in": self.copy_in,
            "copy_out": self.copy_out,
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
            "tcgen05_mma": self.tcgen05_mma,
            "tcgen05_commit": self.tcgen05_commit,
            "allocate_tensor_memory": self.allocate,
            "TensorMemoryLayout": lambda block, col_stride: None,
        }


def run(modules, kernel, programs, arguments, constants, seed=0):
    """Call a Gluon kernel for every program, on numpy and `Descriptor` arguments.

    Args:
        modules: those whose functions the kernel is made of; their Gluon names are replaced while it runs.
        kernel: the name of the kernel in the last of them.
        programs: the grid.
        arguments: positional arguments: None, integers, torch vectors, Descriptors.
        constants: keyword arguments.
        seed: of the schedule.
    """
    arguments = [
        Pointer((a.float() if a.dtype == torch.bfloat16 else a).numpy().reshape(-1)) if hasattr(a, "numpy") else a
        for a in arguments
    ]
    before = [(module, dict(vars(module))) for module in modules]
    try:
        for program in range(programs):
            names = Machine(program, programs, f"{seed} {program}").modules()
            names |= {"ACCUMULATORS": 2, "_CHOOSE_LAYOUT": False}
            for module, original in before:
                for name, value in original.items():
                    if name in names:
                        setattr(module, name, names[name])
                    elif hasattr(value, "is_gluon"):
                        setattr(module, name, value.fn)
            getattr(modules[-1], kernel)(*arguments, **constants)
    finally:
        for module, original in before:
            for name, value in original.items():
                setattr(module, name, value)


def broken(module, pattern, replacement, folder):
    """A module in which the first match of a pattern is replaced."""
    with open(module.__file__) as file:
        source, count = re.subn(pattern, replacement, file.read(), count=1)
    assert count == 1, "nothing to break"
    path = folder / "broken.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("broken", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
