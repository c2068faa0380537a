"""Sums that a block's backward forms for the block before: used where they are right."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torchvision
from contract import assert_no_worse
from handover_cases import check, gradients, loss_of, made, seeded, watched  # noqa: F401
from op_cases import DEVICE
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models.resnet import Bottleneck

from resnet_fused import dispatch, fuse, ops, use_backend
from resnet_fused.dispatch import Fusion
from resnet_fused.functional.residual import handover

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not ops.available(name, DEVICE), reason="not available here"))
    for name in ("reference", "triton", "cuda")
]


@pytest.fixture
def taken(monkeypatch):
    return watched(monkeypatch)


def test_every_block_but_the_last_has_its_sums_from_the_one_behind(taken):
    check()
    assert taken == [False, True, True]


def test_one_op_makes_both_gradients_of_a_layer_and_of_a_join_with_a_projection(monkeypatch):
    called, implementation = [], ops.backends.implementation

    def noted(backend, op):
        called.append(op)
        return implementation(backend, op)

    monkeypatch.setattr(ops.backends, "implementation", noted)
    check()
    assert (called.count("conv_backward"), called.count("conv_dgrad_join")) == (5, 2)
    assert called.count("conv_wgrad") == 2  # of the first convolution of all, and of the projection
    assert called.count("bn_backward_apply_join") == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_within_the_contract(backend, dtype, taken):
    module, x = made(dtype=dtype)
    actual = gradients(fuse(copy.deepcopy(module)), x, backend=backend)
    # In 16 bits a value that rounding carries across zero changes a mask: compared as vectors.
    assert_no_worse(actual, gradients, (module, x), norm=dtype != torch.float32)
    assert taken == [False, *[backend != "cuda"] * 2]  # whose convolutions are PyTorch's


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_nothing_but_the_order_of_a_sum_depends_on_it(backend, monkeypatch):
    """With it and without: bit for bit in the reference, whose order is one."""
    module, x = made(dtype=torch.float32)
    with_it = gradients(fuse(copy.deepcopy(module)), x, backend=backend)
    monkeypatch.setattr(handover, "producer", lambda ctx, x: None)
    without = gradients(fuse(copy.deepcopy(module)), x, backend=backend)
    for name, expected in without.items():
        if backend == "reference":
            assert torch.equal(with_it[name], expected), name
        else:
            torch.testing.assert_close(with_it[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network, count", [("resnet18", 8), ("resnet50", 16)])
def test_a_network_in_float64(network, count, taken):
    plain = getattr(torchvision.models, network)(num_classes=10).to(DEVICE, torch.float64)
    plain = plain.to(memory_format=torch.channels_last)
    check(module=plain, x=torch.randn(2, 3, 64, 64, device=DEVICE, dtype=torch.float64))
    assert sum(taken) == count - 1  # the last block has none behind it


@pytest.mark.parametrize("grad", ["retained", "twice", "in another thread", "anomaly mode", "identity hooks"])
def test_what_does_not_get_in_the_way(grad, taken):
    def run(module, x):
        if grad == "identity hooks":
            with saved_tensors_hooks(lambda t: t, lambda t: t):
                y = module(x)
        else:
            first = module[0](x)
            if grad == "retained":
                first.retain_grad()
            y = module[1:](first)
        if grad == "twice":
            loss_of(y).backward(retain_graph=True)
        if grad == "in another thread":
            thread = threading.Thread(target=loss_of(y).backward)
            thread.start()
            thread.join()
        else:
            with torch.autograd.set_detect_anomaly(grad == "anomaly mode"):
                loss_of(y).backward()
        if grad == "retained":
            retained.append(first.grad)

    retained = []
    check(run)
    assert taken == [False, True, True] * (2 if grad == "twice" else 1)
    if retained:  # the gradient of the sum, not what is left of it behind the ReLU
        torch.testing.assert_close(*retained, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", ["weights", "nothing", "below"])
def test_a_last_batch_norm_of_constants(trained, taken):
    module, x = made()
    for m in (module[0].bn3, module[1].bn3, module[1].downsample[1]):
        m.eval()
        for p in m.parameters():
            p.requires_grad_(trained == "weights")
    if trained == "below":
        module[1].downsample[1].train()
    check(module=module, x=x)
    assert taken == [False, trained != "nothing", trained == "weights"]


def test_a_chain_of_one_layer_takes_part(taken):
    """A convolution, batch norm and ReLU behind a block."""
    from resnet_fused.nn import ConvBNAct2d

    block, x = made([Bottleneck(16, 4)])
    plain = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(
        DEVICE, torch.float64
    )
    ours = ConvBNAct2d(16, 8, 3, padding=1).to(DEVICE, torch.float64, memory_format=torch.channels_last)
    ours.load_state_dict(dict(zip(ours.state_dict(), plain.state_dict().values(), strict=True)))
    expected = gradients(nn.Sequential(copy.deepcopy(block), plain), x)
    actual = gradients(nn.Sequential(fuse(copy.deepcopy(block)), ours), x, backend="reference")
    for got, exact in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-10)
    assert taken == [False, True]


@pytest.mark.parametrize("epilogue", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_plan_decides(epilogue, gradient, taken, monkeypatch):
    fusion = Fusion(prologue=True, dgrad_epilogue=epilogue, dgrad_prologue=gradient)
    monkeypatch.setattr(dispatch, "training", lambda *args: fusion)
    check()
    assert taken == [False, epilogue, epilogue]


def test_compiled_without_graph_breaks():
    module, x = made()
    torch._dynamo.reset()
    expected = gradients(copy.deepcopy(module), x)
    compiled = torch.compile(fuse(copy.deepcopy(module)), fullgraph=True, backend="aot_eager")
    actual = gradients(compiled, x, backend="reference")
    for got, exact in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.larger
def test_compiled_autograd():
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    torch._dynamo.reset()

    def run(module, x):
        loss = loss_of(module(x))
        with compiled_autograd._enable(lambda graph: graph):
            loss.backward()

    check(run)


def test_a_backward_in_inference_mode(taken):
    """Its gradients have no version."""

    def run(module, x):
        loss = loss_of(module(x))
        with torch.inference_mode():
            loss.backward()

    check(run)
    assert taken == [False] * 3


def test_nothing_is_kept_alive():
    """Neither a graph without a backward, nor after one; without the collector's help."""
    module, x = made()
    ours = fuse(module)
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            with use_backend("reference"):
                first = ours[0](x)
                y = ours[1:](first)
            nodes = [weakref.ref(first.grad_fn), weakref.ref(y.grad_fn)]
            held = [weakref.ref(t) for t in first.grad_fn.saved_tensors if t is not None and t.grad_fn is None]
            held = [h for h in held if not isinstance(h(), nn.Parameter)]
            assert len(held) > 10
            if backward:
                loss_of(y).backward()
                assert first.grad_fn.published.get(x, first.shape, False) is None
                assert sum(h() is not None for h in held) == 1  # the input, which is ours
            del first, y
            assert [n() for n in nodes] == [None, None]
            assert sum(h() is not None for h in held) == 1
    finally:
        gc.enable()


def test_no_more_is_saved(monkeypatch):
    def count():
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        module, x = made()
        with saved_tensors_hooks(pack, lambda t: t), use_backend("reference"):
            y = fuse(module)(x)
        assert y.grad_fn is not None
        return sum(sizes.values())

    with_it = count()
    monkeypatch.setattr(handover, "publish", lambda ctx, operands: None)
    assert with_it == count()
