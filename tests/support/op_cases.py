"""What the tests of the memory-bound ops share: the matrix, ops strung together, and plain PyTorch doing the same."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from torch import Tensor

from resnet_fused import ops
from resnet_fused.contract import in_double
from resnet_fused.ops.backends import implementation

OPS = torch.ops.resnet_fused
# Functions of an op's name and arguments, `reference.add_act(x, other, relu)`.
reference, aten = (
    SimpleNamespace(**{op: implementation(backend, op) for op in ops.OPS if ops.implements(backend, op)})
    for backend in ("reference", "aten")
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(not ops.available(name, DEVICE), reason=f"{ops.unavailable(name, DEVICE)}")
    )
    for name in ("reference", "triton", "cuda", "cpu")
]
NCHW, NHWC = torch.contiguous_format, torch.channels_last
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (2, 8, 4, 6),  # octets both ways
    (3, 35, 5, 7),  # octets nowhere
    (2, 65, 3, 8),
    (5, 3, 9, 4),
    (4, 1, 6, 5),  # dense both ways
    (7, 16, 1, 1),  # dense both ways
    (2, 72, 7, 7),  # a width that does not divide a block
]
EPS = 1e-5

backends = pytest.mark.parametrize("backend", BACKENDS)
half_backends = pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values != ("cpu",)])


def backends_of(op: str) -> pytest.MarkDecorator:
    """Those that have a kernel for this op, where not all have."""
    return pytest.mark.parametrize("backend", [p for p in BACKENDS if ops.implements(p.values[0], op)])


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def activation(shape, dtype=torch.float32, layout=NCHW) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE, memory_format=layout)


def vector(channels: int) -> Tensor:
    return torch.randn(channels, device=DEVICE)


def weights(channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias, the weight zero in the first channel and negative in the second."""
    weight = torch.randn(channels)
    weight[:2] = torch.tensor([0.0, -1.5])[:channels]
    return weight.to(DEVICE), vector(channels)


def misaligned(t: Tensor) -> Tensor:
    """The same values and strides, one element off the alignment of the allocation."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].as_strided(t.shape, t.stride()).copy_(t)


def pixels(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Strides agree wherever a dimension has more than one element."""
    return all(p == q for p, q, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1)


def statistics(backend, x, rows, weight=None, bias=None, running=(None, None), momentum=0.1):
    return OPS.bn_finalize(
        *OPS.bn_stats(x, rows, backend=backend), weight, bias, *running, momentum, EPS, backend=backend
    )


def train(backend, x, weight, bias, dy, rows=3, residual=None, shortcut=None, relu=True, mask_from="bits"):
    """Batch norm (+ residual, itself behind an affine map `shortcut`) (+ ReLU), forward and backward."""
    running = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
    scale, shift, mean, invstd = statistics(backend, x, rows, weight, bias, running)
    with_mask = relu and (residual is not None or mask_from == "bits")
    y, mask = OPS.bn_apply(x, scale, shift, residual, *(shortcut or (None, None)), relu, with_mask, backend=backend)
    args = dy, x, mask if with_mask else None, scale, shift, mean, invstd
    sums = OPS.bn_backward_reduce(*args, relu, rows, backend=backend)
    dx, dresidual = OPS.bn_backward_apply(
        *args, *sums, float(len(pixels(x))), relu, residual is not None, backend=backend
    )
    results = {
        "y": y,
        "dx": dx,
        "dbias": sums[0],
        "dweight": sums[1],
        "running_mean": running[0],
        "running_var": running[1],
    }
    return results | ({} if residual is None else {"dresidual": dresidual})


def plain(x, weight, bias, dy, residual=None, shortcut=None, relu=True):
    """The same by autograd, with vectors in fp32, or all in fp64."""
    dtype, vectors = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (t.to(vectors).requires_grad_() for t in (weight, bias))
    x = x.detach().requires_grad_()
    running = (
        torch.zeros(x.shape[1], dtype=vectors, device=x.device),
        torch.ones(x.shape[1], dtype=vectors, device=x.device),
    )
    y = F.batch_norm(x, *running, weight, bias, True, 0.1, EPS)
    leaves = {"dx": x, "dweight": weight, "dbias": bias}
    if residual is not None:
        residual = residual.detach().requires_grad_()
        leaves["dresidual"] = residual
        r = residual
        if shortcut is not None:
            # The op hands back the gradient of the sum; that of the affine map is its caller's.
            scale, shift = (v.to(vectors).view(-1, 1, 1) for v in shortcut)
            r = leaves["dresidual"] = (residual.to(vectors) * scale + shift).to(dtype)
        y = y + r
    y = F.relu(y) if relu else y
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y, "running_mean": running[0], "running_var": running[1], **dict(zip(leaves, gradients, strict=True))}


def check_train(backend, x, weight, bias, dy, residual=None, shortcut=None, relu=True, **how):
    actual = train(backend, x, weight, bias, dy, residual=residual, shortcut=shortcut, relu=relu, **how)
    assert same_memory_order(actual["y"], x) and same_memory_order(actual["dx"], x)
    arguments = x, weight, bias, dy, residual, shortcut, relu
    magnitudes = plain(*in_double((x, weight, bias, dy.abs(), residual, shortcut, relu)))
    counted = torch.where(dy.isnan(), 0, dy)
    xhat = F.batch_norm(x.double(), None, None, None, None, True, 0.1, EPS)
    terms = {
        "dbias": magnitudes["dbias"],
        "dweight": pixels(counted.double() * xhat).abs().sum(0),
        "running_mean": 0.1 * pixels(x.double()).abs().mean(0),
    }
    assert_no_worse({name: actual[name] for name in magnitudes}, plain, arguments, terms=terms)
    return actual


@contextlib.contextmanager
def environment(**variables):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def stem(backend, x, dtype, rows=3, dy=None, weight=None, bias=None):
    channels = x.shape[1]
    weight = torch.ones(channels, device=DEVICE) if weight is None else weight
    bias = torch.zeros(channels, device=DEVICE) if bias is None else bias
    scale, shift, mean, invstd = statistics(backend, x, rows, weight, bias)
    y, index = OPS.bn_act_max_pool(x, scale, shift, backend=backend)
    dy = torch.ones_like(y) if dy is None else torch.empty_like(y).copy_(dy)
    args = dy, index, x, scale, shift, mean, invstd
    sums = OPS.bn_act_max_pool_backward_reduce(*args, rows, backend=backend)
    dx = OPS.bn_act_max_pool_backward_apply(*args, *sums, float(len(pixels(x))), backend=backend)
    return {"pooled": y, "index": index, "stem dx": dx, "stem dbias": sums[0], "stem dweight": sums[1]}


def plain_stem(x, weight, bias, dy):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)), 3, 2, 1)
    gradients = torch.autograd.grad(y, (x, bias, weight), dy)
    return {"pooled": y, **dict(zip(("stem dx", "stem dbias", "stem dweight"), gradients, strict=True))}
