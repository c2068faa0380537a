"""`resnet-fused info`."""

from __future__ import annotations

import argparse
from typing import Any

import resnet_fused


def register(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    info = commands.add_parser("info", help="what is built, and which backends can run here")
    info.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    print(resnet_fused.info())
    return 0
