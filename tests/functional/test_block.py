"""Residual blocks as one autograd function, against plain blocks in the same dtype and in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from contract import assert_no_worse
from networks import randomised
from op_cases import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import dispatch, functional, fuse, ops, use_backend
from resnet_fused.dispatch import Fusion
from resnet_fused.functional.residual import ConvBN, backward, choose_chain, decide

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not ops.available(name, DEVICE), reason="not available here"))
    for name in ("reference", "triton", "cuda")
]
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
FUSIONS = [Fusion(*switches) for switches in itertools.product((True, False), repeat=4)]


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class PaperBottleneck(Bottleneck):
    """The paper's v1: the stride in the first 1x1."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__(inplanes, planes, 1, _projection(inplanes, 4 * planes, stride))
        self.conv1.stride = (stride, stride)


BLOCKS = {
    "basic": (lambda: BasicBlock(8, 8), (2, 8, 5, 7)),
    "basic, strided": (lambda: BasicBlock(8, 12, 2, _projection(8, 12, 2)), (2, 8, 7, 5)),
    "bottleneck": (lambda: Bottleneck(16, 4), (2, 16, 5, 6)),
    "bottleneck, strided": (lambda: Bottleneck(8, 8, 2, _projection(8, 32, 2)), (2, 8, 7, 9)),
    "the paper's bottleneck": (lambda: PaperBottleneck(8, 4, 2), (3, 8, 7, 7)),
    "grouped": (lambda: Bottleneck(16, 4, groups=2, base_width=128), (2, 16, 4, 5)),
    "dilated": (lambda: Bottleneck(24, 6, dilation=2), (1, 24, 7, 7)),
    "one pixel": (lambda: BasicBlock(16, 16), (12, 16, 1, 1)),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def chains(monkeypatch):
    """The chains that run."""
    ran = []
    original = backward.join
    monkeypatch.setattr(backward, "join", lambda chain, *args: (ran.append(chain), original(chain, *args))[1])
    return ran


def _made(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = BLOCKS[name]
    module = randomised(make()).to(DEVICE)
    return module, torch.randn(shape, device=DEVICE)


def _step(module: nn.Module, x: torch.Tensor, backend: str = "auto") -> dict[str, torch.Tensor | None]:
    """Output, gradients of the input and of every parameter, and the state behind one forward and backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with use_backend(backend):
        y = module(x)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    y.backward(weights.to(y.dtype))
    results = {"y": y, "dx": x.grad} | {f"d{name}": p.grad for name, p in module.named_parameters()}
    return results | dict(module.named_buffers())


class _ReLUAt(nn.Module):
    """ReLU whose step stands at `threshold` times the largest input, instead of at zero."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > self.threshold * x.detach().abs().max(), x, 0)


def _assert_same_step(plain: nn.Module, x: torch.Tensor, backend: str, dtype: torch.dtype) -> dict:
    """In half precision a value that rounding carries across zero changes a ReLU's mask, here or there: compared in the
    Euclidean norm, and with the difference that the step on either side of zero makes.
    """
    actual = _step(fuse(copy.deepcopy(plain)).to(dtype), x.to(dtype), backend)
    plain, x, around = copy.deepcopy(plain).to(dtype), x.to(dtype), []
    for side in (1, -1) if dtype != torch.float32 else ():
        module = copy.deepcopy(plain).double()
        module.relu = _ReLUAt(side * 4 * torch.finfo(dtype).eps)
        around.append(_step(module, x.double()))
    assert_no_worse(actual, _step, (plain, x), around=around, norm=dtype != torch.float32)
    return actual


@backends
@dtypes
@every_block
def test_a_training_step(backend, dtype, name, chains):
    plain, x = _made(name)
    _assert_same_step(plain.train(), x, backend, dtype)
    assert len(chains) == 1


@backends
@pytest.mark.parametrize("name", ["basic, strided", "bottleneck"])
@pytest.mark.parametrize("weights_nhwc", [False, True])
def test_memory_formats(backend, name, weights_nhwc):
    plain, x = _made(name)
    for x_format in (torch.contiguous_format, torch.channels_last):
        module = plain.to(memory_format=torch.channels_last if weights_nhwc else torch.contiguous_format)
        step = _assert_same_step(module, x.contiguous(memory_format=x_format), backend, torch.float32)
        assert step["dx"].is_contiguous(memory_format=x_format)
        nhwc = weights_nhwc or x_format == torch.channels_last
        assert step["y"].is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        for parameter, like in plain.named_parameters():
            assert step[f"d{parameter}"].stride() == like.stride(), parameter


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "".join("01"[s] for s in vars(f).values()))
@pytest.mark.parametrize("name", ["bottleneck, strided", "bottleneck"])
def test_every_way_to_fuse_is_right(name, fusion, monkeypatch, chains):
    monkeypatch.setattr(dispatch, "training", lambda *args: fusion)
    plain, x = _made(name)
    _assert_same_step(plain.train(), x, "reference", torch.float32)
    assert [layer.fusion for layer in chains[0].branch[1:]] == [fusion] * 2


@pytest.mark.parametrize("conv_backends", list(itertools.product(("reference", "aten"), repeat=3)), ids="-".join)
@pytest.mark.parametrize("fusion", [FUSIONS[0], FUSIONS[-1]], ids=["all", "none"])
def test_the_plan_may_mix_backends(conv_backends, fusion, monkeypatch, chains):
    monkeypatch.setattr(dispatch, "training", lambda *args: fusion)
    monkeypatch.setattr(decide, "_conv_backends", lambda *args: conv_backends)
    for name in ("bottleneck, strided", "bottleneck"):
        plain, x = _made(name)
        _assert_same_step(plain.train(), x, "reference", torch.float32)
    assert chains[0].branch[1][2:5] == conv_backends


@pytest.mark.skipif(not ops.available("triton", DEVICE), reason="not available here")
@pytest.mark.parametrize("fusion", [FUSIONS[0], FUSIONS[7], FUSIONS[-1]], ids=["all", "prologue", "none"])
def test_triton_fuses_in_every_way(fusion, monkeypatch):
    monkeypatch.setattr(dispatch, "training", lambda *args: fusion)
    plain, x = _made("bottleneck, strided")
    _assert_same_step(plain.train(), x, "triton", torch.bfloat16)


@backends
@pytest.mark.parametrize("name", ["basic, strided", "bottleneck"])
@pytest.mark.parametrize("frozen", ["all batch norms", "the first batch norm", "the last batch norm"])
def test_frozen_batch_norm(backend, name, frozen, chains):
    plain, x = _made(name)
    norms = [m for m in plain.train().modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in {"all": norms, "the first": norms[:1], "the last": norms[-1:]}[
        frozen.removesuffix(" batch norms").removesuffix(" batch norm")
    ]:
        bn.eval()
    _assert_same_step(plain, x, backend, torch.float32)
    assert not all(layer.batch_statistics for layer in chains[0].layers)


@pytest.mark.parametrize("name", ["basic, strided", "bottleneck"])
@pytest.mark.parametrize("trained", range(6))
def test_frozen_parameters(name, trained):
    """One parameter wants a gradient: what lies below it is not computed, what lies above is right."""
    plain, x = _made(name)
    parameters = list(plain.parameters())
    for p in parameters:
        p.requires_grad_(p is parameters[trained])
    results = []
    for module in (fuse(copy.deepcopy(plain)), copy.deepcopy(plain)):
        with use_backend("reference"):
            y = module(x)
        y.square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@backends
def test_a_gradient_of_nothing_below_the_join(backend):
    plain, x = _made("bottleneck")
    for p in plain.parameters():
        p.requires_grad_(p is plain.bn3.bias)
    module = fuse(copy.deepcopy(plain))
    with use_backend(backend):
        module(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(module.bn3.bias.grad, plain.bn3.bias.grad)


@backends
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_inf_go_where_plain_pytorch_lets_them(backend, special):
    plain, x = _made("bottleneck")
    plain.eval()  # constant statistics: a NaN stays in its image
    x[0, 3, 2, 1] = special
    ours = _step(fuse(copy.deepcopy(plain)), x, backend)
    expected = _step(plain, x)
    for what in ("y", "dx", "dconv1.weight", "dconv3.weight", "dbn2.bias"):
        assert torch.equal(ours[what].isnan(), expected[what].isnan()), what


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_running_statistics_over_steps(momentum):
    plain, x = _made("basic")
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    ours = fuse(copy.deepcopy(plain))
    for step in range(3):
        with use_backend("reference"):
            ours(x * (step + 1))
        plain(x * (step + 1))
    for (name, a), (_, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norms_without_parameters_or_buffers(options, chains):
    plain = BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, **options))
    x = torch.randn(2, 4, 5, 5)
    for training in (True, False):
        _assert_same_step(plain.train(training), x, "reference", torch.float32)
    assert len(chains) == 2


@backends
def test_autocast(backend, chains):
    plain, x = _made("bottleneck, strided")

    def run(module, x, name="auto"):
        exact = x.dtype == torch.float64
        with torch.autocast(DEVICE, torch.bfloat16, enabled=not exact), use_backend(name):
            y = module(x)
        assert y.dtype == (torch.float64 if exact else torch.bfloat16)
        (y if exact else y.float()).square().sum().backward()
        return {"y": y, **{n: p.grad for n, p in module.named_parameters()}}

    assert_no_worse(run(fuse(copy.deepcopy(plain)), x, backend), run, (plain, x), norm=True)
    assert len(chains) == 1


def test_autocast_of_a_full_precision_identity_is_no_chain(chains):
    plain, x = _made("bottleneck")
    layer = ConvBN(torch.randn(16, 16, 1, 1), None, None, None, None, ((1, 1), (0, 0), (1, 1), 1), True)
    with torch.autocast("cpu", torch.bfloat16), use_backend("reference"):
        assert choose_chain("residual_block", x, [layer], identity=True) is None
        assert choose_chain("residual_block", x.bfloat16(), [layer], identity=True) is not None
        assert choose_chain("residual_block", x, [layer]) is not None


def test_a_decision_is_made_once_and_anew_where_anything_differs(monkeypatch):
    made, decides = [], decide._decide
    monkeypatch.setattr(decide, "_decide", lambda *args: made.append(args) or decides(*args))
    x, vector = torch.randn(2, 16, 6, 6), torch.rand(16)
    layer = ConvBN(torch.randn(16, 16, 1, 1), vector, vector, vector, vector, ((1, 1), (0, 0), (1, 1), 1), True)

    def chosen(x=x, layers=(layer,), **how):
        return choose_chain("residual_block", x, layers, **how)

    with use_backend("reference"):
        first = chosen()
        assert first is not None and chosen(x + 1, [layer._replace(momentum=0.5)]) is first and len(made) == 1
        others = [
            lambda: chosen(x[:1]),
            lambda: chosen(x.double()),
            lambda: chosen(identity=True),
            lambda: chosen(residual=x + 1),
            lambda: chosen(residual=x.double()),
            lambda: chosen(relu=False),
            lambda: chosen(layers=[layer, layer]),
            lambda: chosen(layers=[layer], shortcut=layer),
            lambda: chosen(layers=[layer._replace(weight=torch.randn(16, 16, 3, 3))]),
            lambda: chosen(layers=[layer._replace(weight=layer.weight.double())]),
            lambda: chosen(layers=[layer._replace(bn_weight=None)]),
            lambda: chosen(layers=[layer._replace(bn_bias=vector.double())]),
            lambda: chosen(layers=[layer._replace(training=False)]),
            lambda: chosen(layers=[layer._replace(eps=1e-3)]),
            lambda: chosen(layers=[layer._replace(geometry=((2, 2), (0, 0), (1, 1), 1))]),
        ]
        for count, other in enumerate(others, 2):
            assert other() is not first and len(made) == count
        with torch.autocast("cpu", torch.bfloat16):
            assert chosen() is not first
        assert chosen() is first
    with use_backend("aten"):
        assert chosen() is None
    dispatch.choice.forget()
    with use_backend("reference"):
        assert chosen() is not first and chosen() == first


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    plain, x = _made("basic, strided")
    module = fuse(copy.deepcopy(plain))
    plain_step, results = _step(plain, x), []
    leaf = x.clone().requires_grad_()
    with use_backend("reference"):
        y = checkpoint(module, leaf, use_reentrant=reentrant)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype))
    results.append(leaf.grad)
    torch.testing.assert_close(leaf.grad, plain_step["dx"], rtol=1e-4, atol=1e-4)


