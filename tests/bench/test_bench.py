"""The bench: statistics on fake callables, correctness against float64, models, pictures, JSON, chart."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from recorded import rendered
from torch import nn

from resnet_fused._command import UsageError
from resnet_fused.bench import chart, images, results, run, table
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS
from resnet_fused.bench.correctness import FLOORS, Errors, breach, errors_of, max_error, norm_error
from resnet_fused.bench.runner import Outcome, Runner, reference
from resnet_fused.measure import cases, models
from resnet_fused.measure.cases import Case
from resnet_fused.measure.progress import Silent

CPU = torch.device("cpu")


# correctness


def test_relative_errors():
    reference_value = torch.tensor([1.0, -4.0, math.nan])
    assert max_error(torch.tensor([1.0, -3.0, math.nan]), reference_value) == 0.25
    assert norm_error(torch.tensor([0.0, 3.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / math.sqrt(2))
    assert max_error(torch.tensor([1.0, -4.0, 0.0]), reference_value) == math.inf  # a NaN that was swallowed
    assert max_error(torch.zeros(2), torch.zeros(3)) == math.inf
    assert max_error(torch.full((2,), 0.5), torch.zeros(2)) == 0.5


def test_the_contract_is_twice_plain_pytorch_plus_a_floor():
    plain = [Errors(1e-6), Errors(4e-6)]
    limit = 2 * 4e-6 + FLOORS["fp32"]["logits"]
    assert breach(Errors(limit * 0.999), plain, "fp32") is None
    assert "error of logits" in breach(Errors(limit * 1.001), plain, "fp32")
    assert breach(Errors(math.nan), plain, "fp32") is not None
    assert breach(Errors(math.inf), plain, "fp32") is not None


@pytest.mark.parametrize("mode", cases.MODES)
def test_plain_pytorch_keeps_the_contract_and_a_wrong_gradient_breaks_it(mode):
    case = Case("resnet18", mode, 4, "fp32", "cpu", 32)
    model = models.create("resnet18")
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    judge = reference(model, case, pixels, labels)
    outcomes = {name: Runner(CONTESTANTS[name], model, case, pixels, labels).evaluate() for name in ("eager", BASELINE)}
    errors = {name: errors_of(outcome, judge) for name, outcome in outcomes.items()}
    assert 0 < errors["eager"].logits < 1e-5
    assert breach(errors["eager"], [errors[BASELINE]], "fp32") is None
    if mode == "infer":
        assert errors["eager"].gradients is None
        return
    good = outcomes["eager"]
    wrong = {**good.gradients, "bn1.bias": torch.zeros_like(good.gradients["bn1.bias"])}
    broken = errors_of(Outcome(good.logits, good.loss, wrong, good.statistics), judge)
    assert broken.worst_gradient == pytest.approx(1.0)
    assert "worst gradient" in breach(broken, [errors[BASELINE]], "fp32")
    statistics = {**good.statistics, "bn1.running_var": good.statistics["bn1.running_var"] * 1.01}
    broken = errors_of(Outcome(good.logits, good.loss, good.gradients, statistics), judge)
    assert "statistics" in breach(broken, [errors[BASELINE]], "fp32")
    del wrong["bn1.bias"]
    assert errors_of(Outcome(good.logits, good.loss, wrong, good.statistics), judge).gradients == math.inf


@pytest.mark.larger
def test_compile_freezes_only_its_own_model():
    from torch._inductor import config

    case = Case("-", "infer", 2, "fp32", "cpu", 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    torch.optim.swa_utils.update_bn([torch.randn(8, 3, 16, 16)], model)
    x, labels = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    runner = Runner(CONTESTANTS["compile"], model, case, x, labels)
    assert config.freezing is False
    assert max_error(runner.evaluate().logits, reference(model, case, x, labels).logits) < 1e-5


def test_a_training_step_trains_and_an_evaluation_does_not():
    case = Case("resnet18", "train", 2, "bf16", "cpu", 32)
    model = models.create("resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = Runner(CONTESTANTS[BASELINE], model, case, torch.randn(2, 3, 32, 32), torch.arange(2))
    runner.evaluate()
    assert torch.equal(runner.module.conv1.weight, before["conv1.weight"])
    runner.step()
    assert not torch.equal(runner.module.conv1.weight, before["conv1.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# pictures


def test_pictures_of_any_readable_size_and_kind(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    for name, size in (("a.png", (31, 500)), ("b.jpg", (640, 17)), ("c.png", (1, 1))):
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    Image.new("P", (300, 300)).save(tmp_path / "d.gif")
    Image.new("RGBA", (20, 30)).save(tmp_path / "e.png")
    Image.fromarray(np.full((40, 30), 40000, np.uint16)).save(tmp_path / "f.png")
    (tmp_path / ".hidden").write_text("passed over")
    (tmp_path / "folder").mkdir()
    pictures = images.load_folder(tmp_path)
    assert pictures.shape == (6, 3, 224, 224) and pictures.dtype == torch.float32 and pictures.isfinite().all()


def test_unreadable_truncated_missing_and_no_pictures(tmp_path):
    from PIL import Image

    with pytest.raises(UsageError, match="no picture"):
        images.load_folder(tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        images.load_folder(tmp_path / "absent")
    whole = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"cannot read .*a\.png"):
        images.load_folder(tmp_path)
    whole.write_text("not a picture")
    with pytest.raises(UsageError, match=r"cannot read .*a\.png"):
        images.load_folder(tmp_path)


def test_logits_in_full_batches_and_their_comparison():
    pictures = torch.randn(5, 3, 2, 2)
    seen = []

    def forward(batch):
        seen.append(len(batch))
        return batch.flatten(1)

    logits = images.logits_of(forward, pictures, 2)
    assert seen == [2, 2, 2] and torch.equal(logits, pictures.flatten(1))
    other = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    compared = images.compare(other, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert compared == {"top1_agreement": 0.5, "max_logit_difference": 4.0, "relative_difference": 1.0}


# a run


def _options(**changes):
    case = Case("resnet18", "infer", 2, "fp32", "cpu", 64)
    defaults = {"model": "resnet18", "cases": (case,), "device": CPU, "contestants": ("eager",), "rounds": 3}
    return run.Options(**{**defaults, **changes})


@pytest.fixture(scope="module")
def tiny_report():
    train = Case("resnet18", "train", 2, "fp32", "cpu", 64)
    cases_ = (Case("resnet18", "infer", 2, "fp32", "cpu", 64), train)
    return run.run(_options(cases=cases_, contestants=("eager", "fused", "frozen")), Silent())


def test_a_run_checks_and_times_every_contestant(tiny_report):
    infer, train = tiny_report.cases
    assert [result.contestant for result in infer.results] == ["eager", BASELINE, "fused", "frozen"]
    assert [result.contestant for result in train.results] == ["eager", BASELINE, "fused"]
    for case in (infer, train):
        assert case.rounds == 3 and case.flops_per_step > 0
        for result in case.results:
            assert result.status == "ok", result.reason
            assert len(result.timing.samples_ms) == 3 and case.images_per_s(result) > 0
            assert result.errors.logits < 1e-5 and (result.errors.gradients is not None) == (case is train)
    assert tiny_report.geometric_means("infer")[BASELINE] == (1.0, 1)
    assert {row["contestant"] for row in tiny_report.pictures["comparisons"]} == {"fused", "frozen"}
    assert all(row["top1_agreement"] == 1.0 for row in tiny_report.pictures["comparisons"])


def test_a_case_that_does_not_fit_the_budget_is_left_out_and_named():
    infer = Case("resnet18", "infer", 1, "fp32", "cpu", 32)
    report = run.run(_options(cases=(infer, Case("resnet18", "train", 2, "fp32", "cpu", 32)), budget_s=1e-3), Silent())
    assert [case.case for case in report.cases] == [infer]
    assert report.left_out == ("train, batch 2, fp32: no time left in --budget 0.001",)


def test_the_table_shows_everybody_the_means_and_the_roof(tiny_report):
    text = rendered(table.render, tiny_report)
    for word in (
        "infer, batch 2, fp32",
        "train, batch 2, fp32",
        "frozen",
        f"{BASELINE} *",
        "1.00x",
        "inference (one case)",
        "roof",
    ):
        assert word in text
    assert "top-1 agreement 100.0%" in text


def test_the_json_carries_the_numbers_and_where_they_come_from(tiny_report, tmp_path):
    path = tmp_path / "new" / "bench.json"
    results.write_json(tiny_report.to_json(), path)
    data = json.loads(path.read_text())
    assert data["schema"] == 1 and data["model"] == "resnet18" and data["provenance"]["torch"] == torch.__version__
    frozen = data["cases"][0]["results"][3]
    assert frozen["contestant"] == "frozen" and frozen["status"] == "ok"
    baseline = data["cases"][0]["results"][1]
    assert frozen["speedup"] == pytest.approx(baseline["ms"]["p50"] / frozen["ms"]["p50"])
    assert frozen["images_per_s"] == pytest.approx(2e3 / frozen["ms"]["p50"])
    assert np.median(frozen["samples_ms"]) == pytest.approx(frozen["ms"]["p50"], abs=1e-3)
    assert 0 < frozen["roof_fraction"] < 1.5 and frozen["flops_per_s"] > 0
    assert data["geometric_mean_speedup"]["infer"]["frozen"]["cases"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]


def test_the_chart_is_a_picture_with_bars(tiny_report, tmp_path):
    from PIL import Image

    path = tmp_path / "bench.png"
    chart.save(dataclasses.replace(tiny_report, cases=tiny_report.cases[:1]), path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 250 and pixels.shape[1] > 800
    lengths = {}
    for name in ("eager", BASELINE, "fused", "frozen"):
        colour = [int(chart.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        lengths[name] = int((np.abs(pixels.astype(int) - colour).max(axis=2) <= 2).sum(axis=1).max())
    rates = {result.contestant: tiny_report.cases[0].images_per_s(result) for result in tiny_report.cases[0].results}
    assert all(length > 20 for length in lengths.values())
    assert lengths["frozen"] / lengths[BASELINE] == pytest.approx(rates["frozen"] / rates[BASELINE], rel=0.15)
