"""The autograd function of a chain conv-bn-relu-...-conv-bn (+ shortcut) (-relu): its forward, and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused.functional import native
from resnet_fused.functional.common import dense, in_layout_of, pixels
from resnet_fused.functional.residual import handover
from resnet_fused.functional.residual.decide import Chain
from resnet_fused.ops import implements
from resnet_fused.ops.arithmetic import behind_relu

_op = torch.ops.resnet_fused


class LayerForward(NamedTuple):
    """What a layer's forward leaves: its weight as the kernels saw it (None: as it is), z, and the affine map."""

    weight: Tensor | None  # never the parameter itself: Dynamo wants each input of an autograd.Function once
    z: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor


def join(
    chain: Chain, x: Tensor, residual: Tensor | None, made: list[LayerForward], with_mask: bool
) -> tuple[Tensor, Tensor]:
    """act(z normalised + shortcut) and the ReLU's mask, one bit an element: the only activation a chain writes."""
    last = made[len(chain.branch) - 1]
    affine: tuple[Tensor | None, Tensor | None] = (None, None)
    if chain.shortcut is not None:
        residual, affine = made[-1].z, (made[-1].scale, made[-1].shift)
    elif chain.identity:
        residual = x
    addend = None if residual is None else in_layout_of(residual, last.z)
    result: tuple[Tensor, Tensor] = _op.bn_apply(
        last.z, last.scale, last.shift, addend, *affine, chain.relu, with_mask, backend=chain.backend
    )
    return result


def _native(ctx: Any, dy: Tensor) -> native.Recomputed:
    """Of `(chain, x, residual, *parameters)`, behind the masks that forward found."""
    chain: Chain = ctx.chain
    count, last = len(chain.layers), len(chain.branch) - 1
    x, mask, *rest = ctx.saved_tensors
    made = _unflatten(rest[2 * count :])
    x, residual = native.alias(x), native.stand_in(made[last].z)
    weights, scales, biases = (
        [native.alias(t) for t in ts] for ts in (rest[:count], rest[count : 2 * count], ctx.biases)
    )

    def normalised(k: int, value: Tensor | None) -> Tensor:
        layer, one, weight, bias = chain.layers[k], made[k], weights[k], biases[k]
        z = one.z if value is None else F.conv2d(value, weight.to(value.dtype), None, *layer.geometry)
        mean, invstd = one.mean, one.invstd
        if layer.eps is not None and z.requires_grad:
            mean, invstd = native.moments(z, layer.eps)
        if bias is not None:  # as forward saw it, whatever has become of it
            bias = one.shift + one.mean * one.scale + (bias - bias.detach()).to(one.shift.dtype)
        return native.normalised(z, mean, invstd, scales[k], bias)

    def behind(k: int, value: Tensor, mask: Tensor | None, relu: bool) -> Tensor:
        one = made[k]
        return behind_relu(value, one.z, mask, one.scale, one.shift, relu).to(one.z.dtype)

    value = x
    for k in range(last):
        value = behind(k, normalised(k, value), None, True)
    total = normalised(last, value) + residual
    if chain.shortcut is not None:
        total = total + normalised(last + 1, x)
    elif chain.identity and x is not None:
        total = total + x
    by_layer = (t for layer in zip(weights, scales, biases, strict=True) for t in layer)
    return behind(last, total, mask, chain.relu), (None, x, residual, *by_layer)


