"""The tuner's search with made-up times, a made-up clock, and processes that crash and hang when told to."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import tune_doubles
from tiers import larger

from resnet_fused._command import UsageError
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.choice import ATEN, BLOCK
from resnet_fused.dispatch.table import Choice
from resnet_fused.measure.network import networks
from resnet_fused.measure.progress import Silent
from resnet_fused.measure.workers import WorkerCrashed
from resnet_fused.tuning import candidates as listing
from resnet_fused.tuning import search as tune_search
from resnet_fused.tuning.device_worker import ProcessWorker
from resnet_fused.tuning.precompile import Precompiler
from resnet_fused.tuning.problems import blocks, check_images, jobs, parts
from resnet_fused.tuning.report import predict, summarise
from resnet_fused.tuning.search import SAME, Search
from resnet_fused.tuning.work import Roofs, work

CPU, GPU, ARCH, DTYPE, N = torch.device("cpu"), "NVIDIA H100 80GB HBM3", 90, torch.bfloat16, 256
FACTS = dict.fromkeys(SAME, "1")
CHECK_S, PREPARE_S, RACE_S = 0.05, 0.02, 0.2  # what they take here


class Clock:
    """Time passes when the bench says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Bench:
    """Answers with made-up times, the same for the same candidate."""

    def __init__(self, clock, path, wrong=(), seed=0, slow=1.0):
        self.clock, self.path, self.wrong, self.seed, self.slow = clock, path, set(wrong), seed, slow
        self.checked, self.raced, self.prepared = Counter(), [], {}

    def start(self):
        pass

    def check(self, job, choice, table, first):
        self.clock.now += CHECK_S
        self.checked[(job.problem, choice)] += 1
        if sum(self.checked.values()) % 200 == 150:  # whenever anybody looks, it is a table
            tables.from_json(json.loads(self.path.read_text()))
        if (job.problem.op, str(choice)) in self.wrong or (job.problem.op, choice.backend) in self.wrong:
            return {job.problem.op: "y errs by 1"}
        return {job.problem.op: None}

    def roofs(self, dtype):
        return Roofs(1e12, 1e14)

    def prepare(self, job, choice, table):
        self.clock.now += PREPARE_S
        self.prepared[choice] = job.problem
        return None

    def race(self, budget_s):
        self.clock.now += min(budget_s, RACE_S)
        self.raced.append((next(iter(self.prepared.values())), list(self.prepared)))
        times = {str(choice): self.time(problem, choice) for choice, problem in self.prepared.items()}
        self.prepared = {}
        return times

    def time(self, problem, choice):
        chance = random.Random(f"{self.seed} {problem} {choice}")
        return (0.5 + chance.random()) * (1.0 if choice == ATEN else self.slow)

    def close(self):
        pass


@pytest.fixture(scope="module")
def resnet50():
    """The network, its problems and its blocks."""
    (network,) = networks(["resnet50"], 224)
    found = jobs(network, ("infer", "train"), N, DTYPE, ARCH, False, alternatives=True)
    found = [
        job for job in found if job.problem.shape not in [(N, 64, 112, 112)] or job.problem.op == "bn_act_max_pool"
    ]
    return network, found, blocks(network, N, DTYPE, False)


@pytest.fixture
def search(resnet50, tmp_path, monkeypatch):
    """Makes a search over ResNet-50, on a GPU that is only a name."""
    monkeypatch.setattr(listing, "backends", lambda device: ["triton", "cuda"])
    clock = Clock()
    monkeypatch.setattr(tune_search, "time", clock)
    network, found, whole = resnet50
    path = tmp_path / "t.json"

    def make(again=False, bench=None, **options):
        bench = bench or Bench(clock, path, **options)
        made = Search(CPU, ARCH, GPU, FACTS, path, again, False, bench, Precompiler(ARCH, 0), Silent())
        return made, bench

    make.clock, make.path, make.network, make.jobs, make.blocks = clock, path, network, found, whole
    return make


