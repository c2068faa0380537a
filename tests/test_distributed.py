"""More than one process: synchronised statistics, DDP and FSDP2 of fused models, against one process with all batches.

Two processes of a gloo group on the CPU. The oracle is plain PyTorch on the batches put one behind the other.
"""

from __future__ import annotations

import copy
import io
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from contract import assert_within_contract
from ranks import WORLD, Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import resnet_fused
from resnet_fused import ops, use_backend
from resnet_fused.functional.sync import choose_sync, sync_batch_norm_act, sync_batch_norm_act_max_pool
from resnet_fused.nn import BatchNormAct2d, SyncBatchNormAct2d, units

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
BACKENDS = [b for b in ("reference", "triton", "cuda") if ops.available(b, "cpu")]
SIZES = {"equal": (2, 2), "unequal": (3, 1), "one empty": (0, 3), "the other empty": (2, 0)}
sizes = pytest.mark.parametrize("batches", SIZES.values(), ids=SIZES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    both = Ranks(str(tmp_path_factory.mktemp("ranks") / "rendezvous"))
    yield both
    both.close()


# --- the function ---


def _sync_step(rank, parts, vectors, options):
    """One step on this rank's part: output, gradients, running statistics."""
    x, residual, dy = (None if part is None else part[rank] for part in parts)
    weight, bias, mean, var = (v.clone() for v in vectors)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    with use_backend(options["backend"]):
        pools = options["act"] == "pool"
        chosen = choose_sync("bn_act_max_pool" if pools else "bn_apply", x, (weight, bias, mean, var))
    shared = {"process_group": dist.group.WORLD, "backend": chosen}
    if pools:
        y = sync_batch_norm_act_max_pool(x, mean, var, weight, bias, **shared)
    else:
        y = sync_batch_norm_act(x, mean, var, weight, bias, residual, act=options["act"], **shared)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves), mean, var]


def _plain_step(x, residual, dy, vectors, act, dtype):
    up = x.dtype if dtype is None else dtype
    x, dy, residual = (None if t is None else t.detach().to(up) for t in (x, dy, residual))
    weight, bias, mean, var = (v.clone().double() if dtype is not None else v.clone() for v in vectors)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y = F.batch_norm(x, mean, var, weight, bias, True)
    y = y if residual is None else y + residual
    y = F.relu(y) if act else y
    y = F.max_pool2d(y, 3, 2, 1) if act == "pool" else y
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves), mean, var]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", ["relu", "residual", "plain", "pool"])
@sizes
def test_statistics_are_those_of_all_batches(ranks, backend, dtype, layout, case, batches):
    def activation(*size):
        full = torch.randn(sum(batches), 6, *size).to(dtype).contiguous(memory_format=layout)
        return full, [part.contiguous(memory_format=layout) for part in full.split(batches)]

    (x, xs), (dy, dys) = activation(5, 3), activation(*((3, 2) if case == "pool" else (5, 3)))
    residual, residuals = activation(5, 3) if case == "residual" else (None, None)
    vectors = [torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5]
    act = {"plain": None, "pool": "pool"}.get(case, "relu")
    results = ranks.run(_sync_step, (xs, residuals, dys), vectors, {"backend": backend, "act": act})
    plain = _plain_step(x, residual, dy, vectors, act, None)
    truth = _plain_step(x, residual, dy, vectors, act, torch.float64)
    names = ["y", "dx", "dweight", "dbias", *(["dresidual"] if residual is not None else []), "mean", "var"]
    for name, first, second, p, t in zip(names, *results, plain, truth, strict=True):
        if name in ("mean", "var"):
            assert torch.equal(first, second), f"{name}: the ranks disagree"
            assert_within_contract(first, p, t, name)
        else:  # parameters' gradients are each rank's own; DDP adds them up
            joined = first + second if name in ("dweight", "dbias") else torch.cat([first, second])
            assert_within_contract(joined, p, t, name)


@pytest.mark.parametrize("backend", BACKENDS)
@sizes
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(ranks, backend, batches):
    x = 100 + torch.randn(sum(batches), 6, 5, 3)
    vectors = [torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6)]
    parts = (x.split(batches), None, torch.zeros_like(x).split(batches))
    results = ranks.run(_sync_step, parts, vectors, {"backend": backend, "act": None})
    plain, truth = (_plain_step(x, None, torch.zeros_like(x), vectors, None, d) for d in (None, torch.float64))
    for *_, mean, var in results:
        assert_within_contract(mean, plain[-2], truth[-2], "mean")
        assert_within_contract(var, plain[-1], truth[-1], "var")


