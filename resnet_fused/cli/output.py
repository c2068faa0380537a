"""What every command says and writes: errors in one line, results to the terminal and to files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from resnet_fused._command import one_line

PROGRAM = "resnet-fused"


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def complain(message: str) -> int:
    """Say why the arguments cannot be honoured; returns the exit status for that."""
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return 2


def show(
    out: Any, status: int, render: Callable[[], object], *targets: tuple[str, Path | None, Callable[[Path], object]]
) -> int:
    """Print a result and write it to each (option, path, writer) that was asked for; one that fails leaves the others.

    Returns:
        `status`, or 2 where one of the targets could not be written.
    """
    render()
    for option, path, write in targets:
        if path is None:
            continue
        try:
            written = write(path)
        except Exception as error:  # a disk that has filled up meanwhile, or whatever a chart's library raises
            status = complain(f"{option} {path}: {getattr(error, 'strerror', None) or one_line(error)}; not written")
        else:
            out.print(f"wrote {written or path}", soft_wrap=True, highlight=False)
    return status
