"""Verification and tuning, rehearsed on a CPU: what is wrong is found and never timed, what was measured is kept."""

import dataclasses
import json

import pytest
import torch
from tune_doubles import Steps

import resnet_fused
from resnet_fused import cli, dispatch, ops
from resnet_fused._command import UsageError, seconds
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch import experimental
from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.conv_chain import chain_flags, join_flags
from resnet_fused.dispatch.table import Choice, Entry, Problem, Table
from resnet_fused.measure.network import networks, tiny_network
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning import calls, checks, tune
from resnet_fused.tuning import candidates as candidate_list
from resnet_fused.tuning import device_worker as device_process
from resnet_fused.tuning import search as tune_search
from resnet_fused.tuning.candidates import candidates, configurations
from resnet_fused.tuning.problems import Job, also, blocks, jobs, wrapping_images
from resnet_fused.tuning.report import REHEARSAL

CPU = torch.device("cpu")
REFERENCE = Choice("reference")
needs_kernels = pytest.mark.skipif(
    not any(ops.available(name, "cpu") for name in ("triton", "cuda")), reason="no kernel runs on this CPU"
)


def tiny_jobs(dtype=torch.float32, arch=80):
    return jobs(tiny_network(), ("infer", "train"), 2, dtype, arch, False)


def job_of(op, **rest):
    return next(
        job for job in tiny_jobs() if job.problem.op == op and all(getattr(job, k) == v for k, v in rest.items())
    )


def test_the_problems_of_a_network():
    found = tiny_jobs()
    assert {job.problem.op for job in found} == {
        "conv_fprop",
        "conv_fprop_stats",
        "conv_dgrad",
        "conv_wgrad",
        "conv_chain",
        "conv_join",
        "bn_apply",
        "bn_act_max_pool",
    }
    convolutions = sum(job.weight for job in found if job.problem.op == "conv_wgrad")
    assert convolutions == len(tiny_network().layers)
    assert not any(job.residual and job.epilogue for job in found if job.problem.op == "conv_dgrad")
    assert {job.problem.flags for job in found if job.problem.op == "conv_fprop_stats"} == {(), ("prologue",)}
    assert {job.problem.flags for job in tiny_jobs(arch=100) if job.problem.op == "conv_fprop_stats"} == {()}


def test_in_int8_there_is_inference_alone():
    found = tiny_jobs(torch.int8, 90)
    assert {job.problem.op for job in found} == {"conv_fprop_int8", "conv_join_int8"}
    assert {job.problem.dtype for job in found} == {torch.int8}
    float_jobs = [job for job in tiny_jobs(torch.bfloat16, 90) if job.problem.op in ("conv_fprop", "conv_join")]
    assert [(job.problem.shape, job.weight) for job in found] == [(job.problem.shape, job.weight) for job in float_jobs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_plain_pytorch_keeps_the_contract_everywhere(dtype):
    for job in tiny_jobs(dtype):
        assert {why for why in checks.check_all(job, REFERENCE, CPU).values() if why} == set(), job.problem


def break_it(monkeypatch, break_result):
    """Every op's results pass through `break_result(results, operands)`."""
    real = checks.caller

    def caller(op, choice):
        call = real(op, choice)
        return lambda *operands: break_result(call(*operands), operands)

    monkeypatch.setattr(checks, "caller", caller)


def _wrong(y, operands):
    y[0, 0, 0, 0] += 0.01
    return y


def _unwritten(y, operands):
    return torch.cat([y[:1], torch.empty_like(y[1:])])


def _transposed(y, operands):
    return y[:, :, :1]


def _writes_into_an_operand(y, operands):
    operands[0][0, 0, 0, 0] = 7
    return y


def _writes_beside_an_operand(y, operands):
    x = operands[0].permute(0, 2, 3, 1)
    torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel()).fill_(7)
    return y


def _differs(y, operands, count=[0]):  # noqa: B006
    count[0] += 1
    return y if count[0] % 2 else y.nextafter(torch.tensor(9.0))


