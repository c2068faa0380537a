"""What the commands share: choices, a clear line for each that is none, files that are written whole or not at all."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=str)
FEW = 20  # choices that a message lists


class UsageError(ValueError):
    """A choice the command cannot honour; the message is one line that names the value and the choices."""


def one_line(error: BaseException, kind: bool = False) -> str:
    """What an error says, in one line of some 300 characters; its type where it says nothing.

    Args:
        kind: also its type, and only the first of its lines: for an error that nobody foresaw.
    """
    name, said = type(error).__name__, str(error).strip()
    text = textwrap.shorten(said.partition("\n")[0] if kind else said, 300, placeholder=" ...")
    return f"{name}: {text}" if kind and text else text or name


def choose(value: str, choices: Iterable[Name], what: str) -> Name:
    """The one of `choices` that `value` is.

    Raises:
        UsageError: it is not; the message names close choices, or all of them when there are few.
    """
    choices = list(choices)
    for choice in choices:
        if choice == value:
            return choice
    names, asked = {str(choice).lower(): str(choice) for choice in choices}, value.lower()
    begin = [name for name in names if asked and name.startswith(asked)]
    close = [names[name] for name in difflib.get_close_matches(asked, names, n=5, cutoff=0.5) or begin[:5]]
    if close and len(choices) > 8:
        hint = f"did you mean {', '.join(close)}?"
    elif len(choices) <= FEW:
        hint = f"choices: {', '.join(choices)}"
    else:
        hint = f"there are {len(choices)}, none with a name like it"
    raise UsageError(f"unknown {what} {value!r}; {hint}")


def choose_many(values: str | Iterable[str], choices: Iterable[Name], what: str) -> tuple[Name, ...]:
    """Check each item, of a comma list where it is one; duplicates are dropped, the order is kept."""
    choices = list(choices)
    items = [item.strip() for item in (values.split(",") if isinstance(values, str) else values) if item.strip()]
    if not items:
        raise UsageError(f"no {what} given; choices: {', '.join(choices)}")
    return tuple(dict.fromkeys(choose(item, choices, what) for item in items))


def positive_integers(text: str, what: str) -> tuple[int, ...]:
    """Parse a comma list of integers > 0; duplicates are dropped, the order is kept."""
    try:
        values = [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UsageError(f"{what} {text!r} is not a comma list of integers > 0, like 1,8")
    return tuple(dict.fromkeys(values))


def positive_integer(text: str, what: str) -> int:
    """Parse one integer > 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UsageError(f"{what} {text!r} is not an integer > 0")
    return value


def seconds(text: str, what: str) -> float:
    """A duration > 0: `90`, `90s`, `5m`, `1h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if value <= 0:
        raise UsageError(f"{what} {text!r} is not a duration > 0, like 90s or 5m")
    return value


def resolve_device(text: str | None) -> torch.device:
    """The device to work on: `cpu`, `cuda` or `cuda:<index>`; by default the first GPU, or the CPU without one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        text = "cuda" if count else "cpu"
    if text == "cpu":
        return torch.device("cpu")
    kind, _, index = text.partition(":")
    if kind != "cuda" or (":" in text and not index.isdigit()):
        raise UsageError(f"unknown device {text!r}; choices: cpu, cuda, cuda:<index>")
    if not count:
        raise UsageError(f"device {text!r}: torch {torch.__version__} finds no CUDA device here; choices: cpu")
    if index and int(index) >= count:
        raise UsageError(f"device {text!r}: there are {count} CUDA devices; choices: cpu, cuda:0 ... cuda:{count - 1}")
    return torch.device("cuda", int(index or 0))


def check_backend(name: str, device: torch.device) -> str:
    """Return the backend `name` if it is one, and can run on `device` here; raises UsageError otherwise."""
    from resnet_fused import dispatch, ops

    choose(name, dispatch.BACKENDS, "backend")
    if name != "auto" and (reason := ops.unavailable(name, device.type)):
        raise UsageError(f"--backend {name}: {reason}")
    return name


def check_importable(option: str, *packages: str) -> None:
    """Raise UsageError where one of the packages that an option needs is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{option} needs {package}, which is not installed: `pip install 'resnet_fused[bench]'`")


def check_writable(option: str, path: Path | None) -> None:
    """Raise UsageError where a file `path` could not be written: before the work, not after it."""
    if path is None or _in_place(path):
        return
    if path.is_dir():
        raise UsageError(f"{option} {path}: this is a folder; name a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot write into {parent}: {error.strerror}") from None


def _in_place(path: Path) -> bool:
    """Whether this is a device or a pipe, like /dev/stdout: nothing that a file may be moved over."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path` and move it there: readers see the old file or the whole new one.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    if _in_place(path):
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Write JSON-ready values, atomically."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(path, lambda file: file.write_text(text + "\n"))
