"""`resnet-fused tune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnet_fused._command import check_writable, choose, positive_integers, seconds
from resnet_fused.cli.problems import add_problems, on_problems


def register(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    parser = commands.add_parser("tune", help="measure every kernel and configuration; write this GPU's plan table")
    add_problems(parser)
    add = parser.add_argument
    add("--batch", default="256", help="images, a comma list; the table also speaks for half and twice (default: 256)")
    add("--dtype", default="bf16", help="fp32, bf16 or fp16 (default: %(default)s)")
    add("--budget", help="stop after so long, like 90s or 5m; calling again goes on from there (default: no limit)")
    add("--again", action="store_true", help="measure also what the table knows already")
    add("--out", type=Path, metavar="FILE", help="the table (default: in the cache folder, where the plan finds it)")
    parser.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    """Tune, and print what changed."""
    from resnet_fused.measure import cases

    def work(reporter: Any, common: dict[str, Any]) -> int:
        from resnet_fused.tuning import tune

        dtype = choose(arguments.dtype, cases.DTYPES, "dtype")
        budget = seconds(arguments.budget, "--budget") if arguments.budget else float("inf")
        check_writable("--out", arguments.out)
        common["batch"] = positive_integers(arguments.batch, "--batch")
        print(tune.tune(dtype=dtype, budget_s=budget, again=arguments.again, path=arguments.out, **common))
        return 0

    return on_problems(arguments, work)
