"""Frozen blocks, the stages that hand activations from one to the next, and frozen forwards of any other kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion.nodes import is_holder
from resnet_fused.fusion.plans import SequencePlan
from resnet_fused.inference.conv import FrozenConv, in_format
from resnet_fused.inference.one_call import OneCall, StandIn, in_turn, join
from resnet_fused.inference.tail import Chain, Join, Remake, Result, plan_chain, plan_join
from resnet_fused.inference.value import Apart, Value
from resnet_fused.nn import call
from resnet_fused.nn.sums import PLUS


class FrozenBlock(nn.Module):
    """A residual block of frozen convolutions: one by one, or its tail as one op.

    Args:
        branch: of two or three convolutions; the residual and the last ReLU belong to the last one.
        shortcut: the projection, or None for none.
        pools: what the shortcut begins with, such as the average pool of ResNet-D.
    """

    def __init__(self, branch: list[FrozenConv], shortcut: FrozenConv | None, pools: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.branch = nn.ModuleList(branch)
        self.shortcut = shortcut
        self.pools = nn.ModuleList(pools)
        self.join: Join | nn.Module | None = None
        self.chain: Chain | None = None
        self.one_call: OneCall | None = None
        self._look()

    def _look(self) -> None:
        convs: list[FrozenConv | Join | None] = [*self.branch, self.shortcut, self.join]  # type: ignore[list-item]
        present = [conv for conv in convs if conv is not None]
        self.nhwc = all(conv.backend == "triton" for conv in present)  # reads no other order
        self.nchw = all(conv.nchw for conv in present)

    @property
    def head(self) -> nn.Module:
        """The convolution that makes the block's first activation."""
        return self.branch[0]

    def plan_tail(self, following: FrozenBlock | None, remake: Remake) -> None:
        """Run the tail as one op where its backend does.

        A block with a projection joins it rather than chains: that saves writing and reading the projection, 8 times
        the bottleneck's activation; a chain saves 6, what lies on both sides of conv3.

        Args:
            following: the block that alone gets the result, or None.
            remake: makes a convolution on another backend.
        """
        branch: list[FrozenConv] = list(self.branch)  # type: ignore[arg-type]
        self.join = plan_join(branch, self.shortcut, remake)
        if self.join is not None:  # holds the weights of both
            self.branch, self.shortcut = nn.ModuleList(branch[:-1]), None
        else:
            head: FrozenConv | None = following.head if following is not None else None  # type: ignore[assignment]
            self.chain = plan_chain(branch, head, remake)
            if self.chain is not None:
                self.branch[1], self.branch[2] = self.chain.conv2, self.chain.conv3
                if following is not None and self.chain.head is not None:
                    following.branch[0] = self.chain.head
        self._look()

    def forward(self, x: Tensor) -> Tensor:
        self.check_autocast()
        return through_nhwc(lambda x: self.run(x)[0], x, self.nchw) if self.nhwc else self.run(x)[0]

    def check_autocast(self) -> None:
        """As a convolution's, for all of them: nothing changes it within a block."""
        self.branch[0].check_autocast()  # type: ignore[operator]

    def run(
        self, x: Tensor, first: Tensor | None = None, following: nn.Module | None = None, overwrite_input: bool = False
    ) -> Result:
        """The block, and the first activation of the one after where this one's tail makes that as well.

        Args:
            x: the input.
            first: this block's first activation, if the block before made it.
            following: what comes after, and nothing else gets the result.
            overwrite_input: the result may take the place of `x` in memory.
        """
        if self.one_call is not None and first is None and (result := self.one_call(x)) is not None:
            return result, None
        if self.join is None and self.chain is None:
            return self._layers(x, first, overwrite_input), None
        y = self.branch[0](x) if first is None else first
        if self.chain is not None:
            with_head = isinstance(following, FrozenBlock) and following.head is self.chain.head
            return self.chain(y, self._residual(x), with_head)
        assert self.join is not None
        for conv in list(self.branch)[1:]:
            y = conv(y)
        return self.join(y, self._pooled(x)), None

    def _pooled(self, x: Tensor) -> Tensor:
        for pool in self.pools:
            x = pool(x)
        return x

    def _residual(self, x: Tensor) -> Tensor:
        y = self._pooled(x)
        return y if self.shortcut is None else self.shortcut(y)

    def _layers(self, x: Tensor, first: Tensor | None, overwrite_input: bool) -> Tensor:
        residual = self._residual(x)
        head, *inner, last = self.branch
        y = head(x) if first is None else first
        for conv in inner:
            y = conv(y)
        result: Tensor = last(y, residual, overwrite_residual=self.shortcut is not None or overwrite_input)
        return result

    def join_call(self, x: Value) -> Value:
        if self.join is not None or self.chain is not None or len(self.pools) > 0:
            raise Apart
        residual = x if self.shortcut is None else join(self.shortcut, x)
        *inner, last = self.branch
        return join(last, in_turn(inner, x), residual)


