"""The command `resnet-fused`: one module a subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from resnet_fused._command import UsageError, one_line
from resnet_fused.cli import bench, evaluate, info, tune, verify
from resnet_fused.cli.output import PROGRAM, Parser, complain


def parser() -> argparse.ArgumentParser:
    root = Parser(prog=PROGRAM, description="Fused conv + batch norm + ReLU + residual add for ResNets.")
    root.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (info, bench, evaluate, tune, verify):
        command.register(commands)
    return root


def _version() -> str:
    from resnet_fused import __version__

    return __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2: bad usage, said in one line on stderr)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(argv)
    arguments.argv = argv
    try:
        status = int(arguments.function(arguments))
        sys.stdout.flush()
    except UsageError as error:
        return complain(one_line(error))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, nothing written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as `head` leaves one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 128 + 13
    except OSError as error:  # a disk that has filled up meanwhile
        return complain(f"{error.filename or 'cannot write'}: {error.strerror or error}")
    return status
