"""What PyTorch runs and what it refuses, asked of every function on every backend.

`auto`, `aten` and `reference` do what PyTorch does. Forced kernels may refuse what PyTorch runs, with their reason.
What PyTorch refuses is refused with PyTorch's own exception.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import AVAILABLE, DEVICE
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import functional, fuse, use_backend
from resnet_fused.nn import BatchNormAct2d

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = [*AVAILABLE, "aten"]
F32, HALF, BF16, F64, INT = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32


class _Subclass(Tensor):
    pass


def _outcome(call: Callable[[], Tensor]) -> Tensor | tuple[type, str]:
    torch.manual_seed(0)
    try:
        return call().detach()
    except Exception as error:
        return type(error), str(error)


def _check(what: object, plain: Callable[[], Tensor], ours: Callable[[], Tensor], dtype: torch.dtype = F32) -> None:
    """`dtype` is the coarsest that anything is rounded to on the way."""
    expected = _outcome(plain)
    for backend in BACKENDS:
        with use_backend(backend):
            actual = _outcome(ours)
        if isinstance(expected, tuple):
            assert actual == expected, (what, backend)
        elif isinstance(actual, tuple):
            assert backend in ("triton", "cuda") and "cannot run here: " in actual[1], (what, backend, actual)
        else:
            largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            near = {"rtol": 0, "atol": (4 * torch.finfo(dtype).eps if dtype == BF16 else 1e-4) * largest}
            assert type(actual) is type(expected), (what, backend)
            torch.testing.assert_close(actual, expected, **near, msg=lambda text: f"{what}, {backend}: {text}")  # noqa: B023


def _vectors(dtypes: tuple[torch.dtype, ...], channels: int = 3) -> Callable[[], list[Tensor]]:
    made = [(torch.rand(channels) + 0.5).to(DEVICE, dtype) for dtype in dtypes]
    return lambda: [v.clone() for v in made]


def _functions(x, weight, vectors, residual, training: bool, dtype: torch.dtype = F32) -> None:
    """Every function on these operands, which are made anew for every call."""
    relu, geometry = {"act": "relu"}, {"training": training}
    _check(
        "batch_norm_act",
        lambda: F.relu(F.batch_norm(x(), *vectors(), training) + residual()),
        lambda: functional.batch_norm_act(x(), *vectors(), residual(), **geometry, **relu),
        dtype,
    )
    _check(
        "batch_norm_act_max_pool",
        lambda: F.max_pool2d(F.relu(F.batch_norm(x(), *vectors(), training)), 3, 2, 1),
        lambda: functional.batch_norm_act_max_pool(x(), *vectors(), **geometry),
        dtype,
    )
    _check("add_act", lambda: F.relu(x() + residual()), lambda: functional.add_act(x(), residual()), dtype)
    _check(
        "conv_bn_act",
        lambda: F.relu(F.batch_norm(F.conv2d(x(), weight()), *vectors(), training) + residual()),
        lambda: functional.conv_bn_act(x(), weight(), *vectors(), residual(), **geometry),
        dtype,
    )
    _check(
        "conv_affine_act",
        lambda: F.relu(F.conv2d(x(), weight()) + residual()),
        lambda: functional.conv_affine_act(x(), weight(), None, None, residual()),
        dtype,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes(training, autocast):
    """Of the activation, the weights, the biases, the running statistics and the residual: a sample of all."""
    every = itertools.product((F32, HALF, BF16, F64, INT), (F32, HALF, F64), (F32, BF16), (F32, HALF), (F32, BF16))
    fitting = [(d, w, v, v, r) for d, w, v, r in itertools.product((HALF, F32), (F32, HALF), (F32, HALF), (F32, HALF))]
    for dtype, filters, bias, running, added in [*random.Random(0).sample(list(every), 24), *fitting[::2]]:
        data = (3 * torch.randn(2, 3, 4, 4)).to(DEVICE, dtype)
        wanted = dtype.is_floating_point and training
        filter_, residual = torch.randn(3, 3, 1, 1).to(DEVICE, filters), torch.randn(2, 3, 4, 4).to(DEVICE, added)
        vectors = _vectors((running, running, bias if filters == F64 else filters, bias))
        with torch.autocast(DEVICE, BF16, enabled=autocast):
            _functions(
                lambda data=data, wanted=wanted: data.clone().requires_grad_(wanted),
                lambda filter_=filter_: filter_,
                vectors,
                lambda residual=residual: residual,
                training,
                BF16,
            )


SHAPES = [
    ((2, 3, 4, 4), (1, 3, 1, 1), 3),  # residuals that broadcast
    ((2, 3, 4, 4), (3, 1, 1), 3),
    ((1, 3, 4, 4), (2, 3, 4, 4), 3),
    ((2, 3, 4, 4), (5, 1, 1), 3),  # and one that does not
    ((2, 3, 4, 4), (2, 3, 4, 4), 4),  # vectors of another size
    ((2, 1, 4, 4), (2, 3, 4, 4), 1),
    ((3, 4, 4), (3, 4, 4), 3),  # other ranks
    ((2, 3), (2, 3), 3),
    ((2, 3, 2, 4, 4), (2, 3, 2, 4, 4), 3),
    ((3,), (3,), 3),
    ((0, 3, 4, 4), (0, 3, 4, 4), 3),  # nothing
    ((2, 0, 4, 4), (2, 0, 4, 4), 0),
    ((2, 3, 0, 4), (2, 3, 0, 4), 3),
    ((1, 3, 1, 1), (1, 3, 1, 1), 3),  # one value a channel
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape, added, channels", SHAPES, ids=str)
def test_shapes(training, shape, added, channels):
    weight = torch.randn(3, 3, 1, 1, device=DEVICE)
    for gradient in (False, True):
        _functions(
            lambda gradient=gradient: torch.randn(shape, device=DEVICE).requires_grad_(gradient),
            lambda: weight,
            _vectors((F32,) * 4, channels),
            lambda: torch.ones(added, device=DEVICE),
            training,
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", list(itertools.product((False, True), repeat=3)), ids=str)
def test_tensor_subclasses(training, which):
    kinds = [_Subclass if one else Tensor for one in which]
    x, weight, residual = (torch.randn(size, device=DEVICE) for size in ((2, 3, 4, 4), (3, 3, 1, 1), (2, 3, 4, 4)))
    vectors = _vectors((F32,) * 4)
    _functions(
        lambda: x.as_subclass(kinds[0]),
        lambda: weight.as_subclass(kinds[1]),
        lambda: [*vectors()[:2], *(v.as_subclass(kinds[1]) for v in vectors()[2:])],
        lambda: residual.as_subclass(kinds[2]),
        training,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.0, -1.0])
def test_statistics_that_are_not_there(training, eps):
    x, weight = torch.randn(2, 3, 4, 4, device=DEVICE), torch.randn(3, 3, 1, 1, device=DEVICE)
    settings = {"training": training, "momentum": 0.1, "eps": eps}
    for mean, var, gradient in itertools.product((False, True), repeat=3):
        own = weight.detach().requires_grad_(gradient)

        def vectors(mean=mean, var=var):
            return [torch.ones(3, device=DEVICE) if there else None for there in (mean, var)] + [None, None]

        def norm(z, vectors=vectors):
            return F.relu(F.batch_norm(z, *vectors(), **settings))

        def pool(vectors=vectors):
            return functional.batch_norm_act_max_pool(x, *vectors(), **settings)

        def convolution(own=own, vectors=vectors):
            return functional.conv_bn_act(x, own, *vectors(), **settings)

        _check("norm", partial(norm, x), partial(functional.batch_norm_act, x, *vectors(), **settings))
        _check("pool", lambda norm=norm: F.max_pool2d(norm(x), 3, 2, 1), pool)
        _check("convolution", lambda norm=norm, own=own: norm(F.conv2d(x, own)), convolution)


BAD = [torch.zeros(2, 4, 3, 3, dtype=INT), torch.zeros(2, 4, 3, 3, dtype=F64), torch.zeros(2, 5, 3, 3), torch.zeros(4)]


def test_what_was_decided_under_autocast_does_not_hold_without_it():
    """bf16 data and an fp32 filter meet under autocast alone; how the layer runs is remembered in between."""
    x, filter_ = torch.randn(2, 3, 4, 4).to(DEVICE, BF16).requires_grad_(), torch.randn(3, 3, 1, 1).to(DEVICE)
    for enabled in (True, False, True):
        with torch.autocast(DEVICE, BF16, enabled=enabled):
            _check(
                ("conv_bn_act", enabled),
                lambda: F.relu(F.batch_norm(F.conv2d(x, filter_), None, None, training=True)),
                lambda: functional.conv_bn_act(x, filter_, None, None, training=True),
                BF16,
            )


@pytest.mark.parametrize("bad", BAD, ids=lambda t: f"{t.dtype} {list(t.shape)}")
def test_modules_raise_what_plain_ones_raise_and_count_as_they_do(bad):
    for plain, ours in (
        (nn.BatchNorm2d(4), BatchNormAct2d(4, act=None)),
        (nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), None),
        (BasicBlock(4, 4), None),
    ):
        with pytest.raises(Exception) as expected:  # noqa: B017, PT011
            plain.to(DEVICE)(bad.to(DEVICE))
        counts = [m.num_batches_tracked.item() for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
        for backend in BACKENDS:
            fused = copy.deepcopy(ours or fuse(copy.deepcopy(plain))).to(DEVICE)
            for m in fused.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.reset_running_stats()
            with use_backend(backend), pytest.raises(expected.type) as actual:
                fused(bad.to(DEVICE))
            assert str(actual.value) == str(expected.value)
            assert counts == [m.num_batches_tracked.item() for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