def _raises(y, operands):
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize(
    "broken,why",
    [
        (_wrong, "errs by"),
        (_unwritten, "NaN"),
        (_transposed, "expected"),
        (_writes_into_an_operand, "changed an operand"),
        (_writes_beside_an_operand, "beside an operand"),
        (_differs, "two runs differ"),
        (_raises, "RuntimeError: no such instruction"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, broken, why):
    job = job_of("conv_fprop")
    assert checks.check_all(job, REFERENCE, CPU) == {"conv_fprop": None}
    break_it(monkeypatch, broken)
    assert why in checks.check_all(job, REFERENCE, CPU)["conv_fprop"]


@pytest.mark.parametrize(
    "op,index", [("conv_fprop_stats", 1), ("conv_fprop_stats", 2), ("conv_dgrad", 2), ("conv_wgrad", 0)]
)
def test_a_wrong_sum_is_found(monkeypatch, op, index):
    job = job_of(op, epilogue=True) if op == "conv_dgrad" else job_of(op)

    def broken(results, operands):
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        results[index] = results[index] * (1 + 1e-4)
        return results

    break_it(monkeypatch, broken)
    assert "errs by" in checks.check_all(job, REFERENCE, CPU)[op]


def test_guards_surround_every_operand():
    make = Operands(CPU, torch.bfloat16)
    x = make.activation(2, 3, 4, 5)
    assert x.shape == (2, 3, 4, 5) and x.is_contiguous(memory_format=torch.channels_last) and x.isfinite().all()
    assert x.data_ptr() % 16 == 0 and make.damage() is None
    flat = x.permute(0, 2, 3, 1)
    for place in (-1, x.numel()):
        assert torch.as_strided(flat, (1,), (1,), flat.storage_offset() + place).isnan().all()


@pytest.mark.parametrize(
    "dtype,arch", [(torch.bfloat16, 90), (torch.float32, 80), (torch.float16, 120), (torch.int8, 90)]
)
def test_configurations_begin_with_the_heuristic_and_fit_the_problem(dtype, arch):
    for network in [tiny_network(), *networks(["resnet50"], 224)]:
        for job in jobs(network, ("infer", "train"), 32, dtype, arch, False, alternatives=True):
            if job.problem.op not in plans.CONVOLUTIONS or (job.problem.op == "conv_chain" and dtype == torch.float32):
                continue
            found = configurations(job.problem, arch)
            assert found[0] == plans.heuristic(job.problem, arch) and len(set(found)) == len(found)
            assert configurations(job.problem, arch, quick=True) == found[:1]
            assert len(found) <= 24, job.problem
            outputs = job.problem.shape.c if job.problem.op == "conv_dgrad" else job.problem.shape.k
            if job.problem.op in ("conv_fprop", "conv_fprop_stats", "conv_dgrad"):
                assert all(c.block_n < 2 * outputs for c in found[1:] if c.block_n > 64), job.problem


def test_the_chain_the_join_and_a_flat_3x3_have_candidates():
    (network,) = networks(["resnet50"], 224)
    found = {
        j.problem: configurations(j.problem, 90) for j in jobs(network, ("infer",), 256, torch.bfloat16, 90, False)
    }
    for op in ("conv_chain", "conv_join"):
        assert all(len(configs) >= 6 for problem, configs in found.items() if problem.op == op)
    three = next(c for p, c in found.items() if p.op == "conv_fprop" and (p.shape.r, p.shape.c) == (3, 64))
    assert {config.flat for config in three} == {False, True}


WIDE = {
    "conv_fprop": ConvShape(1, 64, 6, 6, 64, 3, 3, (1, 1), (1, 1)),
    "conv_fprop_stats": ConvShape(2, 64, 5, 5, 128, 1, 1),
    "conv_dgrad": ConvShape(2, 128, 5, 5, 64, 1, 1),
    "conv_wgrad": ConvShape(1, 64, 6, 6, 128, 3, 3, (1, 1), (1, 1)),
    "conv_chain": ConvShape(1, 64, 5, 5, 64, 3, 3, (1, 1), (1, 1)),
    "conv_join": ConvShape(1, 64, 5, 5, 128, 1, 1),
    "conv_fprop_int8": ConvShape(1, 64, 6, 6, 64, 3, 3, (1, 1), (1, 1)),
    "conv_join_int8": ConvShape(1, 64, 5, 5, 128, 1, 1),
}


@pytest.mark.skipif(not ops.available("triton", "cpu"), reason="Triton does not interpret here")
@pytest.mark.parametrize("op", WIDE)
def test_configurations_beside_the_heuristics_are_right(op, monkeypatch):
    monkeypatch.setattr(candidate_list, "_promises", lambda config, first: True)
    following = {"conv_chain": (64, 64), "conv_join": (64, 1), "conv_join_int8": (64, 1)}.get(op, (0, 0))
    told = {"conv_chain": chain_flags, "conv_join": join_flags, "conv_join_int8": join_flags}
    flags = told[op](*following) if op in told else ("prologue",) if op == "conv_fprop_stats" else ()
    dtype = torch.int8 if op.endswith("int8") else torch.float16
    job = Job(Problem(op, WIDE[op], dtype, False, flags), epilogue=op == "conv_dgrad", following=following)
    found = [config for config in configurations(job.problem, 90) if config.kernel == "pointer"]
    assert len(found) > (5 if dtype == torch.float16 else 2)
    for config in found[1:]:
        if config.splits == found[0].splits or config.flat:
            assert checks.check_all(job, Choice("triton", config), CPU) == dict.fromkeys((op, *also(job))), config


@pytest.mark.parametrize("op,count", [("conv_chain", 3), ("conv_join", 2)])
def test_what_competes_with_a_tail_runs_as_the_table_has_it(op, count):
    job = next(j for j in tiny_jobs() if j.problem.op == op)
    if op == "conv_chain":
        job = dataclasses.replace(job, following=(32, 16))
    inference = {j.problem.shape for j in tiny_jobs() if j.problem.op == "conv_fprop"}
    asked = []

    def fprop(shape):
        asked.append(shape)
        return "reference"

    operands = calls.operands_of(job, Operands(CPU, torch.float32, guarded=False))
    separate = calls.make_benchmark_fn(job, Choice("aten"), operands, fprop)()
    assert len(asked) == count and set(asked) <= inference
    fused = calls.make_benchmark_fn(job, Choice("reference"), operands)()
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (separate, fused)), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_launcher_finds_what_was_measured_of_the_chain_and_the_join():
    chain = next(j for j in tiny_jobs(torch.bfloat16, 90) if j.problem.op == "conv_chain")
    join = next(j for j in tiny_jobs(torch.bfloat16, 90) if j.problem.op == "conv_join")
    other = ConvConfig(64, 32, 16, 4, 2)
    entries = {
        job.problem: Entry(job.problem, ((Choice("aten"), 1.0), (Choice("triton", other), 0.5)))
        for job in (chain, join)
    }
    with plans.assuming(Table("a GPU", 90, {}, frozenset(), entries)):
        for job, flags in ((chain, chain_flags(*chain.following)), (join, join_flags(*join.following))):
            asked = dispatch.Problem(job.problem.op, job.problem.shape, torch.bfloat16, flags=flags)
            assert dispatch.conv_config(asked, 90) == other
            another = dataclasses.replace(asked, flags=tuple(flag + "0" for flag in flags))
            assert dispatch.conv_config(another, 90) != other


def test_experimental_formulations_compete_where_they_can_run():
    pointwise = next(
        j for j in tiny_jobs(torch.bfloat16, 90) if j.problem.op == "conv_fprop" and j.problem.shape.r == 1
    )
    kernels = {config.kernel for config in configurations(pointwise.problem, 90)}
    assert "tma_gemm" in kernels and "pointer" in kernels
    assert {config.kernel for config in configurations(pointwise.problem, 80)} == {"pointer"}
    behind = next(j for j in tiny_jobs(torch.bfloat16, 90) if j.problem.flags == ("prologue",))
    assert {config.kernel for config in configurations(behind.problem, 90)} == {"pointer"}


def test_the_gluon_gradient_competes_where_it_can_run():
    job = next(j for j in tiny_jobs(torch.bfloat16, 90) if j.problem.op == "conv_dgrad" and j.epilogue)
    shape = dataclasses.replace(job.problem.shape, c=64, k=64, stride=(1, 1))
    problem = dataclasses.replace(job.problem, shape=shape)
    gluon = experimental.configurations(90, "conv_dgrad")
    assert [c for c in configurations(problem, 90) if c.kernel != "pointer"] == [c for c in gluon if c.block_n <= 64]
    for changes in ({"stride": (2, 2)}, {"k": 40}):
        other = dataclasses.replace(problem, shape=dataclasses.replace(shape, **changes))
        assert {config.kernel for config in configurations(other, 90)} == {"pointer"}
    behind = dataclasses.replace(problem, flags=("prologue",))
    assert {config.kernel for config in configurations(behind, 90)} == {"pointer"}
    # Every program computes several tiles of the image.
    images = wrapping_images(problem, Choice("triton", gluon[0]), 90)
    assert images * shape.h * shape.w * shape.c >= 3 * 132 * gluon[0].block_m * gluon[0].block_n


@pytest.mark.skipif(not ops.available("triton", "cpu"), reason="Triton does not interpret here")
@pytest.mark.parametrize("op", ["conv_fprop", "conv_fprop_stats"])
def test_experimental_formulations_are_checked_or_refused(op):
    wide = dict.fromkeys(("c", "k"), 64)
    job = next(j for j in tiny_jobs(torch.float16, 90) if j.problem.op == op and j.problem.shape.r == 1)
    shape = dataclasses.replace(job.problem.shape, **wide, stride=(1, 1))
    job = dataclasses.replace(job, problem=dataclasses.replace(job.problem, shape=shape, flags=()))
    reasons = {
        config.kernel: checks.check_all(job, Choice("triton", config), CPU)[op]
        for config in configurations(job.problem, 90)
    }
    assert reasons["tma_gemm"] is None and reasons["pointer"] is None, reasons
    assert "refused: " in reasons.get("wgmma_conv", "refused: ")


@needs_kernels
def test_a_rehearsal_writes_a_table_resumes_and_never_counts_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path))
    plans.forget()
    monkeypatch.setattr(tune.provenance, "commit", lambda: None)  # which may change meanwhile
    nothing = resnet_fused.tune(dtype="bf16", rehearse=True, budget_s=-1)
    assert (nothing.measured, nothing.known) == (0, 0) and nothing.left > 30 and nothing.path.exists()
    kept = [job for job in tiny_jobs(torch.bfloat16) if job.problem.op in ("conv_wgrad", "bn_apply", "conv_join")]
    monkeypatch.setattr(tune, "jobs", lambda *_, **__: kept)
    whole = blocks(tiny_network(), 2, torch.bfloat16, False)
    steps = Steps()
    first = resnet_fused.tune(dtype="bf16", rehearse=True, reporter=steps)
    assert first.measured == steps.begun == steps.expected
    assert (first.measured, first.known, first.left) == (len(kept) + len(whole), 0, 0)
    assert not first.disabled and not first.dropped and not first.crashed
    assert first.path == tmp_path / "rehearsal" / "cpu.json"
    table = tables.read(first.path)
    assert table == first.table and table.arch == 0 and table.gpu == REHEARSAL
    assert " -> " not in str(dataclasses.replace(first, changes=[(kept[0].problem, Choice("aten"), Choice("triton"))]))
    assert {job.problem for job in (*kept, *whole)} == set(table.entries)
    kernels = [name for name in ("triton", "cuda") if ops.available(name, "cpu")]
    assert {(op, name) for op in ("bn_stats", "residual_block") for name in kernels} <= table.verified
    for job in (*kept, *whole):
        rivals = candidates(job, CPU, 80, quick=True)
        assert [choice for choice, _ in table.entries[job.problem].measured] == rivals
    again = resnet_fused.tune(dtype="bf16", rehearse=True)
    assert (again.measured, again.known, again.changes) == (0, len(kept) + len(whole), [])
    assert tables.known_tables() == () and dispatch.choose(kept[0].problem, 80) == Choice("aten")


