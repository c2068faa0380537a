"""`resnet-fused tune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnet_fused._command import check_writable, choose, positive_integers, seconds
from resnet_fused.cli.problems import add_problems, on_problems


def register(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest kernel for every layer on this GPU, and use it from then on",
        description="Check and time every kernel and launch configuration on the layers of these models, native "
        "PyTorch beside them, and write the fastest to a table in the cache folder. From then on it is what runs on "
        "this GPU. Stopped at any time, the table is of use, and the next call goes on from there.",
    )
    add_problems(parser)
    add = parser.add_argument
    add("--batch", default="256", metavar="SIZES", help="images, a comma list; also used for half and twice as many "
        "(default: %(default)s)")  # fmt: skip
    add("--dtype", default="bf16", help="fp32, bf16, fp16, or int8 for inference alone (default: %(default)s)")
    add(
        "--budget",
        metavar="TIME",
        help="stop after so long, like 90s or 5m; a number alone is seconds (default: no limit)",
    )
    add("--again", action="store_true", help="measure also what the table knows already")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the table here (default: into the cache folder, which is where models look for it)",
    )
    parser.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    """Tune, and print what changed."""
    from resnet_fused.tuning.problems import DTYPES

    def work(reporter: Any, common: dict[str, Any]) -> int:
        from resnet_fused.tuning import tune

        dtype = choose(arguments.dtype, DTYPES, "dtype")
        budget = seconds(arguments.budget, "--budget") if arguments.budget else float("inf")
        check_writable("--out", arguments.out)
        common["batch"] = positive_integers(arguments.batch, "--batch")
        print(tune.tune(dtype=dtype, budget_s=budget, again=arguments.again, path=arguments.out, **common))
        return 0

    return on_problems(arguments, work)
