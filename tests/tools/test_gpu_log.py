"""The roofs that the GPU log predicts from are the cost model's."""

import re
from pathlib import Path

import pytest

from resnet_fused.bench import cost
from resnet_fused.measure.cases import Case
from resnet_fused.measure.network import build, describe

PAGE = Path(__file__).parents[2] / "docs/gpu_log.md"
BANDWIDTHS, FLOPS = {"H100": 3.0e12, "H200": 4.3e12}, 790e12
SCHEMES = {"eager": "eager", "as planned": "planned"}


@pytest.mark.skipif(not PAGE.exists(), reason="no checkout around these tests")
def test_the_predicted_roofs_are_the_cost_models():
    model = build("resnet50")
    network = describe(model)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.read_text().splitlines()]
    head = next(row for row in rows if row[0] == "case")
    cases = [row for row in rows if re.fullmatch(r"(train|infer), batch \d+", row[0])]
    assert len(cases) == 4 and len(head) == 5
    for name, *numbers in cases:
        mode, batch = name.split(", batch ")
        costs = cost.costs(model, network, Case("resnet50", mode, int(batch), "bf16", "meta"))
        for column, number in zip(head[1:], numbers, strict=True):
            scheme, gpu = column.split(", ")
            roof = int(batch) / cost.seconds(costs[SCHEMES[scheme]], BANDWIDTHS[gpu], FLOPS)
            assert int(number) == pytest.approx(roof, rel=1e-3), (name, column)
