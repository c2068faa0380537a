"""Sums that a block's backward forms for the block before: used where they are right, and nowhere else."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torchvision
from contract import assert_within_contract
from op_cases import DEVICE
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import fuse, ops, plan, use_backend
from resnet_fused.functional import block_border
from resnet_fused.plan import Fusion

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not ops.available(name, DEVICE), reason="not available here"))
    for name in ("reference", "triton", "cuda")
]


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _blocks() -> list[nn.Module]:
    """An identity behind a projection behind an identity."""
    return [
        Bottleneck(16, 4),
        Bottleneck(16, 8, 2, _projection(16, 32, 2)),
        BasicBlock(32, 32),
    ]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def taken(monkeypatch):
    """For every backward of a chain, whether it had its sums from the chain behind."""
    found = []
    original = block_border.take

    def take(ctx, gradient):
        sums = original(ctx, gradient)
        found.append(sums is not None)
        return sums

    monkeypatch.setattr(block_border, "take", take)
    return found


def _made(blocks: list[nn.Module] | None = None, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    module = nn.Sequential(*(blocks or _blocks())).to(DEVICE, dtype, memory_format=torch.channels_last)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
            nn.init.normal_(m.running_mean, 0, 0.1)
    x = torch.randn(2, 16, 6, 5, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return module, x


def _loss(y: torch.Tensor) -> torch.Tensor:
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    return (y * weights.to(y.dtype)).sum()


def _gradients(module: nn.Module, x: torch.Tensor, run=None, backend: str = "auto") -> dict[str, torch.Tensor]:
    """Of every parameter and the input, after `run(module, x)`, which ends with a backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with use_backend(backend):
        (run or (lambda m, x: _loss(m(x)).backward()))(module, x)
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def _assert_same(actual: dict, expected: dict, tolerance: float = 1e-9) -> None:
    assert any(g is not None for g in expected.values())
    for name, exact in expected.items():
        if exact is None:
            assert actual[name] is None, name
            continue
        error = (actual[name] - exact).norm().item()
        assert error <= tolerance * exact.norm().item() + 1e-12, f"{name}: {error}"


def _check(run=None, module=None, x=None) -> None:
    """`run` on plain and on fused blocks in float64: the same gradients."""
    if module is None:
        module, x = _made()
    expected = _gradients(copy.deepcopy(module), x, run)
    _assert_same(_gradients(fuse(copy.deepcopy(module)), x, run, "reference"), expected)


# Where they are used


