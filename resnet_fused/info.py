"""What is installed, what was built, and which backends can run here."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from dataclasses import dataclass, field

import torch

from resnet_fused import _library, ops
from resnet_fused.dispatch import BACKENDS
from resnet_fused.dispatch.table import known_tables
from resnet_fused.ops import cpu


@dataclass(frozen=True)
class Info:
    """What `info` found; `str()` is a table.

    Attributes:
        versions: (package, version) of what decides about kernels.
        kernels: one line on the compiled library.
        devices: the devices PyTorch sees.
        tables: one line on each measured table that the plan reads.
        backends: (backend, device type, None or the reason why it cannot run there).
        frozen: one line on what runs frozen models on a CPU.
    """

    versions: list[tuple[str, str]]
    kernels: str
    devices: list[str]
    backends: list[tuple[str, str, str | None]]
    tables: list[str] = field(default_factory=list)
    frozen: str = ""

    def __str__(self) -> str:
        rows = [*self.versions, ("compiled kernels", self.kernels)]
        rows += [("device", device) for device in self.devices]
        untuned = "nothing yet: native PyTorch kernels run until `resnet-fused tune` has run on a GPU"
        rows += [("tuned for", table) for table in self.tables or [untuned]]
        runs = {"aten": "runs: native PyTorch kernels", "reference": "runs: plain PyTorch, op by op, to compare with"}
        runs["cuda on cpu"] = "runs: the CUDA kernels' code executed on the CPU, slowly, for tests"
        runs["cpu"] = "runs: batch norm, ReLU and residual in training, by default"
        for name, device, why in self.backends:
            row = f"{name} on {device}"
            rows.append((row, f"no: {why}" if why else runs.get(row) or runs.get(name, "runs")))
        rows += [("frozen on a CPU", self.frozen)] if self.frozen else []
        width = max(len(left) for left, _ in rows)
        indent = " " * (width + 2)
        lines = (
            textwrap.fill(
                right, 120, initial_indent=f"{left:<{width}}  ", subsequent_indent=indent, break_long_words=False
            )
            for left, right in rows
        )
        return "\n".join(lines)


def info() -> Info:
    """The versions, the compiled kernels, the devices, and for each backend whether it runs here or why not."""
    from resnet_fused import __version__  # the package imports this module

    versions = [
        ("resnet_fused", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("CUDA of torch", torch.version.cuda or "none"),
    ]
    threads = torch.get_num_threads()
    devices = [f"cpu: {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'' if threads == 1 else 's'}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = "".join(map(str, torch.cuda.get_device_capability(i)))
            devices.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}, sm_{capability}")
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backends = [(name, kind, ops.unavailable(name, kind)) for name in BACKENDS if name != "auto" for kind in kinds]
    tables = [
        f"{table.gpu} (sm_{table.arch}): {len(table.entries)} problems, {len(table.verified)} kernels verified"
        for table in known_tables()
    ]
    return Info(versions, _library.status(), devices, backends, tables, _frozen_on_cpu())


def _frozen_on_cpu() -> str:
    if problem := cpu.unavailable():
        return f"oneDNN, not our kernels: {problem}"
    found, names = cpu.supported(), {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
    dtypes = ", ".join(short for name, short in names.items() if name in found)
    wide, vnni, amx = ("yes" if yes else "no" for yes in (cpu.wide(), "int8" in found, "amx" in found))
    return f"our kernels: {dtypes}; AVX-512 {wide}, VNNI {vnni}, AMX {amx}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