class ConvChain(torch.autograd.Function):
    """Takes `(chain, x, residual, *parameters, *made)`: per layer weight, bn weight, bn bias; a `LayerForward` each.

    All but the join was computed before, outside of this function: running statistics change there, which inside of an
    `autograd.Function` gave wrong gradients under `torch.compile` (pytorch#180642).
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, residual: Tensor | None, *tensors: Any) -> Tensor:
        count = len(chain.layers)
        parameters, flat = tensors[: 3 * count], tensors[3 * count :]
        made = _unflatten(flat)
        needed = any(ctx.needs_input_grad)
        # Where nothing is added the mask is a function of z, which backward reads anyway.
        with_mask = needed and chain.relu and (chain.shortcut is not None or chain.identity or residual is not None)
        y, mask = join(chain, x, residual, made, with_mask)
        ctx.chain = chain
        ctx.size = x.shape[2:]
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        reads_x = any(ctx.needs_input_grad[i] for i in (1, 3, 3 * count if chain.shortcut is not None else 3))
        ctx.save_for_backward(
            x if reads_x else None, mask if with_mask else None, *parameters[::3], *parameters[1::3], *flat
        )
        if not torch.compiler.is_compiling():
            ctx.biases = parameters[2::3]  # which plain PyTorch does not save either: they may be changed in between
        if with_mask and _reduces_at_the_join(chain, ctx.needs_input_grad):
            last, projection = made[len(chain.branch) - 1], None if chain.shortcut is None else made[-1]
            beside = (projection.z, projection.mean, projection.invstd) if projection else (None,) * 3
            handover.publish(ctx, (last.z, mask, last.mean, last.invstd, *beside))
        return y

    @staticmethod
    @native.differentiable(_native)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        count = len(chain.layers)
        x, mask, *rest = ctx.saved_tensors
        made = [
            one if one.weight is not None else one._replace(weight=weight)
            for one, weight in zip(_unflatten(rest[2 * count :]), rest, strict=False)
        ]
        needs = ctx.needs_input_grad
        steps = _Backward(chain, x, mask, made, tuple(ctx.size), needs[1], needs[3 : 3 + 3 * count])
        steps.claim(handover.claim(ctx, dy))
        node = handover.producer(ctx, x) if needs[1] else None
        dx, dresidual = steps.run(dy, needs[2], None if node is None else node.published)
        if node is not None and dx is not None and steps.formed:
            handover.deliver(node, dx, steps.formed)
        gradients: list[Tensor | None] = []
        for i, gradient in enumerate(steps.gradients):
            if gradient is not None:
                gradient = gradient.to(ctx.dtypes[i])
                gradient = in_layout_of(gradient, dense(rest[i // 3])) if i % 3 == 0 else gradient
            gradients.append(gradient if needs[3 + i] else None)
        return None, dx, dresidual, *gradients, *(None,) * (len(LayerForward._fields) * count)


def _reduces_at_the_join(chain: Chain, needs: Sequence[bool]) -> bool:
    """Whether backward will reduce over the gradient of the chain's result."""
    if any(layer.batch_statistics for layer in (chain.branch[-1], *chain.layers[len(chain.branch) :])):
        return True
    return any(any(needs[3 + 3 * k + 1 : 3 + 3 * k + 3]) for k in range(len(chain.branch) - 1, len(chain.layers)))


def _unflatten(flat: Sequence[Any]) -> list[LayerForward]:
    width = len(LayerForward._fields)
    return [LayerForward(*flat[i : i + width]) for i in range(0, len(flat), width)]


class _Gradient(NamedTuple):
    """The gradient of a layer's z: `dy` itself, or a*dy + b*z + c where the convolutions apply that on their way in."""

    dy: Tensor
    z: Tensor | None = None
    coefficients: Tensor | None = None


