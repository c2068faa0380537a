"""`freeze`, and the module that it returns."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resnet_fused.fusion.nodes import is_holder

from .conv import FoldedConv, keep_nan
from .graph import Graphs
from .network import freeze_network, observe, prepare
from .plan import FreezePlan


def freeze(model: nn.Module, example_input: Tensor) -> Frozen:
    """An inference-only callable that computes what `model` computes: `y = model(x)`.

    The network is planned once, as a whole, for the backend of the surrounding `use_backend`, else the plan's default
    for this device. Every fused convolution takes its batch norm, residual and ReLU with it: on PyTorch's own
    convolutions folded and, on a CPU, prepacked for oneDNN; on our kernels as an fp32 epilogue. On our kernels the tail
    of a bottleneck also becomes one op where that backend runs it: `conv_join` with the projection of the shortcut,
    else `conv_chain` with the first convolution of the next block. A convolution that a forced backend cannot run takes
    PyTorch's own. `print(frozen.plan)` shows it all. On a GPU the network is captured in a CUDA graph for each shape of
    input it meets.

    Args:
        model: in eval mode, fused or not; it is left as it is. The Triton kernels read channels_last activations: give
            them a model and an input in that format, or each stage copies on its way in and out.
        example_input: an input such as the callable will get, on the model's device; other sizes work as well.

    Returns:
        A module whose forward takes what `model` takes. It keeps no gradient, cannot go back to training mode, and
        computes in the dtype of `model`: autocast has no effect on it, nor does a later `use_backend` on what was
        planned.

    Raises:
        TypeError: `model` is not an `nn.Module`, `example_input` not a tensor.
        RuntimeError: `model`, or a part of it, is in training mode; whatever `model(example_input)` raises.

    Numerics:
        A NaN or an infinity in the input or in the result gives exactly what the model gives. One that arises inside a
        CPU network on oneDNN by overflow and leaves no trace in the result may read as 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"freeze: example_input must be a torch.Tensor, got {type(example_input).__name__}")
    modes = ((name, module.training and not is_holder(module)) for name, module in model.named_modules())
    training = next((name or "the model itself" for name, training in modes if training), None)
    if training is not None:
        raise RuntimeError(f"freeze: the model is in training mode ({training}); call .eval() on it first")
    with torch.no_grad():
        network, reasons = prepare(model)
        frozen = Frozen(*freeze_network(network, reasons, observe(network, example_input))).eval()
    try:
        frozen(example_input)
    except RuntimeError:  # code between the convolutions may want its activations in NCHW order, as `view` does
        if not frozen.keep_order():
            raise
        frozen(example_input)
    return frozen


class Frozen(nn.Module):
    """What `freeze` returns: the frozen network behind its checks and, on a GPU, its CUDA graphs.

    A graph has one place for its input: on a GPU a frozen model serves one thread at a time.

    Attributes:
        plan: how each convolution is run.
    """

    def __init__(self, network: nn.Module, plan: FreezePlan) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self._graphs = Graphs(network)
        self._loses_nan = any(isinstance(module, FoldedConv) and module.packed for module in network.modules())

    def forward(self, x: Tensor) -> Any:
        """What the model computes of `x`."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cuda":
                return self._graphs(x)
            y = self.network(x)
            if self._loses_nan and not all(map(_finite, (x, *tree_leaves(y)))):
                token = keep_nan.set(True)
                try:
                    y = self.network(x)
                finally:
                    keep_nan.reset(token)
            return y

    def keep_order(self) -> bool:
        """Give the results of all convolutions the memory order that they have in the model, at the price of copies.

        Returns:
            Whether any had another.
        """
        prepacked = [module for module in self.modules() if isinstance(module, FoldedConv) and module.packed]
        for module in prepacked:
            module.keeps_order = True
        return bool(prepacked)

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError("a frozen model has no training mode; train the model it was made from")
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return Frozen(copy.deepcopy(self.network, memo), self.plan).eval()

    def __reduce__(self) -> Any:
        raise TypeError("a frozen model cannot be pickled: save the model it was made from, and freeze that again")


def _finite(value: Any) -> bool:
    """Whether a tensor holds no NaN and no infinity; a sum that overflows counts as one, and costs a second run."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    total = value.sum(dtype=torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else None)
    return bool(total.isfinite())
