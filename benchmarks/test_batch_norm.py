"""Batch norm + residual + ReLU, stem, residual join: ours on every native backend, plain PyTorch, torch.compile.

The bytes are those of the activations that the op must read and write: in training forward x twice (statistics,
    normalise), the residual and y once;
in training backward x and dy twice, dx and the residual's gradient once.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from resnet_fused import functional, ops, use_backend

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH = 256 if ON_GPU else 8
NATIVE = [b for b in ("cuda", "triton") if ON_GPU and ops.available(b, "cuda")]
CONTESTANTS = ["eager", "compile", "auto", *NATIVE]
BLOCKS = [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]


def _plain(x, mean, var, weight, bias, residual, training):
    y = F.batch_norm(x, mean, var, weight, bias, training)
    return F.relu(y if residual is None else y + residual, inplace=True)


def _contestant(name, plain, ours):
    if name == "eager":
        return plain
    if name == "compile":
        return torch.compile(plain, dynamic=False)

    @functools.wraps(ours)
    def forced(*args, **kwargs):
        with use_backend(name):
            return ours(*args, **kwargs)

    return forced


def _measure(benchmark, call, group, contestant, passes, elements):
    """Time `call`, which moves `passes` times `elements`, from an idle device."""

    def run():
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info.update(contestant=contestant, bytes=passes * elements * DTYPE.itemsize)
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


def _activation(device, channels, size, requires_grad=False):
    x = torch.randn(BATCH, channels, size, size, device=device, dtype=DTYPE)
    return x.to(memory_format=torch.channels_last).requires_grad_(requires_grad)


def _vectors(device, channels):
    return [torch.rand(channels, device=device) + 0.5 for _ in range(4)]


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("channels,size", BLOCKS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_batch_norm_act(benchmark, device, direction, channels, size, with_residual, contestant):
    backward = direction == "backward"
    x = _activation(device, channels, size, backward)
    residual = _activation(device, channels, size, backward) if with_residual else None
    vectors = [v.requires_grad_(backward and i > 1) for i, v in enumerate(_vectors(device, channels))]
    op = _contestant(
        contestant,
        functools.partial(_plain, training=True),
        lambda x, mean, var, weight, bias, r: functional.batch_norm_act(x, mean, var, weight, bias, r, training=True),
    )
    call, passes = functools.partial(op, x, *vectors, residual), 3 + with_residual
    if backward:
        y = call()
        dy = torch.randn_like(y)
        inputs = [t for t in (x, *vectors[2:], residual) if t is not None]
        call, passes = functools.partial(torch.autograd.grad, y, inputs, dy, retain_graph=True), 5 + with_residual
    group = f"bn{'+add' * with_residual}+relu {direction} {BATCH}x{channels}x{size}x{size}"
    _measure(benchmark, call, group, contestant, passes, x.numel())


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_stem(benchmark, device, contestant):
    x, vectors = _activation(device, 64, 112), _vectors(device, 64)
    op = _contestant(
        contestant,
        lambda x, *v: F.max_pool2d(_plain(x, *v, None, True), 3, 2, 1),
        lambda x, *v: functional.batch_norm_act_max_pool(x, *v, training=True),
    )
    call = functools.partial(op, x, *vectors)
    _measure(benchmark, call, f"bn+relu+max pool forward {BATCH}x64x112x112", contestant, 2.25, x.numel())


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_add_act(benchmark, device, contestant):
    x, other = _activation(device, 256, 56), _activation(device, 256, 56)
    op = _contestant(contestant, lambda x, y: F.relu(x + y, inplace=True), functional.add_act)
    _measure(
        benchmark, functools.partial(op, x, other), f"add+relu forward {BATCH}x256x56x56", contestant, 3, x.numel()
    )
