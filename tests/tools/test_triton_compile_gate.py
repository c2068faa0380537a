"""The gate that compiles the Triton kernels without a GPU: it passes what is right, fails what is not, and needs no
clean environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import from_checkout  # noqa: F401
import pytest

pytest.importorskip("triton")

from tools.compile_gate import machine_code, triton_gate

GATE = [sys.executable, "-m", "tools.compile_gate.triton_gate"]
EXPECTED = {
    "matrix=True": "wgmma",
    "copies=True": "no asynchronous copies",
    "tma=True": "no copies by the tensor memory accelerator",
    "specialized=True": "warps not specialised",
    "index64=True": "32-bit offsets",
}


def _run(*command, interpret="0"):
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.larger
def test_it_passes_the_kernels_as_they_are():
    """The gate itself must see to it that the compiler, not the interpreter, gets the kernels."""
    done = _run(*GATE, "--quick", "--arch", "90", "--kernel", "add_act", interpret="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kernels compiled" in done.stdout and "0 in violation" in done.stdout
    assert "add_act_backward" in done.stdout


@pytest.fixture(scope="module")
def problems():
    """What add_act is found to lack, by what was expected of it: it has no matrix product."""
    script = f"""
import dataclasses
from tools.compile_gate import triton_gate as gate
job = next(job for job in gate.jobs((90,), True, "add_act_kernel"))
for expect in ({", ".join(f"gate.Expect({expected})" for expected in EXPECTED)}):
    print(gate.compile_job(dataclasses.replace(job, expect=expect)).problems)
"""
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    return dict(zip(EXPECTED, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("expected", EXPECTED)
def test_a_kernel_that_is_not_what_it_should_be_fails(expected, problems):
    assert EXPECTED[expected] in problems[expected]


SERIALISED = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, y, K, DEFINED: tl.constexpr):
    i = tl.arange(0, 64)
    tile = i[:, None] * 64 + i[None, :]
    first, acc = (tl.load(x + tile) * 2.0).to(tl.bfloat16), tl.zeros((64, 64), tl.float32)
    for k in range(0, K, 64):
        left = first
        if DEFINED:  # its accumulator is set to zero while the other product of the round before runs
            left = (tl.dot(first, tl.load(x + k * 64 + tile)) + 1.0).to(tl.bfloat16)
        acc = tl.dot(left, tl.load(x + (K + k) * 64 + tile), acc)
    tl.store(y + tile, acc)
"""


@pytest.mark.larger
def test_products_that_wait_for_one_another_fail(tmp_path):
    (tmp_path / "serialised.py").write_text(SERIALISED)
    script = f"""
import os, sys
del os.environ["TRITON_INTERPRET"]
sys.path.append({str(tmp_path)!r})
from tools.compile_gate import triton_gate as gate
signature = (("x", "*bf16"), ("y", "*fp32"), ("K", "i32"), ("DEFINED", "constexpr"))
for defined in (False, True):
    args = ("x", "serialised", "kernel", 90, signature, ((3, defined),), (0, 1, 2), (("num_warps", 4),))
    print(gate.compile_job(gate.Job(*args, gate.Expect(matrix=True))).problems)
"""
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "['serialised wgmma']"]


