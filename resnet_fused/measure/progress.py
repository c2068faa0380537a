"""Tell what a long run is doing: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """`start(text)` begins the next of `total` steps (None: unknown); `detail(text)` says what is too short for it."""

    def __init__(self, console: Console, total: int | None) -> None:
        self._console, self._total, self._done = console, total, 0
        self._text = "starting"
        self._start = time.monotonic()
        columns = (BarColumn(bar_width=30), TimeElapsedColumn(), TextColumn("{task.description}"))
        # drawn between the steps only: a thread that redraws would share the cores with what is timed
        bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._bar = bar if console.is_terminal else None
        self._task = self._bar.add_task(self._text, total=total) if self._bar else None

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """Say how many steps there are, where only the work itself knows."""
        self._total = total
        if self._bar and self._task is not None:
            self._bar.update(self._task, total=total)

    def start(self, text: str) -> None:
        self._text = text
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=text, refresh=True)
        else:
            seconds = time.monotonic() - self._start
            of = f"/{self._total}" if self._total else ""
            line = f"[{seconds:5.0f} s] {self._done + 1}{of} {text}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._done += 1

    def detail(self, text: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=f"{self._text}: {text}", refresh=True)


class Silent:
    """A reporter for callers that want no progress."""

    def expect(self, total: int) -> None:
        pass

    def start(self, text: str) -> None:
        pass

    def detail(self, text: str) -> None:
        pass
