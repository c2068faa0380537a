"""Sums that a block's backward forms for the block before: not used where another gradient, or nothing, arrives."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from handover_cases import assert_same, check, gradients, loss_of, made, seeded, three_blocks, watched  # noqa: F401
from op_cases import DEVICE
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from resnet_fused import fuse, ops, use_backend


@pytest.fixture
def taken(monkeypatch):
    return watched(monkeypatch)


def _two_consumers(order):
    def run(module, x):
        y = module[0](x)
        parts = [loss_of(module[1:](y)), (y * y).sum()]
        sum(parts[::order]).backward()

    return run


def _hook(change):
    def run(module, x):
        y = module[0](x)
        y.register_hook(change)
        loss_of(module[1:](y)).backward()

    return run


def _between(step):
    return lambda module, x: loss_of(module[1:](step(module[0](x)))).backward()


def _doubled(y):
    """In place where that is allowed: plain PyTorch's ReLU has saved its result."""
    return y.mul_(2) if hasattr(y.grad_fn, "published") else y * 2


def _unseen(gradient):
    gradient.data.mul_(3)  # which the version does not count


def _in_place(gradient):
    gradient.mul_(3)


def _late_hook(module, x):
    y = module[0](x)
    z = module[1:](y)
    y.register_hook(_unseen)
    loss_of(z).backward()


def _both_blocks(module, x):
    y = module[0](x)
    (loss_of(module[1:](y)) + loss_of(module[1:](y))).backward()


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(_two_consumers(1), id="another consumer, later"),
        pytest.param(_two_consumers(-1), id="another consumer, earlier"),
        pytest.param(_both_blocks, id="the same block twice"),
        pytest.param(_hook(lambda g: 2 * g), id="a hook that replaces"),
        pytest.param(_hook(_in_place), id="a hook that writes"),
        pytest.param(_hook(_unseen), id="a hook that writes unseen"),
        pytest.param(_late_hook, id="a hook after the next block ran"),
        pytest.param(_between(_doubled), id="an op in place"),
        pytest.param(_between(lambda y: y[:]), id="a view"),
        pytest.param(_between(lambda y: y * 1.5), id="an op"),
    ],
)
def test_a_gradient_that_is_not_the_one_that_was_written(run, taken):
    check(run)
    assert len(taken) in (3, 5) and not taken[-1]


def test_a_consumer_that_writes_into_the_gradient_without_being_seen(taken):
    """As Megatron's copy to the ranks does, which reduces in place."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dy):
            dy.data.mul_(2)
            return dy

    check(_between(Doubled.apply))
    assert not taken[-1]


def test_part_of_the_graph(taken):
    """The sums of a gradient nobody passes on are left, and so is no tensor with them."""
    module, x = made()
    plain, ours = copy.deepcopy(module), fuse(copy.deepcopy(module))
    results = []
    for m in (plain, ours):
        with use_backend("reference"):
            y = m[0](x)
            loss = loss_of(m[1:](y))
        (gradient,) = torch.autograd.grad(loss, y, retain_graph=True)
        if m is ours:
            held = weakref.ref(gradient)
            assert y.grad_fn.delivered.gradient() is gradient
        (weight,) = torch.autograd.grad(loss, m[1].conv2.weight, retain_graph=True)
        parameters = list(m[0].parameters())
        clone = torch.autograd.grad(y, parameters, gradient.clone(), retain_graph=True)
        again = torch.autograd.grad(loss, y, retain_graph=True)
        same = torch.autograd.grad(y, parameters, again, retain_graph=True)
        results.append({str(i): t for i, t in enumerate((gradient, weight, *clone, *same))})
    assert_same(results[1], results[0])
    del gradient, results, again
    assert held() is None
    assert taken == [False, True, False, True, False, False, True, True]


def _packed(pack, unpack):
    def run(module, x):
        with saved_tensors_hooks(pack, unpack):
            y = module(x)
        loss_of(y).backward()

    return run


def _offloaded(module, x):
    with save_on_cpu(pin_memory=False):
        y = module(x)
    loss_of(y).backward()


def _checkpointed(reentrant):
    def run(module, x):
        for m in module:
            x = checkpoint(m, x, use_reentrant=reentrant)
        loss_of(x).backward()

    return run


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(_packed(lambda t: t.clone(), lambda t: t), id="copied"),
        pytest.param(_packed(lambda t: t.cpu().numpy(), lambda a: torch.from_numpy(a).to(DEVICE)), id="elsewhere"),
        pytest.param(_checkpointed(True), id="checkpoint, reentrant"),
        pytest.param(_checkpointed(False), id="checkpoint"),
        pytest.param(
            _offloaded,
            id="offloaded",
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU save_on_cpu saves the tensor itself"),
        ),
    ],
)
def test_operands_that_are_not_in_memory(run, taken):
    check(run)
    assert taken == [False] * 3


def test_two_blocks_in_one_checkpoint():
    check(lambda m, x: loss_of(checkpoint(m, x, use_reentrant=False)).backward())
    check(lambda m, x: loss_of(checkpoint(m, x, use_reentrant=True)).backward())


def test_packed_tensors_are_unpacked_once():
    """By the chain that saved them, and by no other."""
    module, x = made()
    unpacked = []
    packed = iter(range(10**6))

    def unpack(pair):
        unpacked.append(pair[0])
        return pair[1]

    gradients(fuse(module), x, _packed(lambda t: (next(packed), t.clone()), unpack), "reference")
    assert unpacked and len(unpacked) == len(set(unpacked))


@pytest.mark.skipif(not ops.available("triton", DEVICE), reason="not available here")
def test_blocks_of_other_backends_and_orders(taken):
    """The second block reads what the first has in an order, or a dtype, that its kernels do not take."""
    module, x = made(three_blocks()[:2], torch.float32)
    expected = gradients(copy.deepcopy(module).double(), x.double())

    def run(m, x):
        with use_backend("reference"):
            y = m[0](x)
        with use_backend("triton"):
            z = m[1](y)
        loss_of(z).backward()

    for order in (torch.contiguous_format, torch.channels_last):
        ours = fuse(copy.deepcopy(module)).to(memory_format=order)
        actual = gradients(ours, x.contiguous(memory_format=order), run)
        assert_same({k: v.double() for k, v in actual.items()}, expected, 1e-4)
    assert taken == [False, False, False, True]


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_blocks_on_two_streams(taken):
    module, x = made(dtype=torch.float32)
    expected = gradients(copy.deepcopy(module).double(), x.double())

    def run(m, x):
        y, other = m[0](x), torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            loss = loss_of(m[1:](y))
        torch.cuda.current_stream().wait_stream(other)
        loss.backward()
        torch.cuda.synchronize()

    actual = gradients(fuse(module), x, run, "triton")
    assert_same({k: v.double() for k, v in actual.items()}, expected, 1e-3)
    assert taken == [False, True, False]
