"""PyTorch's own samples and error inputs of batch norm, convolution, ReLU and max pool, run through ours.

Plain PyTorch in the same dtype and in float64 gives the expected results, gradients and state; where it raises, ours
raises the same type with the same message. What PyTorch runs a forced kernel may refuse, and then says why.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contract import assert_within_contract, largest
from networks import AVAILABLE, DEVICE
from tiers import larger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_fused import functional, fuse, use_backend
from resnet_fused.contract import changed, in_double, longest_sum, realisations
from resnet_fused.nn import BatchNormAct2d

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

# PyTorch's test suite forbids itself to set flags outside a context manager; whoever runs next in this process may.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

OPS = {op.name: op for op in op_db if op.variant_test_name == ""}
MODULES = {info.module_cls: info for info in module_db}
NHWC = torch.channels_last
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What a forced backend may say; anything else would be a surprise.
REFUSALS = re.compile(
    r"cannot run here: .*(got (float64|int|complex|torch\.)|floating point|must be torch|group|dilation|channels|"
    r"kernel|stride|the weight is)"
)

backends = pytest.mark.parametrize("backend", AVAILABLE)


def _sampled(dtypes: list[torch.dtype]) -> list[object]:
    """One of every width of float and one integer for every tier, the others for the largest."""
    small = (torch.float64, torch.float32, torch.bfloat16, torch.int32)
    return [dtype if dtype in small else larger(dtype) for dtype in dtypes]


def _dtypes(name: str) -> list[torch.dtype]:
    return sorted(OPS[name].dtypes, key=str)


def _every_layout(t: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """The layouts worth telling apart: as it comes, and channels_last where there is such a thing."""
    yield lambda v: v
    if isinstance(t, Tensor) and t.dim() == 4:
        yield lambda v: v.contiguous(memory_format=NHWC) if v.dim() == 4 else v


def _leaves(arguments: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda t: layout(t.detach().clone()).requires_grad_(t.requires_grad), arguments)


class Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]
    state: list[Tensor]


def _results(call: Callable[..., Any], arguments: Any, modules: tuple[nn.Module, ...] = ()) -> Results:
    """Outputs, gradients of what wants one, and the tensors handed in behind the call (running statistics change)."""
    args, kwargs = arguments
    y = call(*args, **kwargs)
    outputs = list(y) if isinstance(y, tuple) else [y]
    tensors = [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor)]
    wanted = [t for t in tensors if t.requires_grad] + [p for m in modules for p in m.parameters()]
    gradients: list[Tensor] = []
    if wanted and outputs[0].requires_grad:
        weights = torch.cos(torch.arange(outputs[0].numel(), device=y[0].device if isinstance(y, tuple) else y.device))
        found = torch.autograd.grad(
            outputs[0], wanted, weights.view(outputs[0].shape).to(outputs[0].dtype), allow_unused=True
        )
        gradients = [torch.zeros(()) if g is None else g for g in found]
    state = [t for t in tensors if not t.requires_grad] + [b for m in modules for b in m.buffers()]
    return Results([t.detach() for t in outputs], gradients, [t.detach() for t in state])


def _compare(ours: Callable[[], Results], plain: Callable[..., Results], arguments: Any, backend: str) -> bool:
    """Whether `ours()` ran; it must do what `plain(*arguments)` does. A forced backend may refuse instead."""
    try:
        expected = plain(*changed(arguments, lambda t: t))
    except Exception as error:
        with pytest.raises(type(error)) as raised, use_backend(backend):
            ours()
        assert str(raised.value) == str(error)
        return False
    try:
        with use_backend(backend):
            actual = ours()
    except RuntimeError as error:
        assert backend in ("triton", "cuda") and REFUSALS.search(str(error)), error
        return False
    exact = plain(*in_double(arguments))
    # A gradient or a mean may be a sum that cancels, as that of a bias behind batch norm: the floor is then that of
    # what is summed, which is as large as the outputs and the gradients (or their own gradient, 1) are.
    scale = max([1.0, *(largest(t) for t in (*exact.outputs, *exact.gradients))])
    addends = longest_sum(*tree_leaves(arguments))
    for kind, *tensors in zip(Results._fields, actual, expected, exact, strict=True):
        for k, (a, e, t) in enumerate(zip(*tensors, strict=True)):
            if not e.is_floating_point():
                assert torch.allclose(a, e) if e.is_complex() else torch.equal(a, e), f"{kind} {k}"
                continue
            again = ([getattr(r, kind)[k] for r in runs] for runs in realisations(plain, arguments))  # noqa: B023
            how = {"again": again, "addends": addends, "scale": 0.0 if kind == "outputs" else scale}
            assert_within_contract(a, e, t, f"{kind} {k}", **how)
    return True


def _check_function(ours: Callable[..., Any], plain: Callable[..., Any], arguments: Any, backend: str) -> int:
    """How many of the layouts of one sample ours ran on."""
    ran = 0
    for layout in _every_layout(arguments[0][0]):
        own = _leaves(arguments, layout)
        ran += _compare(
            lambda own=own: _results(ours, changed(own, lambda t: t)),
            lambda args, kwargs: _results(plain, (args, kwargs)),
            own,
            backend,
        )
    return ran


@functools.cache
def _samples(name: str, dtype: torch.dtype) -> list[Any]:
    """(arguments, keyword arguments) of every sample; nobody writes into them."""
    gradients = dtype.is_floating_point or dtype.is_complex
    found = OPS[name].sample_inputs(DEVICE, dtype, requires_grad=gradients)
    return [((s.input, *s.args), s.kwargs) for s in found]


def _errors(name: str) -> list[Any]:
    found = [error.sample_input for error in OPS[name].error_inputs(DEVICE)]
    return [((s.input, *s.args), s.kwargs) for s in found]


# --- functions --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", _sampled(_dtypes("nn.functional.batch_norm")), ids=str)
def test_batch_norm(backend, dtype):
    ran = 0
    for args, kwargs in _samples("nn.functional.batch_norm", dtype):
        x, mean, var, weight, bias = (*args, None, None, None, None)[:5]
        arguments = ((x, mean, var, weight, bias), kwargs)

        def ours(x, mean, var, weight, bias, training=False, momentum=0.1, eps=1e-5):
            return functional.batch_norm_act(
                x, mean, var, weight, bias, training=training, momentum=momentum, eps=eps, act=None
            )

        ran += _check_function(ours, F.batch_norm, arguments, backend)
    assert ran >= 10


def _geometry(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("stride", "padding", "dilation", "groups") if name in kwargs}


@backends
@pytest.mark.parametrize("dtype", _sampled(_dtypes("nn.functional.conv2d")), ids=str)
def test_conv2d(backend, dtype):
    samples = _samples("nn.functional.conv2d", dtype)
    if backend == "triton":
        # every fourth, each in one of the dtypes that its kernels have
        samples = samples[4 * FLOATING[1:].index(dtype) :: 12] if dtype in FLOATING[1:] else samples[::4]
    _conv2d(samples, backend)


@pytest.mark.larger
@pytest.mark.parametrize("dtype", _sampled(_dtypes("nn.functional.conv2d")), ids=str)
def test_conv2d_on_more_of_the_samples(dtype):
    if "triton" in AVAILABLE:
        _conv2d(_samples("nn.functional.conv2d", dtype)[::4], "triton")


def _conv2d(samples: list[Any], backend: str) -> None:
    ran = 0
    for args, kwargs in samples:

        def ours(x, weight, bias, geometry=_geometry(kwargs)):  # noqa: B008
            return functional.conv_affine_act(x, weight, None, bias, **geometry, act=None)

        def plain(x, weight, bias, geometry=_geometry(kwargs)):  # noqa: B008
            return F.conv2d(x, weight, bias, **geometry)

        arguments = ((*args, None)[:3], {})
        ran += _check_function(ours, plain, arguments, backend)
        without = tree_map_only(Tensor, lambda t: t.detach(), arguments)  # inference: one kernel
        ran += _check_function(ours, plain, without, backend)
    assert ran > 0


@backends
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
def test_conv2d_with_batch_norm_behind_it(backend, dtype, mode):
    """The convolution's samples again, a batch norm behind each: in training, frozen, and folded into the weight."""
    samples = _samples("nn.functional.conv2d", dtype)[:: 13 if backend == "triton" else 2]
    ran = _conv_bn(samples, dtype, backend, mode)
    assert ran or (dtype == torch.float64 and backend in ("triton", "cuda"))  # their kernels have no float64


