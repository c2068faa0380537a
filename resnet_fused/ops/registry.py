"""The registry of ops: a module `ops/<op>.py` is the record of one, and everything that concerns all ops iterates here.

A record holds `Args` and `Out` (typed tuples, from which the schema is made), `reference` (its docstring is the
contract) and what else the attributes of `Op` say. `torch.ops.resnet_fused.<op>` has one keyword argument more, `str
backend`.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from resnet_fused.dispatch.table import Problem
from resnet_fused.ops.comparison import Comparison, each

Pair = Annotated[Sequence[int], "SymInt[2]"]  # (vertical, horizontal)
Size = Sequence[int]  # (N, C, H, W)
FlopCount = Callable[..., int]  # PyTorch's, of a convolution: (shape of x, of weight, of y, transposed=False)
RunOp = Callable[..., Any]  # (name of an op, **arguments) to its results
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
}


@dataclass(frozen=True)
class Mutated:
    """Marks a tensor that an op writes to; `alias` is its letter in the schema."""

    alias: str


@dataclass(frozen=True)
class Op:
    """The record of an op.

    Attributes:
        name: of the op and of its module, its Triton launcher and its C++ function.
        triton: the module of `kernels` that has the launcher, or None. It takes the arguments, as `args`, and a launch
            configuration for each of `problems`.
        cuda: whether there is a CUDA kernel.
        cpu: whether there is a kernel for CPUs (csrc/cpu), for NHWC activations in fp32 and bf16.
        args: the typed tuple of its arguments, in their order.
        out: the typed tuple of its results; `Tensor` where there is one.
        reference: (args) to the results in plain PyTorch; any device, any strides; rounded once.
        native: (args) to those of native PyTorch, the backend "aten"; None where nothing of ours calls it.
        fake: (args) to results without values, of the shapes, dtypes and strides of `reference` and `native`. What
            Triton's convolutions return is NHWC.
        problems: (args) to the convolutions that it runs, each of which has a launch configuration in the plan.
        refuse: (args) to why the Triton kernel cannot run on them, or None. (A C++ kernel says so itself.)
        case: (operands, shape, **options) to arguments; the shape is a `ConvShape` of a convolution, else (N, C, H, W).
        options: the values that each option of `case` takes; the last is the one that asks most of a kernel.
        compare: (args, actual, plain, truth) to what is to be compared of the results.
        flops: (args, results, PyTorch's count of a convolution) to their number; None where there is no product.
        family: the ops that one choice decides about, verified and timed as one; only itself where it is alone.
        runs_beside: (op, options of its case) to whether a problem of that op also runs this one.
        unfused: (args, run) to the call of native PyTorch's convolution, and the passes that stand around it in a block
            where the plan has that; `run(op, **arguments)` is an op of a pass. None where no pass does.
        sequence: (args, conv_fprop) to the results by its convolutions one by one; None of an op that is no sequence.
    """

    name: str
    triton: str | None
    cuda: bool
    cpu: bool
    args: type[Any]
    out: type[Any]
    reference: Callable[[Any], Any]
    native: Callable[[Any], Any] | None
    fake: Callable[[Any], Any]
    problems: Callable[[Any], tuple[Problem, ...]]
    refuse: Callable[[Any], str | None]
    case: Callable[..., Any]
    options: Mapping[str, Sequence[Any]]
    compare: Callable[[Any, Any, Any, Any], list[Comparison]]
    flops: Callable[[Any, Any, FlopCount], int] | None
    family: tuple[str, ...]
    runs_beside: Callable[[str, Mapping[str, Any]], bool]
    unfused: Callable[[Any, RunOp], Callable[[], object]] | None
    sequence: Callable[[Any, Callable[[Any], Tensor]], Any] | None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The backends that have a kernel of ours."""
        return ("triton",) * (self.triton is not None) + ("cuda",) * self.cuda + ("cpu",) * self.cpu

    def results(self, returned: Any) -> Any:
        """What an implementation returned as `out`."""
        return returned if self.out is Tensor else self.out(*returned)

    def variants(self) -> Iterator[dict[str, Any]]:
        """Every combination of the options of `case`."""
        for values in itertools.product(*self.options.values()):
            yield dict(zip(self.options, values, strict=True))

    @property
    def contract(self) -> str:
        """What the op computes."""
        return (self.reference.__doc__ or "").strip()

    def bytes_moved(self, args: Any) -> int:
        """Of the arguments read and the results written, each once."""
        return sum(t.nbytes for t in (*args, *self.written(args)) if isinstance(t, Tensor))

    def written(self, args: Any) -> tuple[Tensor, ...]:
        """The results without values, as a tuple."""
        results = self.fake(args)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    def schema(self, *extra: str) -> str:
        """The op's schema, with these arguments behind its own."""
        hints = get_type_hints(self.args, include_extras=True)
        arguments = [f"{_schema_type(hint)} {name}" for name, hint in hints.items()]
        return f"{self.name}({', '.join([*arguments, *extra])}) -> {self._results()}"

    def _results(self) -> str:
        if self.out is Tensor:
            return "Tensor"
        return f"({', '.join(f'Tensor {name}' for name in self.out._fields)})"


def _schema_type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        inner, mark = get_args(hint)
        return mark if isinstance(mark, str) else _schema_type(inner).replace("Tensor", f"Tensor({mark.alias}!)")
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (part for part in get_args(hint) if part is not type(None))
        return f"{_schema_type(inner)}?"
    return _SCHEMA_TYPES[hint]


OPS: dict[str, Op] = {}
# A fragment, and what is defined stays: the modules may be imported again, while compiled graphs hold on to the ops.
_library = torch.library.Library("resnet_fused", "FRAGMENT")


def register(module: str, *, triton: str | None = None, cuda: bool = False, cpu: bool = False) -> Op:
    """Make an op of the record in this module.

    Args:
        module: its name, `__name__`.
        triton, cuda, cpu: as in `Op`.
    """
    record = sys.modules[module]
    name = module.rpartition(".")[2]
    op = Op(
        name,
        triton,
        cuda,
        cpu,
        record.Args,
        getattr(record, "Out", Tensor),
        record.reference,
        getattr(record, "native", None),
        record.fake,
        getattr(record, "problems", lambda args: ()),
        record.refuse,
        record.case,
        getattr(record, "OPTIONS", {}),
        getattr(record, "compare", _compare),
        getattr(record, "flops", None),
        getattr(record, "FAMILY", (name,)),
        getattr(record, "runs_beside", lambda op, options: False),
        getattr(record, "unfused", None),
        getattr(record, "sequence", None),
    )
    OPS[name] = op
    return op


def _compare(a: Any, actual: Any, plain: Any, truth: Any) -> list[Comparison]:
    """Every result with its counterparts."""
    if isinstance(actual, Tensor):
        return each(["the result"], [actual], [plain], [truth])
    return each(truth._fields, actual, plain, truth)


def define(op: Op) -> None:
    """Define `torch.ops.resnet_fused.<op>`, once in a process; it runs what the newest import of this package has."""
    if hasattr(torch.ops.resnet_fused, op.name):
        return

    def run(*values: Any, backend: str) -> Any:
        return sys.modules["resnet_fused.ops.backends"].implementation(backend, op.name)(*values)

    def run_fake(*values: Any, backend: str) -> Any:
        returned = op.fake(op.args(*values))
        if backend != "triton" or not op.name.startswith("conv_"):
            return returned
        return tuple(map(_nhwc, returned)) if isinstance(returned, tuple) else _nhwc(returned)

    _library.define(op.schema("*", "str backend"), tags=torch.Tag.pt2_compliant_tag)
    _library.impl(op.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{op.name}", run_fake, lib=_library)


def _nhwc(t: Tensor) -> Tensor:
    """Of an activation one like it in NHWC order; anything else as it is."""
    return torch.empty_like(t, memory_format=torch.channels_last) if t.dim() == 4 else t
