"""Where a number comes from: machine, versions, commit, command, date. Unknown values are None, never guessed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

import resnet_fused


class _Cpu(TypedDict):
    name: str
    capability: str
    threads: int
    load_average_1min: float


class Cpu(_Cpu, total=False):
    """Name, instruction set, cores, torch's threads, clock now, and the load others put on the machine."""

    cores: int | None
    mhz: float | None


class Gpu(TypedDict):
    """Name, capability, memory, CUDA; driver, clocks and power limit where nvidia-smi tells."""

    name: str


class Commit(TypedDict):
    """Of the sources."""

    sha: str
    dirty: bool


class _Always(TypedDict):
    date_utc: str
    command: str
    torch: str
    cpu: Cpu
    gpu: Gpu | None


class Provenance(_Always, total=False):
    """Everything a reader needs to judge or repeat a measurement."""

    commit: Commit | None
    package: str
    python: str
    platform: str
    triton: str | None
    torchvision: str | None
    timm: str | None
    cudnn: int | None
    onednn: str | None
    cudnn_allow_tf32: bool
    float32_matmul_precision: str


def collect(device: torch.device, command: str) -> Provenance:
    """Of what is measured on `device` by `command`."""
    return {
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "package": resnet_fused.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "torchvision": version("torchvision"),
        "timm": version("timm"),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "onednn": onednn_version(),
        "cpu": cpu(),
        "gpu": gpu(device) if device.type == "cuda" else None,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(provenance: Provenance) -> str:
    """The measured device in a few words, for titles."""
    if provenance["gpu"]:
        return str(provenance["gpu"]["name"])
    cpu = provenance["cpu"]
    return f"{cpu['name']} ({cpu['capability']}), {cpu['threads']} threads"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def onednn_version() -> str | None:
    match = re.search(r"(?:oneDNN|MKL-DNN|mkldnn)\)?\s+v(\d[\w.]*)", torch.__config__.show())
    return match[1] if match else None


def cpu() -> Cpu:
    text = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    clock = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)
    return {
        "name": name[1].strip() if name else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mhz": float(clock[1]) if clock else None,
        "load_average_1min": os.getloadavg()[0],
    }


def gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    row = output_of(nvidia_smi(device, *fields))
    values = [value.strip() for value in row.split(",")] if row else [None] * len(fields)
    facts.update(zip(fields, values, strict=False))
    return cast(Gpu, facts)


def nvidia_smi(device: torch.device, *fields: str) -> list[str]:
    """The command that prints these fields of a GPU, with commas between them."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    target = f"--id=GPU-{uuid}" if uuid else f"--id={device.index or 0}"
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", target]


def commit() -> Commit | None:
    """The commit of the checkout this package runs from and whether it has uncommitted changes; outside one what
    RESNET_FUSED_COMMIT says, as `git describe --always --dirty --abbrev=40 --exclude='*'` does, or None.
    """
    package = Path(resnet_fused.__file__).resolve().parent
    git = ["git", "-C", str(package.parent)]
    if output_of([*git, "ls-files", "--error-unmatch", "resnet_fused/__init__.py"]) is None:
        # Installed: a repository around site-packages would not be this project's. Or copied without its history.
        said = re.fullmatch(r"([0-9a-f]{7,40})(-dirty)?", os.environ.get("RESNET_FUSED_COMMIT", ""))
        return {"sha": said[1], "dirty": bool(said[2])} if said else None
    sha = output_of([*git, "rev-parse", "HEAD"])
    return {"sha": sha, "dirty": bool(output_of([*git, "status", "--porcelain"]))} if sha else None


def output_of(command: list[str]) -> str | None:
    """What a command prints; None where it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
