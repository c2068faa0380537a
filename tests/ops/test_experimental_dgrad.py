"""The Gluon data gradient in `gluon_simulator`: every op that it serves, right for every schedule tried, and what of it
must be noticed when it breaks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import gluon_simulator as simulator
from conv_cases import ARCHITECTURES, DEVICE, check, problem, runs_kernels, sample, tensors
from tiers import larger

from resnet_fused import kernels
from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.dispatch.experimental import GRADIENTS, configurations, refuse_shape
from resnet_fused.kernels import experimental
from resnet_fused.kernels.experimental import _gluon, wgmma, wgmma_dgrad
from resnet_fused.ops import OPS, comparison
from resnet_fused.ops.operands import Operands

pytestmark = [runs_kernels, pytest.mark.skipif(DEVICE != "cpu", reason="the simulator runs on a CPU")]

MODULES = (_gluon, wgmma, wgmma_dgrad)
CONFIG = ConvConfig(16, 8, 16, 4, 3, kernel="wgmma_conv")
SHAPES = {
    "3x3, boxes overhang, C too": problem(2, 40, 5, 7, 32, 3, 3, padding=(1, 1)),
    "3x3 dilated, unpadded": problem(2, 16, 8, 7, 16, 3, 3, dilation=(2, 1)),
    "3x3, more padding than filter": problem(1, 16, 5, 4, 16, 3, 3, padding=(3, 2)),
    "nothing square": problem(1, 24, 6, 5, 16, 1, 3, padding=(0, 2), dilation=(1, 2)),
    "1x1": problem(2, 48, 5, 7, 32, 1, 1),
    "1x1, one step a tile": problem(2, 16, 5, 7, 16, 1, 1),
    "fewer tiles than programs": problem(1, 8, 2, 2, 16, 3, 3, padding=(1, 1)),
}
FEW = ("3x3, boxes overhang, C too", "3x3 dilated, unpadded", "1x1, one step a tile")


class Integers(Operands):
    """Small enough that every sum is exact."""

    def activation(self, *size):
        return self._some(*size).to(self.dtype).contiguous(memory_format=torch.channels_last)

    weight = activation

    def vector(self, *shape, positive=False):
        return self._some(*shape).abs() + 1 if positive else self._some(*shape)

    def _some(self, *size):
        return torch.randint(-2, 3, size, generator=self.generator).float()


def _variants():
    """Every op that a data gradient serves, with all that it may do behind the products."""
    for record in OPS.values():
        for options in record.variants() if record.flops is not None else ():
            a = record.case(Operands(torch.device("meta"), torch.float16), SHAPES["1x1"], **options)
            first, *_ = record.problems(a)
            if first.op == "conv_dgrad" and not first.flags:
                yield pytest.param(record.name, options, id=f"{record.name} {options}")


every_variant = pytest.mark.parametrize("op, options", list(_variants()))


def _simulate(monkeypatch, seed=0, modules=MODULES):
    """Launches go to the simulator, three programs each."""

    def launch(kernel, x, tiles, *arguments, num_warps, **constants):
        simulator.run(modules, "_wgmma_dgrad_kernel", min(3, tiles), arguments, constants, seed)

    monkeypatch.setattr(_gluon, "launch", launch)
    for module in (_gluon, wgmma_dgrad):
        monkeypatch.setattr(module, "descriptor", simulator.descriptor)
    monkeypatch.setattr(wgmma_dgrad, "SUM_TILE", 16)  # two steps of the sums


def _exact(op, shape, seed=0, poke=None, **options):
    """What a launcher gives on integers, and what it should."""
    a = OPS[op].case(Integers(torch.device("cpu"), torch.float16, seed=seed), shape, **options)
    if poke is not None:
        a.dy[0, 0, 0, 0] = poke
        if getattr(a, "x", None) is not None:
            a.x[0, 0, -1, -1] = poke
    return tensors(kernels.run(op, a, CONFIG)), tensors(OPS[op].reference(comparison.double(a)))


def _alike(actual, truth):
    return all(torch.equal(a.double().nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(actual, truth, strict=True))


@every_variant
@pytest.mark.parametrize("name", [name if name in FEW else larger(name) for name in SHAPES])
def test_every_schedule_tried_gives_the_op(name, op, options, monkeypatch):
    for seed in range(3):
        _simulate(monkeypatch, seed)
        assert _alike(*_exact(op, SHAPES[name], seed, **options)), f"schedule {seed}"


@every_variant
def test_what_it_rounds_is_within_the_contract(op, options, monkeypatch):
    _simulate(monkeypatch)
    check(op, sample(op, SHAPES["3x3, boxes overhang, C too"], torch.float16, **options), CONFIG)


@pytest.mark.parametrize("slots", [2, 4, 7])
def test_any_number_of_slots(slots, monkeypatch):
    _simulate(monkeypatch)
    a = sample("conv_dgrad", SHAPES["3x3, boxes overhang, C too"], torch.float16, epilogue="batch norm")
    once, again = (kernels.run("conv_dgrad", a, replace(CONFIG, num_stages=n)) for n in (CONFIG.num_stages, slots))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_variant
def test_nan_and_inf_reach_exactly_what_sees_them(op, options, value, monkeypatch):
    _simulate(monkeypatch)
    actual, truth = _exact(op, SHAPES["3x3, boxes overhang, C too"], poke=value, **options)
    assert not actual[0].isfinite().all() and actual[0].isfinite().any()
    assert _alike(actual, truth)


# What is broken, where, and the text that is replaced: a test above must not let it pass.
MUTATIONS = {
    "copies overwrite what is being stored": (wgmma_dgrad, r"\n +tma.store_wait\(pendings=0\)\n( +mbarrier)", r"\n\1"),
    "without copies, the tile does": (wgmma_dgrad, r"(else:\n +)tma.store_wait\(pendings=0\)", r"\1pass"),
    "operands not awaited": (wgmma_dgrad, r"\n +mbarrier.wait\(arrived, operands_phase\)\n", "\n"),
    "the operands' phase stands still": (wgmma_dgrad, r"operands_phase \^ 1", "operands_phase"),
    "bytes of one operand awaited": (wgmma_dgrad, r"OPERANDS \* dx", "dx"),
    "no fence before the store": (wgmma_dgrad, r"\n +fence_async_shared\(\)  # what.*\n", "\n"),
    "the last store is not awaited": (wgmma_dgrad, r"\n    tma.store_wait\(pendings=0\)\n", "\n"),
    "sums of pixels outside": (wgmma_dgrad, r"gl.where\(counts, (.*), 0.0\)", r"\1"),
    "sums of another row": (wgmma_dgrad, r"tile // gl.cdiv\(C, BLOCK_N\)", "tile"),
    "bits from the other end": (wgmma_dgrad, r">> lane\[None, None, :\]", ">> (7 - lane)[None, None, :]"),
    "bits of other channels": (wgmma_dgrad, r"octet = c0 // 8 \+", "octet ="),
    "bits outside the image": (wgmma_dgrad, r"valid = inside\[:, None\] & ", "valid = "),
    "the residual unmasked": (wgmma_dgrad, r"gl.where\(passes, some.load\(rows\), 0.0\)", "some.load(rows)"),
    "the first pixels' residual alone": (wgmma_dgrad, r"tile_dx.slice\(first, ROWS\)\n", "tile_dx.slice(0, ROWS)\n"),
    "bits of the first pixels": (wgmma_dgrad, r"m = first \+ (.*bytes)", r"m = \1"),
    "a NaN does not pass": (
        wgmma_dgrad,
        r"(gl.where\(normalised) <= 0.0, 0.0, normalised\)",
        r"\1 > 0.0, normalised, 0.0)",
    ),
    "ReLU's mask the other way": (wgmma_dgrad, r"activated != 0.0", "activated == 0.0"),
    "the activation not rectified": (wgmma_dgrad, r"store\(activated.to", "store(normalised.to"),
    "what is stored not masked": (wgmma_dgrad, r"\n +tile_dx.slice\(first, ROWS\).store\(dz\)\n", "\n"),
    "no fence behind the mask": (wgmma_dgrad, r"\n +if mask is None:\n +fence_async_shared\(\)\n", "\n"),
    "the shortcut of the first pixels": (wgmma_dgrad, r"tile_shortcut.slice\(first", "tile_shortcut.slice(0"),
    "taps forwards": (_gluon, r"\(R \* S - 1 - tap\)", "tap"),
    "the weight's first columns": (_gluon, r"tap\) \* K \+ k0", "tap) * K"),
    "a pixel's other row": (_gluon, r"\(n \* P \+ p\) \* Q", "(n * Q + p) * Q"),
    "an early release": (wgmma, r"num_outstanding=1", "num_outstanding=2"),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_it_is_noticed(what, monkeypatch, tmp_path):
    module, pattern, replacement = MUTATIONS[what]
    broken = simulator.broken(module, pattern, replacement, tmp_path)
    for other in MODULES:  # what they have from it
        for name, value in vars(other).items():
            if other is not module and hasattr(value, "is_gluon") and getattr(module, name, None) is value:
                monkeypatch.setattr(other, name, getattr(broken, name))
    modules = [broken if one is module else one for one in MODULES]
    asked = (("conv_dgrad", {}), ("conv_backward", {}), ("conv_dgrad_join", {"epilogue": "masked residual"}))
    names = ["3x3, boxes overhang, C too", "1x1, one step a tile"]
    for seed in range(40):
        _simulate(monkeypatch, seed, modules)
        shape, poke = SHAPES[names[seed % 2]], float("nan") if seed % 4 > 1 else None
        for op, options in asked:
            try:
                noticed = not _alike(*_exact(op, shape, seed, poke, **options))
            except (AssertionError, IndexError):
                noticed = True
            if noticed:
                return
    pytest.fail("no schedule showed it")


# ---- what it is asked for, and what it refuses -----------------------------------------------------------------------

GOOD = problem(2, 64, 8, 8, 64, 3, 3, padding=(1, 1))


@pytest.mark.parametrize("config", configurations(90, "conv_dgrad"), ids=str)
def test_listed_configurations_suit_and_no_other_architecture_has_any(config):
    assert config.kernel in GRADIENTS
    assert refuse_shape(GOOD, torch.bfloat16, 90, config, "conv_dgrad") is None
    assert not any(configurations(arch, "conv_dgrad") for arch in ARCHITECTURES if arch != 90)


@pytest.mark.parametrize(
    "kernel, arch, dtype, changes, message",
    [
        ("tma_conv", 90, torch.float16, {}, "tma_conv has no data gradient; choose 'pointer' or one of wgmma_conv"),
        ("tcgen05_conv", 100, torch.float16, {}, "no data gradient"),
        ("wgmma_conv", 100, torch.float16, {}, "sm_100"),
        ("wgmma_conv", 90, torch.float32, {}, "float32"),
        ("wgmma_conv", 90, torch.float16, {"stride": (2, 2)}, "stride 1, got (2, 2)"),
        (
            "wgmma_conv",
            90,
            torch.float16,
            {"stride": (1, 2), "r": 1, "s": 1, "padding": (0, 0)},
            "stride 1, got (1, 2)",
        ),
        ("wgmma_conv", 90, torch.float16, {"groups": 2}, "groups, got 2"),
        ("wgmma_conv", 90, torch.float16, {"c": 20}, "20"),
        ("wgmma_conv", 90, torch.float16, {"k": 20}, "20"),
        ("wgmma_conv", 90, torch.float16, {"k": 24}, "does not divide 24"),
        ("wgmma_conv", 90, torch.float16, {"n": 0}, "nothing"),
        ("wgmma_conv", 90, torch.float16, {"r": 1, "s": 1}, "only without padding, got (1, 1)"),
        ("wgmma_conv", 90, torch.float16, {"c": 24}, None),  # which it does not reduce over
        ("wgmma_conv", 90, torch.float16, {"dilation": (2, 1)}, None),
    ],
)
def test_refusals_name_the_value(kernel, arch, dtype, changes, message):
    reason = refuse_shape(replace(GOOD, **changes), dtype, arch, replace(CONFIG, kernel=kernel), "conv_dgrad")
    assert reason is None if message is None else message in reason


def _refuse(monkeypatch, a):
    monkeypatch.setattr(experimental, "INTERPRETED", False)
    monkeypatch.setattr(experimental, "arch", lambda device: 90)
    return experimental.refuse(a, CONFIG)


@every_variant
def test_every_variant_is_accepted_and_none_behind_a_prologue(op, options, monkeypatch):
    assert _refuse(monkeypatch, sample(op, GOOD, torch.float16, **options)) is None
    behind = sample(op, GOOD, torch.float16, **options | {"prologue": True})
    assert "'wgmma_conv' has no prologue" in _refuse(monkeypatch, behind)
    with pytest.raises(ValueError, match="has no prologue"):
        kernels.run(op, behind, CONFIG)


@pytest.mark.parametrize("name", ["dy", "residual", "x", "shortcut"])
def test_operands_that_are_not_aligned_are_refused(name, monkeypatch):
    a = sample("conv_dgrad_join", GOOD, torch.float16, epilogue="masked residual", projection=True)
    value = getattr(a, name).permute(0, 2, 3, 1)
    odd = torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape).permute(0, 3, 1, 2)
    assert f"{name} starts at" in _refuse(monkeypatch, a._replace(**{name: odd}))


def test_a_planned_gradient_that_these_operands_refuse_falls_back(monkeypatch):
    """A measured winner of the plan, and a dy behind a prologue: the pointer kernel runs."""
    monkeypatch.setattr(kernels, "conv_config", lambda *args: CONFIG)
    ran = []
    monkeypatch.setattr(experimental, "data_gradient", lambda *args: ran.append("experimental"))
    check("conv_dgrad", sample("conv_dgrad", SHAPES["1x1"], torch.float16, prologue=True))
    assert not ran


def test_a_planned_gradient_runs_in_every_op_of_its_problem(monkeypatch):
    """And is never replayed, for its descriptors hold addresses."""
    _simulate(monkeypatch)
    monkeypatch.setattr(experimental, "refuse", lambda *args: None)
    planned = kernels.conv_config
    gradient = lambda problem, arch: CONFIG if problem.op == "conv_dgrad" else planned(problem, arch)  # noqa: E731
    monkeypatch.setattr(kernels, "conv_config", gradient)
    ran = []
    run = wgmma_dgrad.run
    monkeypatch.setattr(wgmma_dgrad, "run", lambda *args: (ran.append(1), run(*args)))
    for op in {parameter.values[0] for parameter in _variants()}:
        a = sample(op, SHAPES["1x1"], torch.float16)
        for _ in range(2):
            kernels.checked(op)(*a)
    assert len(ran) == 2 * len({parameter.values[0] for parameter in _variants()})
