"""Convolution, batch norm and ReLU *modules* run as one fused call, in place of three module calls.

The modules stay what they are. Whenever calling them one by one could be told from calling the fused function - hooks,
parametrizations, subclasses, an unusual padding - they are called one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from resnet_fused import functional
from resnet_fused.functional.common import Act, add_relu, fits, operand_dtype
from resnet_fused.functional.residual import ConvBN, choose_chain, run_chain
from resnet_fused.functional.sync import choose_sync, sync_batch_norm_act, sync_batch_norm_act_max_pool
from resnet_fused.nn.convs import CONVS, Conv, RecognisedConv
from resnet_fused.nn.eligibility import not_plain, untouched, watched
from resnet_fused.nn.norms import (
    BATCH_NORMS,
    BatchNorm,
    Norm,
    RecognisedNorm,
    begin_batch_norm,
    module_of,
    plain_norm,
    running_statistics,
    sync_group,
)
from resnet_fused.nn.sums import PLUS, Sum
from resnet_fused.ops.activations import ACTIVATIONS, activate


def plain(
    conv: nn.Module | RecognisedConv | None,
    bn: Norm,
    act: nn.Module | None,
    activation: str | None = "relu",
    *,
    in_forward: bool = True,
) -> str | None:
    """Why these modules cannot be run as one fused call, or None if they can.

    Args:
        conv: the convolution, or None for batch norm alone.
        bn: the batch norm behind it.
        act: the module of the activation behind that, or None if there is none, or if it was called as a function.
        activation: its name.
        in_forward: they are about to run. Before that, FSDP may still have to gather their parameters.
    """
    if conv is not None:
        if isinstance(conv, RecognisedConv):
            reason = watched(conv.module, "Conv2d", in_forward)
        else:
            reason = _plain(conv, nn.Conv2d, in_forward)
        if reason is not None:
            return reason
    reason = plain_norm(bn, conv, in_forward=in_forward)
    if reason is None and act is not None and activation is not None:
        reason = _plain(act, ACTIVATIONS[activation].module, in_forward)
    if reason is None and isinstance(conv, CONVS) and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
        mode = conv.padding if isinstance(conv.padding, str) else conv.padding_mode
        return f"the convolution pads in mode {mode!r}"
    return reason


def _plain(module: nn.Module, expected: type[nn.Module], in_forward: bool) -> str | None:
    return not_plain(module, expected) or watched(module, expected.__name__, in_forward)


def conv_bn_act(
    x: Tensor,
    conv: nn.Module | RecognisedConv | None,
    bn: Norm,
    act: nn.Module | None,
    *,
    activation: str | None = "relu",
    residual: Tensor | None = None,
    add: Sum = PLUS,
) -> Tensor:
    """act(bn(conv(x)) + residual) with the modules' own parameters and buffers.

    Args:
        x: the input of `conv`, or of `bn` where `conv` is None.
        conv, bn, act: the modules; `act` is None where the activation is called as a function or there is none.
        activation: its name; any but ReLU is a pass of its own.
        residual: added before it.
        add: how, where that matters.

    Mutates:
        The running statistics and `num_batches_tracked` of `bn`, as its own forward does.
    """
    shape = None if traced(x) or plain(conv, bn, act, activation) is not None else _result_shape(conv, x)
    if shape is not None and activation not in ("relu", None):
        z = conv_bn_act(x, conv, bn, None, activation=None, residual=residual, add=add)
        return activate(z, activation) if act is None else act(z)
    if shape is None or not fits(residual, shape, x.dtype if conv is None else operand_dtype(x), x.device):
        if shape is None:
            z = bn(x if conv is None else conv(x))
        else:
            z = conv_bn_act(x, conv, bn, None, activation=None)
        if residual is not None:
            z = add(z, residual)
        return activate(z, activation) if act is None else act(z)
    assert isinstance(bn, (*BATCH_NORMS, RecognisedNorm))
    name: Act = "relu" if activation else None
    if conv is None or sync_group(bn) is not None:
        return batch_norm_act(x if conv is None else _conv(x, conv), bn, residual, name)
    assert isinstance(conv, CONVS)
    training, momentum = begin_batch_norm(bn)
    running_mean, running_var = running_statistics(bn)
    return functional.conv_bn_act(
        x,
        conv.weight,
        running_mean,
        running_var,
        bn.weight,
        bn.bias,
        residual,
        bias=conv.bias,
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        training=training,
        momentum=momentum,
        eps=bn.eps,
        act=name,
    )


def traced(x: Tensor) -> bool:
    """Whether a tracer watches, which must see the modules, and not that their mode was asked for: that of torch.fx, by
    which `fuse` finds out what a forward computes, or `torch.jit.trace`."""
    return isinstance(x, fx.Proxy) or torch._C._get_tracing_state() is not None


def _result_shape(conv: nn.Module | RecognisedConv | None, x: Tensor) -> Sequence[int] | None:
    """The shape of bn(conv(x)); None where the convolution, or batch norm for want of a batch, will raise: which must
    happen before either counts the batch."""
    if not isinstance(conv, CONVS):
        return x.shape if x.dim() == 4 else None
    common, weight = functional.common, conv.weight
    if x.dtype != weight.dtype and common.operand_dtype(x) != common.operand_dtype(weight):
        return None
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return common.conv_shape(x.shape, weight, geometry)  # type: ignore[arg-type]


def _conv(x: Tensor, conv: nn.Module | RecognisedConv) -> Tensor:
    """A plain convolution alone, on the chosen backend where it has no bias to add behind it."""
    assert isinstance(conv, CONVS)
    if conv.bias is not None:
        biased: Tensor = conv(x)
        return biased
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return functional.conv_affine_act(x, conv.weight, **geometry, act=None)  # type: ignore[arg-type]


Layers = Sequence[tuple[nn.Module | RecognisedConv, Norm, nn.Module | None]]


def conv_bn_chain(
    x: Tensor,
    layers: Layers,
    shortcut: tuple[nn.Module | RecognisedConv, Norm] | None,
    pool: Callable[[Tensor], Tensor] | None = None,
    add: Sum = PLUS,
) -> Tensor | None:
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut(pool(x))) as one autograd function.

    Args:
        x: the input.
        layers: (conv, bn, act) in order; `act` None where ReLU is called as a function.
        shortcut: (conv, bn) of a projection, or None for the identity.
        pool: what the shortcut does to the input first, such as an average pool; then the shortcut is apart from the
            autograd function.
        add: how the shortcut is added, where that matters.

    Returns:
        The result; None where the units are to run one by one: nothing is trained, the plan prefers it, or the modules
        are not plain.

    Mutates:
        The running statistics and `num_batches_tracked` of the batch norms, as their own forwards do.
    """
    if traced(x) or functional.common.runs_plain("residual_block", x.device.type):
        return None
    units: Layers = [*layers, *([] if shortcut is None else [(*shortcut, None)])]
    parameters = (p for conv, bn, _ in units for m in (module_of(conv), module_of(bn)) for p in m.parameters())
    if not (functional.common.wants_gradient(x) or functional.common.wants_gradient(*parameters)):
        return None
    for conv, bn, act in units:
        if plain(conv, bn, act) is not None or conv.bias is not None or sync_group(bn) is not None:
            return None
    residual = None
    if pool is not None:
        residual = pool(x)
        if shortcut is not None:
            residual = conv_bn_act(residual, *shortcut, None, activation=None)
        units, shortcut = layers, None
    described = [_describe(conv, bn) for conv, bn, _ in units]  # type: ignore[arg-type]
    branch, projection = described[: len(layers)], described[len(layers) :]
    try:
        chain = choose_chain(
            "residual_block", x, branch, projection[0] if projection else None,
            identity=residual is None and shortcut is None, residual=residual,
        )  # fmt: skip
    except functional.common.Refused:
        chain = None  # the layers, one by one, refuse it as well, behind what PyTorch refuses
    if chain is None:
        return None if residual is None else _one_by_one(x, layers, residual, add)
    for i, (_, bn, _) in enumerate(units):
        assert isinstance(bn, (*BATCH_NORMS, RecognisedNorm))
        described[i] = described[i]._replace(momentum=begin_batch_norm(bn)[1])
    branch, projection = described[: len(layers)], described[len(layers) :]
    return run_chain(chain, x, branch, projection[0] if projection else None, residual)


