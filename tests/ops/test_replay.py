"""What a launcher did is replayed for arguments of the same description: on other values, and on nothing it kept."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, NHWC, activation, vector
from torch import Tensor

from resnet_fused import ops
from resnet_fused.dispatch import choice
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops.operands import Operands

if not ops.available("triton", DEVICE):
    pytest.skip(ops.unavailable("triton", DEVICE), allow_module_level=True)
from resnet_fused import kernels

NAMES = sorted(kernels.LAUNCHERS)
SHAPES = {"conv_chain": ConvShape(2, 16, 4, 4, 16, 3, 3, padding=(1, 1)), "pack_weight": (6, 3, 3, 2)}


@pytest.fixture
def runs(monkeypatch):
    """The ops whose launchers ran."""
    names = []

    def counted(name, launcher):
        def run(*args):
            names.append(name)
            return launcher(*args)

        return run

    monkeypatch.setattr(kernels, "LAUNCHERS", {name: counted(name, one) for name, one in kernels.LAUNCHERS.items()})
    return names


def _flat(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _sample(name: str, seed: int):
    default = ConvShape(2, 16, 5, 4, 24, 3, 3, padding=(1, 1)) if name.startswith("conv") else (2, 16, 5, 6)
    op, make = ops.OPS[name], Operands(torch.device(DEVICE), torch.float16, seed=seed)
    variant = {option: values[-1] for option, values in op.options.items()}
    if name.startswith("conv_join"):
        default = ConvShape(2, 16, 4, 4, 32, 1, 1)
    return op.case(make, SHAPES.get(name, default), **variant)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_returns_what_the_launcher_would(name, runs):
    run = kernels.checked(name)
    run(*_sample(name, 0))
    args, again = _sample(name, 1), _sample(name, 1)  # twice, for what is mutated
    replayed = _flat(run(*args))
    assert runs == [name]
    for one, other in zip(replayed, _flat(kernels.run(name, again)), strict=True):
        assert one.stride() == other.stride() and torch.equal(one, other)
    for one, other in zip(args, again, strict=True):
        assert not isinstance(one, Tensor) or torch.equal(one.nan_to_num(), other.nan_to_num())


def test_results_are_allocated_anew(runs):
    run, x = kernels.checked("add_act"), activation((2, 8, 4, 4))
    first = run(x, x.neg(), True)
    second = run(x, x.clone(), True)
    assert first.data_ptr() != second.data_ptr() and not first.any() and second.any()
    assert runs == ["add_act"]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:, :, :2].contiguous(),
        lambda x: x.contiguous(memory_format=NHWC),
        lambda x: x.half(),
    ],
    ids=["shape", "strides", "dtype"],
)
def test_another_description_is_not_replayed(other, runs):
    run, x = kernels.checked("add_act"), activation((2, 8, 4, 4))
    run(x, x.neg(), True)
    x = other(x)
    torch.testing.assert_close(run(x, x.clone(), True), (x + x).relu())
    torch.testing.assert_close(run(x, x.clone(), False), x + x)
    assert runs == ["add_act"] * 3


def test_a_tensor_given_twice_is_not_taken_for_one_of_two(runs):
    run, x = kernels.checked("add_act"), activation((2, 8, 4, 4))
    torch.testing.assert_close(run(x, x, False), 2 * x)
    y = torch.ones_like(x)
    torch.testing.assert_close(run(x, y, False), x + y)
    torch.testing.assert_close(run(y, x, False), x + y)
    assert runs == ["add_act"] * 3


def test_a_launcher_that_copies_runs_again(runs):
    """A weight in NCHW order is copied first: that is no launch."""
    run, x, weight = kernels.checked("conv_fprop"), activation((2, 16, 4, 4), layout=NHWC), activation((16, 16, 3, 3))
    more = (None, None, None, [1, 1], [1, 1], [1, 1], 1, None)
    for _ in range(2):
        torch.testing.assert_close(run(x, weight, *more), torch.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
        weight = -weight
    assert runs == ["conv_fprop"] * 2


def test_another_plan_is_asked(runs):
    run, x = kernels.checked("bn_apply"), activation((2, 8, 4, 4))
    args = (x, vector(8), vector(8), None, None, None, True, False)
    run(*args)
    choice.forget()
    run(*args)
    assert runs == ["bn_apply"] * 2


def test_a_refused_description_stays_refused(runs):
    run, x = kernels.checked("add_act"), activation((2, 8, 4, 4))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="dtype torch.float16"):
            run(x, x.half(), True)
    assert not runs
