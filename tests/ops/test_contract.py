"""The judge of the numerics contract: what it forgives, what it does not, and what it asks for."""

from __future__ import annotations

import pytest
import torch
from contract import assert_no_worse, assert_within_contract
from torch import nn

from resnet_fused import contract

EPS = torch.finfo(torch.float32).eps


def test_twice_plains_error_and_four_units_of_the_largest_magnitude():
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    plain = truth.float() + 16 * EPS
    limit = 2 * 16 + 4 * 2
    for error, kept in ((limit, True), (-limit, True), (limit + 2, False)):
        problem = contract.breach(truth.float() + error * EPS, plain, truth)
        assert (problem is None) == kept, problem


def test_a_lucky_run_is_not_the_limit():
    """Plain PyTorch hits float64's result here; its error elsewhere counts, and is asked for only then."""
    truth = torch.ones(3, dtype=torch.float64)
    lucky, ours = truth.float(), truth.float() + 20 * EPS
    with pytest.raises(AssertionError, match="error 2.38e-06 exceeds 4.77e-07"):
        assert_within_contract(ours, lucky, truth)
    asked = []

    def again():
        for units in (3, 8, 1):
            asked.append(units)
            yield truth.float() + units * EPS, truth

    assert_within_contract(ours, lucky, truth, again=again())  # 2 * 8 + 4
    assert asked == [3, 8, 1]
    with pytest.raises(AssertionError, match=r"exceeds .* \(plain PyTorch errs by 9.54e-07\)"):
        assert_within_contract(ours + 2 * EPS, lucky, truth, again=again())
    asked.clear()
    assert_within_contract(lucky, lucky, truth, again=again())
    assert asked == []


def test_plain_runs_again_in_both_orders_and_on_the_neighbours_of_its_inputs():
    seen = []

    def plain(module, nested):
        x = nested["x"][0]
        seen.append((x, module.weight))
        return module(x)

    module, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    x.data[0, 0, 0, 0] = 0.0
    runs = list(contract.realisations(plain, (module, {"x": [x]})))
    assert [(run.dtype, exact.dtype) for run, exact in runs] == [(torch.float32, torch.float64)] * 4
    assert all(run.requires_grad for run, _ in runs)
    assert not module.running_mean.any(), "the module that was handed in has changed"
    assert all(torch.equal(x.double(), exact) for (x, _), (exact, _) in zip(seen[::2], seen[1::2], strict=True))
    nchw, nhwc, up, down = seen[::2]
    assert nchw[0].is_contiguous() and nhwc[0].is_contiguous(memory_format=torch.channels_last)
    for (moved, weight), side in ((up, torch.inf), (down, -torch.inf)):
        assert torch.equal(moved, torch.where(x == 0, 0, torch.nextafter(x, torch.tensor(side))))
        assert torch.equal(weight, torch.nextafter(torch.ones(3), torch.tensor(side)))


def test_a_kink_and_a_badly_conditioned_input_forgive_nothing():
    """A neighbour's result may differ by anything; what counts is how far plain PyTorch is from float64 there."""

    def plain(x):
        return {"step": torch.where(x > 1, 1.0, 0.0).to(x.dtype), "difference": x - 1}

    x = torch.ones(3)
    with pytest.raises(AssertionError, match="^step: error 1 exceeds 0 "):
        assert_no_worse({"step": torch.ones(3), "difference": x - 1}, plain, (x,))
    with pytest.raises(AssertionError, match="^difference: error 1.19e-07 exceeds 0 "):
        assert_no_worse({"step": torch.zeros(3), "difference": x * EPS}, plain, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_specials_stay(dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, 0.0], dtype=dtype)
    for moved, _ in contract.realisations(lambda x: x, (x,)):
        assert torch.equal(moved.isnan(), x.isnan()) and torch.equal(moved.isinf(), x.isinf()) and moved[4] == 0


@pytest.mark.parametrize("n", [64, 4096, 262144])
@pytest.mark.parametrize("signs", ["one", "both"])
def test_the_floor_covers_a_sum_added_up_one_by_one_and_is_not_wide(n, signs):
    """No running sum of 64 in float32 is beyond it, and they are not a hundred times below."""
    values = torch.rand(64, n) if signs == "one" else torch.randn(64, n)
    found = torch.from_numpy(values.numpy().cumsum(1, dtype="float32")[:, -1].copy())
    error = (found.double() - values.double().sum(1)).abs()
    magnitude = values.double().sum(1).abs().max()
    assert error.max() <= contract.floor(torch.float32, n) * magnitude
    assert error.square().mean().sqrt() >= contract.floor(torch.float32, n) * magnitude / 100


def test_the_floor_of_short_sums_and_of_half_precision_is_four_units():
    assert contract.floor(torch.float32) == contract.floor(torch.float32, 16) == 4 * EPS
    assert contract.floor(torch.float32, 64) == 8 * EPS
    assert contract.floor(torch.bfloat16, 10**6) == 4 * torch.finfo(torch.bfloat16).eps
    assert contract.floor(torch.float64, 64) == 8 * torch.finfo(torch.float64).eps


def test_the_longest_sum():
    filters = nn.Conv2d(6, 10, 3)
    assert contract.longest_sum() == 1
    assert contract.longest_sum(filters, torch.ones(2, 6, 4, 4)) == 90  # of dgrad: 10 * 3 * 3
    assert contract.longest_sum(filters, torch.ones(4, 6, 5, 5)) == 100
    assert contract.longest_sum(torch.ones(0, 6, 5, 5), "x", None) == 1


@pytest.mark.parametrize(
    "actual,complaint",
    [
        (torch.tensor([1.0, torch.nan]), "1 NaN, plain PyTorch has 0"),
        (torch.tensor([1.0, -torch.inf]), "an inf of the other sign"),
        (torch.tensor([1.0, 2.0]), "0 inf, plain PyTorch has 1"),
        (torch.tensor([1.0, torch.inf], dtype=torch.float64), "torch.float64, expected torch.float32"),
        (torch.tensor([1.0]), r"shape \[1\], expected \[2\]"),
        (torch.tensor([1.1, torch.inf]), "error 0.1 exceeds"),
    ],
)
def test_what_no_rounding_explains(actual, complaint):
    plain = torch.tensor([1.0, torch.inf])
    with pytest.raises(AssertionError, match=complaint):
        assert_within_contract(actual, plain, plain.double())


def test_sums_that_cancel_and_masks_that_rounding_flips():
    zero = torch.zeros(2, dtype=torch.float64)
    ours = torch.tensor([30 * EPS, 0.0])
    assert contract.breach(ours, zero.float(), zero) is not None
    assert contract.breach(ours, zero.float(), zero, terms=torch.tensor([10.0, 1.0])) is None
    assert contract.breach(ours, zero.float(), zero, around=(ours, zero)) is None
    truth = torch.full((100,), 1.0, dtype=torch.float64)
    single = truth.float()
    single[0] += 30 * EPS  # one element of many, and little of the norm
    assert contract.breach(single, truth.float(), truth) is not None
    assert contract.breach(single, truth.float(), truth, norm=True) is None


def test_whole_results():
    def plain(x):
        return {"y": x * 2, "count": torch.tensor(3), "nothing": None}

    x = torch.randn(5)
    assert_no_worse(plain(x), plain, (x,))
    for name, wrong in (("y", x), ("count", torch.tensor(4)), ("nothing", x)):
        with pytest.raises(AssertionError, match=f"^{name}"):
            assert_no_worse(plain(x) | {name: wrong}, plain, (x,))
    with pytest.raises(AssertionError):
        assert_no_worse({"y": x * 2}, plain, (x,))
