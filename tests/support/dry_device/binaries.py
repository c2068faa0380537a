"""Which binary an op launches on what, seen where Triton hands both to the driver: its own choice and the remembered.

`python -m dry_device.binaries ARCH [OP ...]` prints a line for each case in which they differ.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from dry_device import dry_device
from resnet_fused import ops
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops.operands import Operands

# Sizes that are multiples of 16, sizes that are not, and ones.
CONVOLUTIONS = (
    ConvShape(2, 32, 8, 8, 64, 3, 3, padding=(1, 1)),
    ConvShape(3, 24, 5, 7, 40, 3, 3, padding=(1, 1)),
    ConvShape(1, 8, 1, 1, 8, 1, 1),
)
ACTIVATIONS = ((2, 32, 8, 8), (3, 24, 5, 7), (1, 8, 1, 2))
Launched = tuple[Any, tuple[int, ...], tuple[Any, ...]]  # binary, grid, arguments


@contextlib.contextmanager
def _seen() -> Iterator[list[Launched]]:
    """What is handed to the driver, which does not get it."""
    launched: list[Launched] = []
    before = CompiledKernel.run

    def run(self: Any) -> Any:
        self._init_handles()
        return lambda *given: launched.append((self, given[:3], given[9:]))

    CompiledKernel.run = property(run)
    try:
        yield launched
    finally:
        CompiledKernel.run = before


def _launches(op: str, args: Any, by_triton: bool = False) -> list[Launched]:
    hook = triton.knobs.runtime.launch_enter_hook
    with _seen() as launched:
        if by_triton:
            hook.add(_nothing)
        getattr(torch.ops.resnet_fused, op)(*args, backend="triton")
        hook.remove(_nothing)
    return launched


def _nothing(metadata: Any) -> None:
    pass


def _differences(ours: list[Launched], tritons: list[Launched], inputs: Any) -> Iterator[str]:
    if len(ours) != len(tritons):
        yield f"{len(ours)} launches, {len(tritons)} by Triton"
    addresses = {t.data_ptr() for t in inputs if isinstance(t, Tensor) and t.numel()}
    for (binary, grid, given), (own, own_grid, wanted) in zip(ours, tritons, strict=False):
        if binary is not own or grid != own_grid or len(given) != len(wanted):
            yield f"{binary.name} on {grid}, not {own.name} on {own_grid}"
        for i, (a, b) in enumerate(zip(given, wanted, strict=False)):
            if isinstance(b, Tensor):  # allocated anew, but for the inputs
                a, b = (t.data_ptr() if isinstance(t, Tensor) else t for t in (a, b))  # noqa: PLW2901
                if addresses.isdisjoint((a, b)):
                    a, b = a % 16, b % 16  # noqa: PLW2901
            if a is not b and a != b:
                yield f"{binary.name}: argument {i} is {a}, not {b}"


def _off_by_one(t: Tensor) -> Tensor:
    """The same, not at a multiple of 16 bytes."""
    end = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    copy = torch.empty(end + 1, dtype=t.dtype).as_strided(t.shape, t.stride(), 1)
    return copy.copy_(t)


def wrong(name: str) -> Iterator[str]:
    """What is wrong with the launches of an op."""
    op, bound = ops.OPS[name], {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape in CONVOLUTIONS if name.startswith("conv") else ACTIVATIONS:
            case = (3, 3, *shape[:2]) if name == "pack_weight" else shape
            variant = {option: values[-1] for option, values in op.options.items()}
            args = op.case(Operands(torch.device("cpu"), dtype), case, **variant)
            if op.refuse(args) is not None:
                continue
            label = f"{name} of {shape} in {dtype}"
            for _ in range(2):
                _launches(name, args)
            ours, tritons = _launches(name, args), _launches(name, args, by_triton=True)
            if not ours or any(isinstance(a, Tensor) for launch in ours for a in launch[2]):
                yield f"{label}: not bound"
            yield from (f"{label}: {one}" for one in _differences(ours, tritons, args))
            for i, t in enumerate(args):
                if (
                    not isinstance(t, Tensor) or t.numel() < 2 or (bound and i)
                ):  # each of the first case's, one of others
                    continue
                moved = args._replace(**{args._fields[i]: _off_by_one(t)})
                if op.refuse(moved) is not None:
                    continue
                ours, tritons = _launches(name, moved), _launches(name, moved, by_triton=True)
                yield from (f"{label}, {args._fields[i]} moved: {one}" for one in _differences(ours, tritons, moved))
            bound[dtype, shape] = _launches(name, args)
    for (dtype, shape), launched in bound.items():
        if any(isinstance(a, Tensor) for launch in launched for a in launch[2]):
            yield f"{name} of {shape} in {dtype}: no longer bound"


def main() -> None:
    torch.set_num_threads(1)
    with dry_device(int(sys.argv[1])):
        names = sys.argv[2:] or [name for name, op in ops.OPS.items() if op.triton]
        for name in names:
            for problem in wrong(name):
                print(problem)


if __name__ == "__main__":
    main()
