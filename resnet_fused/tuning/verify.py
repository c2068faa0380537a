"""Every kernel of a network's problems against float64, on this machine.

A (kernel, architecture) pair becomes a default only after this has passed there; `tune` asks the same questions before
it times anything.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from resnet_fused import ops
from resnet_fused._command import UsageError, choose_many
from resnet_fused.dispatch.conv import tf32_allowed
from resnet_fused.dispatch.device import arch as arch_of
from resnet_fused.dispatch.table import Choice, Problem
from resnet_fused.measure import provenance
from resnet_fused.measure.cases import MODES
from resnet_fused.measure.network import networks
from resnet_fused.measure.progress import Silent
from resnet_fused.measure.provenance import Provenance
from resnet_fused.measure.workers import TaskFailure, isolated_map
from resnet_fused.tuning.calls import KERNEL_BACKENDS, backends
from resnet_fused.tuning.candidates import candidates
from resnet_fused.tuning.checks import REFUSED, VERIFIED_IMAGES, check_all, unusable
from resnet_fused.tuning.problems import DTYPES, Job, jobs, wrapping_images

BUILT_IN = ("resnet50", "resnet18")


@dataclass(frozen=True)
class Check:
    """One candidate of one problem; `reason` is None where it was right."""

    problem: Problem
    op: str
    choice: Choice
    reason: str | None

    @property
    def refused(self) -> bool:
        """Whether the kernel said beforehand that it does not take the problem, which is no error."""
        return self.reason is not None and self.reason.startswith(REFUSED)


@dataclass(frozen=True)
class Verification:
    """What `verify` found; `str()` is a table, `passed` the verdict."""

    device: str
    checks: tuple[Check, ...]
    provenance: Provenance

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.reason and not check.refused]

    @property
    def passed(self) -> bool:
        return not self.failures and any(not check.refused for check in self.checks)

    def __str__(self) -> str:
        right: Counter[tuple[str, str]] = Counter()
        total: Counter[tuple[str, str]] = Counter()
        for check in self.checks:
            key = check.op, check.choice.backend
            total[key] += not check.refused
            right[key] += check.reason is None
        width = max((len(op) for op, _ in total), default=0)
        lines = [f"{op:<{width}}  {backend:<9} {right[op, backend]} of {n}" for (op, backend), n in total.items() if n]
        lines += [f"wrong: {check.problem}: {check.op}, {check.choice}: {check.reason}" for check in self.failures]
        if not sum(total.values()):
            reasons = "; ".join(dict.fromkeys(f"{check.op}, {check.reason}" for check in self.checks))
            return f"nothing to verify: no kernel that runs here takes one of these problems: {reasons}"
        verdict = "all right" if self.passed else f"{len(self.failures)} wrong"
        return "\n".join([*lines, f"{verdict}: {sum(total.values())} checks against float64 on {self.device}"])

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "provenance": self.provenance,
            "passed": self.passed,
            "checks": [
                {"problem": str(c.problem), "op": c.op, "choice": str(c.choice), "reason": c.reason}
                for c in self.checks
            ],
        }


def verify(
    model: str | torch.nn.Module | Iterable[str] = BUILT_IN,
    *,
    modes: Iterable[str] = ("infer", "train"),
    dtypes: Iterable[str] = tuple(DTYPES),
    batch: int = VERIFIED_IMAGES,
    image_size: int = 224,
    every_configuration: bool = False,
    rehearse: bool = False,
    processes: int | None = None,
    command: str = "resnet_fused.verify()",
    reporter: Any = None,
) -> Verification:
    """Compare every kernel with float64 on the problems of these models, on the GPU if there is one.

    Each op runs twice on operands between guards of NaN, its results allocated full of NaN. An error of more than twice
    plain PyTorch's in the same dtype plus 4 units in the last place, a NaN, a touched guard, a changed operand or two
    runs that differ in a bit is a failure.

    Args:
        model: a model, a name (torchvision's, or `timm:<name>`), or several names.
        modes: `"infer"`, `"train"`.
        dtypes: of `"fp32"`, `"bf16"`, `"fp16"` and, for inference, `"int8"`.
        batch: images.
        image_size: side of the square input.
        every_configuration: all launch configurations that `tune` would try, not only those used without a table.
        rehearse: a tiny network instead, for a CPU (Triton's interpreter, host-executed CUDA kernels).
        processes: that compile and check side by side; a kernel that crashes or hangs takes only its own with it. By
            default 8, in a rehearsal 1: this one. A script that calls this with more than 1 does so under
            `if __name__ == "__main__"`.
        command: recorded as the origin of the result.
        reporter: gets `expect(number)` of checks, then `start(text)` for each.

    Raises:
        UsageError: no kernel can run here, or a choice is unknown; one line.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not rehearse else "cpu")
    modes, dtypes = choose_many(modes, MODES, "mode"), choose_many(dtypes, DTYPES, "dtype")
    if not backends(device):
        raise UsageError(f"nothing to verify: no kernel of this package runs here ({_missing(device)})")
    arch = arch_of(device)
    found: dict[Problem, Job] = {}
    for network in networks(model, image_size, rehearse):
        for dtype in dtypes:
            tf32 = dtype == "fp32" and tf32_allowed()
            for job in jobs(network, modes, 2 if rehearse else batch, DTYPES[dtype], arch, tf32):
                found.setdefault(job.problem, job)
    if processes is None:
        processes = 1 if rehearse else min(8, os.cpu_count() or 1)
    quick = not every_configuration
    pairs = [
        (job if rehearse else _enough(job, choice, arch), choice)
        for job in found.values()
        for choice in candidates(job, device, arch, quick=quick)
        if choice.backend != "aten"
    ]
    if not pairs:
        wanted = ", ".join(dict.fromkeys(problem.op for problem in found)) or "training in int8"
        here, missing = ", ".join(backends(device)), _missing(device)
        why = f"; {missing}" if missing else ""
        raise UsageError(f"nothing to verify: of the kernels that run here ({here}), none is for {wanted}{why}")
    checks = tuple(_checks(pairs, device, processes, reporter or Silent()))
    facts = provenance.collect(device, command)
    return Verification(provenance.device_name(facts), checks, facts)


def _missing(device: torch.device) -> str:
    """Why the kernel backends that cannot run here cannot."""
    missing = [name for name in KERNEL_BACKENDS if name not in backends(device)]
    return "; ".join(f"{name}: {ops.unavailable(name, device.type)}" for name in missing)


def _enough(job: Job, choice: Choice, arch: int) -> Job:
    """The problem with as many images as a persistent kernel needs to be proven on."""
    images = max(job.problem.batch, wrapping_images(job.problem, choice, arch))
    return dataclasses.replace(job, problem=job.problem.with_batch(images))


def _checks(pairs: list[tuple[Job, Choice]], device: torch.device, processes: int, reporter: Any) -> Iterator[Check]:
    """In the order of `pairs`."""
    tasks = [(job, choice, device, job.problem.batch) for job, choice in pairs]
    reporter.expect(len(tasks))
    if processes > 1:
        results: Iterable[tuple[int, Any]] = isolated_map(check_all, tasks, processes, spoils=unusable)
    else:
        results = ((index, check_all(*task)) for index, task in enumerate(tasks))
    found: dict[int, dict[str, str | None]] = {}
    for index, result in results:
        job, choice = pairs[index]
        reporter.start(f"{job.problem}: {choice}")
        found[index] = {job.problem.op: result.reason} if isinstance(result, TaskFailure) else result
    for index, (job, choice) in enumerate(pairs):
        yield from (Check(job.problem, op, choice, reason) for op, reason in found[index].items())
