"""Peak memory of one call, and whether what comes next fits into what is left.

On a CUDA device: what the contestant holds (its weights, packed copies and graph pools) plus the peak that the caching
allocator hands out above that during a call. On a CPU: the rise of the process's resident set during a call, read from
the kernel's high-water mark after freed pages were returned; the weights are not in it, oneDNN's own scratch memory is.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

GROUPS = Path("/sys/fs/cgroup")
_GROUP_FILES = {  # of a controller's hierarchy: limit, usage, and the line of memory.stat with pages of files
    "": ("memory.max", "memory.current", "inactive_file"),  # version 2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
}
EXPLANATION = {
    "cuda": "weights and graph pools held, plus the allocator's peak during one call",
    "cpu": "rise of the resident set during one call (weights not included)",
}


class MemoryMeter:
    """Create it before a contestant is built, ask it for the peak once the contestant is warm."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reserved_before = self._reserved()

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes at the peak of one call, as this module's docstring defines them; None where they cannot be known."""
        if self.device.type != "cuda":
            return _resident_peak(call)
        held = self._reserved() - self._reserved_before
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return held + torch.cuda.max_memory_allocated(self.device) - allocated

    def _reserved(self) -> int:
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)


def require(needed: int) -> None:
    """Raise MemoryError where so many bytes of main memory are not left: a kernel that runs out of it ends the process.

    Args:
        needed: bytes, an estimate.
    """
    left = available()
    if left is not None and needed > left:
        raise MemoryError(f"needs about {_gigabytes(needed)} of main memory, {_gigabytes(left)} are left")


def available() -> int | None:
    """Bytes of main memory that this process can still take: of the machine, or less where a control group limits it.

    None where the kernel does not tell.
    """
    try:
        found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return min([*found, *_group_limits()], default=None)


def _group_limits() -> Iterator[int]:
    """What is left to each control group that this process is in; pages of files can be given back."""
    try:
        memberships = [line.split(":", 2) for line in _lines("/proc/self/cgroup")]
    except OSError:
        return
    for _, controllers, own in memberships:
        if controllers not in _GROUP_FILES:
            continue
        root = GROUPS / controllers
        names = _GROUP_FILES[controllers]
        for group in (root / own.strip("/"), *(root / own.strip("/")).parents):
            if group == root or root in group.parents:
                yield from _left_to(group, *names)


def _left_to(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        allowed = int((group / limit).read_text())
        files = next(line for line in _lines(group / "memory.stat") if line.startswith(f"{cache} "))
        yield max(0, allowed - int((group / usage).read_text()) + int(files.split()[1]))
    except (OSError, ValueError, StopIteration):  # no limit is "max", or no file
        return


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def activations(model: nn.Module, mode: str, image_size: int) -> int:
    """Elements per image that a step of plain PyTorch holds at once, beside weights and input; from shapes alone.

    In training every output that is not written in place, in inference the largest input and output of one layer.

    Args:
        model: what runs; it is copied.
        mode: `"infer"` or `"train"`.
        image_size: side of the square input.
    """
    module = copy.deepcopy(model).eval().to("meta")
    inputs_and_outputs, outputs = [0], [0]

    def note(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not isinstance(output, torch.Tensor) or not isinstance(inputs[0], torch.Tensor):
            return
        inputs_and_outputs.append(inputs[0].numel() + output.numel())
        outputs.append(0 if getattr(layer, "inplace", False) else output.numel())

    for layer in module.modules():
        if not any(layer.children()):
            layer.register_forward_hook(note)
    with torch.inference_mode():
        module(torch.empty(1, 3, image_size, image_size, device="meta"))
    return sum(outputs) if mode == "train" else max(inputs_and_outputs)


def _resident_peak(call: Callable[[], object]) -> int | None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark
        before = _status("VmRSS")
    except (OSError, AttributeError, LookupError):  # not Linux, not glibc, or a kernel without the file
        return None
    call()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in _lines("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)
