"""Public functions against plain PyTorch and float64 on every backend: values, gradients, state, layouts, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse

from resnet_fused import functional, ops, use_backend
from resnet_fused.contract import longest_sum

BACKENDS = [b for b in ("reference", "aten", "triton", "cuda") if ops.available(b, "cpu")]
NHWC, NCHW = torch.channels_last, torch.contiguous_format
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _leaf(t, dtype=None, memory_format=torch.preserve_format):
    return t.detach().to(dtype or t.dtype).clone(memory_format=memory_format).requires_grad_(t.requires_grad)


def _cast(tensors, dtype, memory_format):
    """Leaves: activations in `dtype`, vectors in float32 beside 16 bits."""
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None if t is None else _leaf(t, dtype, memory_format) if t.dim() == 4 else _leaf(t, vector_dtype)
        for name, t in tensors.items()
    }


def _run(function, tensors, dtype, memory_format, backend):
    """`function` of the activations (4-D) and vectors (1-D), its results and the gradients of whatever requires one."""
    inputs = _cast(tensors, dtype, memory_format)
    with use_backend(backend):
        y = function(**inputs)
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    cotangent = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, list(wanted.values()), cotangent)
    results = {"y": y, **{f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}}
    for name, t in inputs.items():
        if name.startswith("running"):
            results[name] = t
    return results


def _assert_contract(ours, plain, tensors, dtype, memory_format, backend):
    actual = _run(ours, tensors, dtype, memory_format, backend)
    expected = _run(plain, tensors, dtype, memory_format, "auto")
    assert actual["y"].stride() == expected["y"].stride()
    for name in ("dx", "dweight"):
        if name in actual and actual[name].dim() == 4:
            assert actual[name].stride() == expected[name].stride(), f"{name} has other strides than plain PyTorch's"

    def again(tensors):
        return _run(plain, tensors, tensors["x"].dtype, torch.preserve_format, "auto")

    assert_no_worse(actual, again, (_cast(tensors, dtype, memory_format),), addends=longest_sum(*tensors.values()))


def _activation(*shape, requires_grad=True):
    return torch.randn(shape, dtype=torch.float64).to(torch.float16).double().requires_grad_(requires_grad)


def _vectors(channels):
    draw = torch.randn
    return {
        "running_mean": draw(channels).float(),
        "running_var": torch.rand(channels) + 0.5,
        "weight": draw(channels).requires_grad_(),
        "bias": draw(channels).requires_grad_(),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("act", ["relu", None])
def test_batch_norm_act(backend, memory_format, dtype, training, with_residual, act):
    shape = (3, 9, 5, 7)
    # An integer residual: hardly a sum lies within a rounding of zero, where plain PyTorch's two roundings may flip the
    # mask.
    residual = torch.randint(-2, 3, shape).double().requires_grad_() if with_residual else None
    tensors = {"x": _activation(*shape), **_vectors(9), "residual": residual}

    def ours(**t):
        return functional.batch_norm_act(**t, training=training, momentum=0.3, act=act)

    def plain(x, running_mean, running_var, weight, bias, residual):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.3)
        y = y if residual is None else y + residual
        return F.relu(y) if act else y

    _assert_contract(ours, plain, tensors, dtype, memory_format, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_act_max_pool(backend, memory_format, dtype, training):
    tensors = {"x": _activation(2, 6, 9, 12), **_vectors(6)}

    def ours(**t):
        return functional.batch_norm_act_max_pool(**t, training=training)

    def plain(x, running_mean, running_var, weight, bias):
        return F.max_pool2d(F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training)), 3, 2, 1)

    _assert_contract(ours, plain, tensors, dtype, memory_format, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval with gradients", "eval"])
@pytest.mark.parametrize("kernel,stride,groups", [(1, 1, 1), (3, 2, 1), (3, 1, 4)])
def test_conv_bn_act(backend, memory_format, dtype, mode, kernel, stride, groups):
    x = _activation(2, 16, 7, 6, requires_grad=mode != "eval")
    weight = (torch.randn(8, 16 // groups, kernel, kernel) / 8).double().requires_grad_(mode != "eval")
    vectors = {("bn_" + n if n in ("weight", "bias") else n): v.requires_grad_(False) for n, v in _vectors(8).items()}
    out = F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)
    residual = torch.randint(-2, 3, out.shape).double().requires_grad_(mode != "eval")
    tensors = {"x": x, "weight": weight, **vectors, "residual": residual}
    geometry = {"stride": stride, "padding": kernel // 2, "groups": groups}

    def ours(**t):
        y = functional.conv_bn_act(**t, **geometry, training=mode == "train")
        return y if mode != "eval" else y + torch.zeros((), requires_grad=True)

    def plain(x, weight, running_mean, running_var, bn_weight, bn_bias, residual):
        z = F.conv2d(x, weight, **geometry)
        y = F.relu(F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, mode == "train") + residual)
        return y if mode != "eval" else y + torch.zeros((), requires_grad=True)

    if backend == "triton" and groups > 1:
        with use_backend(backend):
            reason = ops.conv_refusal(
                backend,
                *(t.float().contiguous(memory_format=NHWC) for t in (x, weight)),
                None,
                ((1, 1), (1, 1), (1, 1), groups),
            )
        if reason is not None:
            with use_backend(backend), pytest.raises(RuntimeError, match="conv.*cannot run here: .*group"):
                ours(**{n: t.float() for n, t in tensors.items()})
            return
    if mode == "eval":
        with torch.no_grad(), use_backend(backend):
            cast = {
                n: (t.to(dtype).to(memory_format=memory_format) if t.dim() == 4 else t.float())
                for n, t in tensors.items()
            }
            actual, expected = functional.conv_bn_act(**cast, **geometry), plain(**cast)
            assert actual.stride() == expected.stride()
            assert_no_worse(actual, lambda t: plain(**t), (cast,), addends=longest_sum(*cast.values()))
        return
    _assert_contract(ours, plain, tensors, dtype, memory_format, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_conv_affine_act(backend, with_gradient):
    tensors = {
        "x": _activation(2, 8, 6, 5, requires_grad=with_gradient),
        "weight": (torch.randn(8, 8, 3, 3) / 8).double().requires_grad_(with_gradient),
        "scale": torch.randn(8).requires_grad_(with_gradient),
        "shift": torch.randn(8).requires_grad_(with_gradient),
        "residual": _activation(2, 8, 3, 3, requires_grad=with_gradient),
    }

    def ours(**t):
        return functional.conv_affine_act(**t, stride=2, padding=1)

    def plain(x, weight, scale, shift, residual):
        return F.relu(F.conv2d(x, weight, None, 2, 1) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual)

    if with_gradient:
        _assert_contract(ours, plain, tensors, torch.float32, NHWC, backend)
        return
    single = {n: t.float() for n, t in tensors.items()}
    with use_backend(backend):
        actual = ours(**single)
    assert_no_worse(actual, lambda t: plain(**t), (single,), addends=longest_sum(*single.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["relu", None])
def test_add_act(backend, act):
    tensors = {"x": _activation(2, 5, 3, 4), "other": _activation(2, 5, 3, 4)}

    def plain(x, other):
        return F.relu(x + other) if act else x + other

    _assert_contract(
        lambda x, other: functional.add_act(x, other, act=act), plain, tensors, torch.float32, NHWC, backend
    )


@pytest.mark.parametrize("act", ["relu", None])
def test_add_act_leaves_its_operands_alone(act):
    x, other = _activation(2, 5, 3, 4), _activation(2, 5, 3, 4)
    copies = x.clone(), other.clone()
    functional.add_act(x, other, act=act)
    with pytest.raises(TypeError, match="NoneType"):
        functional.add_act(x, None, act=act)  # also where it refuses
    assert torch.equal(x, copies[0]) and torch.equal(other, copies[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_where_pytorch_keeps_it(backend):
    x = torch.randn(2, 4, 5, 5)
    x[0, 1, 2, 3] = float("nan")
    x[1, 2, 0, 0] = float("inf")
    weight, mean, var = torch.randn(4, 4, 3, 3), torch.zeros(4), torch.ones(4)
    with torch.no_grad(), use_backend(backend):
        y = functional.conv_bn_act(x, weight, mean, var, padding=1)
    expected = F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), mean, var))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_nan_gradient_is_dropped_and_an_unmasked_one_kept(backend):
    x = torch.tensor([-1.0, 2.0, 3.0, -4.0]).view(1, 1, 2, 2).requires_grad_()
    dy = torch.tensor([float("nan"), 1.0, float("nan"), 1.0]).view(1, 1, 2, 2)
    with use_backend(backend):
        y = functional.batch_norm_act(x, torch.zeros(1), torch.ones(1))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.isnan().flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_offset_and_expanded_inputs(backend):
    base = torch.randn(4, 9, 6, 11)
    running = (torch.zeros(8), torch.ones(8))
    views = [base[:, 1:, :, 2:8], base[::2, 1:, ::2], base[:, 1:].transpose(2, 3), base[:1, 1:].expand(4, 8, 6, 11)]
    for view in views:
        x = view.clone().requires_grad_()
        strided = view.detach().requires_grad_()
        expected = F.relu(F.batch_norm(x, *(r.clone() for r in running), None, None, True))
        with use_backend(backend):
            actual = functional.batch_norm_act(strided, *(r.clone() for r in running), training=True)
        torch.testing.assert_close(actual, expected)
        dy = torch.randn(view.shape[::-1]).permute(3, 2, 1, 0)
        torch.testing.assert_close(torch.autograd.grad(actual, strided, dy), torch.autograd.grad(expected, x, dy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noncontiguous_parameters_and_running_statistics(backend):
    x = torch.randn(3, 4, 5, 5)
    storage = torch.rand(4, 4) + 0.5
    expected_storage = storage.clone()
    expected = F.relu(F.batch_norm(x, *expected_storage.unbind(1), True))
    with use_backend(backend):
        mean, var, weight, bias = storage.unbind(1)
        actual = functional.batch_norm_act(x, mean, var, weight, bias, training=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(storage, expected_storage)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_before_backward_and_backward_twice(backend):
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    mean, var = torch.zeros(4), torch.ones(4)
    with use_backend(backend):
        total = sum(functional.batch_norm_act(x * k, mean, var, training=True).square().sum() for k in (1, 2))
    first = torch.autograd.grad(total, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, x)[0])
    plain = sum(F.relu(F.batch_norm(x * k, None, None, training=True)).square().sum() for k in (1, 2))
    torch.testing.assert_close(first, torch.autograd.grad(plain, x)[0], rtol=1e-4, atol=1e-5)


def test_double_backward_and_forward_ad_are_right_by_default():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        return functional.batch_norm_act(x, None, None, weight, bias, training=True, act=None)

    assert torch.autograd.gradcheck(function, (x, weight, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_function_transforms_take_the_plain_path():
    x, tangent = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mean, var, weight = torch.zeros(3), torch.ones(3), torch.randn(3, 3, 3, 3)

    def ours(x):
        return functional.conv_bn_act(x, weight, mean, var, padding=1)

    def plain(x):
        return F.relu(F.batch_norm(F.conv2d(x, weight, padding=1), mean, var))

    torch.testing.assert_close(torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)))
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: plain(x).sum())(x)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend):
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3, requires_grad=True)
    bn = torch.rand(4, 8) + 0.5
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
            y = functional.conv_bn_act(x, weight, *(v.clone() for v in bn), padding=1, training=training)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert weight.grad.dtype == torch.float32


def test_backends_that_cannot_run_say_why():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for backend in BACKENDS:
        if backend in ("triton", "cuda"):
            with use_backend(backend), pytest.raises(RuntimeError, match=f"{backend}.*float64"):
                functional.batch_norm_act(x, None, None, training=True)
    with pytest.raises(ValueError, match="'trition'.*'triton'"), use_backend("trition"):
        pass
    with pytest.raises(ValueError, match="'gelu'.*'relu' or None"):
        functional.batch_norm_act(x, None, None, training=True, act="gelu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorch_raises_its_own_errors(backend):
    x, mean, var = torch.randn(2, 3, 4, 4), torch.zeros(3), torch.ones(3)
    cases = [
        (
            lambda f: f.conv_bn_act(x, torch.randn(4, 5, 3, 3), torch.zeros(4), torch.ones(4)),
            "expected input.*to have 5 channels",
        ),
        (
            lambda f: f.conv_bn_act(x, torch.randn(3, 3, 9, 9), mean, var),
            "Kernel size can't be greater than actual input size",
        ),
        (lambda f: f.batch_norm_act(x, torch.zeros(4), torch.ones(4)), "running_mean should contain 3 elements"),
        (lambda f: f.batch_norm_act(x[:1, :, :1, :1], mean, var, training=True), "more than 1 value per channel"),
    ]
    for call, message in cases:
        with use_backend(backend), torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=message):
            call(functional)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_weight_of_another_dtype_is_never_converted_in_silence(backend, gradient):
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1, dtype=torch.bfloat16, requires_grad=gradient)
    with use_backend(backend), pytest.raises(RuntimeError, match="(?i)bfloat16"):
        functional.conv_bn_act(x, weight, torch.zeros(5), torch.ones(5), training=gradient)
    with use_backend(backend), pytest.raises(RuntimeError, match="(?i)bfloat16"):
        functional.conv_affine_act(x, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("inputs", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_gradients_of_a_convolution_have_the_layouts_of_its_operands(backend, weights, inputs):
    """Already as backward returns them, before autograd's accumulation makes them so."""
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=inputs).requires_grad_()
    weight = torch.randn(6, 4, 3, 3).contiguous(memory_format=weights).requires_grad_()
    with use_backend(backend):
        y = functional.conv_affine_act(x, weight, act=None)
    dx, dweight = torch.autograd.grad(y.square().sum(), (x, weight))
    if backend != "aten" and backend != "cuda":  # those are native PyTorch convolutions
        assert dx.stride() == x.stride() and dweight.stride() == weight.stride()
    expected = torch.autograd.grad(F.conv2d(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close((dx, dweight), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_without_graph_breaks(backend):
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3, requires_grad=True)

    def function(x, mean, var):
        return functional.conv_bn_act(x, weight, mean, var, training=True, padding=1)

    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(8), torch.ones(8)
        with use_backend(backend):
            y = call(x, mean, var)
        weight.grad = None
        y.square().sum().backward()
        results.append((y, weight.grad, mean, var))
    torch.testing.assert_close(results[1], results[0])


def test_a_residual_alone_may_be_mapped_over():
    x, residuals = torch.randn(2, 4, 3, 3), torch.randn(5, 2, 4, 3, 3)
    mean, var = torch.zeros(4), torch.ones(4)
    mapped = torch.vmap(lambda residual: functional.batch_norm_act(x, mean, var, None, None, residual))(residuals)
    assert torch.equal(mapped, torch.stack([functional.batch_norm_act(x, mean, var, None, None, r) for r in residuals]))
