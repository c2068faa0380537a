"""How much of the suite runs: `--tier=check`, `test` or `all`, each a sample of the next. No list is kept by hand.

`all` runs every case of every test. `test` keeps of each parametrised test a few cases in which every value of every
parameter occurs, and every op and backend with every dtype; it leaves out what is marked `larger`: the same facts on
larger samples. `check` keeps, of the tests of CHECK alone, cases with every op, every backend and every dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import pytest

TIERS = ("check", "test", "all")
# The records of all ops, a block, a network fused, a network frozen, what they refuse, the judge and the installation.
CHECK = (
    "ops/test_bn_ops.py::test_training_matches_plain_pytorch",
    "ops/test_records.py::test_a_variant_is_within_the_contract",
    "ops/test_stem_ops.py::test_stem_matches_plain_pytorch",
    "functional/test_block.py::test_a_training_step",
    "ops/test_contract.py",
    "inference/test_freeze.py::test_our_own_modules_are_folded",
    "fusion/test_fusion.py",
    "nn/test_nn.py",
)
SHARED = ("op", "backend", "dtype")  # the parameters whose values meet everywhere

Value = tuple[str, type, Hashable]  # one value of one parameter


def larger(value: object) -> object:
    """A value of a parameter that only the tier `all` takes."""
    return pytest.param(value, marks=pytest.mark.larger)


def values(item: pytest.Item) -> list[Value]:
    """Of each of the test's parameters, in a fixed order. One without a hash is told by which object it is."""
    found = []
    for name, value in sorted(getattr(getattr(item, "callspec", None), "params", {}).items()):
        try:
            hash(value)
        except TypeError:
            value = id(value)
        found.append((name, type(value), value))
    return found


def wanted(case: Sequence[Value], tier: str) -> list[Hashable]:
    """What of a case a tier has to see once."""
    shared = [value for value in case if value[0] in SHARED]
    if tier == "check":
        return list(shared)
    return [*case, *itertools.combinations(shared, 2)]


def cover(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """The positions of few cases, at least one, that contain between them all that the cases contain."""
    bits: dict[Hashable, int] = {}
    masks = [sum({1 << bits.setdefault(part, len(bits)) for part in case}) for case in cases]
    missing, chosen = (1 << len(bits)) - 1, []
    while missing or not chosen:
        gains = [(mask & missing).bit_count() for mask in masks]
        best = gains.index(max(gains))
        chosen.append(best)
        missing &= ~masks[best]
    return sorted(chosen)


def select(items: Sequence[pytest.Item], tier: str) -> list[pytest.Item]:
    """The tests of a tier, in their order."""
    if tier == "all":
        return list(items)
    groups: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        if tier == "check" and not any(name.endswith(f"/{listed}") or f"/{listed}::" in name for listed in CHECK):
            continue
        if item.get_closest_marker("larger") is None:
            groups.setdefault(name, []).append(item)
    kept: set[int] = set()
    for group in groups.values():
        # what is skipped stands for nothing, unless all is: then one says why
        runs = [item for item in group if not _skipped(item)] or group[:1]
        kept.update(id(runs[position]) for position in cover([wanted(values(item), tier) for item in runs]))
    return [item for item in items if id(item) in kept]


def _skipped(item: pytest.Item) -> bool:
    marks = item.iter_markers("skipif")
    return item.get_closest_marker("skip") is not None or any(mark.args and mark.args[0] is True for mark in marks)


def verdict(tier: str, torch: str, stats: dict[str, int], left_out: int) -> str:
    """The last line of a run.

    Args:
        tier: that ran.
        torch: the version.
        stats: how many tests passed, failed, ..., as pytest counts them.
        left_out: how many tests the tier leaves out.
    """
    passed, bad = stats.get("passed", 0), stats.get("failed", 0) + stats.get("error", 0)
    where = f"on torch {torch}, tier {tier}"
    if bad or not passed:
        return f"resnet_fused: {bad} of {passed + bad} tests FAILED {where}"
    skipped = f" ({stats['skipped']} skipped, see above)" if stats.get("skipped") else ""
    more = f"; `make test-all` runs {left_out} more samples" if left_out else ""
    return f"resnet_fused: all {passed} tests passed{skipped} {where}{more}"
