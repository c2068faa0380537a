"""The tiers of the suite leave out samples and no facts; the last line says how it went."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import tiers
from tiers import larger

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]


def test_few_cases_cover_all_that_is_wanted():
    cases = [[("a", a), ("b", b), ("c", c)] for a, b, c in itertools.product(range(4), range(3), range(2))]
    pairs = [list(itertools.combinations(case, 2)) for case in cases]
    kept = tiers.cover(pairs)
    assert {p for k in kept for p in pairs[k]} == {p for case in pairs for p in case}
    assert 12 <= len(kept) <= 14 and kept == tiers.cover(pairs)
    assert tiers.cover([[], [], []]) == [0]


SUITE = """
import pytest
from tiers import larger

@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    pass  # no tensors here, and fresh memory poisoned costs every worker an import

@pytest.mark.parametrize("backend", ["reference", pytest.param("absent", marks=pytest.mark.skipif(True, reason="-"))])
@pytest.mark.parametrize("dtype", [1, 2, 3])
@pytest.mark.parametrize("shape", [[1], [2], [1]], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_op(backend, dtype, shape, layout):
    pass

@pytest.mark.parametrize("network", ["small", larger("large")])
def test_network(network):
    pass

def test_plain():
    assert {outcome}

@pytest.mark.skip(reason="never")
@pytest.mark.parametrize("x", [1, 2])
def test_skipped(x):
    pass
"""


def run(pytester: pytest.Pytester, *options: str, outcome: bool = True) -> list[str]:
    """What a run in this process prints, which has torch imported; workers are processes of their own."""
    (pytester.path / "test_suite.py").write_text(SUITE.replace("{outcome}", str(outcome)))
    for source in ("conftest.py", "support/tiers.py", "support/ranks.py"):
        shutil.copy(ROOT / "tests" / source, pytester.path)
    (pytester.path / "pytest.ini").write_text("[pytest]\nmarkers = larger: x\naddopts = --strict-markers\n")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", *options)  # the latter collects garbage
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each plugin costs every worker its import
        return pytester.runpytest_inprocess("-p", "xdist", *options).stdout.str().strip().splitlines()


def kept(pytester: pytest.Pytester, tier: str) -> list[str]:
    lines = run(pytester, f"--tier={tier}", "--collect-only")
    return [line.partition("::")[2] for line in lines if "::" in line]


def test_a_smaller_tier_sees_every_value_and_the_smaller_samples(pytester):
    found = kept(pytester, "test")
    ops = [name for name in found if "op[" in name]
    assert len(ops) == 3 and not any("absent" in name for name in ops)
    triples = {tuple(name.partition("[")[2].split("-")[:3]) for name in ops}
    for k, size in ((0, 2), (1, 3), (2, 3)):  # layout; shape, whose values have no hash: each is another; dtype
        assert len({triple[k] for triple in triples}) == size
    assert [name for name in found if "op[" not in name] == ["test_network[small]", "test_plain", "test_skipped[1]"]
    assert len(kept(pytester, "all")) == 36 + 2 + 1 + 2
    assert not [name for name in kept(pytester, "check") if "::" in name]


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["here", "workers"])
def test_the_last_line(pytester, workers):
    last = run(pytester, "--tier=test", *workers)[-1]
    assert last.startswith("resnet_fused: all 5 tests passed (1 skipped, see above) on torch ")
    assert last.endswith(", tier test; `make test-all` runs 35 more samples")


@pytest.mark.parametrize("workers", [[], larger(["-n", "2"])], ids=["here", "workers"])
def test_the_last_line_of_a_run_that_fails(pytester, workers):
    assert "1 of 5 tests FAILED" in run(pytester, "--tier=test", *workers, outcome=False)[-1]


def test_what_check_lists_is_there():
    for listed in tiers.CHECK:
        file, _, test = listed.partition("::")
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), listed