def test_in_place_edits_of_saved_tensors_are_noticed():
    plain, x = _made("bottleneck")
    module = fuse(plain)
    for edit in (lambda: x.add_(1), lambda: module.conv2.weight.data_ptr() and module.conv2.weight.add_(1)):
        with use_backend("reference"):
            y = module(x)
        with torch.no_grad():
            edit()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_backward_twice():
    plain, x = _made("basic")
    module = fuse(plain)
    with use_backend("reference"):
        y = module(x)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()


def test_a_chain_compiles_without_graph_breaks():
    plain, x = _made("bottleneck, strided")
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        module = fuse(copy.deepcopy(plain))
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        results.append(_step(call, x, "reference"))
    for (what, expected), actual in zip(results[0].items(), results[1].values(), strict=True):
        torch.testing.assert_close(actual, expected, msg=what)


def test_errors_are_pytorchs():
    plain, x = _made("basic")
    for bad in (torch.randn(1, 8, 1, 1), torch.randn(2, 5, 4, 4), torch.randn(8, 4)):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            plain(bad)
        module = fuse(copy.deepcopy(plain))
        with pytest.raises(expected.type) as actual, use_backend("reference"):
            module(bad)
        assert str(actual.value) == str(expected.value)


def test_a_forced_backend_that_cannot_run_says_why():
    layer = ConvBN(torch.randn(4, 4, 3, 3), None, None, None, None, ((2, 2), (2, 2), (2, 2), 1), True)
    x = torch.randn(1, 4, 9, 9)
    assert choose_chain("residual_block", x, [layer]) is None
    if ops.available("triton", "cpu"):
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"residual_block: backend 'triton'.*dilation"):
            choose_chain("residual_block", x, [layer])


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_a_network_in_float64(network, chains):
    """Every parameter, the input and the running statistics of a whole network."""
    plain = randomised(getattr(torchvision.models, network)(num_classes=10)).to(DEVICE).double()
    x = torch.randn(2, 3, 64, 64, device=DEVICE, dtype=torch.float64)
    actual, expected = _step(fuse(copy.deepcopy(plain)), x, "reference"), _step(copy.deepcopy(plain), x)
    for what, exact in expected.items():
        error = (actual[what] - exact).double().norm().item()
        assert error <= 1e-9 * exact.double().norm().item(), what
    assert len([chain for chain in chains if len(chain.branch) > 1]) == {"resnet18": 8, "resnet50": 16}[network]