class FrozenStage(nn.Sequential):
    """A Sequential that alone sees what its blocks pass on.

    A block may overwrite the result of the one before it, and make the first activation of the one after it.
    """

    one_call: OneCall | None = None

    def forward(self, x: Tensor) -> Tensor:
        blocks = [module for module in self if isinstance(module, FrozenBlock)]
        blocks[0].check_autocast()
        if self.one_call is not None and (result := self.one_call(x)) is not None:
            return result
        if len(blocks) == len(self) and all(block.nhwc for block in blocks):
            return through_nhwc(self._run, x, all(block.nchw for block in blocks))
        return self._run(x)

    def join_call(self, x: Value) -> Value:
        return in_turn(self, x)

    def _run(self, x: Tensor) -> Tensor:
        before: nn.Module | None = None
        first: Tensor | None = None
        modules = list(self)
        for module, following in zip_longest(modules, modules[1:]):
            if isinstance(module, FrozenBlock):
                x, first = module.run(x, first, following, overwrite_input=isinstance(before, FrozenBlock))
            else:
                x, first = module(x), None
            before = module
        return x


def use_one_call(network: nn.Module) -> None:
    """Let what has `join_call` run in one call where the kernels of all of it do: the network, else each stage, else
    each block; nothing may be put in their place after it.
    """
    for module in network.modules():
        if hasattr(module, "one_call"):
            module.one_call = OneCall(module)  # type: ignore[assignment]


def through_nhwc(run: Callable[[Tensor], Tensor], x: Tensor, nchw: bool) -> Tensor:
    """`run(x)` in NHWC order all the way, its result in the order of PyTorch's own."""
    if x.dim() != 4:
        return run(x)
    return in_format(run(x.contiguous(memory_format=torch.channels_last)), x, nchw)


class FrozenSequence(nn.Module):
    """A module whose forward was regenerated around its fused chains, with frozen convolutions in their place."""

    def __init__(self, module: nn.Module, plan: SequencePlan, frozen: dict[int, FrozenConv], kept: list[Any]) -> None:
        super().__init__()
        replaced = {path for k in frozen for path in (plan.units[k].conv, plan.units[k].bn) if path is not None}
        for name, child in module.named_children():
            still = _still_called(child, name, replaced)
            if still is not None:
                self.add_module(name, still)
        opened = [path for path in plan.bypassed if isinstance(module.get_submodule(path), nn.Sequential)]
        for path in replaced:  # the Sequentials are not called any more
            parent, _, name = path.rpartition(".")
            if parent in opened:
                setattr(module.get_submodule(parent), name, nn.Identity())
        for name, parameter in module.named_parameters(recurse=False) if "" not in replaced else ():
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):  # a plain tensor attribute, which the forward may read
                setattr(self, name, value)
        self.one_call: OneCall | None = None
        self._frozen_convs = nn.ModuleDict({str(k): conv for k, conv in frozen.items()})
        self._kept_units = kept  # the modules of the other units, which are children of their own
        self._plan = plan

    def forward(self, *inputs: Any) -> Any:
        body = self._plan.body(False, inputs)
        if body is None:
            kinds = ", ".join(type(x).__name__ for x in inputs)
            raise TypeError(f"this frozen module was planned for other inputs than ({kinds})")
        for conv in self._frozen_convs.values():
            conv.check_autocast()  # type: ignore[operator]
            break  # nothing changes it within a planned forward
        if self.one_call is not None and len(inputs) == 1 and (result := self.one_call(inputs[0])) is not None:
            return result
        return body(self, *inputs)

    def join_call(self, x: Value) -> Value:
        for forward in self._plan.forwards:
            if forward.training is not True and (forward.inputs, forward.arity) == ("any", 1):
                return forward.function(StandIn(self), x)  # type: ignore[no-any-return]
        raise Apart

    def join_unit(self, k: int, x: Value, residual: Value | None) -> Value:
        """Unit `k` in one call."""
        if str(k) not in self._frozen_convs:
            raise Apart
        y, pool = join(self._frozen_convs[str(k)], x, residual), self._plan.units[k].pool
        return y if pool is None else join(self.get_submodule(pool), y)

    def _run_unit(self, k: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        unit = self._plan.units[k]
        if str(k) in self._frozen_convs:
            y: Tensor = self._frozen_convs[str(k)](x, residual)
        else:
            conv, bn, act, activation = self._kept_units[k]
            y = call.conv_bn_act(x, conv, bn, act, activation=activation, residual=residual, add=unit.add or PLUS)
        return y if unit.pool is None else self.get_submodule(unit.pool)(y)


def _still_called(module: nn.Module, path: str, replaced: set[str]) -> nn.Module | None:
    """What of a module a forward may still call when it no longer calls the modules at `replaced`.

    Of a replaced module, that is what it called itself, such as the activation in a batch norm.
    """
    if path not in replaced and not is_holder(module):
        return module
    rest = nn.Module()
    if path not in replaced:
        rest.__dict__.update(module.__dict__, _modules={})
    for name, child in module.named_children():
        kept = _still_called(child, f"{path}.{name}", replaced)
        if kept is not None:
            rest.add_module(name, kept)
    return rest if rest._modules or path not in replaced else None
