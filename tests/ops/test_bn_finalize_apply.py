"""A batch norm's second stage and the pass behind it: the results of both, bit for bit, in one launch for few rows."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import DEVICE, NCHW, NHWC
from tiers import larger

from resnet_fused import ops
from resnet_fused.ops.operands import Operands

pytest.importorskip("triton")
RECORD, OPS = ops.OPS["bn_finalize_apply"], torch.ops.resnet_fused
runs_kernels = pytest.mark.skipif(not ops.available("triton", DEVICE), reason=f"{ops.unavailable('triton', DEVICE)}")


def _arguments(size, layout, dtype, rows):
    make = Operands(torch.device(DEVICE), dtype, nhwc=layout is NHWC)
    n, c, h, w = size
    statistics = {"mean": make.vector(rows, c).double(), "m2": make.vector(rows, c, positive=True)}
    running = {"running_mean": make.vector(c), "running_var": make.vector(c, positive=True)}
    count = torch.full((rows,), 7.0, device=DEVICE)
    return RECORD.case(make, size)._replace(**statistics, count=count, **running)


def _fresh(a):
    return a._replace(running_mean=a.running_mean.clone(), running_var=a.running_var.clone())


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=runs_kernels), "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("rows", [1, 13, 17])
@pytest.mark.parametrize("size", [(2, 16, 9, 9), larger((3, 70, 3, 5)), larger((2, 1, 4, 4)), larger((1, 130, 11, 13))])
def test_it_is_both(size, rows, layout, dtype, backend):
    a = _arguments(size, layout, dtype, rows)
    ours, theirs = _fresh(a), _fresh(a)
    together = OPS.bn_finalize_apply(*ours, backend=backend)
    norm = OPS.bn_finalize(*theirs[1:], backend=backend)
    y, _ = OPS.bn_apply(a.x, norm[0], norm[1], None, None, None, True, False, backend=backend)
    assert all(map(torch.equal, (*together, *ours[6:8]), (*norm, y, *theirs[6:8])))
    assert together[4].stride() == a.x.stride()


@runs_kernels
@pytest.mark.parametrize("rows, layout, launches", [(16, NHWC, 1), (17, NHWC, 2), (16, NCHW, 2)])
def test_few_rows_take_one_launch(rows, layout, launches, monkeypatch):
    from resnet_fused.kernels import _launch, run

    a, counted = _arguments((2, 16, 4, 4), layout, torch.float32, rows), []
    for name in ("bn_finalize", "bn_apply"):
        module = importlib.import_module(f"resnet_fused.kernels.{name}")
        monkeypatch.setattr(module, "launch", lambda *args, **kwargs: counted.append(_launch.launch(*args, **kwargs)))
    run("bn_finalize_apply", a)
    assert len(counted) == launches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8, 3)}, "3-D"),
        ({"x": torch.zeros(2, 7, 3, 4)}, "mean must be [rows, 7]"),
        ({"m2": torch.zeros(2, 8).half()}, "m2 must be contiguous float32"),
    ],
)
def test_refusals_name_the_value(changes, message):
    a = RECORD.case(Operands(torch.device("cpu"), torch.float32), (2, 8, 3, 4))
    assert RECORD.refuse(a) is None
    assert message in RECORD.refuse(a._replace(**changes))
