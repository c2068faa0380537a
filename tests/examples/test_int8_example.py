"""Trained networks lose at most half a point of top-1 in int8, as `examples/int8.py` shows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from resnet_fused.ops import onednn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(onednn.int8_refusal() is not None, reason=str(onednn.int8_refusal()))


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("digits", "int8"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("int8")
    for name in ("digits", "int8"):
        sys.modules.pop(name, None)


def _check(example, network, epochs):
    model = example.networks()[network]
    example.digits.train(model, epochs, seed=0)
    found = example.compare(model)
    assert found.accuracy > 0.95 and found.accuracy_int8 >= found.accuracy - 0.005
    assert 1e-4 < found.error < 0.05 and found.differ <= 2
    assert all(row.error is not None for row in found.plan.layers)


def test_the_digits_network_loses_no_accuracy(example):
    _check(example, "small_resnet", epochs=4)


@pytest.mark.larger
@pytest.mark.parametrize("depth", [20, 56])
def test_the_cifar_nets_lose_no_accuracy(example, depth):
    _check(example, f"cifar_resnet({depth})", epochs=8)


def test_the_table_has_every_network(example, monkeypatch, capsys):
    networks = example.networks()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(example, "networks", lambda: {"cifar_resnet(20)": networks["cifar_resnet(20)"]})
    assert example.main(["--epochs", "1", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "\u2026" not in said
    assert "cifar_resnet(20)" in said and "int8 error" in said and "loses most" in said
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
