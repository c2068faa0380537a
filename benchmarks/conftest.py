"""Measured bandwidth beside measured copy bandwidth, behind pytest-benchmark's own table.

    pytest benchmarks                      the device is the GPU if there is one, else the CPU
    pytest benchmarks --benchmark-json=F   to keep the numbers

A benchmark states in `extra_info["bytes"]` what its op has to move at the least; the summary turns that and the median
into GB/s, per cent of what a plain copy of the same device reaches, and a ratio to plain PyTorch in the same group.
"""

from __future__ import annotations

import pytest
import torch

from resnet_fused.measure.roof import copy_bandwidth

BASELINE = "eager"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device():
    return DEVICE


def pytest_report_header() -> str:
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads (no GPU here)"
    )
    return f"benchmarks on: {name}; torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    results = [b for b in (session.benchmarks if session else []) if not b.has_error and "bytes" in b.extra_info]
    if not results:
        return
    roof = copy_bandwidth(DEVICE)
    medians = {(b.group, b.extra_info["contestant"]): b["median"] for b in results}
    write = terminalreporter.write_line
    terminalreporter.section(f"bandwidth; a copy reaches {roof / 1e9:.0f} GB/s")
    write(f"{'op':<48}{'contestant':<12}{'ms':>9}{'GB/s':>8}{'% copy':>8}{'x eager':>9}")
    for b in sorted(results, key=lambda b: (b.group, b["median"])):
        rate = b.extra_info["bytes"] / b["median"]
        baseline = medians.get((b.group, BASELINE))
        ratio = f"{baseline / b['median']:.2f}" if baseline else "-"
        name, ms = b.extra_info["contestant"], b["median"] * 1e3
        write(f"{b.group:<48}{name:<12}{ms:>9.3f}{rate / 1e9:>8.0f}{rate / roof:>8.0%}{ratio:>9}")