@needs_kernels
def test_a_kernel_that_errs_is_never_timed_nor_verified_again(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    kept = [job for job in tiny_jobs() if job.problem.op == "add_act" or job.problem.flags == ("residual",)]
    kept = [job for job in kept if job.problem.op == "bn_apply"]
    monkeypatch.setattr(tune, "jobs", lambda *_, **__: kept)
    options = {"dtype": "fp32", "rehearse": True, "path": path, "modes": ("infer",)}
    right = resnet_fused.tune(**options)
    backends = {backend for _, backend in right.table.verified}
    assert backends
    monkeypatch.setattr(device_process, "check_all", lambda job, *_: {job.problem.op: "errs by 1"})
    wrong = resnet_fused.tune(**options, again=True)
    assert {(op, backend) for op, backend, _ in wrong.disabled} == {("bn_apply", backend) for backend in backends}
    assert not any(pair[0] == "bn_apply" for pair in wrong.table.verified)
    assert all(choice == Choice("aten") for e in wrong.table.entries.values() for choice, _ in e.measured)
    monkeypatch.undo()
    monkeypatch.setattr(tune, "jobs", lambda *_, **__: kept)
    later = resnet_fused.tune(**options, again=True)
    assert later.disabled == wrong.disabled and "never chosen: bn_apply" in str(later)


def test_a_table_of_other_versions_is_begun_anew():
    facts = dict.fromkeys(tune_search.SAME, "1")
    table = Table(REHEARSAL, 0, facts)
    assert tune_search.continues(table, facts, REHEARSAL)
    assert not tune_search.continues(table, {**facts, "torch": "2"}, REHEARSAL)
    assert not tune_search.continues(table, facts, "another GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["tune"], ["tune", "--rehearse", "--budget", "soon"], ["tune", "--dtype", "fp8"]])
def test_nothing_to_tune_and_bad_choices_are_one_line(command, capsys):
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and ("--rehearse" in err or "soon" in err or "fp8" in err)


def test_no_kernel_to_verify_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(ops, "available", lambda name, kind: False)
    for command in (["verify", "--rehearse"], ["tune", "--rehearse"]):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "triton" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_verify_says_why_there_is_nothing_to_verify(monkeypatch, capsys):
    command = ["verify", "--model", "resnet18", "--image-size", "32", "--batch", "1", "--dtype", "fp32"]
    monkeypatch.setattr(ops, "available", lambda name, kind: name == "cuda")
    monkeypatch.setattr(ops, "unavailable", lambda name, kind: None if name == "cuda" else "no triton")
    assert cli.main([*command, "--mode", "infer"]) == 2
    err = capsys.readouterr().err
    assert "kernels that run here (cuda), none is for conv_fprop; triton: no triton\n" in err and "float64" not in err
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("resnet_fused.tuning.verify.check_all", lambda job, *_: {job.problem.op: "refused: too odd"})
    assert cli.main([*command, "--mode", "train"]) == 1
    out = capsys.readouterr().out
    assert "takes one of these problems" in out and "bn_apply, refused: too odd" in out and "right" not in out


@needs_kernels
def test_the_verify_command(tmp_path, capsys, monkeypatch):
    path = tmp_path / "v.json"
    command = ["verify", "--rehearse", "--dtype", "fp32", "--mode", "infer", "--json", str(path)]
    assert cli.main(command) == 0
    assert "all right" in capsys.readouterr().out
    text = json.loads(path.read_text())
    assert text["passed"] and text["checks"]
    assert all(c["reason"] is None or c["op"] == "conv_chain" and "refused" in c["reason"] for c in text["checks"])
    monkeypatch.setattr("resnet_fused.tuning.verify.check_all", lambda job, *_: {job.problem.op: "errs by 1"})
    assert cli.main(command) == 1 and "wrong: conv_fprop" in capsys.readouterr().out


@pytest.mark.parametrize("text,expected", [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_durations(text, expected):
    assert seconds(text, "--budget") == expected


@pytest.mark.parametrize("text", ["", "soon", "-1", "0s", "5 x"])
def test_no_durations(text):
    with pytest.raises(UsageError, match="--budget"):
        seconds(text, "--budget")
