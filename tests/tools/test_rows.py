"""Names that count up are written together, and only those."""

import itertools

import pytest

from resnet_fused._rows import grouped, ranges, table


@pytest.mark.parametrize(
    "names, written",
    [
        (["layer1.0", "layer1.1", "layer1.2"], ["layer1.[0-2]"]),
        (["layer1.9", "layer1.10"], ["layer1.[9-10]"]),
        (["layer1.0", "layer1.2"], ["layer1.0", "layer1.2"]),
        (["layer1.1", "layer1.0"], ["layer1.1", "layer1.0"]),
        (["layer1.0", "layer2.1"], ["layer1.0", "layer2.1"]),
        (["a1.b", "a2.c"], ["a1.b", "a2.c"]),
        (["(model)", "a", "b"], ["(model)", "a", "b"]),
        ([f"{a}.{b}.conv{c}" for a, b, c in itertools.product("12", "012", "12")], ["[1-2].[0-2].conv[1-2]"]),
    ],
)
def test_ranges(names, written):
    assert ranges(names) == written


def test_rows_are_one_only_where_all_that_is_said_is_equal():
    rows = [("a1", "x", "y"), ("b", "x", "z"), ("a2", "x", "y"), ("c", "", "y")]
    assert grouped(rows) == [("a[1-2]", "x", "y"), ("b", "x", "z"), ("c", "", "y")]


def test_a_table_loses_no_word_and_is_no_wider_than_a_screen():
    words = " ".join(f"word{k}" for k in range(100))
    lines = table(("name", "empty", "more"), [(words, "", words), ("b", "", "c")])
    assert max(map(len, lines)) <= 120 and "empty" not in lines[0]
    assert sorted(" ".join(lines[2:]).split()) == sorted([*words.split() * 2, "b", "c"])
