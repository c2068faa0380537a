"""The cost model: the totals it is known by, and its invariants."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from resnet_fused import cli, dispatch
from resnet_fused._command import UsageError
from resnet_fused.bench import cost, roofline
from resnet_fused.measure import network

BATCH = 256


@pytest.fixture(scope="module")
def resnet50():
    return network.describe(torchvision.models.resnet50())


def megabytes(net, mode, scheme):
    step, schemes = {"infer": (cost.inference, cost.INFERENCE), "train": (cost.training, cost.TRAINING)}[mode]
    return cost.total(step(net, schemes[scheme], BATCH, torch.bfloat16))[0] / BATCH / 1e6


@pytest.mark.parametrize(
    "mode,scheme,expected",
    [
        ("infer", "eager", 159.9),
        ("infer", "pointwise", 90.1),
        ("infer", "layer", 54.9),
        ("infer", "ideal", 23.0),
        ("train", "eager", 473.5),
    ],
)
def test_totals_to_the_last_digit(resnet50, mode, scheme, expected):
    assert round(megabytes(resnet50, mode, scheme), 1) == expected


@pytest.mark.parametrize("scheme,expected", [("pointwise", 367.7), ("statistics", 274.7), ("join", 240.2)])
def test_totals_of_fused_training_within_a_percent(resnet50, scheme, expected):
    assert megabytes(resnet50, "train", scheme) == pytest.approx(expected, rel=0.01)


def test_the_page_says_what_the_model_says(resnet50):
    page = Path(__file__).parents[2] / "docs" / "cost_model.md"
    if not page.exists():
        pytest.skip("no checkout around these tests")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line
    ]
    mode, found = "infer", {}
    for name, *_, figure in rows[2:]:
        mode = "train" if name.startswith("training") else mode
        found[mode, name.split()[-1].strip("`")] = float(figure)
    expected = {("infer", scheme): megabytes(resnet50, "infer", scheme) for scheme in cost.INFERENCE}
    expected |= {("train", scheme): megabytes(resnet50, "train", scheme) for scheme in cost.TRAINING}
    assert found == {key: round(value, 1) for key, value in expected.items()}


def test_what_the_sums_from_the_block_behind_save(resnet50, monkeypatch):
    """A read of every block's gradient but the last one's; at a join with a projection two, and two of the mask."""
    with_it = megabytes(resnet50, "train", "planned")
    rule = dispatch.training
    monkeypatch.setattr(cost._Step, "_forms_the_sums", lambda self, block: False)
    outputs = [block.branch[-1].outputs for block in resnet50.blocks[:-1]]
    projected = [block.branch[-1].outputs for block in resnet50.blocks[:-1] if block.shortcut is not None]
    saved = 2 * (sum(outputs) + 2 * (1 + cost.MASK) * sum(projected)) / 1e6
    assert megabytes(resnet50, "train", "planned") - with_it == pytest.approx(saved)
    monkeypatch.undo()
    no_epilogue = {"dgrad_epilogue": False}
    monkeypatch.setattr(dispatch, "training", lambda *args: dataclasses.replace(rule(*args), **no_epilogue))
    without = cost.training(resnet50, cost.TRAINING["planned"], BATCH, torch.bfloat16)
    assert sum(c.op == "bn_backward_reduce" for c in without) == len(resnet50.layers) - 1


@pytest.mark.parametrize("mode,gflop", [("infer", 8.18), ("train", 24.3)])
def test_floating_point_operations_do_not_depend_on_fusion(resnet50, mode, gflop):
    step, schemes = (cost.inference, cost.INFERENCE) if mode == "infer" else (cost.training, cost.TRAINING)
    flops = {cost.total(step(resnet50, s, BATCH, torch.bfloat16))[1] for s in schemes.values()}
    assert len(flops) == 1 and flops.pop() / BATCH / 1e9 == pytest.approx(gflop, rel=1e-3)


@pytest.mark.parametrize(
    "gpu,expected", [("H100 SXM", [19.6, 33.2, 51.4, 90.3]), ("A100 80 GB", [10.5, 16.4, 23.5, 30.6])]
)
def test_roofs(gpu, expected):
    (line,) = roofline.rooflines("resnet50", [("infer", BATCH, "bf16")])
    assert [round(line.roof(s, gpu) / 1e3, 1) for s in ("eager", "pointwise", "layer", "ideal")] == expected


def test_an_identity_block_of_the_first_stage_in_units(resnet50):
    """The published count of a bottleneck's passes, in activations of the bottleneck's width."""
    unit = 64 * 56 * 56 * 2 * BATCH
    weights = 2 * sum(layer.weights for layer in resnet50.blocks[2].layers)

    def units(mode, scheme):
        step, schemes = (cost.inference, cost.INFERENCE) if mode == "infer" else (cost.training, cost.TRAINING)
        block = [c for c in step(resnet50, schemes[scheme], BATCH, torch.bfloat16) if c.where == "layer1.2"]
        return (cost.total(block)[0] - weights * (1 if mode == "infer" else 3)) / unit

    assert units("train", "eager") == pytest.approx(138)
    assert units("train", "pointwise") == pytest.approx(104 + 0.75)  # a bit mask: written, read twice
    assert units("train", "statistics") == pytest.approx(76 + 0.5)
    assert units("train", "join") == pytest.approx(66 + 0.5)
    assert units("infer", "layer") == pytest.approx(16)
    assert units("infer", "ideal") == pytest.approx(8)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_fusing_more_moves_less(name, mode):
    (line,) = roofline.rooflines(name, [(mode, 64, "fp16")])
    moved = [line.per_image(scheme)[0] for scheme in ("eager", "pointwise", "planned", "ideal")]
    assert moved == sorted(moved, reverse=True) and moved[-1] > 0


def test_every_convolution_and_its_operations_are_found():
    model = torchvision.models.resnext50_32x4d()
    net = network.describe(model)
    assert [layer.name for layer in net.layers] == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sum(layer.weights for layer in net.layers) == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)
    )


def test_what_is_no_resnet_is_refused_by_name():
    with pytest.raises(UsageError, match="features.3 is in no residual block"):
        network.describe(torchvision.models.vgg11())
    with pytest.raises(UsageError, match="layer1.0.conv1 is in no residual block"):
        network.networks("plain18", 224)


def test_our_own_networks_by_name():
    (net,) = network.networks("cifar_resnet20", 32)
    assert len(net.layers) == 19 and net.pooled is None and net.classes == 10
    assert all(block.shortcut is None and len(block.branch) == 2 for block in net.blocks)


def test_the_command_prints_and_writes_it(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    assert cli.main(["bench", "--roofline", "--model", "resnet18", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "layer2.0 " in out and "  downsample.0 " in out and "planned: what" in out and "images/s" in out
    cases = json.loads(path.read_text())["cases"]
    assert [case["mode"] for case in cases] == ["infer", "train"]
    eager = cases[0]["schemes"]["eager"]
    assert sum(op["bytes"] for op in eager["ops"]) / 256 / 1e6 == pytest.approx(eager["mb_per_image"])


@pytest.mark.parametrize("arguments", [["--model", "alexnet"], ["--batch", "0"], ["--mode", "fly"]])
def test_bad_choices_are_one_line(arguments, capsys):
    assert cli.main(["bench", "--roofline", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
