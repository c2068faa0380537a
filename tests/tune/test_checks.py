"""What `verify` compares with what: yardsticks that a GPU needs and a CPU does not."""

from __future__ import annotations

import pytest
import torch
from conv_cases import problem
from op_cases import reference

from resnet_fused import ops
from resnet_fused.dispatch.table import Choice, Problem
from resnet_fused.measure import memory, network
from resnet_fused.ops import arithmetic
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning import checks
from resnet_fused.tuning.checks import comparisons
from resnet_fused.tuning.problems import Job, arguments, jobs
from resnet_fused.tuning.verify import verify

CPU = torch.device("cpu")


def _breaches(op, operands, results, **options):
    return [reason for one in comparisons(op, operands, results, **options) if (reason := one.breach())]


@pytest.mark.parametrize("op", ["conv_fprop", "conv_dgrad", "conv_wgrad"])
def test_tf32_is_judged_by_what_tf32_loses(op):
    """Operands cut off to 10 bits keep the contract where products may be TF32, and nowhere else; to 7 bits never."""
    shape = problem(2, 16, 6, 5, 24, 3, 3, padding=(1, 1))
    operands = arguments(Job(Problem(op, shape, torch.float32, True, ())), Operands(CPU, torch.float32))

    def cut(bits):
        def one(value):
            if not isinstance(value, torch.Tensor) or value.dim() != 4:
                return value
            return (value.view(torch.int32) & -(1 << bits)).view(torch.float32)

        results = getattr(reference, op)(*map(one, operands))
        return [results] if isinstance(results, torch.Tensor) else list(results)

    assert not _breaches(op, operands, cut(0), tf32=True)
    assert not _breaches(op, operands, cut(13), tf32=True)
    assert _breaches(op, operands, cut(16), tf32=True)
    assert _breaches(op, operands, cut(13))


def test_the_mask_is_judged_by_the_result_beside_it():
    """A sum that cancels may round to either side of zero; what its bit says must be what was written."""
    what = Problem("bn_apply", (1, 8, 2, 2), torch.float32, False, ("residual",))
    operands = arguments(Job(what), Operands(CPU, torch.float32))
    residual = -(operands.x.double() * operands.scale.double().view(-1, 1, 1)).float()
    residual[0, 0, 0, 0] += 5  # of the others the product's rounding is left
    one, zero = torch.ones(8), torch.zeros(8)
    operands = operands._replace(shift=zero, residual=residual, residual_scale=one, residual_shift=zero)
    y, mask = reference.bn_apply(*operands)
    assert 1 < int((y > 0).sum()) < y.numel()
    fused = torch.where(y > 1, y, 0)  # as two roundings have it
    bits = arithmetic.pack_bits(arithmetic.in_memory_order(fused) > 0)
    assert not _breaches("bn_apply", operands, [fused, bits])
    assert not _breaches("bn_apply", operands, [y, mask])
    (reason,) = _breaches("bn_apply", operands, [fused, mask])
    assert "mask differs" in reason


@pytest.mark.skipif(not any(ops.available(name, "cpu") for name in ("triton", "cuda")), reason="no kernel runs here")
@pytest.mark.larger
def test_verify_finds_the_same_side_by_side():
    alone, together = (
        verify("resnet18", modes=("infer",), dtypes=("fp32",), rehearse=True, processes=processes)
        for processes in (1, 2)
    )
    assert alone.passed and len(alone.checks) > 5
    assert together.checks == alone.checks


def test_a_check_that_does_not_fit_is_its_reason(monkeypatch):
    (job, *_) = jobs(network.tiny_network(), ["infer"], 2, torch.float32, 80, False)
    choice = Choice("reference")
    assert checks.check(job, job.problem.op, choice, CPU) is None
    monkeypatch.setattr(memory, "available", lambda: 1000)
    assert "MemoryError: needs about" in checks.check(job, job.problem.op, choice, CPU)

    def full(self, *shape):
        raise MemoryError

    monkeypatch.setattr(memory, "available", lambda: None)
    monkeypatch.setattr(Operands, "activation", full)
    assert checks.check(job, job.problem.op, choice, CPU) == "MemoryError"
