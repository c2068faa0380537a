"""The tuner's search with made-up times, a made-up clock, and processes that crash and hang when told to."""

import dataclasses
import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path

import pytest
import tune_doubles
from tiers import larger
from tune_doubles import ARCH, CPU, DTYPE

from resnet_fused._command import UsageError
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.choice import ATEN, BLOCK
from resnet_fused.dispatch.table import Choice
from resnet_fused.measure.workers import WorkerCrashed
from resnet_fused.tuning import candidates as listing
from resnet_fused.tuning import search as tune_search
from resnet_fused.tuning.device_worker import ProcessWorker
from resnet_fused.tuning.problems import check_images, parts
from resnet_fused.tuning.report import predict, summarise
from resnet_fused.tuning.work import Roofs, work

N = 256


def test_first_what_runs_without_a_table_then_blocks_then_the_rest_then_blocks_again(search):
    made, bench = search()
    steps = made.reporter = tune_doubles.Steps()
    done = made.run(search.jobs, search.blocks, 1e9)
    assert done.left == 0 and done.measured == len(search.jobs) + len(search.blocks)
    assert steps.begun == steps.expected == len(bench.raced)
    raced = [problem for problem, _ in bench.raced]
    stages = [list(found) for found in (raced[: len(search.jobs)], raced[len(search.jobs) :][: len(search.blocks)])]
    assert set(stages[0]) == {job.problem for job in search.jobs} and len(set(stages[0])) == len(stages[0])
    assert {problem.op for problem in stages[1]} == {BLOCK}
    quick = [choices for problem, choices in bench.raced[: len(search.jobs)]]
    assert max(map(len, quick)) <= 3
    weights = {job.problem: job.weight for job in search.jobs}
    spare = [weights[problem] == 0 for problem in stages[0] if problem.op not in ("conv_chain", "conv_join")]
    assert spare == sorted(spare)  # what no network runs as it is comes after what it does
    assert [problem.op for problem in stages[0]][-8:] == ["conv_chain"] * 4 + ["conv_join"] * 4 or {
        problem.op for problem in stages[0][-8:]
    } == {"conv_chain", "conv_join"}
    assert [problem.op for problem in raced[-len(search.blocks) :]] == [BLOCK] * len(search.blocks)
    assert len(search.blocks) == 8 and sum(job.weight for job in search.blocks) == 16


def test_nothing_is_checked_twice_but_blocks(search):
    made, bench = search()
    made.run(search.jobs, search.blocks, 1e9)
    assert all(count == 1 for (problem, _), count in bench.checked.items() if problem.op != BLOCK)
    assert all(count == 2 for (problem, _), count in bench.checked.items() if problem.op == BLOCK)


def _consistent(table, network):
    """What must hold of any table, whenever time ran out."""
    assert tables.from_json(json.loads(json.dumps(table.to_json()))) == table
    for problem, entry in table.entries.items():
        times = dict(entry.measured)
        assert "alone" in problem.flags or ATEN in times
        assert times[entry.winner] == min(times.values())
    for mode in ("infer", "train"):
        found = predict("x", parts(network, mode, N, DTYPE, ARCH, False), table)
        assert found.ours_ms <= found.aten_ms + 1e-9 or mode == "infer" and found.ours_ms <= found.aten_ms


@pytest.mark.parametrize("seconds", [1, larger(10), larger(30), larger(60), larger(120), larger(300)])
def test_whenever_time_runs_out_the_table_is_of_use_and_the_next_call_goes_on(search, seconds):
    made, first = search()
    done = made.run(search.jobs, search.blocks, seconds)
    assert search.clock.now <= seconds + 1.0  # it begins nothing after that
    _consistent(done.table, search.network)
    assert tables.read(search.path) == done.table
    known = len(done.table.entries)
    if seconds >= 60:
        assert known == len(search.jobs) + len(search.blocks)
        found = predict("x", parts(search.network, "train", N, DTYPE, ARCH, False), done.table)
        assert found.measured == found.parts
    assert (done.left == 0) == (seconds >= 300)
    made, second = search()
    rest = made.run(search.jobs, search.blocks, 1e9)
    assert rest.left == 0 and len(rest.table.entries) == len(search.jobs) + len(search.blocks)
    both = first.checked + second.checked
    assert all(count == 1 for (problem, _), count in both.items() if problem.op != BLOCK)
    made, third = search()
    last = made.run(search.jobs, search.blocks, 1e9)
    assert not third.checked and not third.raced and last.table == rest.table
    assert last.known == len(search.jobs) + len(search.blocks)