def _raises(rank, batches, shape):
    bn = nn.SyncBatchNorm(3)
    try:
        units.batch_norm_act(torch.randn(batches[rank], *shape), bn, None, "relu")
    except ValueError as error:
        return str(error)
    return [bn.running_mean, bn.running_var]


def test_one_value_in_all_batches_is_an_error_on_every_rank(ranks):
    for message in ranks.run(_raises, (1, 0), (3, 1, 1)):
        assert message.startswith("Expected more than 1 value per channel when training")


def test_one_value_on_every_rank_is_enough(ranks):
    first, second = ranks.run(_raises, (1, 1), (3, 1, 1))
    assert torch.equal(first[1], second[1]) and first[1].isfinite().all()


def test_nothing_on_any_rank_leaves_the_statistics_alone(ranks):
    bn = nn.BatchNorm2d(3)
    bn(torch.empty(0, 3, 2, 2))
    for mean, var in ranks.run(_raises, (0, 0), (3, 2, 2)):
        assert torch.equal(mean, bn.running_mean) and torch.equal(var, bn.running_var)


# --- conversion keeps the activation ---


@pytest.mark.parametrize("options", [{}, {"affine": False, "track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("nested", [True, False])
def test_convert_sync_batchnorm_keeps_the_activation(options, act, nested):
    bn = BatchNormAct2d(4, act=act, **options)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bn) if nested else bn
    x = torch.randn(2, 3 if nested else 4, 5, 5)
    expected = copy.deepcopy(model)(x)
    for _ in range(2):  # the second time it is a SyncBatchNorm that is converted
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        made = model[1] if nested else model
        assert type(made) is SyncBatchNormAct2d and made.act == act
    assert isinstance(made, nn.SyncBatchNorm) and made.weight is bn.weight and made.running_mean is bn.running_mean
    assert made.momentum == bn.momentum
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # one process: the plain path


def test_timms_converter_keeps_it_too():
    layers = pytest.importorskip("timm.layers")
    model = layers.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4)))
    assert type(model[0]) is SyncBatchNormAct2d and model[0].act == "relu"


def test_a_converter_that_would_lose_the_activation_is_refused():
    class Other(nn.BatchNorm2d):
        pass

    def convert(module):
        module_output = Other(module.num_features) if isinstance(module, nn.BatchNorm2d) else module
        for name, child in module.named_children():
            module_output.add_module(name, convert(child))
        return module_output

    with pytest.raises(
        TypeError, match="Other cannot replace a BatchNormAct2d, whose activation .'relu'. it would lose"
    ):
        convert(nn.Sequential(BatchNormAct2d(4)))


def test_children_are_listed_as_ever():
    bn = BatchNormAct2d(4)
    module_output = bn  # a converter that leaves it alone
    assert list(bn.named_children()) == [] and module_output is bn
    assert [name for name, _ in nn.Sequential(bn).named_modules()] == ["", "0"]


def test_a_batch_norm_with_a_relu_of_its_own_is_not_taken_for_a_plain_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = model[0], model[1]

        def forward(self, x):
            return self.bn(self.conv(x))

    x = torch.randn(2, 3, 4, 4)
    for module in (Module(), nn.SyncBatchNorm.convert_sync_batchnorm(Module())):
        fused = resnet_fused.fuse(module)
        assert (fused(x) >= 0).all() and (fused.eval()(x) >= 0).all()
        fused.train()


def test_frozen_it_is_folded():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fused.fuse(_tiny())).eval()
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        frozen = resnet_fused.freeze(model, x)
        torch.testing.assert_close(frozen(x), model(x))
    assert "left to the model" not in str(frozen.plan)


# --- models ---


def _tiny(seed=0):
    """Every kind of unit: stem with pool, basic blocks, a projection."""
    torch.manual_seed(seed)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def _batch(batches):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(batches), 3, 33, 33, dtype=torch.float64, generator=generator)
    return x, torch.arange(sum(batches)) % 5