@backends
@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
def test_error_inputs_of_conv2d(backend, mode):
    _conv_bn(_errors("nn.functional.conv2d"), torch.float32, backend, mode)


def _conv_bn(samples: list[Any], dtype: torch.dtype, backend: str, mode: str) -> int:
    """On how many samples and layouts ours ran."""
    ran = 0
    for args, kwargs in samples:
        x, weight, bias = (*args, None)[:3]
        channels = weight.shape[0]
        mean, scale, shift = (torch.randn(channels, dtype=dtype) for _ in range(3))
        var = torch.rand(channels, dtype=dtype) + 0.5
        geometry, training = _geometry(kwargs), mode == "training"

        def ours(x, weight, bias, mean, var, scale, shift, geometry=geometry, training=training):
            return functional.conv_bn_act(
                x, weight, mean, var, scale, shift, bias=bias, **geometry, training=training, act=None
            )

        def plain(x, weight, bias, mean, var, scale, shift, geometry=geometry, training=training):
            return F.batch_norm(F.conv2d(x, weight, bias, **geometry), mean, var, scale, shift, training)

        arguments = ((x, weight, bias, mean, var, scale.requires_grad_(), shift.requires_grad_()), {})
        if mode == "inference":
            arguments = tree_map_only(Tensor, lambda t: t.detach(), arguments)
        ran += _check_function(ours, plain, arguments, backend)
    return ran


