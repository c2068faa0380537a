"""Peak memory of one call.

On a CUDA device: what the contestant holds (its weights, packed copies and graph pools) plus the peak that the caching
allocator hands out above that during a call. On a CPU: the rise of the process's resident set during a call, read from
the kernel's high-water mark after freed pages were returned; the weights are not in it, oneDNN's own scratch memory is.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

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
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)