def _state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _model_step(rank, batches, backend, convert_first):
    model = _tiny().double()
    if convert_first:
        model = resnet_fused.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fused.fuse(model))
    fused = [name for name, _ in resnet_fused.report(model).fused]
    xs, targets = _batch(batches)
    x = xs.split(batches)[rank].requires_grad_()
    with use_backend(backend):
        y = model(x)
    F.cross_entropy(y, targets.split(batches)[rank], reduction="sum").backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = _state(model)
    evaluated = model.eval()(xs).detach()
    return fused, y.detach(), x.grad, gradients, state, evaluated


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("convert_first", [True, False])
@sizes
def test_a_fused_model_with_sync_batch_norm(ranks, batches, convert_first, backend):
    plain = _tiny().double()
    xs, targets = _batch(batches)
    x = xs.clone().requires_grad_()
    y = plain(x)
    F.cross_entropy(y, targets, reduction="sum").backward()  # parts add up to the whole
    results = ranks.run(_model_step, batches, backend, convert_first)
    for fused, *_ in results:
        assert {"", "layer1.0", "layer2.0"} <= set(fused)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([r[1] for r in results]), y, **close)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), x.grad, **close)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(results[0][3][name] + results[1][3][name], p.grad, **close, msg=name)
    for *_, state, evaluated in results:
        assert list(state) == list(plain.state_dict())
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(state[name], buffer, **close, msg=name)
        torch.testing.assert_close(evaluated, plain.eval()(xs), **close)


def _unit_step(rank, xs, conv, backend):
    bn, x = nn.SyncBatchNorm(4), xs[rank].requires_grad_()
    with use_backend(backend):
        y = units.conv_bn_act(x, conv, bn, None, relu=True, residual=x)
    (y * y).sum().backward()
    return [y.detach(), x.grad, conv.weight.grad, bn.running_var]


@pytest.mark.parametrize("backend", BACKENDS)
@sizes
def test_a_unit_on_every_backend(ranks, backend, batches):
    x, conv = torch.randn(sum(batches), 4, 6, 5), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    first, second = ranks.run(_unit_step, x.split(batches), conv, backend)
    expected = []
    for dtype in (torch.float32, torch.float64):
        own, bn = copy.deepcopy(conv).to(dtype), nn.BatchNorm2d(4, dtype=dtype)
        leaf = x.detach().clone().to(dtype).requires_grad_()
        y = F.relu(bn(own(leaf)) + leaf)
        (y * y).sum().backward()
        expected.append([y, leaf.grad, own.weight.grad, bn.running_var])
    joined = [torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), first[2] + second[2], first[3]]
    for name, actual, plain, truth in zip(("y", "dx", "dweight", "var"), joined, *expected, strict=True):
        assert_within_contract(actual, plain, truth, name)


def _beside_pytorchs(rank, xs, residuals, backend):
    """Our step and that of `nn.SyncBatchNorm`, on this rank's GPU."""
    x, residual = xs[rank].cuda(rank), residuals[rank].cuda(rank)
    results = []
    for ours in (True, False):
        bn, leaf = SyncBatchNormAct2d(6).cuda(rank), x.clone().requires_grad_()
        with use_backend(backend):
            y = bn(leaf, residual) if ours else F.relu(nn.SyncBatchNorm.forward(bn, leaf) + residual)
        (y * y).sum().backward()
        results.append([t.cpu() for t in (y.detach(), leaf.grad, bn.weight.grad, bn.bias.grad, bn.running_var)])
    return results


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@sizes
def test_on_gpus_it_is_pytorchs_own_sync_batch_norm(ranks, backend, batches):
    if backend != "auto" and not ops.available(backend, "cuda"):
        pytest.skip(str(ops.unavailable(backend, "cuda")))
    xs, residuals = (torch.randn(sum(batches), 6, 5, 3).split(batches) for _ in range(2))
    for ours, theirs in ranks.run(_beside_pytorchs, xs, residuals, backend):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, SyncBatchNormAct2d])
def test_where_the_plan_has_pytorchs_own_kernels_its_own_forward_runs(monkeypatch, cls):
    """As on a GPU under "auto" before any kernel of ours is the default."""
    called = []
    monkeypatch.setattr(units, "sync_group", lambda bn: "a group")
    monkeypatch.setattr(units, "choose_sync", lambda *_: None)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: called.append(self) or x - 1)
    bn, x, residual = cls(3), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(units.batch_norm_act(x, bn, residual, "relu"), F.relu(x - 1 + residual))
    assert called == [bn] and bn.num_batches_tracked == 0  # which that forward would count


