"""The gate that compiles the Triton kernels without a GPU: it passes what is right, fails what is not, and needs no
clean environment.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

GATE = [sys.executable, "-m", "resnet_fused.bench.compile_gate_triton"]
# The gate itself must see to it that the compiler, not the interpreter, gets the kernels.
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1"}


def _run(*command):
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def test_it_passes_the_kernels_as_they_are():
    done = _run(*GATE, "--quick", "--arch", "90", "--kernel", "add_act")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kernels compiled" in done.stdout and "0 in violation" in done.stdout
    assert "add_act_backward" in done.stdout


@pytest.mark.parametrize(
    "expected, problem",
    [("matrix=True", "wgmma"), ("copies=True", "no asynchronous copies"), ("index64=True", "32-bit offsets")],
)
def test_a_kernel_that_is_not_what_it_should_be_fails(expected, problem):
    """add_act has no matrix product, so whoever expects one must hear about it."""
    script = f"""
import dataclasses, os
del os.environ["TRITON_INTERPRET"]
from resnet_fused.bench import compile_gate_triton as gate
job = next(job for job in gate.jobs((90,), True, "add_act_kernel"))
print(gate.compile_job(dataclasses.replace(job, expect=gate.Expect({expected}))).problems)
"""
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert problem in done.stdout


def test_spills_and_too_much_shared_memory_fail():
    """A tile far beyond the registers, and one beyond the shared memory of the smaller architectures."""
    script = """
import os
del os.environ["TRITON_INTERPRET"]
import torch
from resnet_fused.bench import compile_gate_triton as gate
from resnet_fused import kernels
from resnet_fused.plan.conv import ConvConfig
def problems(arch, config):
    x = torch.empty(8, 64, 28, 28, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    w = torch.empty(256, 64, 3, 3, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    with gate.recording() as launches:
        kernels.conv_fprop(x, w, None, None, None, [1, 1], [1, 1], [1, 1], 1, False, config=config)
    return gate.compile_job(gate.job("x", gate.Expect(), arch, *launches[0])).problems
print("first:", problems(80, ConvConfig(256, 128, 32, 4, 2, False)))
print("second:", problems(86, ConvConfig(128, 128, 64, 8, 5, False)))
"""
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "spills" in first
    assert "shared memory" in second or "does not compile" in second


@pytest.mark.parametrize(
    "arguments, message", [(("--arch", "70"), "70"), (("--arch", "x"), "x"), (("--kernel", "nothing"), "nothing")]
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    done = _run(*GATE, *arguments, "--quick")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
