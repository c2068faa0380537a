"""How the layers of a training block run, decided by tables of made-up times."""

import dataclasses
import itertools
import json

import pytest
import torch

from resnet_fused.dispatch import BlockShape, Fusion, LayerPlan, choice, formulation
from resnet_fused.dispatch.conv import ConvConfig, ConvShape, uses_tf32
from resnet_fused.dispatch.table import Choice, Entry, Problem, Table, from_json

GPU, ARCH, DTYPE = "NVIDIA H100 80GB HBM3", 90, torch.bfloat16
CONFIG = ConvConfig(128, 64, 64, 4, 3)
N = 256
POINTWISE = ConvShape(N, 64, 56, 56, 256, 1, 1)
THREE = ConvShape(N, 64, 56, 56, 64, 3, 3, padding=(1, 1))
SECOND = Choice("triton", CONFIG)


def entry(problem, aten, triton):
    return Entry(problem, ((Choice("aten"), aten), (SECOND, triton)))


def table_of(*entries):
    pairs = {(e.problem.op, c.backend) for e in entries for c, _ in e.measured if c.backend != "aten"}
    return Table(GPU, ARCH, {}, frozenset(pairs), {e.problem: e for e in entries})


def inner_layer(shape, fused, apart, written):
    """Times of the inner layer: (fprop, dgrad, wgrad) pairs of (aten, triton) with a prologue and without, and of the
    pass that the latter needs."""
    rule = Fusion(prologue=True)
    entries = []
    for fusion, times in ((rule, fused), (dataclasses.replace(rule, prologue=False), apart)):
        asked = formulation.problems(shape, DTYPE, False, fusion, False, False)
        entries += [entry(problem, *pair) for problem, pair in zip(asked, times, strict=True)]
    entries.append(Entry(formulation.normalisation(shape, DTYPE), ((Choice("triton"), written),)))
    return table_of(*entries)


def planned(table, shape=POINTWISE, first=False, residual=False, gpu=GPU):
    return choice.plan_layer(shape, DTYPE, ARCH, False, first, residual, [table], gpu)


def test_without_a_table_all_is_native_pytorch():
    for first in (True, False):
        found = choice.plan_layer(POINTWISE, DTYPE, ARCH, False, first, False)
        assert found == LayerPlan("aten", "aten", "aten", Fusion(prologue=not first))


def test_where_the_fused_kernel_is_slower_that_convolution_is_native_pytorch():
    times = [(1.0, 0.5), (1.0, 1.5), (1.0, 0.9)]
    found = planned(inner_layer(POINTWISE, times, [(9.0, 9.0)] * 3, 0.1))
    assert (found.fprop, found.dgrad, found.wgrad) == ("triton", "aten", "triton") and found.fusion.prologue


@pytest.mark.parametrize("written,prologue", [(0.05, False), (0.3, True)])
def test_a_prologue_pays_where_the_pass_it_saves_costs_more_than_it_does(written, prologue):
    fused, apart = [(1.2, 0.9), (1.0, 0.8), (1.2, 0.9)], [(1.0, 0.7), (1.0, 0.8), (1.0, 0.7)]  # 0.4 between them
    found = planned(inner_layer(POINTWISE, fused, apart, written))
    assert found == LayerPlan("triton", "triton", "triton", Fusion(prologue=prologue))


def test_the_sum_decides_and_not_one_op():
    """The prologue wins in wgrad and loses more in fprop."""
    fused, apart = [(1.0, 0.9), (1.0, 0.8), (1.0, 0.2)], [(1.0, 0.1), (1.0, 0.8), (1.0, 0.4)]
    assert planned(inner_layer(POINTWISE, fused, apart, 0.1)).fusion.prologue is False
    assert planned(inner_layer(POINTWISE, fused, apart, 0.4)).fusion.prologue is True


