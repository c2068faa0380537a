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
from typing import Any

import torch

from resnet_fused.dispatch.conv import BlockShape, ConvConfig, ConvShape

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "tables"
BACKENDS = ("aten", "triton", "cuda", "reference")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}
_Json = dict[str, Any]
# What another GPU's table must show for a kernel of ours: PyTorch's time over its time.
SAME_MODEL, SAME_ARCHITECTURE = 1.1, 1.25


class TableError(ValueError):
    """A file that is no table of this format; the message says where it departs from it."""


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
        name = {v: k for k, v in _DTYPES.items()}[self.dtype]
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
        return {
            "format": FORMAT,
            "gpu": self.gpu,
            "arch": self.arch,
            "provenance": self.provenance,
            "verified": sorted(map(list, self.verified)),
            "entries": [_entry_to_json(entry) for entry in self.entries.values()],
        }


def _entry_to_json(entry: Entry) -> _Json:
    problem = dataclasses.asdict(entry.problem)
    problem["dtype"] = str(entry.problem.dtype).removeprefix("torch.")
    measured = [
        {"backend": choice.backend, "config": choice.config and dataclasses.asdict(choice.config), "ms": ms}
        for choice, ms in entry.measured
    ]
    times = [ms for _, ms in entry.measured]
    return {**problem, "candidates": measured, "winner": times.index(min(times))}


def from_json(value: Any) -> Table:
    """The table that `Table.to_json` wrote.

    Raises:
        TableError: it is none, or one of another format.
    """
    _expect(isinstance(value, dict), "a table is an object")
    found = value.get("format")
    _expect(found == FORMAT, f"format is {found!r}, this version of resnet_fused reads {FORMAT}")
    gpu, arch = _typed(value, "gpu", str), _typed(value, "arch", int)
    provenance = _typed(value, "provenance", dict)
    pairs = _typed(value, "verified", list)
    for pair in pairs:
        good = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[1] in BACKENDS
        _expect(good, f"verified holds [op, backend] pairs, got {pair!r}")
    verified = frozenset((op, backend) for op, backend in pairs)
    entries = [_entry_from_json(entry, verified) for entry in _typed(value, "entries", list)]
    return Table(gpu, arch, provenance, verified, {entry.problem: entry for entry in entries})


def _entry_from_json(value: Any, verified: frozenset[tuple[str, str]]) -> Entry:
    _expect(isinstance(value, dict), "an entry is an object")
    op, dtype, shape = _typed(value, "op", str), _typed(value, "dtype", str), value.get("shape")
    _expect(dtype in _DTYPES, f"dtype is {dtype!r}; choices: {', '.join(_DTYPES)}")
    if isinstance(shape, dict):
        shape = _block(shape) if "branch" in shape else _dataclass(ConvShape, shape)
    else:
        good = isinstance(shape, list) and len(shape) == 4 and all(isinstance(s, int) and s > 0 for s in shape)
        _expect(good, f"shape is {shape!r}, not [n, c, h, w] nor a convolution's")
        shape = tuple(shape)  # type: ignore[arg-type]
    flags = _typed(value, "flags", list)
    problem = Problem(op, shape, _DTYPES[dtype], _typed(value, "tf32", bool), tuple(sorted(map(str, flags))))
    measured = []
    for candidate in _typed(value, "candidates", list):
        _expect(isinstance(candidate, dict), "a candidate is an object")
        backend, ms, config = candidate.get("backend"), candidate.get("ms"), candidate.get("config")
        _expect(backend in BACKENDS, f"backend is {backend!r}; choices: {', '.join(BACKENDS)}")
        good = isinstance(ms, int | float) and not isinstance(ms, bool) and math.isfinite(ms) and ms > 0
        _expect(good, f"ms is {ms!r}, not a time")
        known = backend == "aten" or (op, backend) in verified
        _expect(known, f"a time of {op} on {backend}, which is not verified")
        measured.append((Choice(backend, None if config is None else _dataclass(ConvConfig, config)), float(ms)))
    _expect(bool(measured), "an entry without candidates")
    entry = Entry(problem, tuple(measured))
    winner = value.get("winner")
    good = isinstance(winner, int) and 0 <= winner < len(measured) and measured[winner][0] == entry.winner
    _expect(good, f"winner is {winner!r}, not the fastest candidate of {problem}")
    return entry


def _block(value: _Json) -> BlockShape:
    _expect(value.keys() <= {"branch", "shortcut", "identity"}, f"a block has no {', '.join(sorted(value))}")
    branch, shortcut = _typed(value, "branch", list), value.get("shortcut")
    _expect(bool(branch), "a block without convolutions")
    projection = None if shortcut is None else _dataclass(ConvShape, shortcut)
    return BlockShape(
        tuple(_dataclass(ConvShape, conv) for conv in branch), projection, _typed(value, "identity", bool)
    )


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise TableError(message)


def _typed(value: _Json, name: str, kind: type) -> Any:
    found = value.get(name)
    good = isinstance(found, kind) and (kind is not int or not isinstance(found, bool))
    _expect(good, f"{name} is {found!r}, not {kind.__name__}")
    return found


def _dataclass(kind: Any, value: Any) -> Any:
    """A `ConvShape` or `ConvConfig`, each field of the type of its default (ints where there is none)."""
    _expect(isinstance(value, dict), f"{kind.__name__} is an object, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    strange = sorted(value.keys() - fields.keys())
    _expect(not strange, f"{kind.__name__} has no {', '.join(strange)}")
    arguments = {}
    for name, field in fields.items():
        default: Any = field.default
        required = default is dataclasses.MISSING
        _expect(name in value or not required, f"{kind.__name__} lacks {name}")
        wanted = int if required else type(default)
        found = value.get(name, default)
        if isinstance(found, list):
            found = tuple(found)
        good = type(found) is wanted
        if isinstance(found, tuple):
            good = good and len(found) == 2 and all(type(v) is int for v in found)
        _expect(good, f"{kind.__name__}.{name} is {found!r}")
        arguments[name] = found
    return kind(**arguments)


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
        warnings.warn(f"resnet_fused ignores the plan table {path}: {problem}", stacklevel=2)
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