@backends
@pytest.mark.parametrize("dtype", _sampled(_dtypes("nn.functional.relu")), ids=str)
def test_relu(backend, dtype):
    assert _relu(backend, dtype, range(600 if backend == "triton" else 20_000)) > 0


@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "triton"])
@pytest.mark.parametrize("dtype", _dtypes("nn.functional.relu"), ids=str)
@pytest.mark.larger
def test_relu_of_a_million_elements(backend, dtype):
    assert _relu(backend, dtype, range(20_000, 2**31)) > 0


def _relu(backend: str, dtype: torch.dtype, sizes: range) -> int:
    """On how many of the samples of so many elements ours ran."""
    gradients = dtype.is_floating_point
    ran = 0
    for sample in list(OPS["nn.functional.relu"].reference_inputs(DEVICE, dtype, requires_grad=gradients)):
        x = sample.input.detach()
        if x.numel() not in sizes:
            continue
        # as it comes, and as an activation
        for shaped in (x, x.reshape(1, -1, *x.shape[-2:])) if x.dim() > 1 and x.numel() else (x,):
            zero = torch.zeros_like(shaped)
            arguments = ((shaped.requires_grad_(gradients), zero.requires_grad_(gradients)), {})
            ran += _check_function(functional.add_act, lambda x, other: F.relu(x + other), arguments, backend)
            shaped = shaped.detach()
    return ran


# --- modules ----------------------------------------------------------------------------------------------------------


class _Pooled(nn.Module):
    """A stem with any pool."""

    def __init__(self, channels: int, pool: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 1, device=DEVICE, dtype=dtype)
        self.bn = nn.BatchNorm2d(2, device=DEVICE, dtype=dtype)
        self.pool = nn.MaxPool2d(**pool)

    def forward(self, x: Tensor) -> Any:
        return self.pool(F.relu(self.bn(self.conv(x))))


