"""Hypothesis draws shapes, strides, dtypes and flags; what plain PyTorch computes, ours computes on every backend.

A fixed seed and few examples by default; `make properties` draws many, anew each time.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from contract import assert_no_worse
from networks import AVAILABLE, DEVICE
from torch import Tensor

from resnet_fused import functional, use_backend

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("RESNET_FUSED_EXAMPLES", "0"))
backends = pytest.mark.parametrize("backend", AVAILABLE)


def _draws(backend: str) -> settings:
    few = 8 if backend == "triton" else 60
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=EXAMPLES == 0,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """[N, C, H, W] of small integers and halves, exact in every dtype, in any strides; means far from zero too."""
    shape = [draw(st.integers(1, 5)), draw(st.integers(1, 18)), draw(st.integers(1, 7)), draw(st.integers(1, 7))]
    order = draw(st.permutations(range(4)))
    step = draw(st.sampled_from([1, 1, 2]))  # every element, or every other one, of the innermost dimension
    sizes = [shape[d] for d in order]
    sizes[-1] *= step
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    memory = torch.randint(-16, 17, sizes, generator=generator) / 4 + draw(st.sampled_from([0, 0, 8]))
    memory = memory[..., ::step]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = memory.to(dtype).to(DEVICE).permute([order.index(d) for d in range(4)])
    if 1 in shape:  # ambiguous strides: there PyTorch's own gradient is wrong on a CPU (docs/numerics.md)
        layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
        x = torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=layout).copy_(x)
    return x


def _vector(size: int, seed: int) -> Tensor:
    return (torch.randint(2, 9, (size,), generator=torch.Generator().manual_seed(seed)) / 4).to(DEVICE)


def _gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    found = torch.autograd.grad(y, list(leaves.values()), dy.bfloat16().to(y.dtype))  # the same one in every dtype
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


@backends
def test_batch_norm_act(backend):
    @_draws(backend)
    @given(activations(), st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1), st.sampled_from([1e-5, 0.1]))
    def check(x, training, affine, with_residual, momentum, eps):
        channels = x.shape[1]
        assume(not training or x.numel() // channels > 4)  # with fewer, the gradient is nothing but rounding

        def run(function, x, name):
            own = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            leaves = {"x": own}
            vectors = torch.float64 if x.dtype == torch.float64 else torch.float32
            weight = bias = residual = None
            if affine:
                weight, bias = (_vector(channels, k).to(vectors).requires_grad_() for k in (1, 2))
                leaves |= {"weight": weight, "bias": bias}
            if with_residual:
                residual = (own.detach() + 1000).requires_grad_()  # no ReLU changes sides by a rounding
                leaves |= {"residual": residual}
            mean, var = (_vector(channels, k).to(vectors) for k in (3, 4))
            with use_backend(name):
                y = function(own, mean, var, weight, bias, residual)
            return _gradients(y, leaves) | {"running_mean": mean, "running_var": var}

        act = "relu" if with_residual else None

        def ours(x, mean, var, weight, bias, residual):
            return functional.batch_norm_act(
                x, mean, var, weight, bias, residual, training=training, momentum=momentum, eps=eps, act=act
            )

        def plain(x, mean, var, weight, bias, residual):
            y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
            return y if residual is None else F.relu(y + residual)

        assert_no_worse(run(ours, x, backend), lambda x: run(plain, x, "auto"), (x,), joint=True)

    check()


@backends
def test_conv_bn_act(backend):
    geometry = st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))

    @_draws(backend)
    @given(activations(), st.sampled_from(["train", "frozen", "inference"]), st.sampled_from([1, 3, 5]), geometry,
           st.integers(1, 9), st.integers(1, 3), st.booleans(), st.booleans())  # fmt: skip
    def check(x, mode, kernel, pads, outputs, groups, with_bias, nhwc_weight):
        stride, padding, dilation = pads
        groups = groups if x.shape[1] % groups == 0 else 1
        channels = outputs * groups
        reach = dilation * (kernel - 1) + 1
        assume(min(x.shape[2:]) + 2 * padding >= reach)
        assume(backend != "triton" or dilation == 1 or stride == 1)
        # native PyTorch crashes: oneDNN's fp16 on CPUs with AVX512-FP16, of images one pixel wide (torch 2.14)
        assume(x.dtype != torch.float16 or kernel > 1 or dilation == 1 or stride == 1)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        shape = (channels, x.shape[1] // groups, kernel, kernel)
        weights = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(outputs)).to(DEVICE) / 8
        pixels = F.conv2d(x.detach().float(), weights, **options)
        assume(mode != "train" or pixels.numel() // channels > 8)

        def run(function, x, name):
            own, weight = (v.detach().to(x.dtype, copy=True) for v in (x, weights))
            weight = weight.contiguous(memory_format=torch.channels_last if nhwc_weight else torch.contiguous_format)
            vectors = torch.float64 if x.dtype == torch.float64 else torch.float32
            bias = _vector(channels, 5).to(x.dtype) if with_bias else None
            constants = [_vector(channels, k).to(vectors) for k in range(4)]
            leaves = {"x": own, "weight": weight}
            if mode != "inference":
                own.requires_grad_(), weight.requires_grad_()
            with use_backend(name):
                y = function(own, weight, *constants, bias)
            return _gradients(y, leaves) if mode != "inference" else {"y": y}

        def ours(x, weight, mean, var, scale, shift, bias):
            return functional.conv_bn_act(
                x, weight, mean, var, scale, shift, bias=bias, training=mode == "train", act=None, **options
            )

        def plain(x, weight, mean, var, scale, shift, bias):
            return F.batch_norm(F.conv2d(x, weight, bias, **options), mean, var, scale, shift, mode == "train")

        assert_no_worse(run(ours, x, backend), lambda x: run(plain, x, "auto"), (x,), joint=True)

    check()


@backends
def test_the_stem(backend):
    @_draws(backend)
    @given(activations(), st.booleans())
    def check(x, training):
        channels = x.shape[1]
        assume(not training or x.numel() // channels > 4)

        def run(x, name):
            own = x.detach().clone(memory_format=torch.preserve_format)
            vectors = torch.float64 if x.dtype == torch.float64 else torch.float32
            mean, var, weight, bias = (_vector(channels, k).to(vectors) for k in range(4))
            with use_backend(name):
                y = functional.batch_norm_act_max_pool(own, mean, var, weight, bias, training=training)
            return {"y": y, "running_mean": mean, "running_var": var}

        assert_no_worse(run(x, backend), lambda x: run(x, "aten"), (x,), joint=True)

    check()
