"""The benchmark pages: what is committed is what the recorded results say, and nothing in it is typed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import from_checkout  # noqa: F401
import pytest
import recorded

from resnet_fused.bench import chart, schema
from resnet_fused.bench.results import write_json
from tools import pages as docs

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no checkout around these tests")
def test_what_is_committed_is_what_the_results_say(capsys):
    assert docs.main(["--root", str(ROOT), "--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path):
    """One with a README and two results."""
    (tmp_path / "README.md").write_text(f"# Mine\n\n{docs.BEGIN}\nold\n{docs.END}\n\nBelow.\n")
    for date, factor in (("2026-01-02", 1.0), ("2026-01-03", 2.0)):
        schema.record(recorded.usual(factor, date_utc=f"{date}T00:00:00+00:00"), tmp_path / "benchmarks/results")
    return tmp_path


def test_pages_and_charts_are_written_once_and_again_where_a_result_is_new(checkout, capsys):
    assert docs.main(["--root", str(checkout), "--check"]) == 1 and "stale" in capsys.readouterr().out
    assert docs.main(["--root", str(checkout)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4  # two pages, two charts
    assert docs.main(["--root", str(checkout), "--check"]) == 0 and capsys.readouterr().out == ""
    readme, page = (checkout / "README.md").read_text(), (checkout / "docs/benchmarks.md").read_text()
    assert readme.startswith("# Mine\n") and readme.endswith("Below.\n") and "old" not in readme
    assert "| inference, batch 4, fp32 | 200.0 | 250.0 (1.25x) |  |" in readme  # the newer of the two alone
    assert "400.0" in page and page.index("2026-01-03") < page.index("2026-01-02") and "1.25x (1.25 - 1.26)" in page
    assert "broken is failed: it is wrong" in page and docs.NO_GPU in readme and docs.NO_GPU in page
    for name in ("README.md", "docs/benchmarks.md"):
        text = (checkout / name).read_text()
        links = [part.split(")")[0] for part in text.split("](")[1:]]
        assert links and all(((checkout / name).parent / link).exists() for link in links), links
    gone = next((checkout / "benchmarks/results").glob("*/*01-03.json"))
    gone.unlink()
    assert docs.main(["--root", str(checkout)]) == 0 and "400.0" in (checkout / "README.md").read_text()
    assert len(list((checkout / "docs/images").iterdir())) == 1


def test_a_typed_number_or_an_old_chart_is_stale(checkout):
    docs.main(["--root", str(checkout)])
    page, readme = checkout / "docs/benchmarks.md", checkout / "README.md"
    page.write_text(page.read_text().replace("250.0", "251.0"))
    assert docs.stale(checkout) == [docs.PAGE]
    readme.write_text(readme.read_text().replace("Below", "Beneath"))  # beside the markers anything may change
    assert docs.stale(checkout) == [docs.PAGE]
    older, newer = sorted(checkout / name for name in docs.charts(checkout))
    shutil.copy(older, newer)
    assert docs.stale(checkout) == [docs.PAGE, newer.relative_to(checkout)]
    assert chart.drawn_from(checkout / "absent.png") is None


def test_the_readme_shows_resnet50_before_a_newer_result_of_another_network(checkout):
    for model, date in (("resnet50", "2026-01-04"), ("resnet18", "2026-01-05")):
        report = replace(recorded.usual(date_utc=f"{date}T00:00:00+00:00"), model=model)
        schema.record(report, checkout / "benchmarks/results")
    text = docs.pages(checkout)[docs.README]
    assert "**resnet50 on " in text and "resnet18" not in text


def test_a_gpu_is_named_and_the_note_about_none_goes(checkout):
    gpu = {"name": "NVIDIA H100", "clocks.sm": "1980 MHz"}
    schema.record(recorded.usual(gpu=gpu), checkout / "benchmarks/results")
    text = docs.pages(checkout)[docs.README]
    assert "resnet18 on NVIDIA H100**" in text and docs.NO_GPU not in text
    assert (checkout / "benchmarks/results/nvidia-h100").is_dir()


def test_errors_are_one_line(checkout, capsys):
    readme = checkout / "README.md"
    readme.write_text("no markers")
    assert docs.main(["--root", str(checkout)]) == 2 and docs.BEGIN in capsys.readouterr().err
    bad = checkout / "benchmarks/results/x/bad.json"
    write_json({"schema": 1}, bad)
    assert docs.main(["--root", str(checkout)]) == 2
    assert (
        "bad.json" in (text := capsys.readouterr().err) and "model is missing" in text and len(text.splitlines()) == 1
    )


def test_the_committed_results_hold_what_results_hold():
    files = sorted((ROOT / "benchmarks/results").glob("*/*.json"))
    assert files
    for path in files:
        report = schema.load(path)
        assert path.parent.name == schema.folder_name(report.provenance)
        assert report.to_json().keys() >= json.loads(path.read_text()).keys()
