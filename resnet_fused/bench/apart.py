"""Work in other processes, several at once: one that dies or hangs takes its task with it and nothing else."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from .harness import first_line

LIMIT_S = 60.0  # of a task, a kernel's compilation among it
START_S = 300.0  # of a process, which imports torch


@dataclass(frozen=True)
class Lost:
    """A task without a result, and why."""

    reason: str


def run_apart(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    processes: int,
    *,
    limit_s: float = LIMIT_S,
    last: Callable[[Any], bool] | None = None,
) -> Iterator[tuple[int, Any]]:
    """`function(*task)` of every task, in so many processes.

    Args:
        function: of a module, as are the types of its arguments and results.
        tasks: what it is called with.
        processes: at once; started afresh, so a script needs `if __name__ == "__main__"`.
        limit_s: a task that takes longer is lost, and its process ended.
        last: asked in the process about a result; true ends the process, because nothing that follows would count.

    Yields:
        (index of the task, its result or a `Lost`), as they come.
    """
    context = multiprocessing.get_context("spawn")
    waiting = collections.deque(enumerate(tasks))
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else _Worker(context, function, last)
                try:
                    worker.begin(*waiting[0], limit_s)
                except OSError:  # it has ended since its last task
                    worker.end()
                    continue
                waiting.popleft()
                busy[worker.pipe] = worker
            next_deadline = min(worker.deadline for worker in busy.values())
            ready = wait(list(busy), max(0.0, next_deadline - time.monotonic()))
            late = [pipe for pipe, worker in busy.items() if pipe not in ready and worker.deadline <= time.monotonic()]
            for pipe in [*ready, *late]:
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                if pipe in ready and worker.starting():
                    continue
                del busy[pipe]
                result, usable = (Lost(f"not done after {limit_s:g} s"), False) if pipe in late else worker.result()
                if usable:
                    idle.append(worker)
                else:
                    worker.end()
                yield worker.index, result
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


class _Worker:
    """A process, and the task it has."""

    def __init__(self, context: Any, function: Callable[..., Any], last: Callable[[Any], bool] | None) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, last), daemon=True)
        self.process.start()
        theirs.close()  # theirs alone, so that their end is the pipe's
        self.index, self.deadline, self.limit_s, self.started = -1, 0.0, 0.0, False

    def begin(self, index: int, task: tuple[Any, ...], limit_s: float) -> None:
        self.index, self.limit_s = index, limit_s
        self.deadline = time.monotonic() + (limit_s if self.started else START_S)
        self.pipe.send(task)

    def starting(self) -> bool:
        """Whether what it says is only that it has started, from when on its task's time counts."""
        if self.started:
            return False
        self.started = True
        with contextlib.suppress(EOFError, OSError):
            self.pipe.recv()
            self.deadline = time.monotonic() + self.limit_s
            return True
        return False

    def result(self) -> tuple[Any, bool]:
        """What the task came to, and whether the process can take another."""
        try:
            result, ends = self.pipe.recv()
            return result, not ends
        except (EOFError, OSError):
            self.process.join()
            return Lost(f"its process ended with exit code {self.process.exitcode}"), False

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, function: Callable[..., Any], last: Callable[[Any], bool] | None) -> None:
    with contextlib.suppress(EOFError):
        pipe.send(None)
        while True:
            task = pipe.recv()
            try:
                result = function(*task)
                ends = last is not None and last(result)
            except Exception as error:
                result, ends = Lost(first_line(error)), False
            pipe.send((result, ends))
            if ends:
                return
