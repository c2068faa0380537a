"""What `tune` and `verify` share: the options that say whose kernels, and how a run of either begins and ends."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any

from resnet_fused._command import check_importable, choose_many, positive_integer
from resnet_fused.cli.output import PROGRAM


def add_problems(parser: argparse.ArgumentParser) -> None:
    """What tune and verify share."""
    add = parser.add_argument
    add(
        "--model",
        metavar="MODELS",
        help="torchvision ResNets or timm:<name>, a comma list (default: resnet50,resnet18)",
    )
    add("--mode", default="infer,train", metavar="MODES", help="infer, train, as a comma list (default: both)")
    add("--image-size", default="224", metavar="PIXELS", help="side of the square input (default: %(default)s)")
    add(
        "--rehearse",
        action="store_true",
        help="every step on the CPU with a tiny network, to see that it works; says nothing about a GPU",
    )


def on_problems(arguments: argparse.Namespace, run: Callable[[Any, dict[str, Any]], int]) -> int:
    """Check what tune and verify share, and run one of them with progress on stderr."""
    from resnet_fused.measure import cases, models

    check_importable(arguments.command, "rich", "torchvision", "numpy")
    from rich.console import Console

    from resnet_fused.measure.progress import Reporter

    names = [name.strip() for name in (arguments.model or "resnet50,resnet18").split(",") if name.strip()]
    for name in names:
        models.check(name)
    with Reporter(Console(stderr=True), None) as reporter:
        common = {
            "model": names,
            "modes": choose_many(arguments.mode, cases.MODES, "mode"),
            "image_size": positive_integer(arguments.image_size, "--image-size"),
            "rehearse": arguments.rehearse,
            "command": shlex.join([PROGRAM, *arguments.argv]),
            "reporter": reporter,
        }
        try:
            return run(reporter, common)
        except KeyboardInterrupt:  # what was measured is in tune's table
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
            return 130
