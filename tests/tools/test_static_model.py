"""What a training step launches, noted on meta tensors, and how long a launch would take by its machine code."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")
pytest.importorskip("torchvision")
static_model = pytest.importorskip("tools.compile_gate.static_model", reason="no checkout around these tests")
MachineCode = pytest.importorskip("tools.compile_gate.machine_code").MachineCode

PASS = static_model.Launch("bn_apply", None, (), {"num_warps": 4}, 1320, 3 * 10**9, 0.0, 1)
PRODUCT = static_model.Launch("conv_fprop 1x1", None, (), {"num_warps": 8, "num_stages": 3}, 132, 0, 790e9, 1)


def test_a_pass_takes_its_bytes_and_its_programs():
    code = MachineCode(registers=32, instructions=100)
    found = static_model.times(PASS, code, 0, 90)
    assert found.bytes == pytest.approx(1e-3) and found.matrix == 0 and found.longest == found.bytes
    cycle = 132 * 4096 / 790e12
    assert found.issue == pytest.approx(10 * 100 * cycle)  # ten programs of four warps on each of 132
    assert found.latency == pytest.approx(2 * static_model.LATENCY * cycle)  # all at once
    alone = static_model.times(dataclasses.replace(PASS, options={"num_warps": 8}), code, 120 * 1024, 90)
    assert alone.latency == pytest.approx(10 * found.latency)  # the shared memory holds one program at a time


def test_a_product_takes_its_loop_as_often_as_it_asks():
    loop_flop = PRODUCT.flop / PRODUCT.grid / 50
    code = MachineCode(registers=128, instructions=1100, loop=100, loop_flop=loop_flop)
    found = static_model.times(PRODUCT, code, 64 * 1024, 90)
    cycle = 132 * 4096 / 790e12
    assert found.matrix == pytest.approx(1e-3)
    assert found.issue == pytest.approx((1000 + 50 * 100) * 2 * cycle)
    assert found.latency == pytest.approx((2 + 50 / 2) * static_model.LATENCY * cycle)


def test_the_table_adds_up():
    rows = [("a", 2, 1e-3, static_model.Times(1e-3)), ("b", 1, 3e-3, static_model.Times(matrix=2e-3))]
    *_, total, said = static_model.table(rows, 8).splitlines()
    assert total == "| step | 3 | 1.00 | 2.00 | 0.00 | 0.00 | 4.00 |" and said.endswith("2,000 images/s.")


@pytest.mark.larger
def test_the_launches_of_a_step():
    host_time = pytest.importorskip("benchmarks.host_time", reason="no torchvision or rich", exc_type=ImportError)
    found = static_model.launches("resnet50", 2, 90, size=64)
    assert 300 < sum(one.count for one in found) <= host_time.MOST_LAUNCHES
    assert all(one.grid > 0 and one.bytes > 0 for one in found)
    # Three products a convolution, of two images: 4.1 GMAC each at 224 x 224, of which the stem, PyTorch's, has 0.12.
    macs = sum(one.flop * one.count for one in found) / 2
    assert macs / (3 * 2) == pytest.approx((4.09 - 0.12) * 1e9 * (64 / 224) ** 2, rel=0.03)
