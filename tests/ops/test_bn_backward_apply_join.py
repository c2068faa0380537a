"""The gradients of two batch norms in one pass: those of a pass for each, bit for bit."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, NCHW, NHWC
from tiers import larger

from resnet_fused import ops
from resnet_fused.ops.operands import Operands

pytest.importorskip("triton")
RECORD = ops.OPS["bn_backward_apply_join"]
runs_kernels = pytest.mark.skipif(not ops.available("triton", DEVICE), reason=f"{ops.unavailable('triton', DEVICE)}")


def _apart(a, backend):
    """A pass for each."""
    common = (a.count, True, False)
    branch = (a.dy, a.x, a.mask, a.scale, a.scale, a.mean, a.invstd, a.sum_dz, a.sum_dz_xhat, *common)
    vectors = (a.shortcut_scale, a.shortcut_scale, a.shortcut_mean, a.shortcut_invstd)
    projection = (a.dy, a.shortcut, a.mask, *vectors, a.sum_dz, a.sum_dz_shortcut, *common)
    op = torch.ops.resnet_fused.bn_backward_apply
    return [op(*given, backend=backend)[0] for given in (branch, projection)]


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=runs_kernels), "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(2, 16, 5, 6), larger((3, 7, 3, 5)), larger((2, 1, 4, 4))])
def test_it_is_two_passes(size, layout, dtype, backend):
    a = RECORD.case(Operands(torch.device(DEVICE), dtype, nhwc=layout is NHWC), size)
    together = torch.ops.resnet_fused.bn_backward_apply_join(*a, backend=backend)
    assert all(map(torch.equal, together, _apart(a, backend)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortcut": torch.zeros(2, 8, 3, 4)}, "shortcut"),
        ({"shortcut_mean": torch.zeros(7)}, "shortcut_mean must be a contiguous float32 vector of 8"),
        ({"sum_dz_shortcut": torch.zeros(8).half()}, "sum_dz_shortcut must be"),
        ({"mask": torch.zeros(24)}, "mask must be contiguous uint8 [24]"),
    ],
)
def test_refusals_name_the_value(changes, message):
    a = RECORD.case(Operands(torch.device("cpu"), torch.float32), (2, 8, 3, 4))
    assert RECORD.refuse(a) is None
    if "shortcut" in changes:
        changes = {"shortcut": a.shortcut[:, :4]}
    assert message in RECORD.refuse(a._replace(**changes))