def _check_module(plain: nn.Module, ours: nn.Module, arguments: Any, backend: str) -> int:
    def run(module: nn.Module, args: Any, kwargs: Any) -> Results:
        return _results(module, (args, kwargs), (module,))

    ran = 0
    for layout in _every_layout(arguments[0][0]):
        own = _leaves(arguments, layout)
        ran += _compare(
            lambda own=own: run(*changed((ours, *own), lambda t: t)),
            run,
            (plain, *own),
            backend,
        )
    return ran


@backends
@pytest.mark.parametrize("errors", [False, True], ids=["samples", "errors"])
def test_max_pool2d(backend, errors):
    """Every fortieth of the 1440 samples, and all that are a ResNet's pool, behind convolution, batch norm and ReLU."""
    samples = _errors("nn.functional.max_pool2d") if errors else _samples("nn.functional.max_pool2d", torch.float32)
    fused = [s for s in samples if s[1].get("stride") == 2 and s[1].get("padding") in (1, (1, 1))]
    fused = [s for s in fused if s[1]["dilation"] == 1 and s[1]["kernel_size"] == 3 and not s[1]["ceil_mode"]]
    if not errors:
        samples = fused[:4] + samples[::40] if backend != "triton" else fused[:2]
        assert fused
    ran = 0
    for (x,), pool in samples:
        channels = x.shape[-3]
        if channels == 0:
            continue  # no convolution takes that
        pool = {"stride": None, **pool}
        for training in (True, False):
            plain = _Pooled(channels, pool, x.dtype).train(training)
            ran += _check_module(plain, fuse(copy.deepcopy(plain)), ((x.detach().requires_grad_(),), {}), backend)
    assert ran > 0 or errors


@backends
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_modules(backend, dtype, training):
    """`BatchNormAct2d` for `nn.BatchNorm2d`: outputs, gradients, buffers."""
    info, ran = MODULES[nn.BatchNorm2d], 0
    for sample in info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=True, training=training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        if "bias" in kwargs:
            continue  # the next test
        plain = nn.BatchNorm2d(*args, **kwargs, device=DEVICE, dtype=dtype).train(training)
        ours = BatchNormAct2d(*args, **kwargs, act=None, device=DEVICE, dtype=dtype).train(training)
        ran += _check_module(plain, ours, (sample.forward_input.args, {}), backend)
    assert ran >= 8 or dtype == torch.float64


@backends
@pytest.mark.parametrize("training", [True, False])
def test_conv_and_batch_norm_modules(backend, training):
    """Every convolution of the database before every batch norm of it, fused by `fuse`."""
    convs, norms = MODULES[nn.Conv2d], MODULES[nn.BatchNorm2d]
    options = {"device": DEVICE, "dtype": torch.float32, "requires_grad": True, "training": training}
    ran = 0
    for sample in convs.module_inputs_func(convs, **options):
        for norm in norms.module_inputs_func(norms, **options):
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            settings = norm.constructor_input
            plain = nn.Sequential(
                nn.Conv2d(*args, **kwargs, bias=False, device=DEVICE),
                nn.BatchNorm2d(args[1], *settings.args[1:], **settings.kwargs, device=DEVICE),
                nn.ReLU(),
            ).train(training)
            x = torch.randn_like(sample.forward_input.args[0].detach().repeat_interleave(2, -1)).requires_grad_()
            ran += _check_module(plain, fuse(copy.deepcopy(plain)), ((x,), {}), backend)
            if backend == "triton" and ran > 6:
                return
    assert ran >= 20


@backends
@pytest.mark.parametrize("training", [True, False])
def test_error_inputs_of_the_batch_norm_module(backend, training):
    info = MODULES[nn.BatchNorm2d]
    options = {"device": DEVICE, "dtype": torch.float32, "requires_grad": False, "training": training}
    for error in info.module_error_inputs_func(info, **options):
        sample = error.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        plain = nn.BatchNorm2d(*args, **kwargs, device=DEVICE).train(training)
        ours = BatchNormAct2d(*args, **kwargs, act=None, device=DEVICE).train(training)
        ran = _check_module(plain, ours, (sample.forward_input.args, {}), backend)
        assert ran == 0 or not training
