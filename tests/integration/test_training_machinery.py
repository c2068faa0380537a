"""What people do around a training step, plain and fused side by side: graphs, frozen parts, tensors, threads."""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import weakref

import pytest
import torch
from networks import AVAILABLE, QUICK, assert_same_step, pictures, quick_backends, small_resnet, step
from op_cases import same_memory_order
from tiers import larger
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from resnet_fused import functional, fuse, use_backend

FORCED = [name for name in AVAILABLE if name in ("reference", "cuda")]
NHWC = torch.channels_last


def _pair() -> tuple[nn.Module, nn.Module]:
    plain = small_resnet()
    return plain, fuse(copy.deepcopy(plain))


# --- graphs: accumulation, checkpoints, hooks, retain_graph -----------------------------------------------------------


@quick_backends
def test_gradients_accumulate_and_go_where_set_to_none_says(backend):
    plain, fused = _pair()
    batches, grads = [pictures() for _ in range(3)], []
    for model, name in ((plain, "auto"), (fused, backend)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with use_backend(name):
            for x in batches:
                model(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.zero_grad(set_to_none=False)
        held = [p.grad for p in model.parameters()]
        with use_backend(name):
            model(batches[0]).sum().backward()
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in model.parameters())
    assert_same_step(grads[1], grads[0])


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        m = self.model
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        for part in (m.layer1, m.layer2):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return m.fc(m.avgpool(x).flatten(1))


@quick_backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(backend, reentrant):
    """Also the running statistics, which a second forward moves twice, as it does in plain PyTorch."""
    plain, fused = _pair()
    x = pictures()
    expected = step(_Checkpointed(plain, reentrant), x)
    with use_backend(backend):  # backward computes the parts anew
        assert_same_step(step(_Checkpointed(fused, reentrant), x, backend), expected)


@quick_backends
def test_saved_tensor_hooks(backend):
    """What is saved passes through the hooks and nothing else does: offloading it changes nothing."""
    plain, fused = _pair()
    x = pictures()
    packed = []

    def pack(t: Tensor) -> tuple[Tensor]:
        packed.append(t)
        return (t.clone(),)

    expected = step(plain, x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held[0]):
        assert_same_step(step(copy.deepcopy(fused), x, backend), expected)
    assert len(packed) > 20
    with torch.autograd.graph.save_on_cpu():
        assert_same_step(step(fused, x, backend), expected)


@quick_backends
def test_retain_graph_gives_the_same_gradient_twice(backend):
    _, fused = _pair()
    with use_backend(backend):
        y = fused(pictures()).square().sum()
    parameters = list(fused.parameters())
    first = torch.autograd.grad(y, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, parameters)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, parameters)


def test_forward_mode_and_function_transforms_take_the_plain_path():
    plain, fused = _pair()
    x, tangent = pictures(3), torch.randn_like(pictures(3))
    results = []
    for model in (plain.eval(), fused.eval()):
        parameters = dict(model.named_parameters())

        def call(p, x, model=model):
            return torch.func.functional_call(model, p, (x,))

        def loss(p, x, call=call):
            return call(p, x[None]).square().sum()

        results.append([
            *torch.func.jvp(lambda x: call(parameters, x), (x,), (tangent,)),  # noqa: B023
            torch.func.vmap(lambda x: model(x[None]))(x),  # noqa: B023
            *torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values(),
            torch.func.jacrev(model)(x[:1]),
        ])  # fmt: skip
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            results[-1].append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with use_backend("reference"):
        actual = torch.func.jvp(fused, (x,), (tangent,))
    torch.testing.assert_close(actual, torch.func.jvp(plain, (x,), (tangent,)), rtol=1e-4, atol=1e-4)
    for backend in set(FORCED) - {"reference"}:  # never silent zeros
        with use_backend(backend), pytest.raises(RuntimeError, match="a torch.func transform or forward-mode AD"):
            torch.func.jvp(fused, (x,), (tangent,))


# --- what is frozen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b if b == "auto" else larger(b) for b in QUICK])
def test_frozen_layers_and_frozen_batch_norms_in_every_combination(backend):
    """Stem, blocks: parameters frozen or not, batch norm in evaluation or not, the input's gradient wanted or not."""
    plain, fused = _pair()
    parts = ("conv1", "bn1", "layer1", "layer2.0")
    for frozen, constant in itertools.product(itertools.product((0, 1), repeat=4), ((), parts[1:2], parts[2:], parts)):
        results = []
        x = pictures(2, 16)
        for model, name in ((copy.deepcopy(plain), "auto"), (copy.deepcopy(fused), backend)):
            model.train()
            for part, off in zip(parts, frozen, strict=True):
                model.get_submodule(part).requires_grad_(not off)
            for part in constant:
                model.get_submodule(part).eval()
            model.zero_grad()
            leaf = x.clone().requires_grad_(frozen[0] == 0)
            with use_backend(name):
                y = model(leaf)
            y.square().sum().backward()
            found = {"y": y.detach(), "dx": leaf.grad} | {n: p.grad for n, p in model.named_parameters()}
            results.append(found | {n: b.clone() for n, b in model.named_buffers()})
        assert_same_step(results[1], results[0], 1e-3)