@pytest.mark.larger
def test_more_time_never_makes_a_worse_plan(search):
    predicted = []
    for _ in range(8):
        made, _ = search()
        done = made.run(search.jobs, search.blocks, 25)
        found = predict("x", parts(search.network, "infer", N, DTYPE, ARCH, False), done.table)
        if found.measured == found.parts:
            predicted.append(found.ours_ms)
    assert len(predicted) >= 3 and predicted == sorted(predicted, reverse=True)


@pytest.mark.parametrize("slow", [0.5, larger(1.0), larger(3.0)])
def test_auto_is_at_least_as_fast_as_native_pytorch_in_every_block_by_the_tables_own_numbers(search, slow):
    made, _ = search(slow=slow)
    table = made.run(search.jobs, search.blocks, 1e9).table
    chosen = Counter()
    with plans.assuming(table):
        for job in search.blocks:
            entry = table.entries[job.problem]
            backend = plans.block(job.problem.shape, DTYPE, ARCH, False)
            assert entry.best(backend)[1] <= entry.best("aten")[1]
            chosen[backend] += 1
        for job in search.jobs:
            entry = table.entries[job.problem]
            if "alone" not in job.problem.flags:
                assert entry.ms(plans.choose(job.problem, ARCH)) <= entry.best("aten")[1]
    if slow == 3.0:
        assert chosen == {"aten": 8}
    if slow == 0.5:
        assert chosen["aten"] <= 2


def test_a_candidate_that_errs_is_never_timed_and_not_asked_about_again(search):
    some = next(job for job in search.jobs if job.problem.op == "conv_dgrad")
    bad = listing.candidates(some, CPU, ARCH)[3]
    made, bench = search(wrong={("conv_dgrad", str(bad))})
    done = made.run(search.jobs, search.blocks, 1e9)
    assert all(choice != bad or problem.op != "conv_dgrad" for problem, choices in bench.raced for choice in choices)
    assert all(choice == bad for _, choice, _ in done.dropped) and not done.disabled and done.left == 0
    assert ("conv_dgrad", "triton") in done.table.verified
    made, second = search()
    assert made.run(search.jobs, search.blocks, 1e9).left == 0 and not second.checked


def test_where_the_default_configuration_errs_the_kernel_is_out_with_all_that_was_measured_of_it(search):
    made, _ = search()
    made.run(search.jobs, search.blocks, 20)
    made, _ = search(wrong={("conv_wgrad", "triton")}, again=True)
    done = made.run(search.jobs, search.blocks, 1e9)
    assert [(op, backend) for op, backend, _ in done.disabled] == [("conv_wgrad", "triton")]
    assert ("conv_wgrad", "triton") not in done.table.verified
    for problem, entry in done.table.entries.items():
        assert problem.op != "conv_wgrad" or {choice.backend for choice, _ in entry.measured} == {"aten"}


# ---- processes that are lost -----------------------------------------------------------------------------------------


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import PyTorch; `test_workers` starts them as users do."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)


@pytest.fixture
def apart(search, forked, tmp_path, monkeypatch):
    """Runs a search of a few problems against a process that does what it is told."""
    monkeypatch.setattr(tune_search, "time", time)
    log = tmp_path / "log"
    monkeypatch.setenv("TUNE_DOUBLE_LOG", str(log))
    few = [job for job in search.jobs if job.problem.op == "conv_fprop_stats" and job.problem.shape.r == 3][:1]
    limits = {"check": 3.0, "prepare": 3.0, "race": 3.0}

    def run(*script, budget_s=1e9, make=tune_doubles.script):
        Path(f"{log}.script").write_text("".join(f"{'|'.join(line)}\n" for line in script))
        log.write_text("")
        bench = ProcessWorker(CPU, ARCH, None, make=make, limits=limits)
        made, _ = search(bench=bench)
        done = made.run(few, [], budget_s)
        lines = [line.split() for line in log.read_text().splitlines()]
        return done, lines, len({line[0] for line in lines})

    run.jobs = few
    return run