def _one_by_one(x: Tensor, layers: Layers, residual: Tensor, add: Sum) -> Tensor:
    *inner, last = layers
    for layer in inner:
        x = conv_bn_act(x, *layer)
    return conv_bn_act(x, *last, residual=residual, add=add)


def _describe(conv: Conv, bn: BatchNorm) -> ConvBN:
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return ConvBN(
        conv.weight,
        *running_statistics(bn),
        bn.weight,
        bn.bias,
        geometry,  # type: ignore[arg-type]
        training=bn.training or (bn.running_mean is None and bn.running_var is None),
        eps=bn.eps,
    )


def conv_bn_act_max_pool(
    x: Tensor, conv: nn.Module | RecognisedConv, bn: Norm, act: nn.Module | None, pool: nn.Module
) -> Tensor:
    """pool(relu(bn(conv(x)))) with the modules' own parameters and buffers: the stem of a ResNet.

    In training on the fused kernels neither the normalised activation nor int64 winners are stored.

    Args:
        x: the input of `conv`.
        conv, bn, act: as in `conv_bn_act`.
        pool: the `nn.MaxPool2d` behind them.

    Mutates:
        As `conv_bn_act`.
    """
    separate = traced(x) or not bn.training or plain_pool(pool) is not None
    if separate or plain(conv, bn, act) is not None or _result_shape(conv, x) is None:
        pooled: Tensor = pool(conv_bn_act(x, conv, bn, act))
        return pooled
    assert isinstance(bn, (*BATCH_NORMS, RecognisedNorm))
    z = conv(x)
    group = sync_group(bn)
    if group is not None:
        vectors = (*running_statistics(bn), bn.weight, bn.bias)
        backend = choose_sync("bn_act_max_pool", z, vectors)
        if backend is None:
            pooled = pool(batch_norm_act(z, bn, None, "relu"))
            return pooled
        _, momentum = begin_batch_norm(bn)
        return sync_batch_norm_act_max_pool(
            z, *vectors, process_group=group, backend=backend, momentum=momentum, eps=bn.eps
        )
    training, momentum = begin_batch_norm(bn)
    return functional.batch_norm_act_max_pool(
        z, *running_statistics(bn), bn.weight, bn.bias, training=training, momentum=momentum, eps=bn.eps
    )


