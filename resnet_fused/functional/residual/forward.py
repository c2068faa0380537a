"""The forward of a chain: each layer's convolution, statistics and affine map, then the join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.functional.common import (
    add_relu,
    channels_last,
    convolves_to_nchw,
    dense,
    in_layout_of,
    operand_dtype,
    pixels,
)
from resnet_fused.functional.residual.backward import ConvChain, LayerForward
from resnet_fused.functional.residual.decide import Chain, ConvBN, Layer
from resnet_fused.functional.statistics import activation, constant_affine, finalize, finalize_apply

_op = torch.ops.resnet_fused


def run_chain(
    chain: Chain, x: Tensor, branch: Sequence[ConvBN], shortcut: ConvBN | None = None, residual: Tensor | None = None
) -> Tensor:
    """The chain that `choose_chain` found for these tensors.

    Mutates:
        The running statistics of the layers that train.
    """
    if not chain.branch:
        return _plain(chain, x, branch, shortcut, residual)
    residual = None if chain.identity else residual
    x = dense(x.to(operand_dtype(x)))
    nchw = convolves_to_nchw(x, *(layer.weight for layer in branch))
    nhwc = any("triton" in layer[2:5] for layer in chain.layers)  # whose convolutions read channels_last
    if nhwc:
        x, residual = channels_last(x), None if residual is None else channels_last(residual)
    with torch.no_grad():
        made = []
        value, affine = x, None
        for layer, static, following in zip(branch, chain.branch, (*chain.branch[1:], None), strict=True):
            activates = following is not None and not following.normalises
            one, a = _layer(value, affine, layer, static, chain.backend, nhwc, activates)
            made.append(one)
            value, affine = (one.z, (one.scale, one.shift)) if a is None else (a, None)
        if shortcut is not None and chain.shortcut is not None:
            projected, _ = _layer(x, None, shortcut, chain.shortcut, chain.backend, nhwc, False)
            # At the join both lie alike in memory, as the bits of its ReLU do.
            made.append(projected._replace(z=in_layout_of(projected.z, made[-1].z)))
    layers = [*branch, *([] if shortcut is None else [shortcut])]
    parameters = [p for layer in layers for p in (layer.weight, layer.bn_weight, layer.bn_bias)]
    y: Tensor = ConvChain.apply(chain, x, residual, *parameters, *(t for one in made for t in one))
    return y.contiguous() if nchw else y


def _plain(
    chain: Chain, x: Tensor, branch: Sequence[ConvBN], shortcut: ConvBN | None, residual: Tensor | None
) -> Tensor:
    """The same on native PyTorch, layer by layer."""

    def normalised(value: Tensor, layer: ConvBN) -> Tensor:
        z = F.conv2d(value, layer.weight, None, *layer.geometry)
        return F.batch_norm(z, *layer.vectors, layer.training, layer.momentum, layer.eps)  # type: ignore[arg-type, call-arg]

    value = x
    for layer in branch[:-1]:
        value = F.relu(normalised(value, layer), inplace=True)
    added = normalised(x, shortcut) if shortcut is not None else x if chain.identity else residual
    return add_relu(normalised(value, branch[-1]), added, chain.relu)


def _layer(
    x: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    layer: ConvBN,
    static: Layer,
    backend: str,
    nhwc: bool,
    activates: bool,
) -> tuple[LayerForward, Tensor | None]:
    """z = conv(relu(x normalised)) and the affine map of the batch norm behind it; also relu(z normalised) where it
    `activates`.
    """
    weight = layer.weight.to(x.dtype)
    if static.forms_statistics:
        z, *statistics = _op.conv_fprop_stats(
            x, weight, *(affine or (None, None)), *static.geometry, static.rows, backend=static.fprop
        )
    else:
        z = _op.conv_fprop(x, weight, None, None, None, *static.geometry, None, backend=static.fprop)
        z = dense(z)
        if layer.training:
            statistics = _op.bn_stats(z, dispatch.partial_rows(pixels(z), z.shape[1]), backend=backend)
    if nhwc:  # where PyTorch's convolution ran beside Triton's
        z = z.contiguous(memory_format=torch.channels_last)
    a = None
    if layer.training:
        norm: tuple[Any, ...] = (*layer.vectors, layer.momentum, layer.eps, backend)
        if activates:
            vectors, a = finalize_apply(z, statistics, *norm)
        else:
            vectors = finalize(statistics, *norm)
    else:
        assert layer.running_mean is not None and layer.running_var is not None
        vectors = constant_affine(
            layer.running_mean, layer.running_var, layer.bn_weight, layer.bn_bias, layer.eps, z.dtype
        )
        a = activation(z, vectors, backend) if activates else None
    return LayerForward(None if weight is layer.weight else weight, z, *vectors), a
