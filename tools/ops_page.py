"""`docs/ops.md`, made of the ops' records: `python -m tools.ops_page`. `--check` exits with 1 where it is stale."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path

from resnet_fused import ops

PAGE = Path(__file__).parents[1] / "docs" / "ops.md"
HEAD = """\
# Ops

Generated from `resnet_fused/ops/` (`python -m tools.ops_page`). `torch.ops.resnet_fused.<op>` takes these arguments
and, by name, `str backend`; the compiled libraries have those of `cuda` without it. What holds for all - shapes,
memory orders, dtypes - is said in [design.md](design.md#ops).
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_entry(op) for _, op in sorted(ops.OPS.items()))])


def _entry(op: ops.Op) -> str:
    schema = textwrap.fill(op.schema(), 120, initial_indent="    ", subsequent_indent="        ")
    contract = inspect.cleandoc(op.contract).replace("*", "\\*")
    return f"## {op.name}\n\n{schema}\n\n{contract}\n\nKernels: {', '.join(op.kernels)}.\n"


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        stale = not PAGE.exists() or PAGE.read_text() != page()
        print(f"{PAGE.name} is stale: run python -m tools.ops_page" if stale else f"{PAGE.name} is current")
        return int(stale)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
