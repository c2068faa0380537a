"""What the tests run on a dry device, in a process of its own: `python -m dry_device.run ARCH WHAT`.

Prints one JSON object: kernels (distinct binaries by kernel), launches, tensor_maps, refused (what a check said).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dry_device import dry_device, jitted
from resnet_fused import freeze, fuse, kernels, use_backend
from resnet_fused.dispatch.conv import ConvConfig, ConvShape, conv_fprop_heuristic
from resnet_fused.dispatch.experimental import configurations, refuse_shape
from resnet_fused.kernels import conv_dgrad as dgrad
from resnet_fused.ops import conv_dgrad, conv_dgrad_join
from resnet_fused.ops.conv_fprop import Args
from resnet_fused.ops.operands import Operands

NHWC = torch.channels_last


def step() -> list[str]:
    """A training step under autocast, and the same network frozen: every kernel that a network of blocks launches."""
    from networks import SmallResNet

    model = fuse(SmallResNet(channels=64).to(memory_format=NHWC))
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=NHWC)
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    frozen = copy.deepcopy(model).eval().to(torch.bfloat16)
    with torch.no_grad(), use_backend("triton"):
        half = x.to(torch.bfloat16)
        assert freeze(frozen, half)(half).shape == y.shape
    return []


def network(batch: int = 256, model: str = "resnet50") -> list[str]:
    """Every op of a network's inference and training at its true shapes, in bf16, as the plan configures it."""
    import from_checkout  # noqa: F401

    from tools.compile_gate.network_cases import network_cases

    refused = []
    for label, _, run in network_cases(model, _arch(), (batch,)):
        refused += _attempt(label, run)
    return refused


def boxes() -> list[str]:
    """The formulations on tensor maps, every configuration that takes a 3x3 and a 1x1 of ResNet-50."""
    refused = []
    for filter_size in (3, 1):
        padding = (filter_size // 2, filter_size // 2)
        shape = ConvShape(256, 128, 28, 28, 128, filter_size, filter_size, padding=padding)
        for config in configurations(_arch()):
            if refuse_shape(shape, torch.bfloat16, _arch(), config) is None:
                refused += _attempt(str(config), lambda shape=shape, config=config: _forward(shape, config))
        for config in configurations(_arch(), "conv_dgrad"):
            refused += _attempt(str(config), lambda shape=shape, config=config: _backward(shape, config))
    return refused


def beyond() -> list[str]:
    """Six stages of a wide tile need more shared memory than an sm_86 has."""
    shape = ConvShape(256, 128, 28, 28, 128, 3, 3, padding=(1, 1))
    config = dataclasses.replace(conv_fprop_heuristic(shape, torch.bfloat16, 90), num_stages=6)
    return _attempt("six stages", lambda: _forward(shape, config))


def _activation(*shape: int, device: str = "cpu") -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=NHWC)


def _forward(shape: ConvShape, config: ConvConfig) -> object:
    s = shape
    x, weight = (_activation(*size, device="meta") for size in ((s.n, s.c, s.h, s.w), (s.k, s.c, s.r, s.s)))
    shift = torch.empty(s.k, device="meta")
    a = Args(x, weight, None, shift, None, s.stride, s.padding, s.dilation, 1, "relu")
    return kernels.run("conv_fprop", a, config)


def _backward(shape: ConvShape, config: ConvConfig) -> None:
    """The data gradient alone, behind a batch norm with the activation written, and behind a block's end."""
    make = Operands(torch.device("meta"), torch.bfloat16)
    norm = conv_dgrad.case(make, shape, epilogue="batch norm")
    dgrad.run(norm, shape, config, make.activation(*shape.image))
    dgrad.run(conv_dgrad_join.case(make, shape, epilogue="masked residual"), shape, config)
    dgrad.run(conv_dgrad.case(make, shape), shape, config)


def _attempt(label: str, run: Callable[[], object]) -> list[str]:
    try:
        run()
    except Exception as error:  # whatever the compiler or the driver raises
        return [f"{label}: {type(error).__name__}: {error}"]
    return []


def _arch() -> int:
    return int(sys.argv[1])


def main() -> None:
    warnings.simplefilter("ignore")
    what: dict[str, Callable[..., list[str]]] = {"step": step, "network": network, "boxes": boxes, "beyond": beyond}
    with dry_device(_arch()) as stand_in:
        refused = what[sys.argv[2]](*map(int, sys.argv[3:]))
        found: dict[str, Any] = {
            "kernels": {name: count for name, count in jitted().items() if count},
            "launches": stand_in.dry_launches(),
            "tensor_maps": stand_in.dry_tensor_maps(),
            "refused": refused,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
