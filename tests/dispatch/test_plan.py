"""The plan: pure functions of shape, dtype and architecture."""

import copy
import dataclasses
import functools
import json
import time

import pytest
import torch

import resnet_fused
from resnet_fused import dispatch
from resnet_fused.dispatch import choice, conv_config
from resnet_fused.dispatch import table as table_module
from resnet_fused.dispatch.conv import ConvConfig, ConvShape, conv_fprop_heuristic
from resnet_fused.dispatch.table import Choice, Entry, Problem, Table, file_name, from_json


@pytest.mark.parametrize("arch,expected", [(80, True), (86, True), (90, True), (100, False), (120, False)])
def test_a_1x1_takes_the_normalisation_as_a_prologue_up_to_sm_90(arch, expected):
    pointwise = ConvShape(256, 64, 56, 56, 256, 1, 1)
    fusion = dispatch.training(pointwise, torch.bfloat16, arch)
    assert fusion == dispatch.Fusion(prologue=expected, statistics=True, dgrad_epilogue=True, dgrad_prologue=False)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_a_3x3_reads_an_activation_that_was_written_normalised(arch):
    assert not dispatch.training(ConvShape(256, 64, 56, 56, 64, 3, 3, padding=(1, 1)), torch.bfloat16, arch).prologue


H100 = "NVIDIA H100 80GB HBM3"
SHAPE = ConvShape(256, 64, 56, 56, 64, 3, 3, padding=(1, 1))
FAST = ConvConfig(128, 64, 64, 4, 3)
SLOW = ConvConfig(64, 64, 64, 4, 3)


def problem(op="conv_fprop", shape=SHAPE, dtype=torch.bfloat16, **rest):
    return Problem(op, shape, dtype, **rest)


def entry(what, **ms):
    """Times by the names below."""
    choices = {
        "aten": Choice("aten"),
        "fast": Choice("triton", FAST),
        "slow": Choice("triton", SLOW),
        "cuda": Choice("cuda"),
    }
    return Entry(what, tuple((choices[name], value) for name, value in ms.items()))


