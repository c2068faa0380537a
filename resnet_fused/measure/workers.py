"""Processes that do what they are asked, and may be lost: one that dies or hangs takes its task along, nothing else."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from resnet_fused._command import one_line

LIMIT_S = 60.0  # of a task, a kernel's compilation among it
START_S = 300.0  # of a process, which imports torch

Spoils = Callable[[Any], bool]


class WorkerCrashed(RuntimeError):
    """The process that was asked has ended, or was ended; the message says how."""


@dataclass(frozen=True)
class TaskFailure:
    """A task without a result, and why."""

    reason: str


class Worker:
    """A process that makes an object and calls its methods, one at a time.

    Args:
        make: of a module, as are the types of all that is passed; what it returns is asked.
        arguments: of `make`.
        spoils: asked in the process about a result; true ends the process, because nothing that follows would count.
        start_s: until `make` has returned; it starts afresh, so that a script needs `if __name__ == "__main__"`.

    Attributes:
        started: whether it has got as far as to be asked.
        usable: whether it can be asked again.
        deadline: of what it was asked last, on the clock of `time.monotonic`.
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: Any, spoils: Spoils | None = None, start_s: float = START_S
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, spoils), daemon=True)
        self._process.start()
        theirs.close()  # theirs alone, so that their end is the pipe's
        self.started, self.usable = False, True
        self._limit_s, self.deadline = start_s, time.monotonic() + start_s

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def ask(self, method: str, *arguments: Any, limit_s: float) -> None:
        """Have a method called; it has so many seconds, from when the process has started."""
        self._limit_s = limit_s
        if self.started:
            self.deadline = time.monotonic() + limit_s
        with contextlib.suppress(OSError):  # it has ended: `answer` says how
            self.pipe.send((method, arguments))

    def answer(self) -> Any:
        """Wait for the result, or for the `TaskFailure` that stands for it."""
        while True:
            wait([self.pipe], max(0.0, self.deadline - time.monotonic()))
            if (found := self.poll()) is not None:
                return found[0]

    def poll(self) -> tuple[Any] | None:
        """The result, or the `TaskFailure` that stands for it; None while there is neither."""
        try:
            if not self.pipe.poll():
                return self._late() if time.monotonic() >= self.deadline else None
            received = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            self.usable = False
            return (TaskFailure(f"its process ended with exit code {self._process.exitcode}"),)
        if not self.started:
            self.started, self.deadline = True, time.monotonic() + self._limit_s
            return None
        result, ends = received
        self.usable = not ends
        return (result,)

    def _late(self) -> tuple[TaskFailure]:
        self.usable = False
        return (TaskFailure(f"not done after {self._limit_s:g} s" if self.started else "it takes too long to start"),)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], spoils: Spoils | None) -> None:
    made = make(*arguments)
    with contextlib.suppress(EOFError):
        pipe.send(None)
        ends = False
        while not ends:
            method, given = pipe.recv()
            try:
                result = getattr(made, method)(*given)
                ends = spoils is not None and spoils(result)
            except Exception as error:
                result = TaskFailure(one_line(error, kind=True))
            pipe.send((result, ends))


@dataclass(frozen=True)
class _Caller:
    """A function, as an object that a worker can be asked to call."""

    function: Callable[..., Any]

    def call(self, *task: Any) -> Any:
        return self.function(*task)


def isolated_map(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    processes: int,
    *,
    limit_s: float = LIMIT_S,
    spoils: Spoils | None = None,
) -> Iterator[tuple[int, Any]]:
    """`function(*task)` of every task, in so many processes at once.

    Args:
        function, spoils: see `Worker`.
        tasks: what it is called with.
        processes: how many.
        limit_s: a task that takes longer is lost, and its process ended.

    Yields:
        (index of the task, its result or a `TaskFailure`), as they come.
    """
    waiting = collections.deque(enumerate(tasks))
    idle: list[Worker] = []
    busy: dict[Worker, int] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else Worker(_Caller, function, spoils=spoils)
                if not worker.alive:  # it has ended since its last task
                    worker.end()
                    continue
                index, task = waiting.popleft()
                worker.ask("call", *task, limit_s=limit_s)
                busy[worker] = index
            deadline = min(worker.deadline for worker in busy)
            wait([worker.pipe for worker in busy], max(0.0, deadline - time.monotonic()))
            for worker in list(busy):
                if (found := worker.poll()) is None:
                    continue
                index = busy.pop(worker)
                if worker.usable:
                    idle.append(worker)
                else:
                    worker.end()
                yield index, found[0]
    finally:
        for worker in (*idle, *busy):
            worker.end()