def test_first_what_runs_without_a_table_then_blocks_then_the_rest_then_blocks_again(search):
    made, bench = search()
    done = made.run(search.jobs, search.blocks, 1e9)
    assert done.left == 0 and done.measured == len(search.jobs) + len(search.blocks)
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


# ---- compilation -----------------------------------------------------------------------------------------------------

COMPILES = """
import dataclasses, os, torch
from pathlib import Path
from dry_device import dry_device
from resnet_fused.tuning import precompile as compile_ahead
from resnet_fused.tuning import calls
from resnet_fused.tuning import candidates as listing
from resnet_fused.measure.network import networks
from resnet_fused.tuning.problems import Operands, check_images, jobs
from resnet_fused.dispatch.table import Choice

listing.backends = lambda device: ["triton"]
cpu, (network,) = torch.device("cpu"), networks(["resnet18"], 64)
found = jobs(network, ("infer", "train"), 16, torch.bfloat16, 90, False, alternatives=True)
def pick(op, kernel):
    every = ((job, choice) for job in found if job.problem.op == op for choice in listing.candidates(job, cpu, 90))
    return next(one for one in every if one[1].config and one[1].config.kernel == kernel)
picked = [pick("conv_fprop", "wgmma_conv"), pick("conv_wgrad", "pointer"), pick("conv_dgrad", "pointer")]
cache = Path(os.environ["TRITON_CACHE_DIR"])
def binaries():
    return {path.parent.name for path in cache.rglob("*.cubin")}

compile_ahead.as_if_on(90)
for job, choice in picked:
    assert compile_ahead.compile_candidate(job, choice, 90) is None
job, choice = picked[2]
sizes = dict(block_m=256, block_n=256, block_k=128, num_stages=6, num_warps=8)
huge = Choice("triton", dataclasses.replace(choice.config, **sizes))
odd = Choice("triton", dataclasses.replace(choice.config, block_m=48))
assert "shared memory" in compile_ahead.compile_candidate(job, huge, 90)
assert "does not compile" in compile_ahead.compile_candidate(job, odd, 90)

before = binaries()
with dry_device(90) as driver:
    for job, choice in picked:
        for problem in (job.problem, job.problem.with_batch(check_images(job.problem, 4, choice, 90))):
            one = dataclasses.replace(job, problem=problem)
            operands = calls.operands_of(one, Operands(cpu, torch.bfloat16, guarded=False))
            calls.make_benchmark_fn(one, choice, operands)()
    assert driver.dry_launches() >= 6, driver.dry_launches()
assert len(before) > 3 and binaries() == before, binaries() - before
print("all right")
"""


@pytest.mark.larger
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for the driver is built with gcc")
def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path):
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {
        **inherited,
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(root / "tests" / "support"), str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("all right"), done.stdout + done.stderr


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


def test_compiling_ahead_dedupes_waits_and_gives_up(monkeypatch):
    from concurrent.futures import Future

    class Pool:
        submitted = []

        def submit(self, function, *arguments):
            self.submitted.append((arguments, Future()))
            return self.submitted[-1][1]

    ahead = Precompiler(ARCH, 0)
    ahead._pool = Pool()
    (network,) = networks(["resnet50"], 224)
    some = [job for job in jobs(network, ("train",), N, DTYPE, ARCH, False) if job.problem.op == "conv_wgrad"][3]
    config = listing.configurations(some.problem, ARCH)[0]
    one, more = Choice("triton", config), Choice("triton", dataclasses.replace(config, splits=config.splits * 2))
    for choice in (one, more, ATEN, Choice("cuda")):
        ahead.submit(some, choice)
    assert len(Pool.submitted) == 1  # the number of splits is no other kernel
    assert not ahead.ready(some, [one]) and ahead.ready(some, [ATEN]) and ahead.failure(some, one) is None
    ahead.wait(some, [one], 0.01)
    Pool.submitted[0][1].set_result("does not compile: too large")
    assert ahead.ready(some, [one, more]) and "too large" in ahead.failure(some, more)


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