def make_table(*entries, gpu=H100, arch=90, verified=()):
    pairs = {(e.problem.op, choice.backend) for e in entries for choice, _ in e.measured if choice.backend != "aten"}
    facts = {"torch": torch.__version__}
    return Table(gpu, arch, facts, frozenset(pairs | set(verified)), {e.problem: e for e in entries})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a GPU that is only a name."""
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "gpu_name", functools.cache(lambda arch: H100 if arch == 90 else None))
    choice.forget()
    yield tmp_path
    choice.forget()


def write(folder, table, name=None):
    path = folder / (name or file_name(table.gpu))
    path.write_text(json.dumps(table.to_json()))
    return path


def test_nothing_known_is_native_pytorch():
    assert choice.plan(problem(), 90) == Choice("aten")
    assert choice.plan(problem("bn_apply", (2, 8, 4, 4)), 90) == Choice("aten")
    assert choice.default("conv_fprop", 90) == "aten"


def test_the_fastest_measured_wins_even_if_it_is_pytorchs():
    table = make_table(
        entry(problem(), aten=1.0, fast=0.5, slow=0.7), entry(problem("bn_apply", (2, 8, 4, 4)), aten=1, cuda=2)
    )
    assert choice.plan(problem(), 90, [table], H100) == Choice("triton", FAST)
    assert choice.plan(problem("bn_apply", (2, 8, 4, 4)), 90, [table], H100) == Choice("aten")


@pytest.mark.parametrize("batch,known", [(128, True), (512, True), (127, False), (513, False), (1, False)])
def test_an_entry_speaks_for_batches_up_to_a_factor_of_two(batch, known):
    table = make_table(entry(problem(), aten=1.0, fast=0.5))
    found = choice.measured(problem(shape=dataclasses.replace(SHAPE, n=batch)), table)
    assert found == (Choice("triton", FAST) if known else None)


def test_the_nearest_batch_speaks():
    small = problem(shape=dataclasses.replace(SHAPE, n=128))
    table = make_table(entry(problem(), aten=1.0, fast=0.5), entry(small, aten=1.0, slow=0.5))
    assert choice.measured(problem(shape=dataclasses.replace(SHAPE, n=150)), table) == Choice("triton", SLOW)
    assert choice.measured(problem(shape=dataclasses.replace(SHAPE, n=220)), table) == Choice("triton", FAST)


def test_what_differs_in_anything_but_the_batch_is_another_problem():
    table = make_table(entry(problem(), aten=1.0, fast=0.5))
    others = [
        problem("conv_dgrad"),
        problem(dtype=torch.float16),
        problem(tf32=True),
        problem(flags=("prologue",)),
        problem(shape=dataclasses.replace(SHAPE, dilation=(2, 2))),
    ]
    assert [choice.measured(other, table) for other in others] == [None] * len(others)


@pytest.mark.parametrize(
    "gpu,arch,needed",
    [
        (H100, 90, 1.0),
        ("NVIDIA H100 PCIe", 90, table_module.SAME_MODEL),
        ("NVIDIA H200", 90, table_module.SAME_ARCHITECTURE),
        ("NVIDIA B200", 100, None),
    ],
)
def test_a_table_speaks_for_other_gpus_of_its_architecture_with_a_margin(gpu, arch, needed):
    for won in (1.05, 1.2, 1.3):
        table = make_table(entry(problem(), aten=won, fast=1.0, slow=2.0))
        expected = needed is not None and won >= needed
        assert choice.plan(problem(), arch, [table], gpu) == (Choice("triton", FAST) if expected else Choice("aten"))
        assert choice.default("conv_fprop", arch, [table], gpu) == ("triton" if expected else "aten")


def test_a_gpus_own_table_goes_before_that_of_its_model_before_that_of_its_architecture():
    tables = [make_table(gpu=gpu) for gpu in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", H100)]
    asked = [(table.gpu, table.gpu) for table in tables]
    asked += [("NVIDIA H100 NVL", "NVIDIA H100 PCIe"), ("NVIDIA H200", "NVIDIA GH200 480GB")]
    for gpu, expected in asked:
        table, margin = table_module.select_table(tables, gpu, 90)
        assert table.gpu == expected and (margin == 1.0) == (gpu == expected)


def test_what_was_verified_but_not_timed_is_no_default():
    table = make_table(verified={("conv_fprop", "triton")})
    assert choice.plan(problem(), 90, [table], H100) == Choice("aten")


def test_what_was_not_timed_runs_what_won_over_the_ops_other_problems():
    table = make_table(entry(problem(), aten=1.0, fast=0.5))
    other = problem(shape=dataclasses.replace(SHAPE, k=128))
    config = conv_fprop_heuristic(other.shape, torch.bfloat16, 90)
    assert choice.plan(other, 90, [table], H100) == Choice("triton", config)
    assert choice.plan(dataclasses.replace(other, dtype=torch.float16), 90, [table], H100) == Choice("aten")


def test_the_default_of_an_op_is_what_takes_least_time_over_all_its_problems():
    other = problem(shape=dataclasses.replace(SHAPE, h=28, w=28))
    table = make_table(entry(problem(), aten=1.0, fast=0.5), entry(other, aten=1.0, slow=1.4))
    assert choice.default("conv_fprop", 90, [table], H100) == "triton"
    table = make_table(entry(problem(), aten=1.0, fast=0.5), entry(other, aten=1.0, slow=1.6))
    assert choice.default("conv_fprop", 90, [table], H100) == "aten"
    table = make_table(entry(problem(), aten=1.0, fast=0.5), entry(other, aten=1.0))  # it cannot run the other
    assert choice.default("conv_fprop", 90, [table], H100) == "aten"


def test_a_triton_launcher_takes_the_best_of_triton_even_where_pytorch_wins(cache):
    write(cache, make_table(entry(problem(), aten=0.1, slow=0.5, fast=0.4)))
    assert conv_config(problem(), 90) == FAST
    half = dataclasses.replace(problem(), dtype=torch.float16)
    assert conv_config(half, 90) == conv_fprop_heuristic(SHAPE, torch.float16, 90)


@pytest.mark.parametrize("version,expected", [("as now", True), ("another", False)])
def test_an_experimental_formulation_is_taken_only_with_the_triton_that_it_was_measured_with(cache, version, expected):
    boxes = dataclasses.replace(FAST, kernel="tma_conv")
    table = make_table(Entry(problem(), ((Choice("triton", boxes), 0.1), (Choice("triton", SLOW), 0.2))))
    write(cache, dataclasses.replace(table, provenance={"triton": choice._triton() if version == "as now" else "0.1"}))
    heuristic = conv_fprop_heuristic(SHAPE, torch.bfloat16, 90)
    assert conv_config(problem(), 90) == (boxes if expected else heuristic)


@pytest.mark.parametrize(
    "op,flags",
    [
        ("conv_fprop", ()),
        ("conv_fprop_stats", ()),
        ("conv_fprop_stats", ("prologue",)),
        ("conv_dgrad", ()),
        ("conv_dgrad", ("prologue",)),
        ("conv_wgrad", ("dy_prologue", "x_prologue")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_convolution_has_a_heuristic(cache, op, flags, dtype):
    assert isinstance(conv_config(Problem(op, SHAPE, dtype, False, flags), 80), ConvConfig)


def test_an_op_without_configurations_is_refused_by_name(cache):
    with pytest.raises(ValueError, match="bn_apply.*conv_fprop_stats"):
        conv_config(Problem("bn_apply", SHAPE, torch.float32), 80)


def test_a_table_survives_its_file():
    table = make_table(
        entry(problem(tf32=True, flags=("prologue",)), aten=1.0, fast=0.5),
        entry(problem("bn_apply", (2, 8, 4, 4)), cuda=0.1),
        verified={("add_act", "triton")},
    )
    assert from_json(json.loads(json.dumps(table.to_json()))) == table


def _broken():
    good = make_table(entry(problem(), aten=1.0, fast=0.5)).to_json()
    good = json.loads(json.dumps(good))
    candidate = good["entries"][0]["candidates"][1]

    def change(where, key, value):
        whole = copy.deepcopy(good)
        target = whole
        for step in where:
            target = target[step]
        target[key] = value
        return whole

    first = ("entries", 0, "candidates", 1)
    return {
        "another format": (change((), "format", 2), "format is 2, not 1"),
        "no format": (change((), "format", None), "format is null, not 1"),
        "not an object": ([1, 2], "an object"),
        "arch": (change((), "arch", "sm_90"), "arch"),
        "verified": (change((), "verified", [["conv_fprop", "magic"]]), "magic"),
        "not verified": (change((), "verified", []), "not verified"),
        "dtype": (change(("entries", 0), "dtype", "float8"), "float8"),
        "shape": (change(("entries", 0), "shape", [1, 2]), "shape"),
        "field missing": (change(("entries", 0), "shape", {"n": 1}), "entries[0].shape.c is missing"),
        "field unknown": (change((*first, "config"), "magic", 1), "magic"),
        "field type": (change((*first, "config"), "block_m", "128"), "block_m"),
        "time": (change(first, "ms", -1), "candidates[1].ms is -1"),
        "winner": (change(("entries", 0), "winner", 0), "winner"),
        "no candidates": (change(("entries", 0), "candidates", []), "entries[0].candidates is empty"),
        "truncated": (json.dumps(good)[:100], "line"),
        "candidate": (change(("entries", 0, "candidates"), 1, candidate["ms"]), "candidate"),
    }


BROKEN = _broken()


@pytest.mark.parametrize("text,why", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_one_warning_that_names_the_file_and_is_ignored(cache, text, why):
    path = cache / file_name(H100)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            assert choice.choose(problem(), 90) == Choice("aten")
            assert choice.default_on(90, "conv_fprop") == "aten"
    (message,) = [str(w.message) for w in caught]
    assert str(path) in message and why in message, message


def test_a_users_entries_go_before_those_that_shipped(cache, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(table_module, "SHIPPED", shipped)
    other = problem(shape=dataclasses.replace(SHAPE, h=28, w=28))
    write(shipped, make_table(entry(problem(), aten=1.0, slow=0.5), entry(other, aten=1.0, slow=0.5)))
    write(cache, make_table(entry(problem(), aten=1.0, fast=0.5)))
    assert choice.choose(problem(), 90) == Choice("triton", FAST)
    assert choice.choose(other, 90) == Choice("triton", SLOW)


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({"RESNET_FUSED_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/resnet_fused"),
        ({"HOME": "/c"}, "/c/.cache/resnet_fused"),
    ],
)
def test_where_a_users_tables_are(environment, expected, monkeypatch):
    for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(table_module.cache_folder()) == expected


def test_a_lookup_takes_microseconds(cache):
    entries = [
        entry(problem(op, dataclasses.replace(SHAPE, h=h, w=h)), aten=1.0, fast=0.5)
        for op in ("conv_fprop", "conv_dgrad", "conv_wgrad")
        for h in range(8, 72)
    ]
    write(cache, make_table(*entries))
    assert choice.choose(problem(), 90) == Choice("triton", FAST)
    count = 10_000
    start = time.thread_time()  # of the processor: others may use this machine
    for _ in range(count):
        choice.choose(problem(), 90)
    assert (time.thread_time() - start) / count < 100e-6  # some 3 us
    start = time.thread_time()
    choice.choose(problem(shape=dataclasses.replace(SHAPE, n=200)), 90)
    assert time.thread_time() - start < 0.1


def test_shipped_tables_are_tables():
    for path in table_module.SHIPPED.glob("*.json"):
        table = from_json(json.loads(path.read_text()))
        assert path.name == file_name(table.gpu) and table.provenance["gpu"]["name"] == table.gpu


def test_without_a_gpu_the_default_is_native_pytorch():
    assert dispatch.default_backend("conv_fprop", "cpu") == "aten"
    if not torch.cuda.is_available():
        assert dispatch.default_backend("conv_fprop", "cuda") == "aten"


def test_info_names_the_tables_that_the_plan_reads(cache):
    assert "tuned for         nothing yet" in str(resnet_fused.info())
    write(cache, make_table(entry(problem(), aten=1.0, fast=0.5)))
    choice.forget()
    assert f"{H100} (sm_90): 1 problems, 1 kernels verified" in str(resnet_fused.info())


def test_a_gpu_without_a_table_is_told_once_what_would_help(cache, caplog):
    choice._advise.cache_clear()
    for _ in range(2):
        choice.choose(problem(), 90)
        choice.default_on(90, "bn_apply")
        choice.forget()
    (said,) = caplog.messages
    assert said.startswith(f"nothing was measured on {H100} yet") and "`resnet-fused tune`" in said and "\n" not in said
    choice._advise.cache_clear()
    write(cache, make_table(entry(problem(), aten=1.0, fast=0.5)))
    choice.forget()
    choice.choose(problem(), 90)
    choice.choose(problem(), 80)  # no such GPU here
    assert len(caplog.messages) == 1
