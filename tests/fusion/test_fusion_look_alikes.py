"""What only looks like a residual block is not run as one, and tracing it has no side effects."""

from __future__ import annotations

import copy
import inspect
import random

import pytest
import torch
from agreement import assert_same
from look_alikes import LOOK_ALIKES, IntoItsInput
from small_blocks import Block

from resnet_fused.fusion import BlockPlan, fuse, plan_of, report, unfuse

NAMES = [make.__name__ for make, _, _ in LOOK_ALIKES]


@pytest.mark.parametrize(("make", "reason", "units"), LOOK_ALIKES, ids=NAMES)
def test_look_alike_is_not_run_as_a_block(make, reason, units):
    torch.manual_seed(0)
    plain = make().double()
    fused = fuse(copy.deepcopy(plain))
    result = report(fused)
    assert not isinstance(plan_of(fused), BlockPlan)
    assert result.fused == ([] if units is None else [("", units)])
    if units is None:
        assert type(fused) is make
    if reason is None:
        assert result.skipped == []
    else:
        expected = (reason,) if isinstance(reason, str) else reason
        assert any(r in result.skipped[0][1] for r in expected), result.skipped
        assert result.skipped[0][1].startswith("unit by unit, not as one block: ") is (units is not None)


@pytest.mark.parametrize("make", [make for make, _, units in LOOK_ALIKES if units], ids=lambda make: make.__name__)
def test_units_of_a_look_alike_agree(make):
    torch.manual_seed(0)
    plain = make().double()
    fused = fuse(copy.deepcopy(plain))
    shapes = [(2, 4, 6, 6)] * (2 if "y" in inspect.signature(make.forward).parameters else 1)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if make is not IntoItsInput:  # whose backward PyTorch refuses
        assert_same(plain, fused, *inputs)
        return
    results = []
    with torch.no_grad():
        for model in (plain.train(), fused.train()):
            x = inputs[0].clone()
            results += [model(x), x, *model.buffers()]
    for expected, actual in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class ReadsOptions(Block):
    """Reads a dict, which can change without the module being told."""

    def __init__(self):
        super().__init__()
        self.options = {"skip": False}

    def forward(self, x):
        return x if self.options["skip"] else super().forward(x)


def test_a_change_inside_a_dict_is_noticed():
    plain = ReadsOptions().double()
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), BlockPlan)
    for model in (plain, fused):
        model.options["skip"] = True
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(fused(x), x) and plan_of(fused) is None
    for model in (plain, fused):
        model.options["skip"] = False
    assert isinstance(plan_of(fused), BlockPlan)
    assert_same(plain, fused, x)


@pytest.mark.parametrize("make", [make for make, _, _ in LOOK_ALIKES], ids=NAMES)
def test_tracing_a_look_alike_has_no_side_effects(make):
    module = make()
    before = {name: copy.copy(value) for name, value in vars(module).items()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    python, torch_state, modes = (
        random.getstate(),
        torch.get_rng_state(),
        (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    )
    unfuse(fuse(module))
    assert {name: copy.copy(value) for name, value in vars(module).items()} == before
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), torch_state)
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