@pytest.mark.parametrize("written,wgrad", [(0.1, "aten"), (0.3, "triton")])
def test_a_slower_weight_gradient_pays_where_the_data_gradient_then_writes_its_activation(written, wgrad):
    """It loses 0.1 and saves half a pass, which is 0.05 or 0.15."""
    table = inner_layer(THREE, [(9.0, 9.0)] * 3, [(1.0, 0.7), (1.0, 0.8), (1.0, 1.1)], written)
    assert planned(table, THREE) == LayerPlan("triton", "triton", wgrad, Fusion(prologue=False))


def test_the_first_layer_knows_no_prologue_and_whether_it_adds_a_residual():
    own = formulation.problems(THREE, DTYPE, False, Fusion(prologue=False), True, True)
    assert [problem.flags for problem in own] == [(), ("residual",), ()]
    table = table_of(*(entry(problem, 1.0, 0.5) for problem in own))
    assert planned(table, THREE, True, True) == LayerPlan("triton", "triton", "triton", Fusion(prologue=False))
    behind = formulation.problems(THREE, DTYPE, False, Fusion(prologue=False), False, True)
    assert [problem.flags for problem in behind] == [(), ("epilogue",), ()]


def cost(table, shape, first, plan):
    """Of a formulation, from the table's own numbers."""
    asked = formulation.problems(shape, DTYPE, False, plan.fusion, first, False)
    backends = (plan.fprop, plan.dgrad, plan.wgrad)
    total = sum(table.entries[p].best(b)[1] for p, b in zip(asked, backends, strict=True))
    if not first and not plan.fusion.prologue:
        along = plan.dgrad == plan.wgrad == "triton"  # the activation is written by a kernel that reads z anyway
        total += (1.5 if along else 2) * table.entries[formulation.normalisation(shape, DTYPE)].measured[0][1]
    return total


@pytest.mark.parametrize("seed", range(20))
def test_no_formulation_that_was_measured_is_faster_than_the_one_chosen(seed):
    random = torch.Generator().manual_seed(seed)

    def times():
        return [tuple((torch.rand(2, generator=random) + 0.1).tolist()) for _ in range(3)]

    table = inner_layer(POINTWISE, times(), times(), float(torch.rand((), generator=random)) / 4)
    chosen = cost(table, POINTWISE, False, planned(table))
    for prologue, *backends in itertools.product((True, False), *[("aten", "triton")] * 3):
        other = LayerPlan(*backends, Fusion(prologue=prologue))
        assert chosen <= cost(table, POINTWISE, False, other) + 1e-9, other


def test_another_gpu_needs_more_than_a_tie():
    table = inner_layer(POINTWISE, [(1.0, 0.95)] * 3, [(1.0, 0.95)] * 3, 0.1)
    assert planned(table).fprop == "triton"
    assert planned(table, gpu="NVIDIA H200").fprop == "aten"


BLOCK = BlockShape((dataclasses.replace(POINTWISE, c=256, k=64), THREE, POINTWISE), None, True)


@pytest.mark.parametrize("chain,expected", [(9.0, "triton"), (11.0, "aten")])
def test_a_block_that_was_measured_runs_what_won(chain, expected):
    block = Problem(choice.BLOCK, BLOCK, DTYPE)
    table = table_of(Entry(block, ((Choice("aten"), 10.0), (Choice("triton"), chain), (Choice("cuda"), 12.0))))
    assert from_json(json.loads(json.dumps(table.to_json()))) == table
    with choice.assuming(table):
        assert choice.block(BLOCK, DTYPE, ARCH, False) == expected
        assert choice.block(BLOCK.with_batch(128), DTYPE, ARCH, False) == expected
        assert choice.block(dataclasses.replace(BLOCK, identity=False), DTYPE, ARCH, False) is None
        assert choice.default_on(ARCH, choice.BLOCK) == ("triton" if expected == "triton" else "aten")
    assert choice.block(BLOCK, DTYPE, ARCH, False) is None