class _Backward:
    """One backward pass; `gradients` fills up with those of weight, bn weight and bn bias, layer by layer."""

    def __init__(
        self,
        chain: Chain,
        x: Tensor | None,
        mask: Tensor | None,
        made: list[LayerForward],
        size: tuple[int, int],
        needs_x: bool,
        needs: tuple[bool, ...],
    ) -> None:
        self.chain, self.x, self.mask, self.made, self.size, self.needs_x = chain, x, mask, made, size, needs_x
        self.needs = needs
        self.gradients: list[Tensor | None] = [None] * (3 * len(chain.layers))
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, at the join, where they came with the gradient
        self.joined: dict[int, _Gradient] = {}  # by layer, at the join, where one pass makes both
        self.formed: list[Tensor] = []  # the sums of the chain before

    def claim(self, sums: tuple[Tensor, ...] | None) -> None:
        """These are the sums at the join, as `conv_dgrad_join` gives them."""
        if sums is not None:
            last = len(self.chain.branch) - 1
            self.sums[last] = (sums[0], sums[1])
            if self.chain.shortcut is not None:
                self.sums[last + 1] = (sums[0].clone(), sums[2])  # the gradients of two biases, one each

    def run(
        self, dy: Tensor, needs_residual: bool, published: handover.Operands | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the residual; `published` is of the chain that made x."""
        chain, last = self.chain, len(self.chain.branch) - 1
        dy = in_layout_of(dy, self.made[last].z)
        # The gradient of the sum, dy behind the ReLU's mask: the mask is applied wherever dy is read, and dy written
        # masked only for those who read it and know no mask.
        keeps_mask = chain.identity and last >= 0 and chain.branch[0].dgrad != "aten"
        wants_sum = needs_residual or (chain.identity and self.needs_x and not keeps_mask)
        addend, addend_mask = (dy, self.mask) if chain.identity and keeps_mask else (None, None)
        masked = None
        if chain.shortcut is not None:
            self.joins_backward(dy)
            addend = self.projection(dy)
        if wants_sum and not chain.relu:
            masked = dy
        deepest = self.deepest()
        gradient, written = self.join_backward(last, dy, wants_sum and chain.relu, deepest <= last)
        masked = written if masked is None else masked
        if chain.identity and self.needs_x and not keeps_mask:
            addend = masked
        dx = None
        for k in range(last, deepest - 1, -1):
            assert gradient is not None
            together = k > deepest and self.runs_together(k)
            if k == 0 and self.needs_x:
                dx = self.data_gradient(k, gradient, addend, addend_mask, published)
            if not together and self.gradients[3 * k] is None:
                self.weight_gradient(k, gradient)
            if k > deepest:
                gradient = self.layer_backward(k, gradient, together)
        return dx, masked if needs_residual else None

    def deepest(self) -> int:
        """The first layer of the branch that anybody wants a gradient from; one past the last if nobody does."""
        if self.needs_x:
            return 0
        wanted = (k for k in range(len(self.chain.branch)) if any(self.needs[3 * k : 3 * k + 3]))
        return next(wanted, len(self.chain.branch))

    def projection(self, dy: Tensor) -> Tensor | None:
        """The shortcut's gradients; that of x is returned."""
        k = len(self.chain.branch)
        convolves = self.needs[3 * k] or self.needs_x
        gradient, _ = self.join_backward(k, dy, False, convolves)
        if not convolves:
            return None
        assert gradient is not None
        self.weight_gradient(k, gradient)
        if not self.needs_x:
            return None
        dx = self.data_gradient(k, gradient, None, None)
        # PyTorch's may be NCHW where one channel or one pixel is behind it; the branch's dgrad is to read it.
        reads_nhwc = self.chain.branch[0].dgrad == "triton"
        return dx.contiguous(memory_format=torch.channels_last) if reads_nhwc else dx

    def join_backward(
        self, k: int, dy: Tensor, with_sum: bool, with_gradient: bool
    ) -> tuple[_Gradient | None, Tensor | None]:
        """The gradient of z[k] from that of the chain's result, and the gradient of the sum if it is wanted."""
        layer, made, chain = self.chain.layers[k], self.made[k], self.chain
        dy = in_layout_of(dy, made.z)
        args = (dy, made.z, self.mask, made.scale, made.shift, made.mean, made.invstd)
        sums = self.sums.get(k)
        if sums is None and (self.wants_sums(k) or (with_gradient and layer.batch_statistics)):
            sums = _op.bn_backward_reduce(*args, chain.relu, _rows(made.z), backend=chain.backend)
        if sums is not None:
            self.keep_sums(k, sums)
        if k in self.joined and not with_sum:
            return self.joined.pop(k), None
        if not (with_gradient or with_sum):
            return None, None
        given = sums if layer.batch_statistics and sums is not None else (None, None)
        dz, masked = _op.bn_backward_apply(
            *args, *given, float(pixels(made.z)), chain.relu, with_sum, backend=chain.backend
        )
        return _Gradient(dz), masked if with_sum else None

    def joins_backward(self, dy: Tensor) -> None:
        """The gradients of both z's whose sum ends the chain, in one pass, where their sums came with dy."""
        last, chain = len(self.chain.branch) - 1, self.chain
        both = self.sums.keys() == {last, last + 1} and all(layer.batch_statistics for layer in chain.layers[last:])
        if not (both and self.needs_x and chain.relu and implements(chain.backend, "bn_backward_apply_join")):
            return
        branch, projection = self.made[last:]
        sum_dz, sum_dz_xhat = self.sums[last]
        gradients = _op.bn_backward_apply_join(
            *(dy, branch.z, self.mask, branch.scale, branch.mean, branch.invstd, sum_dz, sum_dz_xhat),
            *(projection.z, projection.scale, projection.mean, projection.invstd, self.sums[last + 1][1]),
            float(pixels(branch.z)),
            backend=chain.backend,
        )
        self.joined = dict(enumerate(map(_Gradient, gradients), last))

    def runs_together(self, k: int) -> bool:
        """Whether one op makes both gradients of layer k, which is not the first."""
        layer = self.chain.branch[k]
        return self.needs[3 * k] and layer.dgrad == layer.wgrad != "aten" and layer.fusion.dgrad_epilogue

    def layer_backward(self, k: int, gradient: _Gradient, together: bool) -> _Gradient:
        """The gradient of z[k - 1] from that of z[k]: dgrad, the ReLU's mask, batch norm; and that of the weight, where
        they run `together`.
        """
        layer, before, made = self.chain.branch[k], self.chain.branch[k - 1], self.made[k - 1]
        affine = (made.scale, made.shift, made.mean, made.invstd)
        fused = layer.dgrad != "aten" and layer.fusion.dgrad_epilogue
        operands, how = self.operands(k, gradient), (*layer.geometry,)
        if together:
            da, *sums, self.gradients[3 * k] = _op.conv_backward(
                *operands, made.z, *affine, layer.fusion.prologue, *how, backend=layer.dgrad
            )
        else:
            norm = (made.z, *affine) if fused else (None,) * 5
            da, *sums = _op.conv_dgrad(*operands, None, None, *norm, made.z.shape[2:], *how, backend=layer.dgrad)
        da = in_layout_of(da, made.z)
        if not fused and (self.wants_sums(k - 1) or before.batch_statistics):
            sums = _op.bn_backward_reduce(da, made.z, None, *affine, True, _rows(made.z), backend=self.chain.backend)
        elif not fused:
            sums = None
        if sums is not None:
            self.keep_sums(k - 1, sums)
        count = float(pixels(made.z))
        given = tuple(sums) if before.batch_statistics and sums is not None else (None, None)
        if fused and before.applies_gradient:
            coefficients = _op.bn_backward_finalize(
                *given, made.scale, made.mean, made.invstd, count, backend=before.dgrad
            )
            return _Gradient(da, made.z, coefficients)
        # The epilogue has applied the mask: what is left of ReLU's backward is the identity.
        dz, _ = _op.bn_backward_apply(
            da, made.z, None, *affine, *given, count, not fused, False, backend=self.chain.backend
        )
        return _Gradient(dz)

    def data_gradient(
        self,
        k: int,
        gradient: _Gradient,
        addend: Tensor | None,
        mask: Tensor | None,
        published: handover.Operands | None = None,
    ) -> Tensor:
        """The gradient of x through layer k, with what reaches x on other ways added; it is the whole of it where there
        are `published` operands, whose sums it forms if it can, and the gradient of the weight with them.
        """
        layer, dy = self.chain.layers[k], gradient.dy
        if published is not None and layer.dgrad != "aten" and layer.fusion.dgrad_epilogue:
            weight = self.made[k].weight
            assert weight is not None
            shape = (dy.shape[0], weight.shape[1] * layer.geometry[3], *self.size)
            before = published.get(dy, shape, nhwc=layer.dgrad == "triton")
            if before is not None:
                written: Tensor
                activation = self.x if self.needs[3 * k] and layer.wgrad == layer.dgrad else None
                operands = (*self.operands(k, gradient), addend, mask, *before, activation)
                written, *self.formed, dweight = _op.conv_dgrad_join(
                    *operands, self.size, *layer.geometry, backend=layer.dgrad
                )
                self.gradients[3 * k] = None if activation is None else dweight
                return written
        dx: Tensor = _op.conv_dgrad(
            *self.operands(k, gradient), addend, mask, *(None,) * 5, self.size, *layer.geometry, backend=layer.dgrad
        )[0]
        return dx

    def operands(self, k: int, gradient: _Gradient) -> tuple[Tensor | None, ...]:
        return gradient.dy, self.made[k].weight, gradient.z, gradient.coefficients

    def weight_gradient(self, k: int, gradient: _Gradient) -> None:
        if not self.needs[3 * k]:
            return
        layer, weight = self.chain.layers[k], self.made[k].weight
        assert weight is not None
        no_affine: tuple[Tensor | None, Tensor | None] = (None, None)
        if k in (0, len(self.chain.branch)):
            x, affine = self.x, no_affine
        else:
            before = self.made[k - 1]
            x, affine = before.z, (before.scale, before.shift)
            if layer.wgrad == "aten" or not layer.fusion.prologue:
                x, _ = _op.bn_apply(x, *affine, None, None, None, True, False, backend=self.chain.backend)
                affine = no_affine
        filter_size = weight.shape[2:]
        self.gradients[3 * k] = _op.conv_wgrad(
            gradient.dy,
            x,
            gradient.z,
            gradient.coefficients,
            *affine,
            filter_size,
            *layer.geometry,
            backend=layer.wgrad,
        )

    def wants_sums(self, k: int) -> bool:
        return self.needs[3 * k + 1] or self.needs[3 * k + 2]

    def keep_sums(self, k: int, sums: Any) -> None:
        self.gradients[3 * k + 1], self.gradients[3 * k + 2] = sums[1], sums[0]


def _rows(z: Tensor) -> int:
    return dispatch.partial_rows(pixels(z), z.shape[1])