@pytest.mark.skipif(not ops.available("cuda", DEVICE), reason="not available here")
def test_a_network_of_compiled_kernels():
    plain = randomised(torchvision.models.resnet18(num_classes=10)).to(DEVICE)
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    assert_no_worse(_step(fuse(copy.deepcopy(plain)), x, "cuda"), _step, (plain, x), norm=True)


def test_what_is_saved_for_backward():
    """Raw outputs, per-channel vectors, the input and one bit an element of the result: 10 of eager's 12 units."""
    plain = Bottleneck(64, 16)
    x = torch.randn(2, 64, 8, 8)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def count(module, backend):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), use_backend(backend):
            module(x)
        held = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
        return sum(size for pointer, size in saved.items() if pointer not in held)

    unit = 2 * 16 * 8 * 8 * 4
    vectors = 4 * 4 * (16 + 16 + 64)
    assert count(fuse(copy.deepcopy(plain)), "reference") == 10 * unit + 2 * 64 * 8 * 8 // 8 + vectors
    assert count(plain, "auto") > 12 * unit


def test_functional_conv_bn_act_is_a_chain_of_one(chains):
    x, weight, residual = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(2, 6, 5, 5)
    with use_backend("reference"):
        functional.conv_bn_act(x, weight, None, None, residual=residual, padding=1, training=True).sum().backward()
    assert len(chains) == 1 and not chains[0].identity
    assert weight.grad is not None
