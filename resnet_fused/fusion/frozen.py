"""`freeze`: an inference-only copy with batch norm folded, weights prepacked and, on a GPU, a CUDA graph of it all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from resnet_fused.functional.statistics import constant_affine
from resnet_fused.nn import units
from resnet_fused.ops import aten

from .model import fuse
from .plans import BlockPlan, SequencePlan
from .recognise import is_native, recognise
from .swap import current, is_fused, swap_in

MAX_GRAPHS = 8

# oneDNN's fused ReLU turns a NaN into 0. Where one shows up, the network runs again with ReLU as a pass of its own.
_keep_nan: ContextVar[bool] = ContextVar("resnet_fused_keep_nan", default=False)


def freeze(model: nn.Module, example_input: Tensor) -> nn.Module:
    """An inference-only callable that computes what `model` computes: `y = model(x)`.

    Every fused convolution holds its batch norm folded into the weight, prepacked for the library that runs it; on a
    CPU that is oneDNN's convolution with bias, residual and ReLU inside. On a GPU the network is captured in a CUDA
    graph for each shape of input it meets.

    Args:
        model: in eval mode, fused or not; it is left as it is.
        example_input: an input such as the callable will get, on the model's device; other sizes work as well.

    Returns:
        A module whose forward takes what `model` takes. It keeps no gradient, cannot go back to training mode, and
        computes in the dtype of `model`: autocast has no effect on it.

    Raises:
        TypeError: `model` is not an `nn.Module`, `example_input` not a tensor.
        RuntimeError: `model`, or a part of it, is in training mode; whatever `model(example_input)` raises.

    Numerics:
        A NaN or an infinity in the input or in the result gives exactly what the model gives. One that arises inside a
        CPU network by overflow and leaves no trace in the result may read as 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"freeze: example_input must be a torch.Tensor, got {type(example_input).__name__}")
    training = next((name or "the model itself" for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise RuntimeError(f"freeze: the model is in training mode ({training}); call .eval() on it first")
    with torch.no_grad():
        network = fuse(copy.deepcopy(model))
        _plan_native(network)
        seen = _observe(network, example_input)
        network = _overwriting_stages(_replace(network, seen))
    frozen = Frozen(network).eval()
    frozen(example_input)
    return frozen


class Frozen(nn.Module):
    """What `freeze` returns: the frozen network behind its checks and, on a GPU, its CUDA graphs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._graphs: dict[Any, Callable[[Tensor], Any]] = {}

    def forward(self, x: Tensor) -> Any:
        """What the model computes of `x`."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cuda":
                return self._graph(x)(x)
            y = self.network(x)
            if not all(map(_finite, (x, *tree_leaves(y)))):
                token = _keep_nan.set(True)
                try:
                    y = self.network(x)
                finally:
                    _keep_nan.reset(token)
            return y

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError("a frozen model has no training mode; train the model it was made from")
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return Frozen(copy.deepcopy(self.network, memo)).eval()

    def __reduce__(self) -> Any:
        raise TypeError("a frozen model cannot be pickled: save the model it was made from, and freeze that again")

    def _graph(self, x: Tensor) -> Callable[[Tensor], Any]:
        """The network for inputs like `x`: a graph for the first shapes it meets, since each keeps its memory."""
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                return self.network
            try:
                self._graphs[key] = _capture(self.network, x)
            except RuntimeError as error:
                warnings.warn(f"freeze: no CUDA graph, the network runs kernel by kernel: {error}", stacklevel=3)
                self._graphs[key] = self.network
        return self._graphs[key]


def _capture(network: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The network as a CUDA graph for inputs like `example`; results are copies, free of the graph's memory."""
    static_input = example.clone()
    stream = torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # lets cuDNN choose its algorithms and the allocator fill its pools outside the capture
            network(static_input)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_output = network(static_input)

    def replay(x: Tensor) -> Any:
        static_input.copy_(x)
        graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, static_output)

    return replay


def _finite(value: Any) -> bool:
    """Whether a tensor holds no NaN and no infinity; a sum that overflows counts as one, and costs a second run."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    total = value.sum(dtype=torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else None)
    return bool(total.isfinite())


class FoldedConv(nn.Module):
    """relu(conv(x) + bias + residual) with batch norm folded into the weight and the bias."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: bool, with_residual: bool, input_shape: torch.Size
    ) -> None:
        super().__init__()
        assert bn.running_mean is not None and bn.running_var is not None
        dtype = conv.weight.dtype
        scale, shift, _, _ = constant_affine(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, dtype)
        if conv.bias is not None:
            shift = shift + conv.bias.to(shift.dtype) * scale
        weight = aten.fold(conv.weight, scale)
        assert not isinstance(conv.padding, str)  # units.plain saw to it
        self.geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        self.relu = relu
        self.packed = aten.onednn_runs(weight, weight)
        if self.packed:
            weight = aten.onednn_pack(weight, *self.geometry, input_shape)
            shift = shift.to(aten.bias_dtype(dtype, with_residual))
        # Not persistent: a prepacked weight is opaque, and belongs to this machine's oneDNN.
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", shift.detach(), persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False) -> Tensor:
        if not self.packed:
            return aten.conv_fprop(x, self.weight, None, self.bias, residual, *self.geometry, self.relu)
        relu_apart = self.relu and _keep_nan.get()
        y = aten.onednn_conv(
            x, self.weight, self.bias, residual, *self.geometry, self.relu and not relu_apart, overwrite_residual
        )
        return y.relu_() if relu_apart else y

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.geometry
        form = "prepacked for oneDNN" if self.packed else "folded"
        return f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, relu={self.relu}, {form}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedConv:
        """Copies share the constants; a prepacked weight cannot be copied, and none is ever written."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin


class FrozenBlock(nn.Module):
    """A residual block of folded convolutions."""

    def __init__(self, plan: BlockPlan, convs: list[FoldedConv]) -> None:
        super().__init__()
        branch = len(plan.units)
        self.branch = nn.ModuleList(convs[:branch])
        self.shortcut = convs[branch] if plan.shortcut is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, overwrite_input=False)

    def run(self, x: Tensor, overwrite_input: bool) -> Tensor:
        """The block; with `overwrite_input` its result may take the place of `x` in memory."""
        residual = x if self.shortcut is None else self.shortcut(x)
        y = x
        for conv in self.branch[:-1]:  # type: ignore[union-attr]
            y = conv(y)
        return self.branch[-1](y, residual, overwrite_residual=self.shortcut is not None or overwrite_input)


class FrozenStage(nn.Sequential):
    """A Sequential that alone sees what its blocks pass on: a block may overwrite the result of the one before it."""

    def forward(self, x: Tensor) -> Tensor:
        before = None
        for module in self:
            x = module.run(x, isinstance(before, FrozenBlock)) if isinstance(module, FrozenBlock) else module(x)
            before = module
        return x


class FrozenSequence(nn.Module):
    """A module whose forward was regenerated around its fused chains, with folded convolutions in their place."""

    def __init__(self, module: nn.Module, plan: SequencePlan, folded: dict[int, FoldedConv], kept: list[Any]) -> None:
        super().__init__()
        replaced = {path for k in folded for path in plan.units[k].paths}
        for name, child in module.named_children():
            if name not in replaced:
                self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):  # a plain tensor attribute, which the forward may read
                setattr(self, name, value)
        self._folded_convs = nn.ModuleDict({str(k): conv for k, conv in folded.items()})
        self._kept_units = kept  # the modules of the other units, which are children of their own
        self._plan = plan

    def forward(self, *inputs: Any) -> Any:
        body = self._plan.body(False, inputs)
        if body is None:
            kinds = ", ".join(type(x).__name__ for x in inputs)
            raise TypeError(f"this frozen module was planned for other inputs than ({kinds})")
        return body(self, *inputs)

    def _run_unit(self, k: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if str(k) in self._folded_convs:
            folded: Tensor = self._folded_convs[str(k)](x, residual)
            return folded
        conv, bn, act, relu = self._kept_units[k]
        return units.conv_bn_act(x, conv, bn, act, relu=relu, residual=residual)


def _plan_native(network: nn.Module) -> None:
    """Give the modules of `resnet_fused.nn` plans as well, so that they are folded like the others."""
    for module in list(network.modules()):
        recognition = recognise(module, into_native=True) if is_native(module) else None
        if recognition is not None and recognition.plan is not None:
            swap_in(module, recognition)


def _observe(network: nn.Module, example: Tensor) -> dict[tuple[nn.Module, int], torch.Size]:
    """Run the example; the units that ran, as (fused module, number), and the shapes of their inputs."""
    seen: dict[tuple[nn.Module, int], torch.Size] = {}
    fused = [module for module in network.modules() if is_fused(module)]

    def observed(module: Any) -> Callable[..., Tensor]:
        def run_unit(k: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
            seen[module, k] = x.shape
            result: Tensor = type(module)._run_unit(module, k, x, residual)
            return result

        return run_unit

    for module in fused:
        module.__dict__["_run_unit"] = observed(module)
    try:
        network(example)
    finally:
        for module in fused:
            del module.__dict__["_run_unit"]
    return seen


def _replace(network: nn.Module, seen: dict[tuple[nn.Module, int], torch.Size]) -> nn.Module:
    """Put a frozen module in place of each fused one whose plan ran."""
    made: dict[nn.Module, nn.Module] = {}
    # Children before parents: a frozen parent adopts frozen children.
    for name, module in reversed(list(network.named_modules(remove_duplicate=False))):
        if not is_fused(module):
            continue
        if module not in made:
            made[module] = _frozen_version(module, seen)
        parent, _, child = name.rpartition(".")
        if name:
            setattr(network.get_submodule(parent), child, made[module])
        else:
            network = made[module]
    return network


def _frozen_version(module: nn.Module, seen: dict[tuple[nn.Module, int], torch.Size]) -> nn.Module:
    binding = current(module)
    plan = binding.plan if binding is not None else None
    if binding is None or plan is None or not any((module, k) in seen for k in range(len(plan.all_units))):
        return module
    modules = binding.units
    folded: dict[int, FoldedConv] = {}
    for k, (conv, bn, act, relu) in enumerate(modules):
        foldable = isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None
        if foldable and (module, k) in seen and units.plain(conv, bn, act) is None:
            with_residual = isinstance(plan, BlockPlan) and k == len(plan.units) - 1
            folded[k] = FoldedConv(conv, bn, relu, with_residual, seen[module, k])  # type: ignore[arg-type]
    if isinstance(plan, SequencePlan):
        return FrozenSequence(module, plan, folded, modules)
    return FrozenBlock(plan, list(folded.values())) if len(folded) == len(modules) else module


def _overwriting_stages(network: nn.Module) -> nn.Module:
    """Let the blocks of each plain Sequential reuse memory."""
    for module in network.modules():
        hooks = module._forward_hooks or module._forward_pre_hooks
        if type(module) is nn.Sequential and not hooks and any(isinstance(child, FrozenBlock) for child in module):
            module.__class__ = FrozenStage
    return network
