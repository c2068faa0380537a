"""What is compiled before it is asked for."""

import dataclasses
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from tune_doubles import ARCH, DTYPE

from resnet_fused.dispatch.choice import ATEN
from resnet_fused.dispatch.table import Choice
from resnet_fused.measure.network import networks
from resnet_fused.tuning import candidates as listing
from resnet_fused.tuning.precompile import Precompiler
from resnet_fused.tuning.problems import jobs

COMPILES = """
import dataclasses, os, torch
from pathlib import Path
from dry_device import dry_device
from resnet_fused.tuning import precompile as compile_ahead
from resnet_fused.tuning import calls
from resnet_fused.tuning import candidates as listing
from resnet_fused.measure.network import networks
from resnet_fused.tuning.problems import Operands, check_images, jobs
from resnet_fused.dispatch.table import Choice

listing.backends = lambda device: ["triton"]
cpu, (network,) = torch.device("cpu"), networks(["resnet18"], 64)
found = jobs(network, ("infer", "train"), 16, torch.bfloat16, 90, False, alternatives=True)
def pick(op, kernel):
    every = ((job, choice) for job in found if job.problem.op == op for choice in listing.candidates(job, cpu, 90))
    return next(one for one in every if one[1].config and one[1].config.kernel == kernel)
picked = [pick("conv_fprop", "wgmma_conv"), pick("conv_wgrad", "pointer"), pick("conv_dgrad", "pointer")]
cache = Path(os.environ["TRITON_CACHE_DIR"])
def binaries():
    return {path.parent.name for path in cache.rglob("*.cubin")}

compile_ahead.as_if_on(90)
for job, choice in picked:
    assert compile_ahead.compile_candidate(job, choice, 90) is None
job, choice = picked[2]
sizes = dict(block_m=256, block_n=256, block_k=128, num_stages=6, num_warps=8)
huge = Choice("triton", dataclasses.replace(choice.config, **sizes))
odd = Choice("triton", dataclasses.replace(choice.config, block_m=48))
assert "shared memory" in compile_ahead.compile_candidate(job, huge, 90)
assert "does not compile" in compile_ahead.compile_candidate(job, odd, 90)

before = binaries()
with dry_device(90) as driver:
    for job, choice in picked:
        for problem in (job.problem, job.problem.with_batch(check_images(job.problem, 4, choice, 90))):
            one = dataclasses.replace(job, problem=problem)
            operands = calls.operands_of(one, Operands(cpu, torch.bfloat16, guarded=False))
            calls.make_benchmark_fn(one, choice, operands)()
    assert driver.dry_launches() >= 6, driver.dry_launches()
assert len(before) > 3 and binaries() == before, binaries() - before
print("all right")
"""


@pytest.mark.larger
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for the driver is built with gcc")
def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path):
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {
        **inherited,
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(root / "tests" / "support"), str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("all right"), done.stdout + done.stderr


def test_compiling_ahead_dedupes_waits_and_gives_up():
    class Pool:
        submitted = []

        def submit(self, function, *arguments):
            self.submitted.append((arguments, Future()))
            return self.submitted[-1][1]

    ahead = Precompiler(ARCH, 0)
    ahead._pool = Pool()
    (network,) = networks(["resnet50"], 224)
    some = [job for job in jobs(network, ("train",), 256, DTYPE, ARCH, False) if job.problem.op == "conv_wgrad"][3]
    config = listing.configurations(some.problem, ARCH)[0]
    one, more = Choice("triton", config), Choice("triton", dataclasses.replace(config, splits=config.splits * 2))
    for choice in (one, more, ATEN, Choice("cuda")):
        ahead.submit(some, choice)
    assert len(Pool.submitted) == 1  # the number of splits is no other kernel
    assert not ahead.ready(some, [one]) and ahead.ready(some, [ATEN]) and ahead.failure(some, one) is None
    ahead.wait(some, [one], 0.01)
    Pool.submitted[0][1].set_result("does not compile: too large")
    assert ahead.ready(some, [one, more]) and "too large" in ahead.failure(some, more)
