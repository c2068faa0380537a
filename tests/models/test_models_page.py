"""docs/models.md says what `fuse` does to the models that people have."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from model_families import FAMILIES, parts, row  # noqa: E402
from tiers import larger  # noqa: E402


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    "family", [larger(f) if k % 2 else f for k, f in enumerate(FAMILIES)], ids=lambda family: family[1]
)
def test_the_page_says_what_fuse_does(family):
    _, table, _ = parts()
    assert row(*family) in table.splitlines()


def test_the_page_has_nothing_else():
    _, table, _ = parts()
    assert len(table.splitlines()) == 2 + len(FAMILIES)
