"""Whole models on more than one process: SyncBatchNorm, DDP and FSDP2, fused against plain.

Two processes of a gloo group on the CPU. The oracle is plain PyTorch on the batches put one behind the other.
"""

from __future__ import annotations

import io
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from ranks import WORLD, needs_gloo, sizes
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import resnet_fused
from resnet_fused import use_backend
from resnet_fused.nn import call

pytestmark = needs_gloo


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


def test_frozen_it_is_folded():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fused.fuse(_tiny())).eval()
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        frozen = resnet_fused.freeze(model, x)
        torch.testing.assert_close(frozen(x), model(x))
    assert "left to the model" not in str(frozen.plan)


def _groups(rank):
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fused.fuse(_tiny()), alone)
    x = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(rank))
    assert torch.equal(model(x), _tiny()(x)), "a group of one is one process"
    return call.sync_group(model.bn1) is None


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
    with mock.patch.object(call.functional, "conv_bn_act", wraps=call.functional.conv_bn_act) as counted:
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
