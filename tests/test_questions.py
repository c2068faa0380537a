"""Single kernels beside PyTorch's own: a wrong one has no time, one that crashes or hangs costs its row."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import ops
from resnet_fused.bench import answers
from resnet_fused.bench.answers import Answer
from resnet_fused.bench.network import networks

sys.path.append(str(Path(__file__).resolve().parents[1]))
questions = pytest.importorskip("benchmarks.questions", reason="the benchmarks are not here")
contests = pytest.importorskip("benchmarks.contests", reason="the benchmarks are not here")

pytestmark = pytest.mark.skipif(not ops.available("triton", "cpu"), reason="Triton's interpreter does not run here")
KEYS = [("q", "s", "wgmma_conv"), ("q", "t", "tma_gemm"), ("q", "u", "pointer")]


@pytest.fixture(scope="module")
def setting():
    (network,) = networks("resnet50", 224)
    return questions.Setting(torch.device("cpu"), 90, torch.bfloat16, 256, network)


def test_the_questions_of_an_h100_and_those_of_a_gpu_without_tma(setting):
    found = list(questions.contests(setting))
    keys = [contest.key for contest in found]
    assert len(set(keys)) == len(keys)

    def kernels(question):
        rows = [contest for contest in found if contest.question.startswith(question)]
        return {k: len({c.shape for c in rows if c.kernel == k}) for k in {c.kernel for c in rows}}

    assert kernels("3x3") == {"wgmma_conv": 10, "tma_conv": 10, "pointer": 10}  # all but the stem
    assert kernels("1x1, conv") == {"wgmma_conv": 12, "tma_gemm": 12, "pointer": 12}
    assert set(kernels("chain")) == {"pointer"} and {"56x56", "28x28"} == {
        part for c in found if c.question.startswith("chain") for part in ("56x56", "28x28") if part in c.shape
    }
    assert {"wgmma_conv", "tma_gemm", "pointer"} <= set(kernels("statistics"))
    assert found[0].kernel == "wgmma_conv" and found[0].question.startswith("3x3")  # the most valuable first
    assert all(1 <= len(c.candidates) <= contests.CONFIGURATIONS for c in found)
    older = {c.kernel for c in questions.contests(dataclasses.replace(setting, arch=86))}
    assert older <= {"pointer", "triton", "cuda"}


def contest(ours, plain, op="conv_fprop"):
    """A row whose kernel is this function."""
    setting = questions.Setting.here(rehearse=True)
    one = next(c for c in questions.contests(setting) if c.op == op and c.kernel == "pointer")
    calls = lambda make, candidates: ({str(candidates[0]): ours}, {"conv2d": plain}, 2**20, 2**20)  # noqa: E731
    return dataclasses.replace(one, calls=calls), setting


def test_a_row_has_its_times_its_bytes_and_its_roof():
    x = torch.randn(64, 64)
    one, setting = contest(lambda: x.clone(), lambda: x + 0)
    row = questions.answer(one, setting, 2.0**30, 2.0**40, 2)
    assert row.problem is None and row.plain == "conv2d" and row.ours == str(one.candidates[0])
    assert row.least_ms == pytest.approx(1e3 / 1024) and row.ratio > 0  # its bytes take longer than its arithmetic


@pytest.mark.parametrize("wrong", [0.0, 1.1, math.nan])
def test_a_result_that_is_not_pytorchs_has_no_time(wrong):
    x = torch.randn(64, 64)
    one, setting = contest(lambda: x * wrong, lambda: x)
    row = questions.answer(one, setting, 2.0**30, 2.0**40, 1)
    assert row.ours_ms is None and "differs from PyTorch's" in row.problem


def test_a_kernel_that_is_wrong_or_refused_is_not_timed(monkeypatch):
    one, setting = contest(lambda: pytest.fail("timed"), lambda: pytest.fail("timed"))
    for why in ("refused: no", "the result errs by 1"):
        monkeypatch.setattr(questions, "check", lambda *_, why=why: why)
        row = questions.answer(one, setting, 1.0, 1.0, 1)
        assert row.ours_ms is None and row.problem.endswith(why)
    monkeypatch.setattr(questions, "check", lambda *_: "CUDA error: an illegal memory access was encountered")
    assert questions.answer(one, setting, 1.0, 1.0, 1).problem.startswith("crashed")


@pytest.fixture
def measured(monkeypatch):
    """Roofs that take no time."""
    monkeypatch.setattr(questions.roof, "measure", lambda *_: questions.roof.Roof(1e11, 2e11))
    monkeypatch.setattr(questions.roof, "copy_bandwidth", lambda *_: 1e10)


def test_a_broken_context_is_replaced_and_its_formulation_not_tried_again(tmp_path, monkeypatch, measured):
    path, tried = tmp_path / "q.json", []

    def answer(contest, *_):
        tried.append(contest.key)
        if contest.kernel == "tma_gemm":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return Answer(*contest.key, "ours", 1.0, "conv2d", 2.0, 0.5)

    monkeypatch.setattr(questions, "answer", answer)
    assert questions.work(path, True, True, math.inf) == 0 and not tried  # roofs alone
    assert questions.work(path, True, False, 0.0) == questions.LEFT and not tried
    assert questions.work(path, True, False, math.inf) == questions.REPLACED
    assert questions.work(path, True, False, math.inf) == 0
    rows = answers.load(path)
    lost = [row.problem for row in rows if row.kernel == "tma_gemm"]
    assert lost[0].startswith("crashed: RuntimeError: CUDA error") and len(lost) > 1
    assert all(problem.startswith("not tried: crashed") for problem in lost[1:])
    assert len(tried) == len(set(tried)) == len(rows) - len(lost) + 1
    said = "\n".join(questions.summary(json.loads(path.read_text())))
    assert f"{len(rows)} rows answered, {len(lost)} without a time" in said and "200.0" not in said
    before = len(tried)
    assert questions.work(path, True, False, math.inf) == 0 and len(tried) == before  # nothing is asked twice


def test_a_process_that_dies_or_hangs_costs_one_row(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"schema": 1, "answers": [], "provenance": {}}))
    script = f"""
import json, os, pathlib, time
path = pathlib.Path({str(path)!r})
data = json.loads(path.read_text())
count = len(data["answers"])
if count < 2:
    data["attempt"] = {KEYS!r}[count]
    path.write_text(json.dumps(data))
    os.abort() if count == 0 else time.sleep(60)
"""
    assert questions.supervise([sys.executable, "-c", script], path, patience_s=5) == 0
    first, second = answers.load(path)
    assert first.key == KEYS[0] and first.problem.startswith("crashed: exit status -6")
    assert second.key == KEYS[1] and second.problem.startswith("hung")


def test_a_process_that_dies_before_it_tries_anything_ends_it(tmp_path, capsys):
    assert questions.supervise([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "q.json") == 1
    assert questions.supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "q.json") == questions.LEFT
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            questions.main(["--json", str(tmp_path / "q.json")])
        assert "--rehearse" in capsys.readouterr().err
