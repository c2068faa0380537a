"""The numerics contract on whole networks. `python tests/integration/test_numerics.py` prints the table of the docs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from contract import assert_no_worse
from networks import AVAILABLE, pictures, quick_backends, small_resnet, step
from torch import Tensor, nn

from resnet_fused import fuse, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LAYERS = ("layer1", "layer2.0", "layer2.1", "fc")


def layers(model: nn.Module, x: Tensor, dtype: torch.dtype, training: bool) -> Iterator[tuple]:
    """(name, plain layer, fused layer, input): the input is what float64 gives, so that no error is counted twice."""
    exact = copy.deepcopy(model).to(dtype).double().train(training)
    plain = copy.deepcopy(model).to(dtype).train(training)
    fused = fuse(copy.deepcopy(plain))
    inputs: dict[str, Tensor] = {}
    for name in LAYERS:

        def keep(module, args, y, name=name):  # fmt: skip
            inputs[name] = args[0].detach().to(dtype)

        exact.get_submodule(name).register_forward_hook(keep)
    exact(x.to(dtype).double())
    for name in LAYERS:
        yield name, plain.get_submodule(name), fused.get_submodule(name), inputs[name]


@torch.no_grad()
def errors(model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str, training: bool) -> dict[str, tuple]:
    """(plain's, the fused model's) error of each layer's output, relative to float64 in the Euclidean norm."""
    found = {}
    for name, plain, fused, y in layers(model, x, dtype, training):
        truth = copy.deepcopy(plain).double()(y.double())
        with use_backend(backend):
            results = plain(y), fused(y)
        found[name] = tuple(float((v.double() - truth).norm() / truth.norm()) for v in results)
    return found


@quick_backends
@dtypes
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_errs_at_most_twice_as_much_as_plain_pytorch(backend, dtype, training):
    for name, plain, fused, x in layers(small_resnet(), pictures(4, 32), dtype, training):
        with torch.no_grad():
            with use_backend(backend):
                y = fused(x)
            assert_no_worse(y, nn.Module.__call__, (plain, x), name, norm=True)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_two_runs_give_the_same_bits(backend):
    """Outputs, gradients and statistics of two training steps, in deterministic mode and out of it."""
    channels, size = (8, 32) if backend != "triton" else (4, 16)
    model, x = fuse(small_resnet(channels=channels)), pictures(3, size)
    runs = []
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        own = copy.deepcopy(model)
        runs.append([step(own, x, backend) for _ in range(2)])
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert all(v is None or torch.equal(v, b[k]) for k, v in a.items())


@quick_backends
@dtypes
def test_a_picture_alone_and_in_a_batch(backend, dtype):
    """In evaluation a result depends on its own picture only: bit by bit, wherever plain PyTorch's does."""
    plain = small_resnet().eval().to(dtype)
    fused, x = fuse(copy.deepcopy(plain)), pictures(4, 24, dtype)
    with torch.no_grad():
        differences = []
        for model, name in ((plain, "auto"), (fused, backend)):
            with use_backend(name):
                alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
                differences.append(float((model(x) - alone).abs().max()))
                poisoned = x.clone()
                poisoned[1] = float("nan")
                others = model(poisoned)[[0, 2, 3]]
                assert torch.equal(others.isnan(), torch.zeros_like(others, dtype=torch.bool))
    magnitude = float(alone.abs().max())
    assert differences[1] <= max(2 * differences[0], 4 * torch.finfo(dtype).eps * magnitude)


@quick_backends
def test_statistics_survive_an_overflow_no_worse_than_pytorchs(backend):
    """One picture whose convolution overflows float16: statistics are spoilt at most where PyTorch's are."""
    plain = small_resnet().half()
    plain.conv1.weight.data *= 64
    fused = fuse(copy.deepcopy(plain))
    x = pictures(4, 24, torch.float16)
    for poisoned in (False, True, False):
        batch = x.clone()
        if poisoned:
            batch[0] = 6e4
        for model, name in ((plain, "auto"), (fused, backend)):
            with torch.no_grad(), use_backend(name):
                model(batch)
    states = fused.state_dict(), plain.state_dict()
    for name, value in states[1].items():
        assert not (value.isfinite() & ~states[0][name].isfinite()).any(), name
    assert not states[1]["bn1.running_var"].isfinite().all()  # it did overflow


if __name__ == "__main__":
    torch.manual_seed(0)
    network, batch = small_resnet(channels=32), pictures(8, 64)
    print("| mode | dtype | layer | plain | " + " | ".join(AVAILABLE[:3]) + " |")
    print("|---" * (4 + len(AVAILABLE[:3])) + "|")
    for mode in (True, False):
        for kind in DTYPES:
            found = [errors(network, batch, kind, name, mode) for name in AVAILABLE[:3]]
            for layer in LAYERS[:3]:
                values = [found[0][layer][0], *(f[layer][1] for f in found)]
                label = f"{'training' if mode else 'evaluation'} | {str(kind).removeprefix('torch.')} | {layer}"
                print(f"| {label} | " + " | ".join(f"{v:.1e}" for v in values) + " |")
