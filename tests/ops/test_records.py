"""Every op's record: each variant of its sample arguments on each backend, and the schemas of the C++ library."""

from __future__ import annotations

import importlib
import typing

import interpreter
import pytest
import torch
from from_checkout import ROOT
from op_cases import BACKENDS, DEVICE, dtypes

from resnet_fused import _library, ops
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.ops import comparison
from resnet_fused.ops.operands import Operands

SHAPES = {
    "conv_chain": ConvShape(2, 16, 4, 4, 16, 3, 3, padding=(1, 1)),
    "conv_join": ConvShape(2, 16, 4, 4, 32, 1, 1),
    "conv_join_int8": ConvShape(2, 16, 4, 4, 32, 1, 1),
    "pack_weight": (6, 3, 3, 2),
}
CONVOLUTION, ACTIVATION = ConvShape(2, 32, 9, 7, 40, 3, 3, (2, 2), (1, 1)), (2, 16, 5, 6)


def _runs(name: str) -> list:
    """The backends that have a kernel for an op; each is skipped where it cannot run."""
    return [p for p in BACKENDS if ops.implements(p.values[0], name)]


VARIANTS = [
    pytest.param(
        name,
        {**variant},  # one of its own for each backend: the tiers tell values without a hash by which object they are
        *backend.values,
        marks=backend.marks,
        id="-".join([name, *(f"{k}={v}" for k, v in variant.items() if v), backend.values[0]]),
    )
    for name, op in ops.OPS.items()
    for variant in op.variants()
    for backend in _runs(name)
]
OPS_AND_BACKENDS = [
    pytest.param(name, *backend.values, marks=backend.marks, id=f"{name}-{backend.values[0]}")
    for name in ops.OPS
    for backend in (*_runs(name), *([pytest.param("aten")] if ops.implements("aten", name) else []))
]
CHAIN_DTYPES = (torch.float16, torch.bfloat16)  # the Triton kernel has no others


def sample(name: str, variant: dict, dtype: torch.dtype = torch.float32):
    """The record, sample arguments of it, and what made them."""
    op, make = ops.OPS[name], Operands(torch.device(DEVICE), dtype)
    shape = SHAPES.get(name, CONVOLUTION if name.startswith("conv") else ACTIVATION)
    return op, op.case(make, shape, **variant), make


@dtypes
@pytest.mark.parametrize(("op", "variant", "backend"), VARIANTS)
def test_a_variant_is_within_the_contract(op, variant, backend, dtype):
    if (op, backend) == ("conv_chain", "triton") and dtype not in CHAIN_DTYPES:
        dtype = torch.bfloat16
    record, args, make = sample(op, variant, dtype)
    with interpreter.overflow_checked():
        actual = record.results(getattr(torch.ops.resnet_fused, op)(*args, backend=backend))
    assert make.damage() is None
    plain, truth = record.reference(args), record.reference(comparison.double(args))
    assert [reason for one in record.compare(args, actual, plain, truth) if (reason := one.breach())] == []


@pytest.mark.parametrize(("name", "backend"), OPS_AND_BACKENDS)
def test_the_fake_kernel_and_the_schema_hold(name, backend):
    dtype = torch.float16 if name == "conv_chain" else torch.float32
    _, args, _ = sample(name, {}, dtype)
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, tuple(args), {"backend": backend})


@pytest.mark.parametrize("name", [name for name, op in ops.OPS.items() if "triton" in op.kernels])
def test_a_triton_launcher_takes_the_arguments_of_its_record(name):
    launcher, op = importlib.import_module("resnet_fused.kernels").LAUNCHERS[name], ops.OPS[name]
    first, *configurations = typing.get_type_hints(launcher).values()
    _, args, _ = sample(name, {}, torch.float16)
    assert first is op.args
    assert len(op.problems(args)) <= sum(ConvConfig in (hint, *typing.get_args(hint)) for hint in configurations)


@pytest.mark.parametrize("name", [name for name, op in ops.OPS.items() if op.triton])
def test_a_record_refuses_float64_and_takes_what_its_own_sample_is(name):
    op, args, _ = sample(name, {}, torch.float16)
    assert op.refuse(args) is None
    assert "float64" in op.refuse(comparison.double(args))


@pytest.mark.skipif(not _library.operators("add_act"), reason="the compiled kernels are not built")
@pytest.mark.parametrize("name", [name for name, op in ops.OPS.items() if "cuda" in op.kernels])
def test_the_library_has_the_schema_of_the_record(name):
    for kernel in _library.operators(name).values():
        namespace, _, schema = str(kernel._schema).partition("::")
        assert namespace.startswith("resnet_fused_")
        assert schema == str(torch._C.parse_schema(ops.OPS[name].schema()))


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="no checkout around these tests")
def test_the_page_of_ops_says_what_the_records_say():
    ops_page = importlib.import_module("tools.ops_page")
    assert ops_page.PAGE.read_text() == ops_page.page()