def test_the_network_asks_the_table_about_its_blocks(monkeypatch):
    """`choose_chain` on tensors that say they are on a GPU: what the table says of the block is what runs."""
    from resnet_fused.functional import residual as blocks

    monkeypatch.setattr(blocks.decide, "arch", lambda device: ARCH)

    def layer(shape):
        weight, vector = torch.empty(shape.k, shape.c, shape.r, shape.s, dtype=DTYPE), torch.empty(shape.k)
        return blocks.ConvBN(weight, *[vector] * 4, ((1, 1), shape.padding, (1, 1), 1), True)

    class OnGpu:
        device, shape = torch.device("cuda"), (N, 256, 56, 56)

        def __init__(self, dtype=DTYPE):
            self.dtype = dtype

        def dim(self):
            return 4

    branch = [layer(shape) for shape in BLOCK.branch]
    problem = Problem(choice.BLOCK, BLOCK, DTYPE)
    for ms, expected in ((9.0, "triton"), (11.0, "aten")):
        with choice.assuming(table_of(Entry(problem, ((Choice("aten"), 10.0), (Choice("triton"), ms))))):
            x, half, full = OnGpu(), OnGpu(torch.float16), OnGpu(torch.float32)
            assert blocks.decide._measured(x, DTYPE, branch, None, x) == expected
            assert blocks.decide._measured(x, DTYPE, branch, None, None) is None
            assert blocks.decide._measured(half, torch.float16, branch, None, half) is None
            assert blocks.decide._measured(full, DTYPE, branch, None, full) is None  # autocast's: a sum of two dtypes


