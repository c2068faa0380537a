"""Without a GPU, all of a launch but its execution: binding, specialisation, ptxas, the driver's limits, the launcher.

On sm_80 and sm_90, through Triton's JIT, its own driver and its own launchers; see `dry_device`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import from_checkout  # noqa: F401
import pytest
from tiers import larger

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the stand-in for the driver")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
# Launched by a training step or a frozen network of blocks.
OF_A_NETWORK = {
    *("_bn_act_max_pool_kernel", "_bn_act_max_pool_backward_reduce_kernel", "_bn_act_max_pool_backward_apply_kernel"),
    *("_bn_stats_kernel", "_bn_finalize_kernel", "_bn_apply_kernel", "_bn_backward_reduce_kernel"),
    *("_bn_backward_apply_kernel", "_reduce_rows_kernel"),
    *("_conv_fprop_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel", "_conv_chain_kernel"),
}


def _run(module, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=SUPPORT.parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout


def _dry(arch, what):
    return json.loads(_run("dry_device.run", arch, what).splitlines()[-1])


@pytest.mark.parametrize("arch", [larger(80), 90])
def test_every_kernel_of_a_network_launches(arch):
    found = _dry(arch, "step")
    assert set(found["kernels"]) >= OF_A_NETWORK
    assert found["launches"] > 70 and not found["refused"]


def test_every_formulation_on_tensor_maps_launches():
    found = _dry(90, "boxes")
    assert not found["refused"]
    expected = {"_tma_gemm_kernel", "_tma_conv_kernel", "_wgmma_conv_kernel", "_wgmma_dgrad_kernel"}
    assert set(found["kernels"]) >= expected
    assert found["tensor_maps"] >= 3 * found["launches"]


def test_what_a_gpu_would_refuse_is_refused():
    found = _dry(86, "beyond")
    assert "out of resource: shared memory" in found["refused"][0] and "Hardware limit: 101376" in found["refused"][0]
    assert found["launches"] == 0


@pytest.mark.parametrize(
    "ops", [pytest.param(("add_act",), id="add_act"), pytest.param((), marks=pytest.mark.larger, id="all")]
)
def test_a_remembered_binary_is_the_one_that_triton_would_choose(ops):
    """On the same arguments, of other dtypes and sizes, and each in turn not at a multiple of 16 bytes."""
    assert not _run("dry_device.binaries", 90, *ops)


@pytest.mark.larger
def test_launches_and_dispatches_of_a_training_step(tmp_path):
    """Counts, which are exact; times are for the log."""
    host_time = pytest.importorskip("benchmarks.host_time", reason="no torchvision or rich", exc_type=ImportError)
    written = tmp_path / "host_time.json"
    _run("benchmarks.host_time", "--rounds", 1, "--json", written)
    fused, eager = (json.loads(written.read_text())[name] for name in ("fused Triton", "eager"))
    assert 300 < fused["launches"] <= host_time.MOST_LAUNCHES
    assert fused["dispatches"] < eager["dispatches"]
