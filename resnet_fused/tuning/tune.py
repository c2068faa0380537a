"""Measure every candidate of every problem of a network, and write the plan's table for this GPU.

First what would run without a table, everywhere; then whole blocks; then every other candidate, what takes most time
first; then the blocks again. Whenever time runs out, the table is of use. Correctness comes first: a candidate that
errs is not timed. The rest are timed side by side as CUDA graphs from a cold L2, while other processes compile what
comes next. Nothing but this command ever measures; the plan only reads what it wrote.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from resnet_fused import ops
from resnet_fused._command import UsageError, choose, choose_many
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.conv import tf32_allowed
from resnet_fused.dispatch.device import arch as arch_of
from resnet_fused.dispatch.table import Problem
from resnet_fused.measure import provenance
from resnet_fused.measure.cases import MODES
from resnet_fused.measure.network import Network, networks
from resnet_fused.measure.progress import Silent
from resnet_fused.tuning.calls import backends
from resnet_fused.tuning.device_worker import LocalWorker, ProcessWorker
from resnet_fused.tuning.precompile import SPARE_CORES, Precompiler
from resnet_fused.tuning.problems import DTYPES, Job, blocks, jobs, parts
from resnet_fused.tuning.report import REHEARSAL, Prediction, TuneReport, predict
from resnet_fused.tuning.search import Search

BUILT_IN = ("resnet50", "resnet18")


def tune(
    model: str | torch.nn.Module | Iterable[str] = BUILT_IN,
    *,
    modes: Iterable[str] = ("infer", "train"),
    batch: int | Iterable[int] = 256,
    dtype: str = "bf16",
    image_size: int = 224,
    budget_s: float = math.inf,
    rehearse: bool = False,
    again: bool = False,
    path: Path | None = None,
    processes: int | None = None,
    command: str = "resnet_fused.tune()",
    reporter: Any = None,
) -> TuneReport:
    """Measure what serves each op of these models best on this GPU, and write it to a table that the plan reads.

    Args:
        model: a model, a name (torchvision's, or `timm:<name>`), or several names.
        modes: `"infer"`, `"train"`.
        batch: images, or several numbers of them; a table also speaks for half and for twice as many.
        dtype: `"fp32"`, `"bf16"` or `"fp16"`; or `"int8"`, for inference alone.
        image_size: side of the square input.
        budget_s: begin no problem after so many seconds; calling again goes on from there.
        rehearse: run every step on a CPU, on a tiny network, into a table that no plan reads.
        again: measure also what the table knows already.
        path: the table's file; by default in the cache folder, where the plan finds it.
        processes: that compile ahead; by default one a core but two, in a rehearsal none. On a GPU one more checks and
            times, so that a script calls this under `if __name__ == "__main__"`.
        command: recorded as the origin of the numbers.
        reporter: gets `expect(number)` of steps, then `start(text)` for each and `detail(text)`.

    Returns:
        what was measured and what changed.

    Raises:
        UsageError: there is nothing to tune here, or a choice is unknown; one line.
    """
    choose(dtype, DTYPES, "dtype")
    modes = ["infer"] if dtype == "int8" else choose_many(modes, MODES, "mode")
    batches = sorted({batch} if isinstance(batch, int) else set(batch), reverse=True)
    if not batches or min(batches) < 1:
        raise UsageError(f"batch {batch!r} is no number of images")
    device, arch, gpu = _where(rehearse)
    tf32 = dtype == "fp32" and tf32_allowed()
    model = model if isinstance(model, torch.nn.Module) else [model] if isinstance(model, str) else list(model)
    described = networks(model, image_size, rehearse)
    batches = [2] if rehearse else batches
    everything = [(network, n) for network in described for n in batches]
    what = (DTYPES[dtype], arch, tf32)
    found = _together(job for network, n in everything for job in jobs(network, modes, n, *what, alternatives=True))
    trained = everything if "train" in modes else []
    whole = _together(job for network, n in trained for job in blocks(network, n, DTYPES[dtype], tf32))
    facts = dict(provenance.collect(device, command))
    if processes is None:
        processes = 0 if rehearse else max(1, (os.cpu_count() or 1) - SPARE_CORES)
    bench = LocalWorker(device, arch, rounds=1) if rehearse else ProcessWorker(device, arch, rounds=None)
    compiles = processes if ops.available("triton", device.type) and not rehearse else 0
    path = path or _default_path(gpu, rehearse)
    search = Search(
        device, arch, gpu, facts, path, again, rehearse, bench, Precompiler(arch, compiles), reporter or Silent()
    )
    done = search.run(found, whole, budget_s)
    plans.forget()
    if rehearse:
        return done
    labels = [type(model).__name__] if isinstance(model, torch.nn.Module) else model

    def prediction(label: str, network: Network, mode: str, n: int) -> Prediction:
        name = "inference" if mode == "infer" else "training"
        return predict(f"{label} {name} at batch {n}", parts(network, mode, n, *what), done.table)

    named = [(label, network, n) for label, network in zip(labels, described, strict=True) for n in batches]
    predictions = [prediction(label, network, mode, n) for label, network, n in named for mode in modes]
    done.predictions.extend(predictions)
    return done


def _together(every: Iterable[Job]) -> list[Job]:
    """Each problem once; the first network that has it says how often it occurs."""
    found: dict[Problem, Job] = {}
    for job in every:
        known = found.setdefault(job.problem, job)
        if known.weight < job.weight:
            found[job.problem] = job
    return list(found.values())


def _where(rehearse: bool) -> tuple[torch.device, int, str]:
    """The device, its compute capability times ten and its name; raises UsageError where there is nothing to tune."""
    if rehearse:
        device, arch, name = torch.device("cpu"), 80, REHEARSAL
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        arch, name = arch_of(device), torch.cuda.get_device_name(device)
    else:
        raise UsageError("nothing to tune: no CUDA GPU here; --rehearse runs every step on the CPU")
    if not backends(device):
        reasons = "; ".join(f"{name}: {ops.unavailable(name, device.type)}" for name in ("triton", "cuda"))
        raise UsageError(f"nothing to tune: native PyTorch kernels have no competitor here ({reasons})")
    return device, arch, name


def _default_path(gpu: str, rehearse: bool) -> Path:
    folder = tables.cache_folder()
    return folder / "rehearsal" / "cpu.json" if rehearse else folder / tables.file_name(gpu)
