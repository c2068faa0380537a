"""What PyTorch's `FlopCounterMode` counts for the ops: its own count of the convolutions in them."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def register_formulas(counter: ModuleType) -> None:
    """Tell PyTorch's counter of FLOPs about our convolutions, and about oneDNN's, which it does not know either.

    Args:
        counter: the module `torch.utils.flop_counter`.

    Mutates:
        Its registry; a formula that is there already stays.
    """
    conv = counter.conv_flop_count

    def fprop(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
        y = out_shape[0] if isinstance(out_shape, tuple) and not isinstance(out_shape, torch.Size) else out_shape
        return int(conv(x, weight, y))

    def dgrad(dy: Shape, weight: Shape, *_: Any, out_shape: tuple[Shape, ...], **__: Any) -> int:
        return int(conv(dy, weight, out_shape[0], transposed=True))

    def wgrad(dy: Shape, x: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        swapped = [(shape[1], shape[0], *shape[2:]) for shape in (x, dy, out_shape)]
        return int(conv(*swapped))

    def chain(
        x: Shape, weight2: Shape, scale2: Any, shift2: Any, weight3: Shape, scale3: Any, shift3: Any, residual: Any,
        weight1: Shape | None, *_: Any, out_shape: tuple[Shape, Shape], **__: Any,
    ) -> int:  # fmt: skip
        y, following = out_shape
        inner = (y[0], weight2[0], *y[2:])
        count = conv(x, weight2, inner) + conv(inner, weight3, y)
        return int(count if weight1 is None else count + conv(y, weight1, following))

    def join(x: Shape, weight: Shape, shortcut: Shape, shortcut_weight: Shape, *_: Any, **results: Any) -> int:
        y = results["out_shape"]
        return int(conv(x, weight, y) + conv(shortcut, shortcut_weight, y))

    def onednn(*args: Any, out_shape: Shape, **_: Any) -> int:
        """(x, weight, bias, ...), (x, residual, weight, ...) or (residual, x, weight, ...): the weight is the last."""
        *_rest, weight = (shape for shape in args[:3] if isinstance(shape, torch.Size) and len(shape) == len(out_shape))
        return int(conv(out_shape, weight, out_shape))

    ours = torch.ops.resnet_fused
    formulas = {
        ours.conv_fprop: fprop,
        ours.conv_fprop_stats: fprop,
        ours.conv_dgrad: dgrad,
        ours.conv_dgrad_join: dgrad,
        ours.conv_wgrad: wgrad,
        ours.conv_chain: chain,
        ours.conv_join: join,
    }
    for name in ("_convolution_pointwise", "_convolution_pointwise_"):
        if hasattr(torch.ops.mkldnn, name):
            formulas[getattr(torch.ops.mkldnn, name)] = onednn
    for op, formula in formulas.items():
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


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
