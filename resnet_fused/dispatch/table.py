"""Measured tables: what was verified and timed on one GPU, where the files are, and how they are read.

A table is JSON. Those that ship lie in `resnet_fused/dispatch/tables`, a user's own in the cache folder:
`$RESNET_FUSED_CACHE`, else `$XDG_CACHE_HOME/resnet_fused`, else `~/.cache/resnet_fused`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from resnet_fused import _records
from resnet_fused._records import Misfit
from resnet_fused.dispatch.conv import MAX_REGISTERS, BlockShape, ConvConfig, ConvShape

SHIPPED = Path(__file__).resolve().parent / "tables"
Backend = Literal["aten", "triton", "cuda", "cudnn", "reference"]
DtypeName = Literal["float32", "float16", "bfloat16", "int8"]
_DTYPES: dict[torch.dtype, DtypeName] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}
_Json = dict[str, Any]
# What another GPU's table must show for a kernel of ours: PyTorch's time over its time.
SAME_MODEL, SAME_ARCHITECTURE = 1.1, 1.25


@dataclass(frozen=True)
class Problem:
    """What an entry is about.

    Attributes:
        op: an op's name.
        shape: of the convolution; of a `"residual_block"` all of its convolutions; of the activation, `(n, c, h, w)`,
            for every other op.
        dtype: of the activations.
        tf32: whether fp32 products may be rounded to TF32.
        flags: what else the op does, as `"prologue"`, or is told, as `"outputs 256"`; sorted.
    """

    op: str
    shape: ConvShape | BlockShape | tuple[int, ...]
    dtype: torch.dtype
    tf32: bool = False
    flags: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        return self.shape[0] if isinstance(self.shape, tuple) else self.shape.n

    def with_batch(self, n: int) -> Problem:
        shape = self.shape
        if isinstance(shape, BlockShape):
            return dataclasses.replace(self, shape=shape.with_batch(n))
        return dataclasses.replace(
            self, shape=dataclasses.replace(shape, n=n) if isinstance(shape, ConvShape) else (n, *shape[1:])
        )

    def __str__(self) -> str:
        s = self.shape
        if isinstance(s, ConvShape):
            text = _convolution(s)
        elif isinstance(s, BlockShape):
            text = f"{_convolution(s.branch[0])}" + "".join(f" -> {_kernel(conv)}" for conv in s.branch[1:])
            text += f" + {_kernel(s.shortcut)}" if s.shortcut else " + x" if s.identity else ""
        else:
            text = "x".join(map(str, s))
        name = _DTYPES[self.dtype]
        return " ".join([self.op, text, name, *(["tf32"] if self.tf32 else []), *self.flags])


def _convolution(s: ConvShape) -> str:
    return f"{s.n}x{s.c}x{s.h}x{s.w} -> {_kernel(s)}"


def _kernel(s: ConvShape) -> str:
    """Output channels, filter and what is unusual about it."""
    text = f"{s.k}, {s.r}x{s.s}"
    text += f" / {s.stride[0]}" if s.stride != (1, 1) else ""
    text += f", dilation {s.dilation[0]}" if s.dilation != (1, 1) else ""
    return text + (f", {s.groups} groups" if s.groups > 1 else "")


@dataclass(frozen=True)
class Choice:
    """A backend and, where it takes one, a launch configuration (None: the launcher's own).

    Of a residual block `"aten"` is native PyTorch layer by layer, another backend the chain whose passes beside the
    convolutions run on it.
    """

    backend: str
    config: ConvConfig | None = None

    def __str__(self) -> str:
        if self.config is None:
            return self.backend
        c = self.config
        more = " flat" * c.flat + (f" splits={c.splits}" if c.splits > 1 else "")
        more += f" registers={c.max_registers}" if c.max_registers < MAX_REGISTERS else ""
        return f"{self.backend} {c.kernel} {c.block_m}x{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages}{more}"


@dataclass(frozen=True)
class Entry:
    """Every candidate of a problem that was right, with its median time in milliseconds; the fastest is the winner."""

    problem: Problem
    measured: tuple[tuple[Choice, float], ...]

    @property
    def winner(self) -> Choice:
        return min(self.measured, key=lambda pair: pair[1])[0]

    def ms(self, choice: Choice) -> float:
        return next(ms for other, ms in self.measured if other == choice)

    def best(self, backend: str) -> tuple[Choice, float] | None:
        """The fastest of one backend's, or None if none of its was measured."""
        return min((pair for pair in self.measured if pair[0].backend == backend), key=lambda p: p[1], default=None)


@dataclass(frozen=True)
class Table:
    """What is known of one GPU.

    Attributes:
        gpu: its name, as PyTorch gives it.
        arch: compute capability times ten.
        provenance: machine, versions, commit, date of the measurement.
        verified: (op, backend) pairs that were right in every comparison with float64.
        entries: by problem.
    """

    gpu: str
    arch: int
    provenance: _Json
    verified: frozenset[tuple[str, str]] = frozenset()
    entries: dict[Problem, Entry] = dataclasses.field(default_factory=dict)

    def to_json(self) -> _Json:
        entries = tuple(map(_entry_to_file, self.entries.values()))
        file = _TableFile(1, self.gpu, self.arch, self.provenance, tuple(sorted(self.verified)), entries)  # type: ignore[arg-type]
        value: _Json = _records.to_json(file)
        return value


@dataclass(frozen=True)
class _Candidate:
    """One of an entry in a file."""

    backend: Backend
    config: ConvConfig | None
    ms: float


@dataclass(frozen=True)
class _EntryFile:
    """An `Entry` in a file; the winner is the place of the fastest candidate."""

    op: str
    shape: ConvShape | BlockShape | tuple[int, int, int, int]
    dtype: DtypeName
    tf32: bool
    flags: tuple[str, ...]
    candidates: tuple[_Candidate, ...]
    winner: int


@dataclass(frozen=True)
class _TableFile:
    """A `Table` in a file."""

    format: Literal[1]
    gpu: str
    arch: int
    provenance: _Json
    verified: tuple[tuple[str, Backend], ...]
    entries: tuple[_EntryFile, ...]


def _entry_to_file(entry: Entry) -> _EntryFile:
    p, times = entry.problem, [ms for _, ms in entry.measured]
    candidates = tuple(_Candidate(choice.backend, choice.config, ms) for choice, ms in entry.measured)  # type: ignore[arg-type]
    return _EntryFile(p.op, p.shape, _DTYPES[p.dtype], p.tf32, p.flags, candidates, times.index(min(times)))  # type: ignore[arg-type]


def from_json(value: Any) -> Table:
    """The table that `Table.to_json` wrote.

    Raises:
        Misfit: it is none, or one of another format; the message says where it departs from it.
    """
    file: _TableFile = _records.load(_TableFile, value)
    verified = frozenset(file.verified)
    entries = (_entry(entry, verified, f"entries[{i}]") for i, entry in enumerate(file.entries))
    return Table(file.gpu, file.arch, file.provenance, verified, {entry.problem: entry for entry in entries})


def _entry(file: _EntryFile, verified: frozenset[tuple[str, str]], place: str) -> Entry:
    dtype = next(dtype for dtype, name in _DTYPES.items() if name == file.dtype)
    if isinstance(file.shape, tuple) and min(file.shape) < 1:
        raise Misfit(f"{place}.shape", f"is {file.shape}, not sizes")
    if isinstance(file.shape, BlockShape) and not file.shape.branch:
        raise Misfit(f"{place}.shape.branch", "is empty")
    for i, one in enumerate(file.candidates):
        if not 0 < one.ms < math.inf:
            raise Misfit(f"{place}.candidates[{i}].ms", f"is {one.ms}, not a time")
        if one.backend != "aten" and (file.op, one.backend) not in verified:
            raise Misfit(f"{place}.candidates[{i}]", f"is a time of {file.op} on {one.backend}, which is not verified")
    times = [one.ms for one in file.candidates]
    if not times:
        raise Misfit(f"{place}.candidates", "is empty")
    if file.winner not in range(len(times)) or times[file.winner] != min(times):
        raise Misfit(f"{place}.winner", f"is {file.winner}, not the place of the fastest candidate")
    problem = Problem(file.op, file.shape, dtype, file.tf32, tuple(sorted(file.flags)))
    return Entry(problem, tuple((Choice(one.backend, one.config), one.ms) for one in file.candidates))


def cache_folder() -> Path:
    """Where a user's own tables are."""
    own = os.environ.get("RESNET_FUSED_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resnet_fused"


def file_name(gpu: str) -> str:
    """`nvidia-h100-80gb-hbm3.json` for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def read(path: Path) -> Table | None:
    """The table in a file; None where there is no file, and, after one warning that names it, where it is no table."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as problem:
        warnings.warn(f"resnet_fused ignores {path}, a table of what is fastest on this GPU: {problem}", stacklevel=2)
        return None


@functools.cache
def known_tables() -> tuple[Table, ...]:
    """All tables on this machine, one a GPU; a user's own entries go before those that shipped."""
    found: dict[str, Table] = {}
    for folder in (cache_folder(), SHIPPED):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            table = read(path)
            if table is None:
                continue
            own = found.get(table.gpu)
            found[table.gpu] = table if own is None else merge(table, own)
    return tuple(found.values())


def merge(old: Table, new: Table) -> Table:
    """`old` with what `new` knows better: its entries replace those of the same problem."""
    return dataclasses.replace(new, verified=old.verified | new.verified, entries={**old.entries, **new.entries})


def of_gpu(tables: Iterable[Table], gpu: str) -> Table | None:
    return next((table for table in tables if table.gpu == gpu), None)


def select_table(tables: Iterable[Table], gpu: str | None, arch: int) -> tuple[Table | None, float]:
    """The table to ask about a GPU, and by which factor a kernel of ours must have beaten native PyTorch in it to be
    chosen: 1 in the GPU's own, more in that of another GPU of its architecture, as clocks, multiprocessors and memory
    differ. One of the same model (H100 PCIe, H100 SXM) goes before the others.
    """
    if gpu is None:
        return None, 1.0
    near = [table for table in tables if table.arch == arch]
    own = of_gpu(near, gpu)
    if own is not None:
        return own, 1.0
    sibling = next((table for table in near if model_of(table.gpu) == model_of(gpu)), None)
    if sibling is not None:
        return sibling, SAME_MODEL
    return (near[0], SAME_ARCHITECTURE) if near else (None, 1.0)


def model_of(gpu: str) -> str:
    """`H100` of "NVIDIA H100 80GB HBM3": the first word with a digit; the whole name where there is none."""
    return next((word for word in gpu.split() if any(map(str.isdigit, word))), gpu)