def test_every_block_but_the_last_has_its_sums_from_the_one_behind(taken):
    _check()
    assert taken == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_within_the_contract(backend, dtype, taken):
    module, x = _made(dtype=dtype)
    expected = _gradients(copy.deepcopy(module), x)
    truth = _gradients(copy.deepcopy(module).double(), x.double())
    actual = _gradients(fuse(copy.deepcopy(module)), x, backend=backend)
    for name, exact in truth.items():
        if dtype == torch.float32:
            assert_within_contract(actual[name], expected[name], exact, name)
        else:  # a value that rounding carries across zero changes a mask: compared as vectors
            ours, theirs = ((v[name].double() - exact).norm() for v in (actual, expected))
            assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps * exact.norm(), name
    assert taken == [False, *[backend != "cuda"] * 2]  # whose convolutions are PyTorch's


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_nothing_but_the_order_of_a_sum_depends_on_it(backend, monkeypatch):
    """With it and without: bit for bit in the reference, whose order is one."""
    module, x = _made(dtype=torch.float32)
    with_it = _gradients(fuse(copy.deepcopy(module)), x, backend=backend)
    monkeypatch.setattr(block_border, "behind", lambda ctx, x: None)
    without = _gradients(fuse(copy.deepcopy(module)), x, backend=backend)
    for name, expected in without.items():
        if backend == "reference":
            assert torch.equal(with_it[name], expected), name
        else:
            torch.testing.assert_close(with_it[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network, count", [("resnet18", 8), ("resnet50", 16)])
def test_a_network_in_float64(network, count, taken):
    plain = getattr(torchvision.models, network)(num_classes=10).to(DEVICE, torch.float64)
    plain = plain.to(memory_format=torch.channels_last)
    _check(module=plain, x=torch.randn(2, 3, 64, 64, device=DEVICE, dtype=torch.float64))
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
            _loss(y).backward(retain_graph=True)
        if grad == "in another thread":
            thread = threading.Thread(target=_loss(y).backward)
            thread.start()
            thread.join()
        else:
            with torch.autograd.set_detect_anomaly(grad == "anomaly mode"):
                _loss(y).backward()
        if grad == "retained":
            retained.append(first.grad)

    retained = []
    _check(run)
    assert taken == [False, True, True] * (2 if grad == "twice" else 1)
    if retained:  # the gradient of the sum, not what is left of it behind the ReLU
        torch.testing.assert_close(*retained, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", ["weights", "nothing", "below"])
def test_a_last_batch_norm_of_constants(trained, taken):
    module, x = _made()
    for m in (module[0].bn3, module[1].bn3, module[1].downsample[1]):
        m.eval()
        for p in m.parameters():
            p.requires_grad_(trained == "weights")
    if trained == "below":
        module[1].downsample[1].train()
    _check(module=module, x=x)
    assert taken == [False, trained != "nothing", trained == "weights"]


def test_a_chain_of_one_layer_takes_part(taken):
    """A convolution, batch norm and ReLU behind a block."""
    from resnet_fused.nn import ConvBNAct2d

    block, x = _made([Bottleneck(16, 4)])
    plain = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(
        DEVICE, torch.float64
    )
    ours = ConvBNAct2d(16, 8, 3, padding=1).to(DEVICE, torch.float64, memory_format=torch.channels_last)
    ours.load_state_dict(dict(zip(ours.state_dict(), plain.state_dict().values(), strict=True)))
    expected = _gradients(nn.Sequential(copy.deepcopy(block), plain), x)
    actual = _gradients(nn.Sequential(fuse(copy.deepcopy(block)), ours), x, backend="reference")
    for got, exact in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-10)
    assert taken == [False, True]


# Where they are not


def _two_consumers(order):
    def run(module, x):
        y = module[0](x)
        parts = [_loss(module[1:](y)), (y * y).sum()]
        sum(parts[::order]).backward()

    return run


def _hook(change):
    def run(module, x):
        y = module[0](x)
        y.register_hook(change)
        _loss(module[1:](y)).backward()

    return run


def _between(step):
    return lambda module, x: _loss(module[1:](step(module[0](x)))).backward()


def _doubled(y):
    """In place where that is allowed: plain PyTorch's ReLU has saved its result."""
    return y.mul_(2) if hasattr(y.grad_fn, "offer") else y * 2


def _unseen(gradient):
    gradient.data.mul_(3)  # which the version does not count


def _in_place(gradient):
    gradient.mul_(3)


def _late_hook(module, x):
    y = module[0](x)
    z = module[1:](y)
    y.register_hook(_unseen)
    _loss(z).backward()


def _both_blocks(module, x):
    y = module[0](x)
    (_loss(module[1:](y)) + _loss(module[1:](y))).backward()


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
    _check(run)
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

    _check(_between(Doubled.apply))
    assert not taken[-1]


def test_part_of_the_graph(taken):
    """The sums of a gradient nobody passes on are left, and so is no tensor with them."""
    module, x = _made()
    plain, ours = copy.deepcopy(module), fuse(copy.deepcopy(module))
    results = []
    for m in (plain, ours):
        with use_backend("reference"):
            y = m[0](x)
            loss = _loss(m[1:](y))
        (gradient,) = torch.autograd.grad(loss, y, retain_graph=True)
        if m is ours:
            held = weakref.ref(gradient)
            assert y.grad_fn.formed.gradient() is gradient
        (weight,) = torch.autograd.grad(loss, m[1].conv2.weight, retain_graph=True)
        parameters = list(m[0].parameters())
        clone = torch.autograd.grad(y, parameters, gradient.clone(), retain_graph=True)
        again = torch.autograd.grad(loss, y, retain_graph=True)
        same = torch.autograd.grad(y, parameters, again, retain_graph=True)
        results.append({str(i): t for i, t in enumerate((gradient, weight, *clone, *same))})
    _assert_same(results[1], results[0])
    del gradient, results, again
    assert held() is None
    assert taken == [False, True, False, True, False, False, True, True]


def test_double_backward_says_so_still():
    module, x = _made()
    ours = fuse(copy.deepcopy(module))
    x.requires_grad_()
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(_loss(ours(x)), x, create_graph=True)
    (expected,) = torch.autograd.grad(_loss(module(x)), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _packed(pack, unpack):
    def run(module, x):
        with saved_tensors_hooks(pack, unpack):
            y = module(x)
        _loss(y).backward()

    return run


def _offloaded(module, x):
    with save_on_cpu(pin_memory=False):
        y = module(x)
    _loss(y).backward()


def _checkpointed(reentrant):
    def run(module, x):
        for m in module:
            x = checkpoint(m, x, use_reentrant=reentrant)
        _loss(x).backward()

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
    _check(run)
    assert taken == [False] * 3


def test_two_blocks_in_one_checkpoint():
    _check(lambda m, x: _loss(checkpoint(m, x, use_reentrant=False)).backward())
    _check(lambda m, x: _loss(checkpoint(m, x, use_reentrant=True)).backward())


def test_packed_tensors_are_unpacked_once():
    """By the chain that saved them, and by no other."""
    module, x = _made()
    unpacked = []
    packed = iter(range(10**6))

    def unpack(pair):
        unpacked.append(pair[0])
        return pair[1]

    _gradients(fuse(module), x, _packed(lambda t: (next(packed), t.clone()), unpack), "reference")
    assert unpacked and len(unpacked) == len(set(unpacked))


@pytest.mark.parametrize("epilogue", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_plan_decides(epilogue, gradient, taken, monkeypatch):
    fusion = Fusion(prologue=True, dgrad_epilogue=epilogue, dgrad_prologue=gradient)
    monkeypatch.setattr(plan, "training", lambda *args: fusion)
    _check()
    assert taken == [False, epilogue, epilogue]


@pytest.mark.skipif(not ops.available("triton", DEVICE), reason="not available here")
def test_blocks_of_other_backends_and_orders(taken):
    """The second block reads what the first has in an order, or a dtype, that its kernels do not take."""
    module, x = _made(_blocks()[:2], torch.float32)
    expected = _gradients(copy.deepcopy(module).double(), x.double())

    def run(m, x):
        with use_backend("reference"):
            y = m[0](x)
        with use_backend("triton"):
            z = m[1](y)
        _loss(z).backward()

    for order in (torch.contiguous_format, torch.channels_last):
        ours = fuse(copy.deepcopy(module)).to(memory_format=order)
        actual = _gradients(ours, x.contiguous(memory_format=order), run)
        _assert_same({k: v.double() for k, v in actual.items()}, expected, 1e-4)
    assert taken == [False, False, False, True]


def test_compiled_without_graph_breaks():
    module, x = _made()
    torch._dynamo.reset()
    expected = _gradients(copy.deepcopy(module), x)
    compiled = torch.compile(fuse(copy.deepcopy(module)), fullgraph=True, backend="aot_eager")
    actual = _gradients(compiled, x, backend="reference")
    for got, exact in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-9)


def test_compiled_autograd():
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    torch._dynamo.reset()

    def run(module, x):
        loss = _loss(module(x))
        with compiled_autograd._enable(lambda graph: graph):
            loss.backward()

    _check(run)


def test_a_backward_in_inference_mode(taken):
    """Its gradients have no version."""

    def run(module, x):
        loss = _loss(module(x))
        with torch.inference_mode():
            loss.backward()

    _check(run)
    assert taken == [False] * 3


def test_nothing_is_kept_alive():
    """Neither a graph without a backward, nor after one; without the collector's help."""
    module, x = _made()
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
                _loss(y).backward()
                assert first.grad_fn.offer.operands(x, first.shape, False) is None
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

        module, x = _made()
        with saved_tensors_hooks(pack, lambda t: t), use_backend("reference"):
            y = fuse(module)(x)
        assert y.grad_fn is not None
        return sum(sizes.values())

    with_it = count()
    monkeypatch.setattr(block_border, "offer", lambda ctx, operands: None)
    assert with_it == count()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_blocks_on_two_streams(taken):
    module, x = _made(dtype=torch.float32)
    expected = _gradients(copy.deepcopy(module).double(), x.double())

    def run(m, x):
        y, other = m[0](x), torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            loss = _loss(m[1:](y))
        torch.cuda.current_stream().wait_stream(other)
        loss.backward()
        torch.cuda.synchronize()

    actual = _gradients(fuse(module), x, run, "triton")
    _assert_same({k: v.double() for k, v in actual.items()}, expected, 1e-3)
    assert taken == [False, True, False]
