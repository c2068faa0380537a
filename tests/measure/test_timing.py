"""Timing: rounds, percentiles and the budget on fake callables; the one clock."""

import numpy as np
import pytest
import torch

from resnet_fused.bench import profile, run
from resnet_fused.measure import roof
from resnet_fused.measure import timing as harness
from resnet_fused.measure.timing import MAX_ROUNDS, MIN_ROUNDS, Timing, cpu_clock, round_order, time_interleaved
from resnet_fused.tuning import device_worker as device_process

CPU = torch.device("cpu")


def test_every_timed_call_is_behind_a_rest(monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr(harness.time, "sleep", seen.append)
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    time_interleaved(calls, cpu_clock, rounds=2, warmup=1, rest_s=0.5)
    assert seen == ["a", "b", 0.5, "a", 0.5, "b", 0.5, "b", 0.5, "a"]


def test_round_order_gives_everyone_every_place_and_both_neighbours():
    names = list("abcd")
    orders = [round_order(names, index) for index in range(2 * len(names))]
    assert orders[0] == names
    assert all(sorted(order) == names for order in orders)
    for place in range(len(names)):
        at_place = [order[place] for order in orders]
        assert all(at_place.count(name) == 2 for name in names)
    follows = {(first, then) for order in orders for first, then in zip(order, order[1:], strict=False)}
    assert {("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")} <= follows


def test_percentiles_are_numpys():
    samples = (5.0, 1.0, 4.0, 2.0, 3.0, 100.0)
    timing = Timing(samples)
    assert (timing.p20, timing.p50, timing.p80) == tuple(np.percentile(samples, [20, 50, 80]))
    assert timing.p50 == 3.5  # an outlier does not move the median


def test_a_roof_comes_from_a_smaller_product_where_one_would_take_seconds(monkeypatch):
    monkeypatch.setattr(roof, "clock_for", lambda device: lambda call: 10.0)  # milliseconds, whatever is called
    found = roof.measure("fp32", CPU, repeats=1)
    assert found.gemm == 2 * 256**3 / 0.01  # one of 2048 is 512 times as much
    assert found.conv == 2 * 8 * 28 * 28 * 9 * 128**2 / 0.01


def test_a_narrow_dtype_has_at_least_the_roof_of_fp32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(roof, "clock_for", lambda device: lambda call: 10.0 if call().dtype == torch.bfloat16 else 1.0)
    assert roof.measure("bf16", CPU, repeats=1) == roof.measure("fp32", CPU, repeats=1)


def test_interleaving_calls_everyone_once_per_round_after_warming_up():
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    rounds_seen: list[int] = []
    fake_time = iter(range(10**6))

    def clock(call):
        call()
        return float(next(fake_time))

    measured = time_interleaved(calls, clock, rounds=4, warmup=1, on_round=rounds_seen.append)
    assert log == [name for index in (0, 0, 1, 2, 3) for name in round_order(list("abc"), index)]
    assert rounds_seen == [1, 2, 3, 4] and measured.rounds == 4
    assert measured.timings["a"].samples_ms == (3.0, 8.0, 10.0, 14.0)  # the warm-up's 0 is not kept


def test_a_contestant_that_raises_leaves_the_race_and_the_others_finish():
    count = {"good": 0, "bad": 0}

    def good():
        count["good"] += 1

    def bad():
        count["bad"] += 1
        if count["bad"] == 4:
            raise MemoryError("no room\nsecond line")

    measured = time_interleaved({"good": good, "bad": bad}, cpu_clock, rounds=5, warmup=2)
    assert measured.failures == {"bad": "MemoryError: no room"}
    assert list(measured.timings) == ["good"] and len(measured.timings["good"].samples_ms) == 5
    assert count == {"good": 7, "bad": 4}


@pytest.mark.parametrize(("budget", "expected"), [(0.0, MIN_ROUNDS), (1e9, MAX_ROUNDS)])
def test_the_budget_bounds_the_rounds(budget, expected):
    assert time_interleaved({"a": lambda: None}, cpu_clock, budget_s=budget).rounds == expected


def test_nobody_to_time_is_no_endless_loop():
    assert time_interleaved({}, cpu_clock).timings == {}


def test_one_clock_queues_the_call_behind_the_flush(monkeypatch):
    """What contestants, roofs, profiles and candidates are timed by, with CUDA's part played by a fake."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return 1.5

    class Scratch:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Scratch())
    clock = harness.clock_for(torch.device("cuda"))
    assert clock(lambda: log.append("call")) == 1.5
    assert log == ["wait", "flush", "record", "call", "record", "wait"]
    assert harness.clock_for(CPU) is cpu_clock
    assert {module.clock_for for module in (run, roof, profile, device_process)} == {harness.clock_for}
