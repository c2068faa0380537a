"""Two results side by side; the schema of results; today's run beside the last recorded one."""

import dataclasses
import json

import pytest
from recorded import BASELINE, case, rendered, report, result, usual

from resnet_fused import cli
from resnet_fused._command import UsageError
from resnet_fused.bench import compare, schema
from resnet_fused.bench.results import write_json
from resnet_fused.measure.timing import Timing


@pytest.fixture
def written(tmp_path):
    def write(name, value):
        write_json(value.to_json() if hasattr(value, "to_json") else value, tmp_path / name)
        return tmp_path / name

    return write


def shown(comparison):
    return rendered(compare.render, comparison, ("a.json", "b.json"), width=160)


# schema


def test_a_result_is_read_as_it_was_written(written):
    before = usual()
    assert schema.load(written("a.json", before)).to_json() == before.to_json()


def test_what_a_run_adds_is_read_as_it_was_written(written):
    value = json.loads(json.dumps(usual().to_json()))
    value |= {"pictures": PICTURES, "loader": [_LOADED, {**_TRAINED, "problem": "no memory"}]}
    value["cases"][0]["conditions"] = CONDITIONS
    assert json.loads(json.dumps(schema.load(written("a.json", value)).to_json())) == value


def _set(value, *path):
    """A change of the JSON: `path` to the place."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


_FUSED = ("cases", 0, "results", 1)
_AGREES = {"contestant": "fused", "dtype": "fp32", "max_logit_difference": 0.1, "relative_difference": 0}
_AGREES["top1_agreement"] = 1
PICTURES = {"source": "a", "count": 2, "comparisons": [_AGREES, {**_AGREES, "problem": "no memory"}]}
_RANGE = {"min": 1, "median": 2, "max": 3}
CONDITIONS = {"samples": 2, "sm_mhz": _RANGE, "memory_mhz": _RANGE, "temperature_c": None, "power_w": _RANGE}
CONDITIONS["throttled"] = {"software power cap": 0.5}
_TRAINED = {"contestant": "fused", "case": "train, batch 4, fp32", "batch": 4, "dtype": "fp32"}
_RATES = {"images_per_s": 2.0, "p20": 1.0, "p80": 3, "samples": [2, 3.5]}
_LOADED = {**_TRAINED, "workers": 0, "resident": _RATES, "loader": _RATES, "loader_to_loss": _RATES}
BROKEN = {
    "schema": (_set(7, "schema"), "schema is 7, not 1"),
    "no schema": (lambda data: data.pop("schema"), "schema is missing"),
    "no provenance": (lambda data: data.pop("provenance"), "provenance is missing"),
    "commit": (lambda data: data["provenance"].update(commit={"sha": "abc"}), "provenance.commit.dirty is missing"),
    "mode": (_set("predict", "cases", 0, "mode"), 'cases[0].mode is "predict", not'),
    "dtype": (_set("fp8", "cases", 0, "dtype"), 'cases[0].dtype is "fp8"'),
    "batch": (_set("4", "cases", 0, "batch"), 'cases[0].batch is "4", not int'),
    "no cases": (_set([], "cases"), "cases is empty"),
    "status": (_set("great", *_FUSED, "status"), 'cases[0].results[1].status is "great"'),
    "speed of a failed one": (_set("failed", *_FUSED, "status"), "cases[0].results[1] (fused) is failed"),
    "typed median": (_set(7.0, *_FUSED, "ms", "p50"), "cases[0].results[1].ms.p50 is 7, its samples say 8"),
    "typed rate": (_set(600.0, *_FUSED, "images_per_s"), "cases[0].results[1].images_per_s is 600, its"),
    "typed speed-up": (_set(1.5, *_FUSED, "speedup"), "cases[0].results[1].speedup is 1.5, its samples say 1.25"),
    "an error nobody knows": (_set(1.0, *_FUSED, "errors", "luck"), "cases[0].results[1].errors.luck is unknown"),
    "saved": (_set({}, *_FUSED, "saved"), "cases[0].results[1].saved.bytes is missing"),
    "samples lost": (_set([8.0, 8.0], *_FUSED, "samples_ms"), "cases[0].results[1].samples_ms is not 3 times"),
    "sample": (_set(["8"] * 3, *_FUSED, "samples_ms"), 'cases[0].results[1].samples_ms[0] is "8", not float'),
    "twice": (_set(BASELINE, *_FUSED, "contestant"), "twice"),
    "true for a number": (_set(True, "cases", 0, "rounds"), "cases[0].rounds is true, not int"),
    "typed mean": (_set(2.0, "geometric_mean_speedup", "infer", "fused", "speedup"), "infer.fused.speedup is 2"),
    "errors no object": (_set([], *_FUSED, "errors"), "cases[0].results[1].errors is [], not an object or null"),
    "error a word": (_set("great", *_FUSED, "errors", "logits"), 'errors.logits is "great", not float'),
    "load average": (_set(None, "provenance", "cpu", "load_average_1min"), "cpu.load_average_1min is null, not float"),
    "no load average": (lambda data: data["provenance"]["cpu"].pop("load_average_1min"), "average_1min is missing"),
    "pictures a number": (_set(3, "pictures"), "pictures is 3, not an object or null"),
    "pictures of nobody": (_set({"source": "a", "count": 2}, "pictures"), "pictures.comparisons is missing"),
    "pictures count": (_set({**PICTURES, "count": "two"}, "pictures"), 'pictures.count is "two", not int'),
    "agreement a word": (
        _set({**PICTURES, "comparisons": [{**_AGREES, "top1_agreement": "all"}]}, "pictures"),
        'pictures.comparisons[0].top1_agreement is "all", not float',
    ),
    "conditions a word": (_set("hot", "cases", 0, "conditions"), 'cases[0].conditions is "hot", not an object'),
    "conditions empty": (_set({}, "cases", 0, "conditions"), "cases[0].conditions.samples is missing"),
    "conditions of a word": (
        _set({**CONDITIONS, "power_w": {"min": 1, "median": "2", "max": 3}}, "cases", 0, "conditions"),
        'cases[0].conditions.power_w.median is "2", not float',
    ),
    "throttled": (_set({**CONDITIONS, "throttled": [1]}, "cases", 0, "conditions"), "conditions.throttled is [1]"),
    "loader a word": (_set("fast", "loader"), 'loader is "fast", not a list'),
    "loader of words": (_set(["fast"], "loader"), 'loader[0] is "fast", not an object'),
    "loader without rates": (_set([_TRAINED], "loader"), "loader[0].workers is missing"),
    "loader rate": (_set([{**_LOADED, "loader": {**_RATES, "p20": None}}], "loader"), "loader[0].loader.p20 is null"),
}


@pytest.mark.parametrize(("change", "hint"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_result_is_said_in_one_line(change, hint, written):
    data = json.loads(json.dumps(usual().to_json()))
    change(data)
    with pytest.raises(UsageError) as error:
        schema.load(written("broken.json", data))
    assert hint in str(error.value) and "broken.json" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("content", "hint"), [(None, "No such file"), ("{", "no JSON"), ("[]", "not an object")])
def test_what_is_no_file_or_no_json(content, hint, tmp_path):
    if content:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match=hint):
        schema.load(tmp_path / "a.json")


def test_results_are_appended_never_replaced(tmp_path):
    first = schema.record(usual(), tmp_path)
    text = first.read_text()
    second = schema.record(usual(2.0), tmp_path)
    assert first != second and first.parent == second.parent and first.read_text() == text
    assert first.parent.name.startswith("cpu-") and list(schema.recorded(tmp_path)) == [first, second]


def test_the_last_result_is_that_of_this_device(tmp_path):
    facts = usual().provenance
    assert schema.last(tmp_path, facts) is None
    older = schema.record(usual(date_utc="2026-01-01T00:00:00+00:00"), tmp_path)
    schema.record(usual(date_utc="2026-01-09T00:00:00+00:00", gpu={"name": "NVIDIA H100"}), tmp_path)
    assert schema.last(tmp_path, facts)[0] == older
    newer = schema.record(usual(date_utc="2026-01-02T00:00:00+00:00"), tmp_path)
    assert schema.last(tmp_path, facts)[0] == newer


# comparison


def test_ratios_and_their_spreads():
    slow, fast = Timing((10.0, 20.0, 30.0)), Timing((5.0, 10.0, 15.0))
    assert compare.paired(slow, fast) == compare.Ratio(2, 2, 2)  # what slows a round down cancels out
    wide = compare.unpaired(slow, fast)
    assert wide.p50 == 2 and wide.p20 == pytest.approx(14 / 13) and wide.p80 == pytest.approx(26 / 7)
    assert wide.verdict == "faster" and compare.unpaired(fast, slow).verdict == "slower"
    assert compare.Ratio(0.9, 1.0, 1.1).verdict == "same"


def test_two_results_side_by_side():
    extra = case(result(BASELINE, 5.0), batch=1)
    after = usual(0.5, torch="9.9", commit={"sha": "0" * 40, "dirty": True})
    after = dataclasses.replace(after, cases=(*after.cases, extra))
    found = compare.compare(usual(), after)
    fused = next(row for row in found.rows if row.contestant == "fused")
    assert fused.ratio.p50 == pytest.approx(2) and fused.ratio.p20 < 2 < fused.ratio.p80
    assert [ratio.p50 for ratio in fused.relative] == pytest.approx([1.25, 1.25], rel=0.02)
    assert found.only == ("only in the second: resnet18, infer, batch 1, fp32",)
    assert ("torch", usual().provenance["torch"], "9.9") in found.provenance and found.same_device
    text = shown(found)
    for word in ("2.00x", "failed", "differs: torch", "-> 9.9", "only in the second", "commit", "1.25x"):
        assert word in text, word


def test_other_devices_are_said():
    found = compare.compare(usual(), usual(gpu={"name": "NVIDIA H100"}))
    assert not found.same_device and "different devices" in rendered(
        compare.render, found, ("a.json", "b.json"), width=160
    )


def test_nothing_in_common():
    with pytest.raises(UsageError, match="no case in common: the first has .*batch 4, .*; the second has .*batch 2"):
        compare.compare(report(case(result(BASELINE, 1.0))), report(case(result(BASELINE, 1.0), batch=2)))


# regression


def now(*fused, baseline=(10.0, 10.2, 9.9)):
    return report(case(result(BASELINE, *baseline), result("fused", *fused)))


def test_a_loss_beyond_the_spread_is_found_and_a_slower_machine_is_none():
    assert compare.losses(usual(), usual()) == []
    assert compare.losses(usual(), usual(3.0)) == []  # everything three times slower: the ratio is the same
    assert compare.losses(usual(), now(8.05, 8.15, 8.0)) == []  # within the spread
    assert compare.losses(usual(), now(4.0, 4.0, 4.0)) == []  # a gain
    (loss,) = compare.losses(usual(), now(9.0, 9.1, 8.9))
    assert "fused was 1.25x" in loss and "now 1.1" in loss and "infer, batch 4, fp32" in loss


def test_one_who_fails_now_has_lost_and_one_who_failed_then_has_not():
    (loss,) = compare.losses(usual(), now())
    assert "now failed: it is wrong" in loss
    assert compare.losses(now(), usual()) == []


def test_only_ours_are_guarded():
    then = report(case(result(BASELINE, 10.0), result("compile", 5.0)))
    assert compare.losses(then, report(case(result(BASELINE, 10.0), result("compile", 9.0)))) == []


TINY = ["bench", "--model", "resnet18", "--image-size", "32", "--batch", "1", "--device", "cpu", "--rounds", "3"]


def test_bench_records_compares_and_checks(tmp_path, capsys, monkeypatch):
    asked = []

    def measured(outcome):
        monkeypatch.setattr("resnet_fused.bench.run.run", lambda options, *_: asked.append(options) or outcome)

    monkeypatch.chdir(tmp_path)
    check = ["bench", "--check", "kept", "--device", "cpu", "--rounds", "3"]
    measured(usual())
    assert cli.main(check) == 2 and not asked
    assert "no recorded result for" in (text := capsys.readouterr().out) and "--record" in text
    assert cli.main([*TINY, "--record", "kept"]) == 0
    (path,) = (tmp_path / "kept").glob("*/*.json")
    assert path.name in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(path), str(path)]) == 0
    assert "1.00x" in capsys.readouterr().out
    measured(usual(3.0))  # the machine is slower, we are not
    assert cli.main(check) == 0 and "nothing lost since" in capsys.readouterr().out
    options = asked[-1]
    assert options.contestants == (BASELINE, "fused") and options.rounds == 3 and options.budget_s is None
    assert not options.pictures  # which nobody would see
    assert options.cases == tuple(case.case for case in usual().cases)
    measured(now(9.0, 9.1, 8.9))
    assert cli.main(check) == 1 and "lost resnet18, infer, batch 4, fp32: fused was 1.25x" in capsys.readouterr().out
    measured(dataclasses.replace(usual(), left_out=("train: no time",)))
    assert cli.main(check) == 1 and "not measured: train: no time" in capsys.readouterr().out


BAD = {
    "no file": (["--compare", "a.json", "b.json"], "a.json: No such file"),
    "no result": (["--compare", "c.json", "c.json"], "c.json: no result"),
    "record into a file": ([*TINY[1:], "--record", "c.json"], "--record c.json"),
    "broken record": (["--check", "kept", "--device", "cpu"], "broken.json"),
}


@pytest.mark.parametrize(("arguments", "hint"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(arguments, hint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c.json", "kept/x/broken.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert hint in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""
