"""`resnet-fused verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnet_fused._command import check_writable, choose_many, positive_integer, write_json
from resnet_fused.cli.output import show
from resnet_fused.cli.problems import add_problems, on_problems


def register(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    parser = commands.add_parser(
        "verify",
        help="compare every kernel that can run here with float64",
        description="Run every kernel for GPUs that can run here on the layers of these models, and compare it with "
        "float64. Memory for results, and around operands, is filled with NaN, so that what a kernel leaves out or "
        "reads beside them shows; each runs twice and must give the same bits. Takes some minutes. Without a GPU, the "
        "source of the CUDA kernels runs on the CPU (built with RESNET_FUSED_BUILD=host), and Triton's kernels in its "
        "interpreter (TRITON_INTERPRET=1). The kernels for CPUs are checked by the tests: make test.",
    )
    add_problems(parser)
    add = parser.add_argument
    add("--batch", default="16", metavar="N", help="images (default: %(default)s)")
    add("--dtype", default="bf16,fp16,fp32,int8", metavar="DTYPES", help="comma list (default: %(default)s)")
    add(
        "--every-configuration",
        action="store_true",
        help="all that tune would try, not only the launch configurations used by default",
    )
    add("--json", type=Path, metavar="FILE", help="write the result and its provenance here")
    parser.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify; the exit status is 1 where a kernel is wrong."""
    from resnet_fused.tuning.problems import DTYPES

    def work(reporter: Any, common: dict[str, Any]) -> int:
        from rich.console import Console

        from resnet_fused.tuning import verify

        dtypes = choose_many(arguments.dtype, DTYPES, "dtype")
        check_writable("--json", arguments.json)
        common["batch"] = positive_integer(arguments.batch, "--batch")
        found = verify.verify(dtypes=dtypes, every_configuration=arguments.every_configuration, **common)
        target = ("--json", arguments.json, lambda path: write_json(found.to_json(), path))
        return show(Console(), 0 if found.passed else 1, lambda: print(found), target)

    return on_problems(arguments, work)