def plain_pool(pool: nn.Module) -> str | None:
    """Why this is not the stem's max pool, as a plain module that nobody watches; None if it is."""
    if type(pool) is not nn.MaxPool2d or not untouched(pool, nn.MaxPool2d):
        return "not a plain nn.MaxPool2d"
    size = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    if [v if isinstance(v, tuple) else (v, v) for v in size] != [(3, 3), (2, 2), (1, 1), (1, 1)]:
        return "not a 3x3 max pool of stride 2 and padding 1"
    return "its max pool rounds up or returns indices" if pool.ceil_mode or pool.return_indices else None


def batch_norm_act(x: Tensor, bn: BatchNorm, residual: Tensor | None, act: Act) -> Tensor:
    """act(bn(x) + residual) with the module's own parameters and buffers."""
    if not fits(residual, x.shape, x.dtype, x.device):
        return add_relu(batch_norm_act(x, bn, None, None), residual, act == "relu")
    if not isinstance(bn, RecognisedNorm):
        bn._check_input_dim(x)
    group = sync_group(bn)
    if group is not None:
        return _sync_batch_norm_act(x, module_of(bn), residual, act, group)  # type: ignore[arg-type]
    training, momentum = begin_batch_norm(bn)
    running_mean, running_var = running_statistics(bn)
    return functional.batch_norm_act(
        x,
        running_mean,
        running_var,
        bn.weight,
        bn.bias,
        residual,
        training=training,
        momentum=momentum,
        eps=bn.eps,
        act=act,
    )


def _sync_batch_norm_act(
    x: Tensor, bn: nn.SyncBatchNorm, residual: Tensor | None, act: Act, group: dist.ProcessGroup
) -> Tensor:
    bn._check_non_zero_input_channels(x)
    vectors = (*running_statistics(bn), bn.weight, bn.bias)
    backend = choose_sync("bn_apply", x, vectors)
    if backend is None:
        return add_relu(nn.SyncBatchNorm.forward(bn, x), residual, act == "relu")
    _, momentum = begin_batch_norm(bn)
    return sync_batch_norm_act(
        x, *vectors, residual, process_group=group, backend=backend, momentum=momentum, eps=bn.eps, act=act
    )