@pytest.mark.parametrize("shortcut", ["identity", "projection", "residual", "none"])
@pytest.mark.parametrize("relu", [True, False])
def test_a_chain_of_native_layers_is_the_layers(shortcut, relu, monkeypatch):
    import torch.nn.functional as F

    from resnet_fused.functional import residual as blocks

    monkeypatch.setattr(blocks.decide, "_measured", lambda *_: "aten")

    def made():
        torch.manual_seed(0)
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
        layers = []
        for r in (1, 3, 1):
            weight = torch.randn(8, 8, r, r, dtype=torch.float64, requires_grad=True)
            vectors = (torch.zeros(8).double(), torch.ones(8).double(), torch.rand(8).double(), torch.rand(8).double())
            layers.append(blocks.ConvBN(weight, *vectors, ((1, 1), (r // 2, r // 2), (1, 1), 1), True))
        return x, layers

    x, layers = made()
    projection = layers.pop(0) if shortcut == "projection" else None
    residual = torch.ones(2, 8, 6, 6).double() if shortcut == "residual" else None
    chain = blocks.choose_chain(
        "test", x, layers, projection, identity=shortcut == "identity", residual=residual, relu=relu
    )
    y = blocks.run_chain(chain, x, layers, projection, residual)
    y.sum().backward()

    plain_x, plain = made()
    before = plain.pop(0) if shortcut == "projection" else None

    def bn(value, layer):
        z = F.conv2d(value, layer.weight, None, *layer.geometry)
        return F.batch_norm(z, *layer.vectors, True, layer.momentum, layer.eps)

    value = plain_x
    for layer in plain:
        value = bn(value, layer)
        value = F.relu(value) if layer is not plain[-1] else value
    if before is not None:
        value = value + bn(plain_x, before)
    elif shortcut != "none":
        value = value + (plain_x if shortcut == "identity" else residual)
    value = F.relu(value) if relu else value
    value.sum().backward()
    assert torch.equal(y, value) and torch.equal(x.grad, plain_x.grad)
    for one, other in zip(layers, plain, strict=True):
        assert torch.equal(one.weight.grad, other.weight.grad) and torch.equal(one.running_var, other.running_var)


@pytest.mark.parametrize("op", ["conv_chain", "conv_join"])
def test_freeze_asks_the_table_about_each_tail(op, monkeypatch):
    """The problem that `freeze` asks about is the one that the tuner measured."""
    from types import SimpleNamespace

    from resnet_fused.inference import tail
    from resnet_fused.measure.network import networks
    from resnet_fused.tuning.problems import jobs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    (network,) = networks(["resnet50"], 224)
    found = [job for job in jobs(network, ("infer",), 32, DTYPE, ARCH, False) if job.problem.op == op]
    assert len(found) >= 4
    won = found[1].problem
    entries = [entry(job.problem, 1.0, 0.5 if job.problem == won else 2.0) for job in found]
    flags_of = {"conv_chain": tail.chain_flags, "conv_join": tail.join_flags}[op]
    with choice.assuming(table_of(*entries)):
        for job in found:
            s = job.problem.shape
            x = SimpleNamespace(device=torch.device("cuda"), dtype=DTYPE, shape=(s.n, s.c, s.h, s.w))
            y = SimpleNamespace(shape=(s.n, s.k, s.p, s.q))
            geometry = (list(s.stride), list(s.padding), list(s.dilation), s.groups)
            conv = SimpleNamespace(example=SimpleNamespace(x=x, y=y), geometry=geometry, filter=(s.r, s.s))
            expected = "triton" if job.problem == won else "aten"
            assert tail._planned(op, flags_of(*job.following), conv) == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("projection", [False, True])
def test_a_block_of_mixed_backends_is_right_and_runs_what_the_table_says(seed, projection, monkeypatch):
    """`reference` stands for kernels of ours; whether it is the faster one is a coin toss for every convolution."""
    from resnet_fused import ops
    from resnet_fused.functional import residual as blocks

    random, tf32 = torch.Generator().manual_seed(seed), uses_tf32(torch.float32)
    monkeypatch.setattr(ops, "unavailable", lambda *_: None)
    monkeypatch.setattr(blocks.decide.dispatch, "default_backend", lambda *_: "reference")
    c, inner, size = 16, 8, 6
    shapes = [ConvShape(2, c, size, size, inner, 1, 1), ConvShape(2, inner, size, size, inner, 3, 3, padding=(1, 1))]
    shapes.append(ConvShape(2, inner, size, size, c, 1, 1))
    shortcut = ConvShape(2, c, size, size, c, 1, 1)

    def toss():
        return float(torch.rand((), generator=random)) + 0.1

    entries = {}
    for index, shape in enumerate([*shapes, shortcut]):
        first = index in (0, 3)
        for prologue in (False,) if first else (False, True):
            residual = index == 0 and not projection
            for problem in formulation.problems(shape, torch.float32, tf32, Fusion(prologue), first, residual):
                entries[problem] = Entry(problem, ((Choice("aten"), toss()), (Choice("reference"), toss())))
        alone = formulation.normalisation(shape, torch.float32)
        entries[alone] = Entry(alone, ((Choice("reference"), toss() / 4),))
    table = Table(GPU, 80, {}, frozenset(), entries)

    def layer(shape):
        weight = torch.randn(shape.k, shape.c, shape.r, shape.s, generator=random).requires_grad_()
        vectors = (torch.zeros(shape.k), torch.ones(shape.k))
        scale, shift = (torch.rand(shape.k, generator=random).requires_grad_() for _ in range(2))
        geometry = ((1, 1), shape.padding, (1, 1), 1)
        return blocks.ConvBN(weight, *vectors, scale, shift, geometry, True)

    x = torch.randn(2, c, size, size, generator=random).requires_grad_()
    branch, beside = [layer(shape) for shape in shapes], layer(shortcut) if projection else None
    dy = torch.randn(2, c, size, size, generator=random)
    with choice.assuming(table):
        chain = blocks.choose_chain("test", x, branch, beside, identity=not projection)
        for index, (made, shape) in enumerate(zip(chain.layers, [*shapes, shortcut], strict=False)):
            first = index in (0, 3)
            wanted = choice.layer(shape, torch.float32, 80, tf32, first, index == 0 and not projection)
            assert made[2:6] == (wanted.fprop, wanted.dgrad, wanted.wgrad, wanted.fusion)
        y = blocks.run_chain(chain, x, branch, beside)
        leaves = [x, *(t for one in [*branch, *([beside] if projection else [])] for t in (one.weight, one.bn_weight))]
        ours = [y, *torch.autograd.grad(y, leaves, dy)]
    plain = blocks.Chain((), None, not projection, True, "aten")
    expected = blocks.run_chain(plain, x, branch, beside)
    for one, other in zip(ours, [expected, *torch.autograd.grad(expected, leaves, dy)], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
