"""The profile: every millisecond has a place, the places are those of the cost model, the chart shows both."""

import json
import types

import numpy as np
import pytest
import torch
from networks import small_resnet

from resnet_fused import cli
from resnet_fused.bench import profile, profile_view
from resnet_fused.bench.profile import BACKWARD, HEAD, OPTIMIZER, OTHER, SCOPE, STEM, STEP
from resnet_fused.measure import models, network
from resnet_fused.measure.cases import Case


@pytest.fixture(scope="module")
def profiles():
    model = small_resnet().cpu()
    net = network.describe(model, 32)
    found = []
    for mode in ("infer", "train"):
        case = Case("small", mode, 2, "fp32", "cpu", 32)
        found.append(profile.measure(model, net, case, ["eager-channels-last", "fused"], 1e10, 1e11))
    return found


def test_every_place_of_the_network_is_seen(profiles):
    for one in profiles:
        blocks = [block.name for block in one.network.blocks]
        assert blocks == ["layer1", "layer2.0", "layer2.1"]
        plain, fused = one.contestants
        for profiled in one.contestants:
            assert all(profiled.ms(place) > 0 for place in (STEM, *blocks, HEAD))
            assert all(one.fraction(profiled, place) > 0 for place in (STEM, *blocks, HEAD))
            assert (profiled.ms(OPTIMIZER) is not None) == (one.case.mode == "train")
            assert profiled.total_ms == pytest.approx(
                sum(profiled.ms(where) or 0 for where, layer in one.places() if layer is None)
            )
        convolutions = [(where, layer) for where, layer in one.places() if layer]
        assert len(convolutions) == 9
        assert all(0 < plain.ms(*place) < plain.ms(place[0]) for place in convolutions)
        # A block that was fused calls none of its convolutions; were it seen alone, it would not have been fused.
        assert all(fused.ms(*place) is None for place in convolutions)


def test_little_is_in_no_place_and_the_kinds_are_right(profiles):
    for one in profiles:
        for profiled in one.contestants:
            assert (profiled.ms(OTHER) or 0) < 0.3 * profiled.total_ms
            kinds = dict(profile_view.kinds(profiled))
            training = one.case.mode == "train"
            assert kinds["convolution", False] > 0 and (("convolution", True) in kinds) == training
            assert (("batch norm", True) in kinds) == training and any(back for _, back in kinds) == training
    plain = profiles[1].contestants[0]
    for where in ("layer1", "layer2.1"):
        both = {piece.backward for piece in plain.pieces if piece.where == where and piece.kind == "convolution"}
        assert both == {False, True}


def test_the_roof_is_the_cost_model_s(profiles):
    one = profiles[0]
    plain = one.contestants[0]
    (conv,) = one.ops("eager", "layer1", "layer1.conv1")
    assert conv.op == "convolution" and conv.flops == 2 * 2 * 8 * 8 * 9 * 8 * 8
    least = max(conv.flops / 1e11, conv.bytes / 1e10) * 1e3
    took = plain.ms("layer1", "layer1.conv1")
    assert one.fraction(plain, "layer1", "layer1.conv1") == pytest.approx(least / took)
    ways = {op.op for op in profiles[1].ops("eager", "layer1", "layer1.conv1")}
    assert ways == {"convolution", "convolution_backward"}
    assert one.roof_ms(plain, OTHER) is None and one.contestants[1].scheme == "planned"


def event(name, start, end, parent=None, own=0.0, number=-1, device=0.0):
    kind = torch.autograd.DeviceType.CPU
    times = types.SimpleNamespace(start=start, end=end)
    return types.SimpleNamespace(
        name=name, time_range=times, cpu_parent=parent, sequence_nr=number, device_type=kind,
        self_cpu_time_total=own, self_device_time_total=device,
    )  # fmt: skip


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_op_of_the_backward_belongs_where_its_forward_was(on_gpu):
    step = event(STEP, 0, 100)
    stem = event("aten::conv2d", 1, 5, step, 1000, 7, device=10)
    block = event(SCOPE + "layer1.0", 10, 20, step)
    conv = event(SCOPE + "layer1.0.conv1", 11, 15, block)
    inner = event("aten::conv2d", 11, 14, conv, 2000, 8, device=20)
    copy = event("aten::copy_", 12, 13, inner, 500, 9, device=5)  # has the number of the next node, made by the ReLU
    relu = event("aten::relu_", 16, 17, block, 3000, 9, device=30)
    loss = event("aten::nll_loss_nd", 30, 40, step, 4000, 10, device=40)
    # on a GPU the backward is on a thread of its own, under no step
    back = event(BACKWARD + "ReluBackward0", 50, 60, None if on_gpu else step, 5000, 9, device=50)
    wgrad = event("aten::convolution_backward", 62, 63, event(BACKWARD + "Conv", 61, 64, back.cpu_parent, 0, 8), 6000)
    wgrad.self_device_time_total = 60
    sgd = event("aten::add_", 70, 71, event("Optimizer.step#SGD.step", 70, 75, step), 7000, device=70)
    between = event("aten::relu", 200, 201, None, 9000, device=90)
    events = [step, stem, block, conv, inner, copy, relu, loss, back, wgrad.cpu_parent, wgrad, sgd, between]
    pieces = profile.attribute(events, {"layer1.0"}, {"layer1.0.conv1"}, on_gpu, 1)
    unit = 0.01 if on_gpu else 1.0
    assert {(p.where, p.layer, p.kind, p.backward): round(p.ms / unit, 6) for p in pieces} == {
        (STEM, None, "convolution", False): 1,
        ("layer1.0", "layer1.0.conv1", "convolution", False): 2.5,
        ("layer1.0", None, "ReLU and add", False): 3,
        (HEAD, None, "linear and loss", False): 4,
        ("layer1.0", None, OTHER, True): 5,
        ("layer1.0", "layer1.0.conv1", "convolution", True): 6,
        (OPTIMIZER, None, OPTIMIZER, False): 7,
    }


def test_the_command_writes_table_json_and_chart(profiles, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile, "measure", lambda *_: profiles[1])
    monkeypatch.setattr(models, "create", lambda name, seed: small_resnet().cpu())
    monkeypatch.setattr(profile, "roofs", lambda case: (1e10, 1e11))
    command = ["bench", "--profile", "--model", "resnet18", "--image-size", "32", "--mode", "train", "--batch", "2"]
    assert cli.main([*command, "--device", "cpu", "--json", "p.json", "--chart", "p.png"]) == 0
    out = capsys.readouterr().out
    for word in ("layer2.1", "downsample.0", "of roof", "optimizer", "convolution backward", "wrote p.png", "GB/s"):
        assert word in out, word
    (data,) = json.loads((tmp_path / "p.json").read_text())["cases"]
    row = next(r for r in data["rows"] if r["layer"] == "layer1.conv1" and r["contestant"] == "eager-channels-last")
    assert row["ms"] == pytest.approx(profiles[1].contestants[0].ms("layer1", "layer1.conv1"))
    assert row["roof_fraction"] > 0 and row["bytes"] > 0 and row["flops"] > 0
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    for shade in (profile_view.SHADES["convolution"], profile_view.SHADES[OPTIMIZER], "#b03030"):
        colour = [int(shade[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 50, shade


def test_no_resnet_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(models, "create", lambda name, seed: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    assert cli.main(["bench", "--profile", "--model", "resnet18", "--device", "cpu"]) == 2
    assert "cost model" in capsys.readouterr().err
