"""A residual block in training as a candidate of the tuner: native PyTorch layers, or a chain as the plan has it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused import dispatch
from resnet_fused._command import one_line
from resnet_fused.contract import breach
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch.conv import BlockShape, ConvShape
from resnet_fused.dispatch.table import Choice, Entry, Table
from resnet_fused.functional import residual as chains
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.problems import Job

CHECKED_IMAGES = 8


@dataclass(frozen=True)
class Block:
    """Its operands: input, gradient of the result, layers."""

    x: Tensor
    dy: Tensor
    branch: list[chains.ConvBN]
    shortcut: chains.ConvBN | None
    identity: bool

    @property
    def leaves(self) -> list[Tensor]:
        layers = [*self.branch, *([] if self.shortcut is None else [self.shortcut])]
        return [
            self.x,
            *(t for layer in layers for t in (layer.weight, layer.bn_weight, layer.bn_bias) if t is not None),
        ]


def operands(job: Job, make: Operands) -> Block:
    """Random operands; leaves of autograd."""
    shape = job.problem.shape
    assert isinstance(shape, BlockShape)

    def layer(s: ConvShape) -> chains.ConvBN:
        weight = make.weight(s.k, s.c // s.groups, s.r, s.s).requires_grad_()
        vectors = (torch.zeros(s.k, device=make.device), torch.ones(s.k, device=make.device))
        scale, shift = make.vector(s.k, positive=True).requires_grad_(), make.vector(s.k).requires_grad_()
        return chains.ConvBN(weight, *vectors, scale, shift, (s.stride, s.padding, s.dilation, s.groups), True)

    first, last = shape.branch[0], shape.branch[-1]
    x = make.activation(first.n, first.c, first.h, first.w).requires_grad_()
    dy = make.activation(last.n, last.k, last.p, last.q)
    branch, shortcut = [layer(s) for s in shape.branch], layer(shape.shortcut) if shape.shortcut else None
    return Block(x, dy, branch, shortcut, shape.identity)


def make_benchmark_fn(job: Job, choice: Choice, block: Block, table: Table) -> Callable[[], list[Tensor]]:
    """One step of the block, forward and backward: its result and the gradients of all leaves.

    Args:
        job: the block.
        choice: `"aten"`, or the backend of the chain's passes; the plan chooses the convolutions'.
        block: of `operands`.
        table: what the plan knows.
    """
    chosen = Entry(job.problem, ((choice, 1.0),))
    verified = table.verified | {(job.problem.op, choice.backend)}
    assumed = dataclasses.replace(table, verified=verified, entries={**table.entries, job.problem: chosen})

    def step() -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            if choice.backend == "aten":
                chain: chains.Chain | None = chains.Chain((), None, block.identity, True, "aten")
            else:
                # Without a GPU no table counts.
                forced = block.x.device.type != "cuda"
                stack.enter_context(dispatch.use_backend(choice.backend) if forced else plans.assuming(assumed))
                chain = chains.choose_chain("tune", block.x, block.branch, block.shortcut, identity=block.identity)
            if chain is None:
                raise RuntimeError("the plan does not run this block as a chain")
            y = chains.run_chain(chain, block.x, block.branch, block.shortcut)
            return [y, *torch.autograd.grad(y, block.leaves, block.dy)]

    return step


def check(job: Job, choice: Choice, device: torch.device, table: Table) -> str | None:
    """Why a step is not right, or None, by the numerics contract. Errors are norms: next to zero the mask of a ReLU is
    a matter of rounding, in native PyTorch too.
    """
    job = dataclasses.replace(job, problem=job.problem.with_batch(min(job.problem.batch, CHECKED_IMAGES)))
    try:
        block = operands(job, Operands(device, job.problem.dtype, guarded=False))
        ours = make_benchmark_fn(job, choice, block, table)()
        plain = make_benchmark_fn(job, plans.ATEN, block, table)()
        truth = [value.detach() for value in make_benchmark_fn(job, plans.ATEN, _double(block), table)()]
    except Exception as error:  # whatever a kernel raises is its result
        return one_line(error, kind=True)
    names = ["the result", "the gradient of x", *(f"gradient {i}" for i in range(len(truth) - 2))]
    for name, actual, other, right in zip(names, ours, plain, truth, strict=True):
        if reason := breach(actual, other, right, name, norm=True):
            return reason
    return None


def _double(block: Block) -> Block:
    def layer(one: chains.ConvBN) -> chains.ConvBN:
        vectors = ("weight", "running_mean", "running_var", "bn_weight", "bn_bias")
        made = {}
        for name in vectors:
            value = getattr(one, name)
            made[name] = value.detach().double().requires_grad_(value.requires_grad)
        return one._replace(**made)

    x = block.x.detach().double().requires_grad_()
    shortcut = block.shortcut and layer(block.shortcut)
    return Block(x, block.dy.double(), [layer(one) for one in block.branch], shortcut, block.identity)
