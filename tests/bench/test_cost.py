"""The cost model: every op of a traced step, what it moves and computes, and where it belongs."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from networks import small_resnet

from resnet_fused import cli, ops
from resnet_fused._command import UsageError
from resnet_fused.bench import cost, roofline
from resnet_fused.measure import network
from resnet_fused.measure.cases import Case

BATCH = 256
KINDS = [(mode, scheme) for mode, schemes in cost.SCHEMES.items() for scheme in schemes]


@pytest.fixture(scope="module")
def resnet50():
    return network.describe(network.build("resnet50"))


@pytest.fixture(scope="module")
def traced(resnet50):
    """By mode and scheme."""
    model = network.build("resnet50")
    cases = {mode: Case("resnet50", mode, BATCH, "bf16", "meta") for mode in cost.SCHEMES}
    found = {mode: cost.costs(model, resnet50, case) for mode, case in cases.items()}
    return {(mode, scheme): found[mode][scheme] for mode, scheme in KINDS}


def megabytes(costs):
    return cost.total(costs)[0] / BATCH / 1e6


def test_the_page_says_what_the_model_says(traced):
    page = Path(__file__).parents[2] / "docs" / "cost_model.md"
    if not page.exists():
        pytest.skip("no checkout around these tests")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    modes = {"inference": "infer", "training": "train"}
    found = {(modes[row[0]], row[1]): float(row[-1]) for row in rows if row and row[0] in modes}
    assert found == {kind: round(megabytes(costs), 1) for kind, costs in traced.items()}


@pytest.mark.parametrize("block,mode,scheme,units", [
    ("layer1.2", "infer", "eager", 12 + 12 + 12 + 12),  # convolutions, batch norms, ReLUs, the add
    ("layer3.2", "infer", "planned", 12 + 4),  # convolutions, the residual
    # Forward as above, where a batch norm reads twice; ReLUs, batch norms, convolutions, the sum of two gradients.
    ("layer1.2", "train", "eager", 12 + 18 + 12 + 12 + 18 + 30 + 18 + 12),
])  # fmt: skip
def test_an_identity_block_by_hand(resnet50, traced, block, mode, scheme, units):
    """In activations of the bottleneck's width; per-channel vectors are a thousandth at most."""
    (known,) = (one for one in resnet50.blocks if one.name == block)
    shape = known.branch[0].shape
    weights = sum(layer.weights for layer in known.layers) * (1 if mode == "infer" else 3)  # read, read, written
    moved = cost.total(one for one in traced[mode, scheme] if one.where == block)[0]
    assert (moved / 2 - weights) / (BATCH * shape.k * shape.h * shape.w) == pytest.approx(units, rel=1e-3)


@pytest.mark.parametrize("mode,scheme", KINDS)
def test_each_convolution_s_products_are_counted_where_it_is(resnet50, traced, mode, scheme):
    """A chain and a join have those of several layers under the first of them."""
    costs, products = traced[mode, scheme], 1 if mode == "infer" else 3
    expected = {layer.name: products * layer.flops * BATCH for layer in resnet50.layers}
    if mode == "train":
        expected["conv1"] = expected["conv1"] // 3 * 2  # nobody asks for the picture's gradient
    found, places = Counter(), {}
    for one in costs:
        found[one.layer] += one.flops
        places.setdefault(one.layer, set()).add(one.where)
    head = found.pop(None)
    assert head == products * 2 * 2048 * 1000 * BATCH
    assert sum(found.values()) == sum(expected.values()) and found.keys() <= expected.keys()
    if (mode, scheme) != ("infer", "planned"):
        assert found == expected
    for block in resnet50.blocks:
        assert all(places[layer.name] == {block.name} for layer in block.layers if layer.name in places)
    assert {one.where for one in costs} == {"stem", "head", *(block.name for block in resnet50.blocks)}


def test_a_gradient_of_a_grouped_weight_counts_its_groups():
    model = network.build("resnext50_32x4d")
    known = network.describe(model, 64)
    found = Counter()
    for one in cost.costs(model, known, Case("", "train", 2, "bf16", "meta", 64))["planned"]:
        found[one.layer] += one.flops
    assert all(found[layer.name] == 3 * 2 * layer.flops for layer in known.layers[1:])


def test_ops_of_a_planned_step(resnet50, traced):
    """Chains and joins; the sums of a join come from the dgrad behind it, except at the last one."""
    ops = {kind: Counter(one.op for one in costs) for kind, costs in traced.items()}
    projected = sum(block.shortcut is not None for block in resnet50.blocks)
    frozen, planned, pointwise = ops["infer", "planned"], ops["train", "planned"], ops["train", "pointwise"]
    assert frozen["conv_join"] == projected == 4 and frozen["conv_chain"] > 0 and not frozen["native_batch_norm"]
    assert planned["bn_backward_reduce"] == 1 and planned["conv_dgrad_join"] == len(resnet50.blocks) - 1
    assert planned["bn_backward_apply_join"] == projected
    assert pointwise["bn_backward_reduce"] == len(resnet50.layers) - 1  # the stem's is one with its max pool


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_fusing_more_moves_less(name, mode):
    (line,) = roofline.rooflines(name, [(mode, 64, "fp16")])
    moved = [line.per_image(scheme)[0] for scheme in line.costs]
    assert moved == sorted(moved, reverse=True) and moved[-1] > 0


def test_roofs():
    costs = [cost.Cost("stem", None, "a", 100, 8), cost.Cost("stem", None, "b", 10, 800)]
    assert cost.seconds(costs, bandwidth=10, flops_per_s=100) == 10 + 8
    line = roofline.Roofline(Case("", "infer", 4, "bf16", "meta"), None, {"eager": costs})
    bandwidth, rate = roofline.GPUS["H100 SXM"]
    assert line.roof("eager", "H100 SXM") == pytest.approx(4 / (100 / bandwidth + max(10 / bandwidth, 800 / rate)))


def test_the_model_is_left_as_it_is_and_so_is_what_runs_here():
    model, x = small_resnet().cpu(), torch.randn(1, 3, 32, 32)
    before = model.eval()(x)
    cost.costs(model, network.describe(model, 32), Case("", "train", 2, "fp32", "cpu", 32))
    assert not model.training and torch.equal(model(x), before)
    assert ops.unavailable("triton", "meta") is not None


def test_without_triton_nothing_is_planned(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "resnet_fused.kernels", None)
    model = network.build("resnet18")
    found = cost.costs(model, network.describe(model, 32), Case("", "train", 2, "fp32", "cpu", 32))
    assert list(found) == ["eager"] and cost.total(found["eager"])[1] > 0
    with pytest.raises(UsageError, match="--roofline .* needs triton"):
        roofline.rooflines("resnet18", [("infer", 2, "fp32")], 32)


def test_the_command_prints_and_writes_it(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    assert cli.main(["bench", "--roofline", "--model", "resnet18", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert (
        "layer2.0 " in out
        and "  downsample.0 " in out
        and "planned:" in out
        and "not measured" in out
        and "images/s" in out
    )
    cases = json.loads(path.read_text())["cases"]
    assert [case["mode"] for case in cases] == ["infer", "train"]
    eager = cases[0]["schemes"]["eager"]
    assert sum(op["bytes"] for op in eager["ops"]) / 256 / 1e6 == pytest.approx(eager["mb_per_image"])


@pytest.mark.parametrize("arguments", [["--model", "alexnet"], ["--batch", "0"], ["--mode", "fly"]])
def test_bad_choices_are_one_line(arguments, capsys):
    assert cli.main(["bench", "--roofline", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