def test_a_process_answers_and_is_kept(apart):
    done, lines, processes = apart()
    assert done.left == 0 and processes == 1 and not done.crashed and not done.dropped
    assert {len(entry.measured) for entry in done.table.entries.values()} == {
        len(listing.candidates(job, CPU, ARCH)) for job in apart.jobs
    }


@pytest.mark.parametrize("question", ["check", "prepare"])
@pytest.mark.parametrize("how,why", [("crash", "exit code"), ("hang", "not done after 3 s")])
def test_a_candidate_that_takes_its_process_with_it_is_excluded_for_good(apart, question, how, why):
    bad = listing.candidates(apart.jobs[0], CPU, ARCH)[3]
    done, _, processes = apart((question, str(bad), how))
    assert done.crashed and all(choice == str(bad) and why in reason for _, choice, reason in done.crashed)
    assert processes == 1 + len(done.crashed) and done.left == 0 and not done.disabled
    for job in apart.jobs:
        left = {str(choice) for choice, _ in done.table.entries[job.problem].measured}
        assert left == {str(choice) for choice in listing.candidates(job, CPU, ARCH)} - {str(bad)}
    again, lines, _ = apart((question, str(bad), how))
    assert not lines and again.crashed == done.crashed and f"crashed: {done.crashed[0][0]}" in str(again)


def test_a_cuda_error_that_is_caught_ends_the_process_too(apart):
    bad = listing.candidates(apart.jobs[0], CPU, ARCH)[3]
    done, _, processes = apart(("check", str(bad), "AcceleratorError: CUDA error: an illegal memory access"))
    assert done.crashed and processes == 1 + len(done.crashed) and "illegal memory access" in done.crashed[0][2]


def test_where_the_default_configuration_is_lost_the_kernel_is_out(apart):
    default = listing.candidates(apart.jobs[0], CPU, ARCH, quick=True)[1]
    done, _, _ = apart(("check", str(default), "hang"))
    assert (apart.jobs[0].problem.op, "triton") in {(op, backend) for op, backend, _ in done.disabled}
    assert {choice.backend for choice, _ in done.table.entries[apart.jobs[0].problem].measured} == {"aten"}


def test_a_formulation_that_is_lost_twice_is_excluded_of_its_op(apart):
    some = [job for job in apart.jobs if any("wgmma" in str(c) for c in listing.candidates(job, CPU, ARCH))]
    assert some
    gluon = [str(c) for c in listing.candidates(some[0], CPU, ARCH) if "wgmma" in str(c)]
    done, lines, _ = apart(*(("check", name, "crash") for name in gluon))
    assert len(done.crashed) == tune_search.LOSSES < len(gluon)
    assert done.table.provenance["excluded"] == [[some[0].problem.op, "wgmma_conv"]] and done.left == 0


def test_a_race_that_is_lost_leaves_native_pytorch(apart):
    done, _, _ = apart(("race", "*", "crash"))
    assert done.left == 0 and not any(
        choice.backend != "aten" for e in done.table.entries.values() for choice, _ in e.measured
    )


def test_what_could_not_be_compared_with_native_pytorch_is_not_chosen(apart):
    done, _, _ = apart(("prepare", "aten", "RuntimeError: it cannot be captured"))
    assert not done.table.entries and "cannot be captured" in str(done)


def test_a_process_that_does_not_start_is_one_clear_error_and_costs_no_candidate(apart, search):
    with pytest.raises(UsageError, match="does not start.*exit code 3"):
        apart(make=tune_doubles.never)
    table = tables.read(search.path)
    assert not table.provenance["crashed"] if "crashed" in table.provenance else True
    assert apart()[0].left == 0


def test_questions_are_answered_within_their_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DOUBLE_LOG", str(tmp_path / "log"))
    (tmp_path / "log.script").write_text("race|*|hang\n")
    bench = ProcessWorker(CPU, ARCH, None, make=tune_doubles.script, limits={"race": 0.5})
    with pytest.raises(WorkerCrashed, match="race: not done after 0.5 s"):
        bench.race(1.0)
    (tmp_path / "log.script").write_text("")
    assert bench.race(1.0) == {}  # by a fresh process
    bench.close()


