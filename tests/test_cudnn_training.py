"""cuDNN's own graphs as a contestant, recorded and executed by a double of its package: training."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cudnn_double import CPULibrary, model_of, spec_of
from torch import nn

from resnet_fused.bench import cudnn_graphs_network
from resnet_fused.bench import cudnn_graphs_training as training
from resnet_fused.bench.cases import Case, Unavailable
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS
from resnet_fused.bench.correctness import breach, errors_of
from resnet_fused.bench.cudnn_graphs_training_network import build_training
from resnet_fused.bench.runner import Runner, reference

TRAIN = Case("resnet18", "train", 4, "fp16", "cpu", 32)


def _as_an_h100(graph) -> bool:
    """Convolutions with statistics that an H100 has no engine for."""
    weights = [attributes["weight"] for name, attributes in graph.nodes if name == "conv_fprop"]
    return any(w[1] == 3 or w[2] == 7 for w in weights) and any(name == "genstats" for name, _ in graph.nodes)


def _network(runner: Runner) -> nn.Module:
    (network,) = runner.forward.networks.values()
    return network


def _trained(name: str, monkeypatch, model: nn.Module | None = None, library: CPULibrary | None = None):
    """What a step of the contestant, of plain PyTorch and of float64 gives."""
    library = library or CPULibrary()
    library.cudnn.pygraph.refuses = staticmethod(_as_an_h100)
    monkeypatch.setattr(cudnn_graphs_network, "library", lambda device: library)
    model = model or model_of(name)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    runners = [Runner(CONTESTANTS[who], model, TRAIN, images, labels) for who in ("cudnn-graphs", BASELINE)]
    outcomes = [runner.evaluate() for runner in runners]
    return runners, *outcomes, reference(model, TRAIN, images, labels)


# name, convolutions, activations that are written: one a block, and one before the pool of resnet26d
TRAINED = [("resnet18", 19, 8), ("timm:resnet26d", 30, 9)]


@pytest.mark.parametrize("name, convolutions, written", TRAINED, ids=[case[0] for case in TRAINED])
def test_a_network_trains_as_the_plain_one_does(name, convolutions, written, monkeypatch):
    with warnings.catch_warnings(record=True):
        runners, ours, plain, truth = _trained(name, monkeypatch)
    layers = [type(m).__name__ for m in _network(runners[0]).modules()]
    assert (layers.count("ConvolutionBatchNorm"), layers.count("Normalise")) == (convolutions, written)
    assert set(ours.gradients) == set(plain.gradients) and set(ours.statistics) == set(plain.statistics)
    assert breach(errors_of(ours, truth), [errors_of(plain, truth)], "fp16") is None
    counts = [[int(b) for name, b in r.module.named_buffers() if name.endswith("tracked")] for r in runners]
    assert counts[0] == counts[1] == [2] * len(counts[0])  # the first was calibration's
    assert torch.isfinite(runners[0].step())


def test_fewer_images_train_too(monkeypatch):
    model = _OddTraining()
    with pytest.warns(UserWarning, match="run through PyTorch"):
        runners, *_ = _trained("", monkeypatch, model)
        ours, plain = (runner.evaluate(2) for runner in runners)
    assert ours.logits.shape == plain.logits.shape == (2, 8)
    images, labels = runners[0]._images[:2], runners[0]._labels[:2]
    truth = reference(runners[1].module, TRAIN, images, labels)
    assert breach(errors_of(ours, truth), [errors_of(plain, truth)], "fp16") is None
    assert {network[0] for network in runners[0].forward.networks} == {4, 2}


def test_operands_that_were_not_recorded_are_refused():
    graphs = training.Graphs(CPULibrary())
    spec = spec_of(dtype=torch.float16, relu=False)
    with pytest.raises(ValueError, match=r"data_gradient: dy is \[1, 8, 6, 6\] torch.float16, recorded as"):
        graphs(training.data_gradient, spec, dy=torch.ones(1, 8, 6, 6).half(), weight=torch.ones(8, 8, 3, 3).half())


class _OddTraining(nn.Module):
    """Values with several readers, a batch norm without a ReLU, a sum without one, and a convolution with a bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.relu = nn.ReLU(inplace=True)

    def unit(self, k, x):
        return self.bns[k](self.convs[k](x))

    def forward(self, x):
        x = self.stem(x).relu()
        a = self.relu(self.unit(0, x))  # read by a convolution and by a sum: written
        b = self.relu(self.unit(1, a)) + a
        c = self.unit(2, b)  # without a ReLU, read twice
        d = self.unit(3, c) + c  # a sum without a ReLU
        e = torch.relu(self.unit(4, d) + self.unit(5, d))  # of two batch norms
        return e.mean((2, 3))


def test_odd_networks_train_as_the_plain_ones_do(monkeypatch):
    with pytest.warns(UserWarning, match="1 of 7 convolutions run through PyTorch: stem has no batch norm of its own"):
        runners, ours, plain, truth = _trained("", monkeypatch, _OddTraining())
    assert breach(errors_of(ours, truth), [errors_of(plain, truth)], "fp16") is None
    layers = [type(m).__name__ for m in _network(runners[0]).modules()]
    assert (layers.count("ConvolutionBatchNorm"), layers.count("Normalise")) == (6, 5)


def test_a_step_that_trains_is_fp16(monkeypatch):
    monkeypatch.setattr(cudnn_graphs_network, "library", lambda device: CPULibrary())
    for dtype in ("fp32", "bf16"):
        with pytest.raises(Unavailable, match=f"training graphs are fp16 only, not {dtype}"):
            case = dataclasses.replace(TRAIN, dtype=dtype)
            Runner(CONTESTANTS["cudnn-graphs"], _OddTraining(), case, torch.randn(4, 3, 8, 8), torch.arange(4))
    library = CPULibrary()
    monkeypatch.setattr(library.cudnn.pygraph, "refuses", staticmethod(lambda graph: True))
    with pytest.raises(Unavailable, match="cuDNN has no engine for convolution of a float16 convolution of"):
        build_training(model_of("resnet18").train(), torch.randn(2, 3, 32, 32), library)
