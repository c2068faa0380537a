"""Hooks, parametrizations and other people's tensors and modules: correct through the plain path, and reported."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import AVAILABLE, DEVICE, assert_same_step, pictures, quick_backends, small_resnet, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from resnet_fused import fuse, report, unfuse, use_backend
from resnet_fused.nn import BatchNormAct2d, ConvBNAct2d

torchvision = pytest.importorskip("torchvision")


class _Offset(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01


class _Subclass(Tensor):
    """Somebody's own tensor."""


def _subclassed(block: nn.Module) -> None:
    data = block.conv2.weight.detach().as_subclass(_Subclass)
    block.conv2.weight = nn.Parameter(data)


def _replaced_forward(block: nn.Module) -> None:
    forward = block.conv2.forward
    block.conv2.forward = lambda x: 2 * forward(x)


def _fake_quantised(block: nn.Module) -> None:
    from torch.ao.quantization import FakeQuantize

    parametrize.register_parametrization(
        block.conv2, "weight", FakeQuantize(dtype=torch.qint8, quant_min=-8, quant_max=7)
    )


def _quantisation_aware(block: nn.Module) -> None:
    from torch.ao.nn.qat import Conv2d
    from torch.ao.quantization import get_default_qat_qconfig

    block.conv2.qconfig = get_default_qat_qconfig("x86")
    block.conv2 = Conv2d.from_float(block.conv2)


def _stubbed(block: nn.Module) -> None:
    from torch.ao.quantization import QuantStub

    block.conv2 = nn.Sequential(QuantStub(), block.conv2)


# What is done to a convolution or batch norm of the block, and what `report` then says; None: it is fused as before.
CHANGES: dict[str, tuple[Callable[[nn.Module], object], str | None]] = {
    "forward hook": (lambda b: b.conv2.register_forward_hook(lambda m, a, y: y * 2), "hooks"),
    "forward pre-hook": (lambda b: b.bn2.register_forward_pre_hook(lambda m, a: (a[0] + 1,)), "hooks"),
    "backward hook": (lambda b: b.conv2.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)), "hooks"),
    "backward pre-hook": (lambda b: b.bn1.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,)), "hooks"),
    "tensor hook": (lambda b: b.conv2.weight.register_hook(lambda g: g * 2), None),
    "hook after accumulation": (
        lambda b: b.conv2.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 2 * p.grad)),
        None,
    ),
    "parametrization": (lambda b: parametrize.register_parametrization(b.conv2, "weight", _Offset()), "Conv2d"),
    "parametrized norm": (lambda b: parametrize.register_parametrization(b.bn2, "weight", _Offset()), "BatchNorm2d"),
    "weight norm": (lambda b: parametrizations.weight_norm(b.conv2), "Conv2d"),
    "weight norm of old": (lambda b: nn.utils.weight_norm(b.conv2), "hooks"),
    "spectral norm": (lambda b: parametrizations.spectral_norm(b.conv2), "Conv2d"),
    "spectral norm of old": (lambda b: nn.utils.spectral_norm(b.conv2), "hooks"),
    "pruning": (lambda b: prune.l1_unstructured(b.conv2, "weight", 0.5), "hooks"),
    "pruning made permanent": (
        lambda b: prune.remove(prune.l1_unstructured(b.conv2, "weight", 0.5), "weight"),
        None,
    ),
    "tensor subclass": (_subclassed, "not plain tensors"),
    "replaced forward": (_replaced_forward, "forward"),
    "fake quantisation": (_fake_quantised, "Conv2d"),
    "quantisation-aware convolution": (_quantisation_aware, "Conv2d"),
    "quantisation stub": (_stubbed, "QuantStub"),
}  # fmt: skip


@quick_backends
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*observer", "ignore:.*reduce_range")
def test_what_others_do_to_modules_is_honoured_and_reported(backend, when, change):
    act, reason = CHANGES[change]
    plain, x = _out_of_place(small_resnet()), pictures()
    fused = copy.deepcopy(plain)
    for model in (plain, fused):
        torch.manual_seed(2)
        if model is fused and when == "after":
            step(fuse(model), x, backend)
            model.load_state_dict(plain.state_dict(), strict=False) if not _reparametrised(plain) else None
        act(model.layer1)
    if _reparametrised(plain) or when == "after":
        fused.load_state_dict(plain.state_dict())
    fuse(fused)
    expected = step(plain, x)
    if change == "tensor subclass" and backend in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match="cannot run here: the input is a _Subclass"):  # which the weight made it
            step(fused, x, backend)
        return
    assert_same_step(step(fused, x, backend), expected, 1e-3)
    with torch.no_grad(), use_backend(backend):
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-3, atol=1e-3)
    reasons = [why for name, why in report(fused).skipped if name.startswith("layer1")]
    assert (reasons == []) if reason is None else any(reason in why for why in reasons), reasons