def test_few_images_launch_the_kernel_of_many(search):
    for job in search.jobs:
        images, shape = check_images(job.problem, 4, Choice("aten"), ARCH), job.problem.shape
        h, w = shape[2:] if isinstance(shape, tuple) else (shape.p, shape.q)
        assert 4 <= images <= 128 and images * h * w % 128 == 0 == N * h * w % 128, job.problem
        assert check_images(job.problem.with_batch(1), 4, Choice("aten"), ARCH) == 1


def test_a_persistent_kernel_is_checked_where_its_ring_of_buffers_wraps(search):
    seen = set()
    for job in search.jobs:
        if job.problem.op not in ("conv_fprop", "conv_fprop_stats"):
            continue
        for choice in listing.candidates(job, CPU, ARCH):
            config = choice.config
            if config is not None and config.kernel != "pointer":
                images, s = check_images(job.problem, 4, choice, ARCH), job.problem.shape
                tiles = images * s.p * s.q * s.k / (config.block_m * config.block_n)
                assert tiles >= 3 * 132 or images == N, (job.problem, choice)
                seen.add((config.kernel, images == N))
    assert len(seen) >= 4, seen


def test_a_candidate_that_does_not_compile_is_not_checked(search, monkeypatch):
    made, bench = search()
    some = next(job for job in search.jobs if job.problem.op == "conv_dgrad")
    bad = listing.candidates(some, CPU, ARCH)[2]
    made.ahead.failure = lambda job, choice: "does not compile: no" if choice == bad else None
    done = made.run([some], [], 1e9)
    assert bad not in {choice for _, choice in bench.checked} and done.dropped == [
        (some.problem, bad, "does not compile: no")
    ]


def test_what_an_op_moves_is_its_operands_and_results(search):
    """The kernels' records summed, against a count by hand."""
    (plain,) = (j for j in search.jobs if str(j.problem).startswith("conv_fprop 256x64x56x56 -> 64, 3x3 "))
    pixels, element = N * 56 * 56, 2
    ((moved, flops),) = work(plain)
    assert moved == 2 * pixels * 64 * element + 9 * 64 * 64 * element + 4 * 64  # x, y, weight, shift
    assert flops == 2 * pixels * 64 * 64 * 9
    families = [j for j in search.jobs if j.problem.op == "bn_apply" and j.problem.shape == (N, 64, 56, 56)]
    (family,) = (j for j in families if not j.problem.flags)
    large = sum(moved for moved, _ in work(family)) / (pixels * 64 * element)
    assert 8 <= large < 8.2  # statistics x; apply x, y; reduce dy, x; backward dy, x, dx: and vectors
    assert Roofs(1e12, 1e30).least_ms(plain) == moved / 1e12 * 1e3
    assert Roofs(1e30, 1e12).least_ms(plain) == flops / 1e12 * 1e3
    (chain, *_) = (j for j in search.jobs if j.problem.op == "conv_chain")
    s, (first, second) = chain.problem.shape, chain.following
    ((_, flops),) = work(chain)
    assert flops == 2 * s.n * s.p * s.q * (9 * s.c * s.k + s.k * first + first * second)
    for job in search.jobs:
        assert all(moved > 0 for moved, _ in work(job))


def test_every_op_is_summarised_with_its_share_of_the_roof(search):
    made, _ = search()
    done = made.run(search.jobs, search.blocks, float("inf"))
    assert done.table.provenance["roofs"] == {"bytes_per_s": 1e12, "flops_per_s": 1e14}
    ops = {one.op for one in done.summaries}
    assert {"conv_fprop", "conv_dgrad", "conv_wgrad", "bn_apply"} <= ops
    assert "of the roof" in str(done) and "of native PyTorch (geometric mean), faster in" in str(done)
    (wgrad,) = (one for one in done.summaries if one.op == "conv_wgrad")
    rows = [(j, done.table.entries[j.problem]) for j in search.jobs if j.problem.op == "conv_wgrad"]
    times = [entry.ms(entry.winner) for _, entry in rows]
    assert wgrad.problems == len(rows) and wgrad.faster == sum(entry.winner != ATEN for _, entry in rows)
    assert wgrad.roof_share == pytest.approx(sum(Roofs(1e12, 1e14).least_ms(job) for job, _ in rows) / sum(times))
    bare = dataclasses.replace(done.table, provenance={})
    assert all(one.roof_share is None for one in summarise(search.jobs, bare))