@quick_backends
def test_update_bn(backend):
    plain, fused = _pair()
    batches = [pictures(n) for n in (4, 2, 3)]
    for model, name in ((plain, "auto"), (fused, backend)):
        with use_backend(name):
            update_bn(batches, model)
    assert_same_step(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert all(m.momentum == 0.1 for m in fused.modules() if isinstance(m, nn.BatchNorm2d))


# --- tensors ----------------------------------------------------------------------------------------------------------


def _edits(model: nn.Module, x: Tensor) -> dict:
    return {
        "the input": lambda: x.add_(1),
        "a convolution's weight": lambda: model.layer1.conv2.weight.add_(1),
        "the stem's": lambda: model.conv1.weight.mul_(2),
        "a projection's": lambda: model.layer2[0].downsample[0].weight.mul_(2),
    }


@quick_backends
@pytest.mark.parametrize("what", list(_edits(small_resnet(), torch.zeros(()))))
def test_in_place_edits_of_saved_tensors_are_detected(backend, what):
    """Wherever plain PyTorch detects one (or the gradient is right all the same, from a copy)."""
    plain, fused = _pair()
    x = pictures()
    for model, name in ((plain, "auto"), (fused, backend)):
        own = x.clone()
        with use_backend(name):
            y = model(own)
        with torch.no_grad():
            _edits(model, own)[what]()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@quick_backends
def test_a_result_that_is_saved_is_watched_too(backend):
    x, other = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    with use_backend(backend):
        y = functional.add_act(x, other)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@quick_backends
@pytest.mark.parametrize("weights", ["nchw", "nhwc"])
@pytest.mark.parametrize("inputs", ["nchw", "nhwc"])
def test_gradients_have_the_layout_of_what_they_belong_to(backend, weights, inputs):
    plain, fused = _pair()
    x = pictures()
    if inputs == "nhwc":
        x = x.contiguous(memory_format=NHWC)
    if weights == "nhwc":
        plain, fused = plain.to(memory_format=NHWC), fused.to(memory_format=NHWC)
    expected, actual = step(plain, x), step(fused, x, backend)
    assert_same_step(actual, expected)
    assert [name for name, v in expected.items() if not same_memory_order(actual[name], v)] == []


@quick_backends
def test_a_forward_without_backward_keeps_nothing_alive(backend):
    """What is saved for backward lives as long as the result, also where backward never runs."""
    _, fused = _pair()
    held: list[weakref.ref[Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        kept = t.detach().clone()
        held.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), use_backend(backend):
        y = fused(pictures())
    assert len(held) > 20 and all(r() is not None for r in held)
    del y
    assert all(r() is None for r in held)


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_several_streams(backend):
    """Steps on streams of their own, at once, are the steps that the default stream takes."""
    plain, fused = _pair()
    batches = [pictures(8, 64) for _ in range(4)]
    expected = [step(copy.deepcopy(plain), x) for x in batches]
    models, streams = [copy.deepcopy(fused) for _ in batches], [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    actual = []
    for model, stream, x in zip(models, streams, batches, strict=True):
        with torch.cuda.stream(stream):
            actual.append(step(model, x, backend))
    torch.cuda.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert_same_step(a, e, 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_tensors_on_a_device_that_is_not_the_current_one(backend):
    plain, fused = _pair()
    x = pictures(8, 64)
    expected = step(plain, x)
    with torch.cuda.device(0):
        actual = step(fused.to("cuda:1"), x.to("cuda:1"), backend)
    assert all(t.device.index == 1 for t in actual.values())
    assert_same_step({k: t.to("cuda:0") for k, t in actual.items()}, expected, 1e-2)


def test_threads_share_a_model():
    """Forward and backward on several threads: `use_backend` was read in the forward and travels with the graph."""
    _, fused = _pair()
    x = pictures()
    with contextlib.ExitStack() as stack:
        if FORCED:
            stack.enter_context(use_backend(FORCED[0]))
        y = fused.eval()(x.requires_grad_()).sum()
    done: list[Tensor] = []
    thread = threading.Thread(target=lambda: done.append(torch.autograd.grad(y, x)[0]))
    thread.start()
    thread.join()
    with use_backend(FORCED[0] if FORCED else "auto"):
        torch.testing.assert_close(done[0], torch.autograd.grad(fused(x).sum(), x)[0])
