"""What the bench prints and draws: nothing without information, no wider than a screen."""

import re

import recorded
from PIL import Image
from recorded import BASELINE, rendered

from resnet_fused.bench import chart, table
from resnet_fused.bench.correctness import Errors
from resnet_fused.bench.results import Saved


def _columns(text):
    """The heads of the tables in a rendered report."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith("contestant")]


def test_the_table_fits_a_screen_and_nothing_in_it_is_empty():
    """A large network's numbers in training, which has the most columns."""
    big = dict(peak_bytes=10**11, saved=Saved(10**11), setup_s=345.6, errors=Errors(1e-6, gradients=1e-5))
    many = [recorded.result(name, *[9876.5] * 5, **big) for name in (BASELINE, "compile-max-autotune")]
    missing = recorded.result(
        "onnxruntime", status="unavailable", reason="it is not installed" + " here" * 30, errors=None
    )
    infer = recorded.case(recorded.result(BASELINE, 1.0, 2.0), missing, batch=256)
    train = recorded.case(*many, mode="train", batch=1024, dtype="bf16")
    text = rendered(table.render, recorded.report(infer, train))
    tables = [line for line in text.splitlines() if line.startswith(("contestant", "infer", "train", BASELINE, "comp"))]
    assert len(tables) == 7 and max(map(len, text.splitlines())) <= 120 and "\u2026" not in text
    short, full = _columns(text)
    every = ["contestant", *table.COLUMNS]
    assert full == every
    assert short == [name for name in every if name not in ("p20 - p80", "grad error", "saved MB")]
    assert text.count("onnxruntime") == 1 and "cannot run here: onnxruntime: it is not installed" in text


def test_the_summary_fits_a_screen_and_is_a_mean_of_several_cases():
    names = ("onnxruntime", "compile-max-autotune", "openvino", "cudnn-graphs", "frozen-int4", "fused")
    one = recorded.case(*(recorded.result(name, 1.0, 2.0) for name in (BASELINE, *names)))
    text = rendered(table.render, recorded.report(one))
    assert "inference (one case): onnxruntime" in text and "geometric mean" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert "inference (geometric mean): onnxruntime" in rendered(table.render, recorded.report(one, one))


def test_who_is_missing_in_one_case_alone_keeps_a_row():
    missing = recorded.result("compile", status="unavailable", reason="no kernel", errors=None)
    cases = recorded.case(recorded.result(BASELINE, 1.0), missing), recorded.case(recorded.result("compile", 1.0))
    text = rendered(table.render, recorded.report(*cases))
    assert "unavailable compile: no kernel (infer, batch 4, fp32)" in text and "cannot run here" not in text


def test_the_chart_leaves_out_who_did_not_run(tmp_path):
    heights = []
    for others in ([], [recorded.result(name, status="unavailable") for name in ("compile", "onnxruntime", "broken")]):
        report = recorded.report(recorded.case(recorded.result(BASELINE, 1.0), *others))
        chart.save(report, tmp_path / "bench.png")
        heights.append(Image.open(tmp_path / "bench.png").size)
    assert heights[0] == heights[1]