def _out_of_place(model: nn.Module) -> nn.Module:
    """PyTorch's backward hooks do not go together with modules that change in place what they are given."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def _reparametrised(model: nn.Module) -> bool:
    return set(model.state_dict()) != set(small_resnet().state_dict())


SUMMED_IN_PLACE = ("layer1.bn2", "layer2.0.bn3", "layer2.1.bn3")  # by torchvision's `out += identity`


@quick_backends
def test_hooks_see_what_they_see_in_the_plain_model(backend):
    """Every module of the network: inputs and outputs of forward, gradients of backward, in the same order."""
    plain, x = _out_of_place(small_resnet()), pictures()
    logs = []
    for model, name in ((plain, "auto"), (fuse(copy.deepcopy(plain)), backend)):
        seen: list[tuple[str, str, float]] = []
        for path, module in model.named_modules():
            if any(True for _ in module.children()):
                continue

            def forward(module, args, y, path=path, seen=seen):
                seen.append((path, "forward", float(y.detach().double().norm())))

            def backward(module, grads, outputs, path=path, seen=seen):
                seen.append((path, "backward", float(outputs[0].double().norm())))

            module.register_forward_hook(forward)
            if path not in SUMMED_IN_PLACE:
                module.register_full_backward_hook(backward)
        step(model, x, name)
        logs.append(seen)
    assert [entry[:2] for entry in logs[1]] == [entry[:2] for entry in logs[0]]
    for (path, kind, actual), (_, _, expected) in zip(*logs[::-1], strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4), (path, kind)


@quick_backends
def test_removing_a_hook_restores_the_fusion(backend):
    fused = fuse(small_resnet())
    before = report(fused)
    handle = fused.layer1.conv2.register_forward_hook(lambda m, a, y: y)
    hooked = report(fused)
    assert dict(before.fused)["layer1"].startswith("BasicBlock: ") and before.skipped == []
    assert dict(hooked.fused)["layer1"] == "conv1-bn1-relu, bn2-add-relu"  # all but the convolution
    assert ("layer1.conv2", "a Conv2d has hooks") in hooked.skipped
    handle.remove()
    assert report(fused) == before


@quick_backends
@pytest.mark.parametrize("training", [True, False])
def test_feature_extraction_by_torch_fx(backend, training):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    plain, x = small_resnet().train(training), pictures()
    fused = fuse(copy.deepcopy(plain))
    assert get_graph_node_names(fused) == get_graph_node_names(plain)
    nodes = {"layer1.conv2": "a", "layer1.relu_1": "b", "layer2.0.bn3": "c", "layer2": "d"}
    results = [create_feature_extractor(model, nodes)(x) for model in (plain, fused)]
    with use_backend(backend):
        results.append(create_feature_extractor(fused, nodes)(x))
    for name, value in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_inputs_of_a_tensor_subclass(backend):
    """They take the plain path; forced kernels say so."""
    x = torch.randn(2, 3, 5, 5).as_subclass(_Subclass)
    module = BatchNormAct2d(3)
    expected = nn.BatchNorm2d(3)(x).relu()
    if backend in ("auto", "reference"):
        with use_backend(backend):
            y = module.train()(x)
        assert type(y) is _Subclass
        torch.testing.assert_close(y, expected)
    else:
        with use_backend(backend), pytest.raises(RuntimeError, match="cannot run here: the input is a _Subclass"):
            module(x)


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch.distributed is not built in")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on the CPU")
def test_dtensor_parameters_take_the_plain_path(one_process):
    """Parameters spread over a mesh, of one process here: `report` says why nothing is fused; results are right."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    plain = small_resnet().layer1
    fused = distribute_module(fuse(copy.deepcopy(plain)), mesh)
    assert report(fused).fused == [] and all("not plain tensors" in why for _, why in report(fused).skipped)
    x = torch.randn(2, 8, 6, 6)
    try:
        distribute_module(copy.deepcopy(plain), mesh)(distribute_tensor(x, mesh, [Replicate()])).sum().backward()
    except (NotImplementedError, RuntimeError) as error:  # what PyTorch cannot do, fused cannot: torch 2.11
        with pytest.raises(type(error)):
            fused(distribute_tensor(x, mesh, [Replicate()])).sum().backward()
        return
    expected = plain(x)
    actual = fused(distribute_tensor(x, mesh, [Replicate()])).full_tensor()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_our_own_modules_with_hooks_inside():
    for make in (lambda: ConvBNAct2d(3, 4, 3),):
        module, seen = make().eval(), []
        x = torch.randn(1, 3, 6, 6)
        expected = module(x)
        module.bn.register_forward_hook(lambda m, a, y, seen=seen: seen.append(tuple(y.shape)))
        torch.testing.assert_close(module(x), expected)
        assert seen == [(1, 4, 6, 6)]


def test_unfuse_keeps_what_was_done_in_between():
    model = fuse(small_resnet())
    model.layer1.conv2.register_forward_hook(lambda m, a, y: y * 2)
    prune.l1_unstructured(model.layer2[0].conv1, "weight", 0.5)
    x = pictures()
    expected = model.eval()(x)
    unfused = unfuse(model)
    assert "weight_orig" in dict(unfused.layer2[0].conv1.named_parameters())
    torch.testing.assert_close(unfused(x), expected)
