"""What was to be reached, filled in from recorded results alone."""

import dataclasses

import from_checkout  # noqa: F401
import pytest
import recorded
from recorded import BASELINE, result

from benchmarks import targets

GPU = {"name": "NVIDIA Test 1"}
TRAIN = targets.TARGETS[0]


def case(*results, mode="train", batch=256, **changes):
    one = recorded.case(*results, mode=mode, batch=batch, dtype="bf16")
    return dataclasses.replace(one, **{"model": "resnet50", **changes})


def report(*cases, date="2026-01-02", command="resnet-fused bench", gpu=GPU):
    found = recorded.report(*cases, date_utc=f"{date}T00:00:00+00:00", command=command, gpu=gpu)
    return dataclasses.replace(found, model="resnet50")


def test_nothing_is_reached_before_it_is_measured():
    assert {row[3] for row in targets.rows([])} == {targets.NOT_MEASURED}
    page = list(targets.markdown([]))
    assert "not measured" in "\n".join(page) and len(page) == 2 + len(targets.TARGETS)
    elsewhere = [
        case(result(BASELINE, 100.0), result("fused", 50.0), batch=128),
        case(result(BASELINE, 100.0), result("fused", 50.0), mode="infer"),
        case(result(BASELINE, 100.0), result("fused", 50.0), image_size=192),
        case(result(BASELINE, 100.0), result("fused", 50.0), model="resnet18"),
        case(result(BASELINE, 100.0), result("fused")),
    ]
    assert targets.reached(TRAIN, [report(*elsewhere)]) is None


def test_a_ratio_of_one_run_its_rate_and_its_verdict():
    found = targets.reached(TRAIN, [report(case(result(BASELINE, 100.0), result("fused", 50.0)))])
    assert (found.ratio, found.images_per_s, found.across) == (2.0, 256 / 0.05, False)
    assert found.verdict(TRAIN) == "floor"
    for milliseconds, verdict in ((40.0, "goal"), (59.0, "missed")):
        found = targets.reached(TRAIN, [report(case(result(BASELINE, 100.0), result("fused", milliseconds)))])
        assert found.verdict(TRAIN) == verdict
    memory = next(target for target in targets.TARGETS if target.memory)
    ours = result("fused", 50.0, peak_bytes=6 * 2**30)
    found = targets.reached(memory, [report(case(result(BASELINE, 100.0, peak_bytes=10 * 2**30), ours))])
    assert found.ratio == pytest.approx(0.6) and found.verdict(memory) == "goal"


def test_two_runs_meet_at_the_baseline_and_say_so():
    training = (target for target in targets.TARGETS if target.mode == "train")
    rival = next(target for target in training if target.theirs == "compile-max-autotune")
    ours = report(case(result(BASELINE, 100.0), result("fused", 50.0)))
    theirs = report(case(result(BASELINE, 120.0), result("compile-max-autotune", 80.0)), date="2026-01-03")
    found = targets.reached(rival, [ours, theirs])
    assert found.ratio == pytest.approx(2 / 1.5) and found.across and found.images_per_s == 256 / 0.05
    both = report(
        case(result(BASELINE, 100.0), result("fused", 50.0), result("compile-max-autotune", 60.0)), date="2026-01-01"
    )
    found = targets.reached(rival, [both, ours, theirs])
    assert found.ratio == pytest.approx(1.2) and not found.across  # one run goes before two
    assert "across two runs" in "\n".join(targets.lines([ours, theirs]))


def test_the_last_result_counts_and_a_forced_backend_does_not():
    first = report(case(result(BASELINE, 100.0), result("fused", 50.0)))
    last = report(case(result(BASELINE, 100.0), result("fused", 40.0)), date="2026-01-03")
    forced = report(
        case(result(BASELINE, 100.0), result("fused", 20.0)),
        date="2026-01-04",
        command="resnet-fused bench --backend triton",
    )
    assert targets.reached(TRAIN, [first, last, forced]).ratio == 2.5
    columns = targets.by_gpu([last, first, forced, report(gpu={"name": "other"}), report(gpu=None)])
    assert columns == {"NVIDIA Test 1": [first, last, forced], "other": [report(gpu={"name": "other"})]}
    page = "\n".join(targets.markdown([last, first, forced, report(gpu={"name": "other"})]))
    assert "| NVIDIA Test 1 | other |" in page and "2.50x, 6,400 images/s: goal | not measured |" in page
