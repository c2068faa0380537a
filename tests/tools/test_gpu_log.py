"""The roofs that the GPU log predicts from are the cost model's."""

import re
from pathlib import Path

import pytest

from resnet_fused.bench import cost
from resnet_fused.measure.cases import DTYPES
from resnet_fused.measure.network import networks

PAGE = Path(__file__).parents[2] / "docs/gpu_log.md"
BANDWIDTHS, FLOPS = {"H100": 3.0e12, "H200": 4.3e12}, 790e12
SCHEMES = {"eager": "eager", "as planned": "planned", "ideal": "ideal"}


@pytest.mark.skipif(not PAGE.exists(), reason="no checkout around these tests")
def test_the_predicted_roofs_are_the_cost_models():
    (network,) = networks("resnet50", 224)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.read_text().splitlines()]
    head = next(row for row in rows if row[0] == "case")
    cases = [row for row in rows if re.fullmatch(r"(train|infer), batch \d+", row[0])]
    assert len(cases) == 4 and len(head) == 7
    for name, *numbers in cases:
        mode, batch = name.split(", batch ")
        model, schemes = (cost.training, cost.TRAINING) if mode == "train" else (cost.inference, cost.INFERENCE)
        for column, number in zip(head[1:], numbers, strict=True):
            scheme, gpu = column.split(", ")
            ops = model(network, schemes[SCHEMES[scheme]], int(batch), DTYPES["bf16"])
            roof = int(batch) / cost.seconds(ops, BANDWIDTHS[gpu], FLOPS)
            assert int(number) == pytest.approx(roof, rel=1e-3), (name, column)
