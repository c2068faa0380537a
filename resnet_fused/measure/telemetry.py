"""The clocks, temperature, power and throttling of a GPU while it is measured, as nvidia-smi tells."""

from __future__ import annotations

import statistics
import subprocess
from types import TracebackType
from typing import TypedDict, cast

import torch

from resnet_fused.measure.provenance import nvidia_smi, output_of

PERIOD_MS = 200
FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
NAMES = ("sm_mhz", "memory_mhz", "temperature_c", "power_w")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # of newer and older drivers
# https://docs.nvidia.com/deploy/nvml-api: nvmlClocksEventReasons. Idle and display clocks slow no kernel down.
BITS = {
    0x2: "applications clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class Range(TypedDict):
    """Of the samples of a quantity."""

    min: float
    median: float
    max: float


class Conditions(TypedDict):
    """What a GPU was like while it was measured; None is what it does not tell."""

    samples: int
    sm_mhz: Range | None
    memory_mhz: Range | None
    temperature_c: Range | None
    power_w: Range | None
    throttled: dict[str, float]  # by reason, the share of the samples


class GpuTelemetry:
    """Within it nvidia-smi samples a GPU five times a second; `seen()` afterwards sums that up.

    On a CPU, or without nvidia-smi, it sees nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._command = _command(device) if device.type == "cuda" else None
        self._process: subprocess.Popen[str] | None = None
        self._output = ""

    def __enter__(self) -> GpuTelemetry:
        if self._command:
            loop = [*self._command, f"--loop-ms={PERIOD_MS}"]
            self._process = subprocess.Popen(loop, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            self._process.terminate()
            self._output = self._process.communicate()[0]
            self._process = None

    def seen(self) -> Conditions | None:
        """Minimum, median and maximum of each quantity, and the share of samples with each reason to throttle."""
        return summary(self._output)


def _command(device: torch.device) -> list[str] | None:
    """The query that this driver understands, for this GPU, without units."""
    for reason in REASONS:
        query = nvidia_smi(device, *FIELDS, reason)
        query[2] += ",nounits"
        if output_of(query) is not None:
            return query
    return None


def summary(output: str) -> Conditions | None:
    """Of the lines that nvidia-smi printed; None where there is no whole line among them."""
    columns: dict[str, list[float]] = {name: [] for name in NAMES}
    seen: list[int] = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(NAMES) + 1 or not cells[-1].startswith("0x"):
            continue  # cut off when it was ended, or a word instead of a number
        try:
            mask = int(cells[-1], 16)
        except ValueError:
            continue
        seen.append(mask)
        for name, cell in zip(NAMES, cells, strict=False):
            try:
                columns[name].append(float(cell))
            except ValueError:  # [N/A]: this GPU does not tell
                pass
    if not seen:
        return None
    ranges = {
        name: {"min": min(values), "median": statistics.median(values), "max": max(values)} if values else None
        for name, values in columns.items()
    }
    shares = {name: sum(bool(mask & bit) for mask in seen) / len(seen) for bit, name in BITS.items()}
    throttled = {name: share for name, share in shares.items() if share}
    return cast(Conditions, {"samples": len(seen), **ranges, "throttled": throttled})


def line(conditions: Conditions | None) -> str | None:
    """What `seen` found, in a line."""
    if not conditions:
        return None
    parts = []
    for name, unit in zip(NAMES, ("MHz", "MHz memory", "C", "W"), strict=True):
        if found := cast("Range | None", conditions[name]):  # type: ignore[literal-required]
            low, high = found["min"], found["max"]
            parts.append(f"{low:.0f}-{high:.0f} {unit}" if high > low else f"{low:.0f} {unit}")
    slowed = ", ".join(f"{name} {share:.0%} of the time" for name, share in conditions["throttled"].items())
    return f"{', '.join(parts)}; {f'slowed down by {slowed}' if slowed else 'not throttled'}"