@pytest.mark.parametrize("kernel, arch", [("wgmma_conv", "90"), ("wgmma_dgrad", "90"), ("tcgen05_conv", "100")])
@pytest.mark.larger
def test_the_experimental_kernels_are_what_they_should_be(kernel, arch, tmp_path):
    """And the rows that the documentation is made of say so."""
    file = tmp_path / "rows.json"
    done = _run(*GATE, "--quick", "--arch", arch, "--kernel", kernel, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["quick"] and found["triton"] and found["rows"]
    for row in found["rows"]:
        assert row["kernel"] == kernel and row["arch"] == int(arch)
        assert row["spills"] == 0 and row["problems"] == [] and row["tma"] > 0
        assert row["matrix"] == {"90": "wgmma", "100": "tcgen05"}[arch]
        assert 0 < row["issue/MMA"] < 2
        assert row["specialized"]


SASS = """
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/                   STG.E.128 [R2], R8 ;
        /*0050*/              @P1  BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_issue_over_mma_counts_the_innermost_loop_with_matrix_instructions():
    assert [len(body) for body in machine_code.loops(SASS)] == [3, 6]
    # 3 instructions x 4 warps / 4 schedulers, over 2 x 4096 FLOP x 4 warps / 2048 FLOP a cycle.
    loop = machine_code.main_loop(SASS)
    assert len(loop) == 3
    assert machine_code._issue_per_mma(loop, "", 80, 4, False) == pytest.approx(3 / 16)
    assert machine_code._issue_per_mma(loop, "wgmma tf32", 80, 4, False) == pytest.approx(3 / 32)
    assert machine_code.main_loop(SASS.replace("HMMA", "IMAD")) == []
    assert machine_code._issue_per_mma([], "", 80, 4, False) is None
    eight = machine_code.main_loop(SASS.replace("HMMA.16816.F32.BF16", "IMMA.16832.S8.S8.SAT"))
    ptx = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    assert machine_code._issue_per_mma(eight, ptx, 80, 4, False) == pytest.approx(3 / (2 * 8192 * 4 / 4096))
    wgmma = machine_code.main_loop(SASS.replace("HMMA.16816", "HGMMA.64x128x16"))
    assert machine_code._issue_per_mma(wgmma, "", 90, 8, False) == pytest.approx((3 * 2) / (2 * 2 * 2**18 / 4096))


DIVIDES = """
        /*0016*/                   I2F.S8 R76, R30 ;
        /*0018*/                   I2F.U32.RP R4, UR8 ;
        /*001c*/                   MUFU.RCP R4, R4 ;
"""


def test_divisions_are_counted_in_the_main_loop_alone():
    first, product = SASS.index("        /*0000*/"), SASS.index("        /*0010*/")
    for place, expected in ((first, 0), (product, 2)):
        loop = machine_code.main_loop(SASS[:place] + DIVIDES.lstrip("\n") + SASS[place:])
        assert machine_code.divisions(loop) == expected


def test_what_is_behind_the_main_loop():
    behind = machine_code.behind_loop(SASS, machine_code.main_loop(SASS))
    assert [line.split()[1] for line in behind] == ["STG.E.128", "@P1", "EXIT"]
    assert machine_code.behind_loop(SASS, []) == []


def test_the_shape_of_tcgen05_comes_from_its_instruction_descriptor():
    ptx = """
    mov.b32 %r7, 136315024;
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd2, %rd3, %r7, %p4;
    """
    assert machine_code._tcgen05_flop(ptx) == 2 * 128 * 128 * 16
    assert machine_code._tcgen05_flop(ptx.replace("%rd2,", "[ %r2 + 0 ],")) == 2 * 128 * 128 * 16
    assert machine_code._tcgen05_flop(ptx.replace("kind::f16", "kind::i8")) == 2 * 128 * 128 * 32
    assert machine_code._tcgen05_flop(ptx.replace("mov", "add")) == 0


@pytest.mark.larger
def test_spills_and_too_much_shared_memory_fail():
    """A tile far beyond the registers, and one beyond the shared memory of the smaller architectures."""
    script = """
import torch
from tools.compile_gate import triton_gate as gate
from resnet_fused import kernels
from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.ops.conv_fprop import Args
def problems(arch, config):
    x = torch.empty(8, 64, 28, 28, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    w = torch.empty(256, 64, 3, 3, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    with gate.recording() as launches:
        kernels.run("conv_fprop", Args(x, w, None, None, None, [1, 1], [1, 1], [1, 1], 1, None), config)
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
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capfd):
    try:
        code = triton_gate.main([*arguments, "--quick"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.larger
def test_what_the_plan_launches_for_a_network(tmp_path):
    """Once for each distinct launch, with the configurations of the architecture that was asked for."""
    file = tmp_path / "rows.json"
    script = f"""
from tools.compile_gate import triton_gate as gate
status = gate.main(["--model", "resnet50", "--arch", "90", "--kernel", "bn_apply", "--json", {str(file)!r}])
found = [{{job.options for job in gate.jobs((arch,), False, "conv_dgrad", "resnet50")}} for arch in (80, 90)]
print(status, found[0] != found[1])
"""
    done = _run(sys.executable, "-c", script)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 True", done.stdout + done.stderr
    cases = [row["case"] for row in json.loads(file.read_text())["rows"]]
    assert len(cases) >= 8 and all(case.startswith("bf16 ") for case in cases)
