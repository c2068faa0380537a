"""The compile gate of the CUDA kernels finds what it is for, in the output of a stand-in for cuobjdump."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import from_checkout  # noqa: F401
import pytest

from tools.compile_gate import cuda_gate as gate

ROOT = Path(__file__).resolve().parents[2]
APPLY = "_ZN12resnet_fused15bn_apply_kernelI6__halfLNS_8ChannelsE0ELb1EEEvNS_5ApplyIT_EENS_4WalkE"
SCALAR = "_ZN12resnet_fused18reduce_rows_kernelIfLi1EEEvPKT_PS1_S4_lNS_7ColumnsE"


def cuobjdump(tmp_path: Path, apply: str = "REG:96 STACK:0 SHARED:0", code: str = "LDG.E.128 R4\nSTG.E.128 R4") -> Path:
    usage = f"""
Fatbin elf code:
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function {APPLY}:
  {apply} LOCAL:0 CONSTANT[0]:700 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SCALAR}:
  REG:40 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    sass = f"\tFunction : {APPLY}\n/*0000*/ {code}\n\tFunction : {SCALAR}\n/*0000*/ LDG.E R4 ;\n"
    (tmp_path / "usage").write_text(usage)
    (tmp_path / "sass").write_text(sass)
    tool = tmp_path / "cuobjdump"
    tool.write_text(f'#!/bin/sh\ncase "$1" in *usage*) cat {tmp_path}/usage ;; *sass*) cat {tmp_path}/sass ;; esac\n')
    tool.chmod(0o755)
    return tool


def test_it_reads_registers_stack_shared_memory_and_wide_accesses(tmp_path):
    apply, scalar = gate.inspect(tmp_path / "_C.so", cuobjdump(tmp_path))
    assert apply.name == "bn_apply_kernel<fp16, octet, true>" and apply.arch == "sm_90"
    assert (apply.registers, apply.stack, apply.shared, apply.wide_loads, apply.wide_stores) == (96, 0, 0, 1, 1)
    assert scalar.name == "reduce_rows_kernel<fp32, 1>" and scalar.shared == 2048
    assert not apply.violations and not scalar.violations
    assert "bn_apply_kernel<fp16, octet, true>  96" in gate.table([apply, scalar])


@pytest.mark.parametrize(
    "apply,code,violation",
    [
        ("REG:130 STACK:0 SHARED:0", "LDG.E.128 R4\nSTG.E.128 R4", "130 registers, limit 112"),
        ("REG:96 STACK:16 SHARED:0", "LDG.E.128 R4\nSTG.E.128 R4", "16 bytes of stack: spills"),
        ("REG:96 STACK:0 SHARED:50000", "LDG.E.128 R4\nSTG.E.128 R4", "50000 bytes of shared memory"),
        ("REG:96 STACK:0 SHARED:0", "LDG.E.64 R4\nSTG.E.128 R4", "no 16-byte load"),
        ("REG:96 STACK:0 SHARED:0", "LDG.E.128 R4\nSTG.E.U16 R4", "no 16-byte store"),
    ],
)
def test_it_reports_each_violation(tmp_path, apply, code, violation):
    instance, _ = gate.inspect(tmp_path / "_C.so", cuobjdump(tmp_path, apply, code))
    assert len(instance.violations) == 1 and violation in instance.violations[0]
    assert violation in gate.table([instance])


def test_a_violation_and_a_kernel_that_is_missing_fail_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "_tool", lambda name, toolkit: cuobjdump(tmp_path, "REG:96 STACK:8 SHARED:0"))
    monkeypatch.setattr(gate, "LIMITS", {name: gate.LIMITS[name] for name in ("bn_apply_kernel", "reduce_rows_kernel")})
    assert gate.main(["--library", str(tmp_path / "_C.so")]) == 1
    assert "2 kernel instances on 1 architectures, 1 violations" in capsys.readouterr().out
    monkeypatch.setattr(gate, "_tool", lambda name, toolkit: cuobjdump(tmp_path))
    assert gate.main(["--library", str(tmp_path / "_C.so")]) == 0
    monkeypatch.setattr(gate, "LIMITS", {**gate.LIMITS, "bn_stats_nhwc": gate.Limit(1)})
    assert gate.main(["--library", str(tmp_path / "_C.so")]) == 1
    assert "bn_stats_nhwc: recorded, but not in the library" in capsys.readouterr().out
    assert gate.main(["--library", str(tmp_path / "_C.so"), "--arch", "70"]) == 2
    assert "architectures: sm_90" in capsys.readouterr().out


def test_without_a_toolkit_it_says_so_and_exits_with_2(tmp_path):
    program = "import sys; from tools.compile_gate import cuda_gate as g; b = g._build_module()\n"
    program += "b._candidates = lambda: []; g._build_module = lambda: b; sys.exit(g.main([]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stderr.startswith("compile gate: ") and run.stderr.count("\n") == 1


def test_every_kernel_of_the_sources_has_a_recorded_limit():
    import re

    names = set()
    for source in (ROOT / "csrc").glob("*.cuh"):
        names |= set(re.findall(r"__global__ void __launch_bounds__\([^;{]*?\)\s+(\w+)\(", source.read_text()))
    assert names == set(gate.LIMITS)
