"""What PyTorch's `FlopCounterMode` counts for the ops: its own count of the convolutions in them."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_fused import _library
from resnet_fused.ops import cpu
from resnet_fused.ops.registry import OPS, Op

_COUNTER = "torch.utils.flop_counter"


def register_formulas(counter: ModuleType) -> None:
    """Tell PyTorch's counter of FLOPs about our convolutions, and about oneDNN's, which it does not know either.

    Args:
        counter: the module `torch.utils.flop_counter`.

    Mutates:
        Its registry; a formula that is there already stays.
    """
    conv = counter.conv_flop_count

    def ours(op: Op) -> Callable[..., int]:
        flops = op.flops
        assert flops is not None
        return lambda *values, out_val, **_: int(flops(op.args(*values), op.results(out_val), conv))

    def onednn(*args: Any, out_val: Tensor, **_: Any) -> int:
        """(x, weight, bias, ...), (x, residual, weight, ...) or (residual, x, weight, ...): the weight is the last."""
        *_rest, weight = (t.shape for t in args[:3] if isinstance(t, Tensor) and t.dim() == out_val.dim())
        return int(conv(out_val.shape, weight, out_val.shape))

    def onednn_int8(*args: Any, out_val: Tensor, **_: Any) -> int:
        return int(conv(args[0].shape, args[3].shape, out_val.shape))  # (x, scale, zero point, weight, ...)

    def cpu_conv(x: Tensor, weight: Tensor, *args: Any, out_val: Tensor, **_: Any) -> int:
        channels, filter, _, _, groups = args[3:8]  # behind scale, bias and residual
        return int(conv(x.shape, (channels, x.shape[1] // groups, *filter), out_val.shape))

    def cpu_conv_add_(residual: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
        channels, filter, _, _, groups = args[2:7]  # behind scale and bias
        return int(conv(x.shape, (channels, x.shape[1] // groups, *filter), residual.shape))

    def cpu_steps(x: Tensor, _tensors: object, numbers: Sequence[int], *_: object, **_named: object) -> int:
        problems = (problem for step, problem in cpu.step_problems(x.shape, numbers) if step.op == cpu.CONV)
        return sum(conv(p.image, p.filter, p.output) for p in problems)

    formulas = {getattr(torch.ops.resnet_fused, op.name): ours(op) for op in OPS.values() if op.flops is not None}
    for name in ("_convolution_pointwise", "_convolution_pointwise_"):
        if hasattr(torch.ops.mkldnn, name):
            formulas[getattr(torch.ops.mkldnn, name)] = onednn
    if hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        formulas[torch.ops.onednn.qconv2d_pointwise] = onednn_int8
    if _library.load_cpu() is None:
        ops = torch.ops.resnet_fused_cpu
        formulas |= {ops.conv: cpu_conv, ops.conv_add_: cpu_conv_add_, ops.steps: cpu_steps}
    for op, formula in formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as the counter is imported: it imports triton, which we must not."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == _COUNTER:  # a loader may have other modules
                    register_formulas(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the formulas now if the counter of FLOPs is there, else when it will be imported."""
    if _COUNTER in sys.modules:
        register_formulas(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
