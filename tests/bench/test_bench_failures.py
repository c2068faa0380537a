"""What goes wrong in a bench, a profile, a verification or an evaluation stays where it went wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from networks import small_resnet
from recorded import rendered

from resnet_fused import cli, ops
from resnet_fused.bench import chart, images, loader, profile, run, schema, table
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS, Contestant
from resnet_fused.measure import memory, models, network, roof
from resnet_fused.measure.activation_memory import saved_bytes
from resnet_fused.measure.cases import Case, Unavailable
from resnet_fused.measure.progress import Silent

CPU = torch.device("cpu")
SMALL = ["bench", "--model", "resnet18", "--image-size", "32", "--device", "cpu"]
BENCH, PROFILE = [*SMALL, "--rounds", "1", "--no-images"], [*SMALL, "--profile"]
TINY = [*BENCH, "--contestants", "fused"]
GB = 10**9


@pytest.fixture(autouse=True)
def tiny(one_thread, monkeypatch, tmp_path):
    """A network of few channels under a well-known name, in an empty folder."""
    monkeypatch.setattr(models, "create", lambda name, seed: small_resnet(classes=1000).cpu().eval())
    monkeypatch.setattr(roof, "measure", lambda *_: roof.Roof(1e12, 1e12))
    monkeypatch.setattr(memory, "available", lambda: 4 * GB)
    monkeypatch.chdir(tmp_path)


def case(mode="infer", batch=2, dtype="fp32"):
    return Case("resnet18", mode, batch, dtype, "cpu", 32)


def options(*cases, **changes):
    contestants = ("eager", "fused", *changes.pop("contestants", ()))
    defaults = {"model": "resnet18", "device": CPU, "rounds": 1, "pictures": False, "contestants": contestants}
    return run.Options(cases=cases, **{**defaults, **changes})


def stub(monkeypatch, name, prepare, **about):
    monkeypatch.setitem(CONTESTANTS, name, Contestant(name, "", prepare, **about))
    return name


def judging(monkeypatch, first):
    """Call `first(case)` before each float64 reference."""
    real = run.reference

    def reference(model, case, *rest):
        first(case)
        return real(model, case, *rest)

    monkeypatch.setattr(run, "reference", reference)


def raises_in_training(error):
    def first(case):
        if case.mode == "train":
            raise error

    return first


def statuses(report):
    return [{result.contestant: result.status for result in case.results} for case in report.cases]


# cases


def test_a_batch_that_does_not_fit_fails_alone_and_the_rest_is_shown_and_written(capsys):
    files = ["--json", "b.json", "--chart", "b.png"]
    assert cli.main([*TINY, "--batch", "1,100000000,99999999999999999999,2", *files]) == 0
    data = json.loads(open("b.json").read())
    assert [case["batch"] for case in data["cases"]] == [1, 10**8, 99999999999999999999, 2]
    for found, expected in zip(data["cases"], ("ok", "failed", "failed", "ok"), strict=True):
        assert [result["status"] for result in found["results"]] == [expected] * 2
    reason = data["cases"][1]["results"][0]["reason"]
    assert reason == "MemoryError: needs about 1,228.8 GB of main memory, 4.0 GB are left"
    out = capsys.readouterr().out
    assert reason in out and "wrote b.json" in out and "wrote b.png" in out and "speed-up over" in out
    assert len(schema.load(run.Path("b.json")).cases) == 4  # and it can be read back
    assert os.path.getsize("b.png") > 1000


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_activations_are_estimated_before_anything_runs(mode, monkeypatch):
    """Where the input fits, and what a step makes of it does not."""
    model = small_resnet(classes=1000).cpu()
    elements = memory.activations(model, mode, 32)
    if mode == "train":
        x = torch.randn(8, 3, 32, 32)
        held = saved_bytes(lambda: model.train()(x), [x, *model.parameters(), *model.buffers()]) / 4 / 8
        assert 0.7 < elements / held < 1.3
    else:
        assert elements == 3 * 32 * 32 + 8 * 16 * 16  # the stem: its input and its output
    monkeypatch.setattr(memory, "available", lambda: 2 * 4 * (3 * 32 * 32 + elements) - 1)
    report = run.run(options(case(mode, 2), case(mode, 1, "bf16")), Silent())
    assert [set(found.values()) for found in statuses(report)] == [{"failed"}, {"failed"}]  # float64 does not fit
    monkeypatch.setattr(run, "CHECKED_IMAGES", 0)
    monkeypatch.setattr(run, "reference", lambda *_: run.Outcome(torch.zeros(1, 1000)))
    report = run.run(options(case(mode, 2)), Silent())
    (results,) = (found.results for found in report.cases)
    assert all("needs about" in result.reason for result in results)


def test_a_case_whose_reference_fails_fails_alone(monkeypatch):
    refused = ValueError("Expected more than 1 value per channel\nwhen training")
    judging(monkeypatch, raises_in_training(refused))
    report = run.run(options(case("train"), case()), Silent())
    assert statuses(report) == [dict.fromkeys(("eager", BASELINE, "fused"), s) for s in ("failed", "ok")]
    assert report.cases[0].results[0].reason == "ValueError: Expected more than 1 value per channel"
    assert report.measured and not run.run(options(case("train")), Silent()).measured


def test_training_that_plain_pytorch_refuses_is_a_row(capsys):
    """Batch norm of one value per channel: only this case."""
    assert cli.main([*TINY, "--mode", "infer,train", "--batch", "1", "--image-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "Expected more than 1 value per channel when training" in out
    assert "inference (one case)" in out


def test_where_nothing_could_be_measured_the_exit_code_says_so(capsys):
    assert cli.main([*TINY, "--batch", "100000000"]) == 1
    assert "needs about" in capsys.readouterr().out


# contestants


def crashes(model, example, case):
    raise MemoryError


def lacks(model, example, case):
    raise Unavailable("no such package")


def imports(model, example, case):
    import not_there  # noqa: F401


def later(model, example, case):
    calls = []

    def forward(x):
        calls.append(x)
        if len(calls) > 3:
            raise RuntimeError("out of memory\nand more")
        return model(x)

    return forward


def other_shape(model, example, case):
    return lambda x: model(x)[:, :7]


def wrong(model, example, case):
    return lambda x: model(x) * 1.01


@pytest.mark.parametrize(
    ("prepare", "status", "reason"),
    [
        (crashes, "failed", "MemoryError"),
        (lacks, "unavailable", "no such package"),
        (imports, "failed", "ModuleNotFoundError: No module named 'not_there'"),
        (later, "failed", "RuntimeError: out of memory"),
        (other_shape, "failed", "error of logits inf"),
        (wrong, "failed", "error of logits 1"),
    ],
)
def test_a_contestant_fails_alone(prepare, status, reason, monkeypatch):
    name = stub(monkeypatch, "other", prepare)
    report = run.run(options(case(), rounds=4, contestants=(name,)), Silent())
    rows = {result.contestant: result for result in report.cases[0].results}
    assert rows.pop(name).status == status
    assert all(result.status == "ok" for result in rows.values())
    (row,) = (result for result in report.cases[0].results if result.contestant == name)
    assert row.reason.startswith(reason) and "\n" not in row.reason and row.timing is None
    assert report.cases[0].images_per_s(row) is None and name not in report.geometric_means("infer")
    assert row.reason in rendered(table.render, report)


def test_the_baseline_may_fail_and_the_others_stand(monkeypatch, capsys):
    stub(monkeypatch, BASELINE, crashes, plain=True)
    assert cli.main([*BENCH, "--contestants", "eager,fused", "--batch", "2", "--chart", "b.png"]) == 0
    out = capsys.readouterr().out
    assert f"failed {BASELINE}: MemoryError" in out and "wrote b.png" in out and "speed-up over" not in out


def test_a_clock_that_fails_is_the_reason_of_all_of_its_case(monkeypatch):
    def no_clock(device):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(run, "clock_for", no_clock)
    report = run.run(options(case()), Silent())
    assert set(statuses(report)[0].values()) == {"failed"} and report.cases[0].rounds == 0


def test_no_roof_and_no_count_of_operations_leave_the_times(monkeypatch, capsys):
    def fails(*_):
        raise OSError("no")

    monkeypatch.setattr(roof, "measure", fails)
    monkeypatch.setattr(roof, "flops", fails)
    assert cli.main([*TINY, "--batch", "2", "--json", "b.json", "--chart", "b.png"]) == 0
    (found,) = json.loads(open("b.json").read())["cases"]
    assert found["roof_flops_per_s"] is None and found["flops_per_step"] is None
    assert all(result["images_per_s"] > 0 and result["flops_per_s"] is None for result in found["results"])
    assert "1.00x" in capsys.readouterr().out
    assert schema.load(run.Path("b.json")).cases[0].flops_per_step is None


# stages


@pytest.mark.parametrize(
    ("fails_at", "problems"),
    [(1, ["eager-channels-last: RuntimeError: no room"] * 2), (2, ["RuntimeError: no room"])],
)
def test_pictures_that_fail_leave_the_times(fails_at, problems, monkeypatch):
    monkeypatch.setattr(images, "load_samples", lambda: torch.randn(2, 3, 32, 32))
    monkeypatch.setattr(images, "CROP", 32)
    real, calls = images.logits_of, []

    def logits_of(forward, pictures, batch):
        calls.append(batch)
        if len(calls) == fails_at:
            raise RuntimeError("no room")
        return real(forward, pictures, batch)

    monkeypatch.setattr(images, "logits_of", logits_of)
    report = run.run(options(case(), pictures=True, contestants=("frozen",)), Silent())
    assert set(statuses(report)[0].values()) == {"ok"}
    assert [row["problem"] for row in report.pictures["comparisons"] if "problem" in row] == problems
    assert len(report.pictures["comparisons"]) == 2


def test_a_contestant_that_fails_in_the_loader_leaves_the_others_theirs(monkeypatch, capsys):
    built = []

    def once(model, example, case):
        built.append(case)
        if len(built) > 1:
            raise RuntimeError("no room for a second")
        return model

    stub(monkeypatch, "once", once, modes=("train",))
    train = [*BENCH, "--mode", "train", "--batch", "2", "--loader", "--json", "b.json"]
    monkeypatch.setattr(loader, "GENERATED", 8)
    assert cli.main([*train, "--contestants", "once,fused"]) == 0
    rows = {row["contestant"]: row for row in json.loads(open("b.json").read())["loader"]}
    assert rows["once"]["problem"] == "RuntimeError: no room for a second"
    assert all(rows[name]["loader_to_loss"]["images_per_s"] > 0 for name in (BASELINE, "fused"))
    assert "once: RuntimeError: no room for a second" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["generate", "batches"])
def test_a_pipeline_that_fails_is_the_reason_of_everyone(where, monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device")
        yield

    if where == "generate":
        monkeypatch.setattr(loader, "generate", lambda folder: next(fails()))
    else:
        monkeypatch.setattr(loader, where, fails)
    assert cli.main([*TINY, "--mode", "train", "--batch", "2", "--loader"]) == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()).count("No space left on device") == 2 and "speed-up over" in out


def test_a_chart_or_a_record_that_fails_leaves_table_and_json(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no font\nanywhere")

    monkeypatch.setattr(chart, "save", fails)
    files = ["--json", "b.json", "--chart", "b.png", "--record", "results"]
    assert cli.main([*TINY, "--batch", "2", *files]) == 2
    captured = capsys.readouterr()
    assert "speed-up over" in captured.out and "wrote b.json" in captured.out and "wrote results/" in captured.out
    assert captured.err.splitlines()[-1] == "resnet-fused: error: --chart b.png: no font anywhere; not written"


def test_a_profile_of_a_contestant_or_a_case_that_fails(monkeypatch, capsys):
    stub(monkeypatch, "frozen", crashes, modes=("infer",))
    monkeypatch.setattr(profile, "roofs", lambda case: (1e10, 1e11))
    arguments = [*PROFILE, "--batch", "2,100000000", "--json", "p.json", "--chart", "p.png"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "failed frozen: MemoryError (infer, batch 2, fp32)" in out and "wrote p.png" in out and "of roof" in out
    assert "failed fused: MemoryError: needs about" in out
    first, second = json.loads(open("p.json").read())["cases"]
    assert [one["contestant"] for one in first["contestants"]] == [BASELINE, "fused"] and "frozen" in first["failures"]
    assert not second["contestants"] and set(second["failures"]) == {BASELINE, "fused", "frozen"}

    def no_roofs(case):
        raise RuntimeError("no kernels in this dtype")

    monkeypatch.setattr(profile, "roofs", no_roofs)
    assert cli.main([*PROFILE, "--batch", "2", "--chart", "q.png"]) == 2
    captured = capsys.readouterr()
    assert "failed fused: RuntimeError: no kernels" in captured.out
    assert "--chart q.png: there is nothing to draw" in captured.err


# interrupted


def test_ctrl_c_shows_and_writes_what_was_measured(monkeypatch, capsys):
    judging(monkeypatch, raises_in_training(KeyboardInterrupt()))
    assert cli.main([*TINY, "--mode", "infer,train", "--batch", "2", "--json", "b.json"]) == 130
    assert "left out train, batch 2, fp32: interrupted" in capsys.readouterr().out
    data = json.loads(open("b.json").read())
    assert [case["mode"] for case in data["cases"]] == ["infer"] and "interrupted" in data["left_out"][0]
    assert cli.main([*TINY, "--mode", "train", "--batch", "2", "--json", "c.json"]) == 130
    assert "resnet-fused: interrupted, nothing written" in capsys.readouterr().err and not os.path.exists("c.json")


def test_what_was_measured_is_on_the_disk_before_the_next_case_begins(monkeypatch):
    seen = []

    def look(case):
        seen.append(len(json.loads(open("b.json").read())["cases"]) if os.path.exists("b.json") else 0)

    judging(monkeypatch, look)
    assert cli.main([*TINY, "--batch", "1,2,3", "--json", "b.json"]) == 0
    assert seen == [0, 1, 2]


# before any work


def test_an_image_too_small_for_the_network_is_refused_before_it_is_built(monkeypatch, capsys):
    def unpadded(name):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7), torch.nn.Conv2d(4, 4, 7))

    monkeypatch.setattr(network, "build", unpadded)
    monkeypatch.setattr(models, "create", lambda *_: pytest.fail("built"))
    assert cli.main([*TINY, "--image-size", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resnet-fused: error: --image-size 8: resnet18 takes no such pictures: ")
    assert "size" in error.split("pictures: ")[1] and len(error.splitlines()) == 1
    for command in (["bench", "--roofline"], ["verify"]):
        monkeypatch.setattr(ops, "unavailable", lambda *_: None)
        assert cli.main([*command, "--model", "resnet18", "--image-size", "8"]) == 2
        assert "--image-size 8: the model takes no such pictures" in capsys.readouterr().err


def test_a_model_that_does_not_run_on_shapes_is_not_judged_by_them(monkeypatch):
    class Reads(torch.nn.Module):
        def forward(self, x):
            return x * float(x.sum())

    monkeypatch.setattr(network, "build", lambda name: Reads())
    network.check_size("resnet18", 8)
    monkeypatch.setattr(network, "build", lambda name: 1 / 0)
    network.check_size("resnet18", 8)


# verify and tune


@pytest.mark.parametrize("command", ["tune", "verify"])
def test_missing_packages_are_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert cli.main([command, "--rehearse"]) == 2
    assert f"{command} needs rich" in capsys.readouterr().err