def _groups(rank):
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fused.fuse(_tiny()), alone)
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(model(x), _tiny()(x)), "a group of one is one process"
    return units.sync_group(model.bn1) is None


def test_a_process_group_of_one_takes_the_plain_path(ranks):
    assert all(ranks.run(_groups))


# --- DDP ---


def _ddp_step(rank, fuse, sync, seed):
    model = _tiny(seed + rank).double()  # DDP broadcasts rank 0's
    if fuse:
        resnet_fused.fuse(model)
    if not sync:
        model.bn1.running_mean += rank  # broadcast before each forward
    parallel = DistributedDataParallel(model)
    if sync:  # behind DDP's back, which refuses nn.SyncBatchNorm on a CPU
        parallel.module = model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01, momentum=0.9)
    xs, targets = _batch((3, 3))
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        y = parallel(xs.split(3)[rank])
        F.cross_entropy(y, targets.split(3)[rank]).backward()
        optimizer.step()
        outputs.append(y.detach())
    buffer = io.BytesIO()
    torch.save(parallel.state_dict(), buffer)
    buffer.seek(0)
    again = DistributedDataParallel(resnet_fused.fuse(_tiny(9).double()))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    return outputs, _state(model), _state(again.module)


def test_ddp_of_a_fused_model_is_ddp_of_the_plain_one(ranks):
    plain, fused = ranks.run(_ddp_step, False, False, 0), ranks.run(_ddp_step, True, False, 0)
    for p, f in zip(plain, fused, strict=True):
        torch.testing.assert_close(f[0], p[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(f[1], p[1], rtol=1e-9, atol=1e-9)
        assert all(torch.equal(f[1][name], t) for name, t in f[2].items())


def test_ddp_with_sync_batch_norm_is_one_process_with_both_batches(ranks):
    model = _tiny().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, target = _batch((3, 3))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    for _, state, _ in ranks.run(_ddp_step, True, True, 0):
        torch.testing.assert_close(state, _state(model), rtol=1e-9, atol=1e-9)


# --- FSDP2 ---


def _fsdp_step(rank, fuse, sync, fuse_first=True):
    model = _tiny()
    if sync:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if fuse and fuse_first:
        resnet_fused.fuse(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in (model.layer1[0], model.layer2[0], model):
        fully_shard(block, mesh=mesh)
    if fuse and not fuse_first:
        resnet_fused.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    xs, targets = _batch((3, 3))
    outputs = []
    with mock.patch.object(units.functional, "conv_bn_act", wraps=units.functional.conv_bn_act) as counted:
        for _ in range(2):
            optimizer.zero_grad()
            y = model(xs.float().split(3)[rank])
            F.cross_entropy(y, targets.split(3)[rank]).backward()
            optimizer.step()
            outputs.append(y.detach())
    assert counted.call_count == (2 * 5 if fuse and not sync else 0)  # the stem's is fused with its pool
    fused = [name for name, _ in resnet_fused.report(model).fused]
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    set_model_state_dict(model, dict(state), options=options)  # which changes the dict
    again = get_model_state_dict(model, options=options)
    assert all(torch.equal(again[name], t) for name, t in state.items())
    resnet_fused.fuse(_tiny()).load_state_dict(state)  # into a model in one process
    return outputs, state, fused


@pytest.mark.parametrize("fuse_first", [True, False])
def test_fsdp2_of_a_fused_model_is_fsdp2_of_the_plain_one(ranks, fuse_first):
    plain, fused = ranks.run(_fsdp_step, False, False), ranks.run(_fsdp_step, True, False, fuse_first)
    for p, f in zip(plain, fused, strict=True):
        torch.testing.assert_close(f[0], p[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(f[1], p[1], rtol=1e-4, atol=1e-4)
        assert {"", "layer1.0", "layer2.0"} <= set(f[2])


def test_fsdp2_with_sync_batch_norm_is_one_process_with_both_batches(ranks):
    model = _tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, target = _batch((3, 3))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x.float()), target).backward()
        optimizer.step()
    for _, state, _ in ranks.run(_fsdp_step, True, True):
        torch.testing.assert_close(state, _state(model), rtol=1e-4, atol=1e-4)
