"""`quantize=` of `freeze`: what the user says, the ranges that calibration finds, and the convolutions put in int8."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import HistogramObserver
from torch.utils._pytree import tree_map_only

from resnet_fused import dispatch, ops
from resnet_fused.dispatch.conv import DTYPES
from resnet_fused.inference.conv import FoldedConv, FrozenConv, Source
from resnet_fused.inference.int8 import Grids, Int8Conv, Quantised
from resnet_fused.inference.int8_triton import TritonInt8Conv, plan_joins
from resnet_fused.inference.one_call import join
from resnet_fused.inference.plan import FreezePlan, PlannedConv
from resnet_fused.inference.value import Apart, Value
from resnet_fused.ops import cpu, onednn
from resnet_fused.ops.onednn import Grid


@dataclasses.dataclass(frozen=True)
class Int8:
    """How `freeze` is to quantise a model.

    Args:
        calibration: inputs [N, C, H, W] such as the model will get, of the example's dtype and device; a few batches.
            They set the range of every activation; the first one also shows each layer's error in the plan.
        keep: the names of convolutions, or of modules that hold them, to be kept in the float dtype.
    """

    calibration: Iterable[Tensor]
    keep: Sequence[str] = ()


def check(quantize: Any, example: Tensor) -> tuple[Int8, bool]:
    """What `quantize` says, and whether our Triton kernels are to run it; nothing has been run yet.

    Raises:
        TypeError: it is neither an `Int8` nor an iterable of inputs.
        RuntimeError: int8 does not run there.
    """
    chosen = quantize if isinstance(quantize, Int8) else Int8(quantize)
    if isinstance(chosen.calibration, Tensor):
        raise TypeError("freeze: quantize is one tensor; it takes an iterable of inputs, such as [x]")
    if isinstance(chosen.calibration, (str, bytes)) or not isinstance(chosen.calibration, Iterable):
        kind = type(chosen.calibration).__name__
        raise TypeError(f"freeze: quantize takes an iterable of inputs or resnet_fused.Int8(...), got {kind}")
    if isinstance(chosen.keep, str) or not all(isinstance(name, str) for name in chosen.keep):
        raise TypeError(f"freeze: keep takes a sequence of names, got {chosen.keep!r}")
    forced, device = dispatch.forced_backend(), example.device.type
    on_triton = (forced or dispatch.default_backend("conv_fprop_int8", device)) == "triton"
    if not on_triton and device != "cpu":
        raise RuntimeError(
            f"freeze: quantize runs on a CPU, and example_input is on {example.device}; on a GPU its Triton kernels "
            "run where they are asked for, by resnet_fused.use_backend('triton') around freeze, or where `resnet-fused "
            "tune --dtype int8` has found them right and fast"
        )
    if not on_triton and forced not in (None, "aten"):
        raise RuntimeError(f"freeze: quantize does not run on the forced backend {forced!r}")
    if problem := ops.unavailable("triton", device) if on_triton else onednn.int8_refusal():
        raise RuntimeError(f"freeze: quantize cannot run here: {problem}")
    return chosen, on_triton


def quantised(
    network: nn.Module, plan: FreezePlan, sources: dict[str, Source], example: Tensor, chosen: Int8, on_triton: bool
) -> tuple[nn.Module, FreezePlan]:
    """A frozen float network with its convolutions in int8, and how each now runs.

    Args:
        network: it is changed.
        plan: of the float network.
        sources: what each of its convolutions was made from, by name.
        example: what calibration inputs have to be like.
        chosen: what the user says.
        on_triton: our Triton kernels run it, not a CPU's convolutions.
    """
    reasons = _kept(chosen.keep, plan)
    convs: dict[str, FoldedConv] = {}
    for module in network.modules():
        if isinstance(module, FrozenConv) and module.layer not in reasons:
            reason = _float_only(module, sources[module.layer], on_triton)
            if isinstance(module, FoldedConv) and reason is None:
                convs[module.layer] = module
            else:
                reasons[module.layer] = str(reason)
    ranges = _Ranges(convs.values(), torch.qint8 if on_triton else torch.quint8)
    first = ranges.observe(network, chosen.calibration, example)
    made: dict[str, Int8Conv | TritonInt8Conv] = {}
    for name, conv in convs.items():
        grids = ranges.grids(conv)
        if isinstance(grids, str):
            reasons[name] = grids
            continue
        twin = TritonInt8Conv(sources[name], grids) if on_triton else Int8Conv(sources[name], grids, conv.keeps_order)
        if twin.refusal is None:
            made[name] = twin
        else:
            reasons[name] = twin.refusal
    if not made:
        why = Counter(reasons.values()).most_common(1)
        raise RuntimeError(f"freeze: no convolution can run in int8: {why[0][0] if why else 'none was frozen'}")
    errors = _errors(network, {convs[name]: twin for name, twin in made.items()}, first)
    for module in list(network.modules()):
        for child, part in list(module._modules.items()):
            if isinstance(part, FrozenConv) and part.layer in made:
                setattr(module, child, made[part.layer])
    if isinstance(network, FrozenConv):
        network = made.get(network.layer, network)
    if on_triton:
        plan_joins(network)
    rows = [_row(row, made, errors, reasons) for row in plan.layers]
    return Int8Network(network), FreezePlan(tuple(rows))


def _kept(keep: Sequence[str], plan: FreezePlan) -> dict[str, str]:
    """Why the convolutions that `keep` names stay in float.

    Raises:
        ValueError: a name that is no convolution's, nor of a module with some.
    """
    names = [row.layer for row in plan.layers]
    reasons = {}
    for kept in keep:
        found = [name for name in names if name == kept or name.startswith(f"{kept}.")]
        if not found:
            raise ValueError(f"freeze: keep names {kept!r}, which holds no convolution; choose of {', '.join(names)}")
        reasons.update(dict.fromkeys(found, "kept in float by name"))
    return reasons


def _float_only(conv: FrozenConv, source: Source, on_triton: bool) -> str | None:
    """Why a convolution cannot be in int8, or None."""
    if on_triton and conv.dtype not in DTYPES:
        return f"int8 takes float32, float16 and bfloat16 networks, not {conv.dtype}"
    if not on_triton and isinstance(conv, FoldedConv) and conv.packed is None:
        return f"int8 takes float32 and bfloat16 networks, not {conv.dtype}"
    if not isinstance(conv, FoldedConv):
        return conv.planned.reason or f"it runs on {conv.backend}"
    if source.add is not None and not conv.adds:
        return conv.planned.reason
    if not on_triton and conv.adds and source.act not in (None, "relu"):
        return f"oneDNN's int8 convolution adds a residual before ReLU, not before {source.act}"
    return None


def _row(
    row: PlannedConv, made: Mapping[str, FrozenConv], errors: dict[str, float], reasons: dict[str, str]
) -> PlannedConv:
    if row.layer in made:
        return dataclasses.replace(made[row.layer].planned, error=errors.get(row.layer))
    return dataclasses.replace(row, reason=reasons.get(row.layer, row.reason))


class _Ranges:
    """The range of each convolution's input, result and residual.

    A result is observed once, for all that read it: its observer travels with the tensor.

    Args:
        dtype: of the grids, `torch.quint8` or `torch.qint8`.
    """

    def __init__(self, convs: Iterable[FrozenConv], dtype: torch.dtype) -> None:
        self.convs, self.dtype = list(convs), dtype
        self.observers: dict[tuple[FrozenConv, str], HistogramObserver] = {}
        self._made: dict[HistogramObserver, Grid] = {}

    def observe(self, network: nn.Module, inputs: Iterable[Tensor], example: Tensor) -> Tensor:
        """Run the calibration inputs; the first one is returned.

        Raises:
            TypeError: one is no tensor.
            ValueError: there is none, all are constant, or one is not like the example or not finite.
        """
        first, constant = None, True
        with _watched(self.convs, self._see):
            for number, x in enumerate(inputs):
                _check_input(x, example, number)
                first = x if first is None else first
                constant = constant and bool(x.min() == x.max())
                network(x)
        if first is None:
            raise ValueError("freeze: quantize has no calibration inputs: the iterable is empty")
        if constant:
            raise ValueError("freeze: every calibration input is one constant, which shows the range of no activation")
        return first

    def _see(self, conv: FrozenConv, x: Tensor, residual: Tensor | None, y: Tensor) -> None:
        for role, t in (("x", x), ("residual", residual), ("y", y)):
            if t is None:
                continue
            known = getattr(t, "observer", None)
            if known is None:
                key = (conv, role)
                known = self.observers.get(key) or HistogramObserver(dtype=self.dtype).to(t.device)
                known(t.detach().float())
            self.observers[conv, role] = known
        y.observer = self.observers[conv, "y"]  # type: ignore[attr-defined]

    def grids(self, conv: FrozenConv) -> Grids | str:
        """Or why the convolution has none."""
        found: list[Grid | None] = []
        for role, what in (("x", "input"), ("y", "result"), ("residual", "residual")):
            observer = self.observers.get((conv, role))
            if observer is None and role != "residual":
                return "no calibration input reached it"
            if observer is not None and bool(observer.min_val == observer.max_val):
                return f"its {what} was {float(observer.min_val):g} everywhere on the calibration inputs"
            found.append(None if observer is None else self._grid(observer))
        return Grids(*found)  # type: ignore[arg-type]

    def _grid(self, observer: HistogramObserver) -> Grid:
        if observer not in self._made:
            scale, zero_point = observer.calculate_qparams()
            self._made[observer] = Grid(float(scale), int(zero_point))
        return self._made[observer]


def _check_input(x: Any, example: Tensor, number: int) -> None:
    where = f"freeze: calibration input {number}"
    if not isinstance(x, Tensor):
        raise TypeError(f"{where} is a {type(x).__name__}, not a tensor; of pairs with labels give the inputs alone")

    def kind(t: Tensor) -> str:
        channels = f" with {t.shape[1]} channels" if t.dim() == 4 else ""
        return f"a {t.dim()}-D {t.dtype} on {t.device}{channels}"

    if kind(x) != kind(example):
        raise ValueError(f"{where} is {kind(x)}; the example input is {kind(example)}")
    if x.numel() == 0:
        raise ValueError(f"{where} is empty: its shape is {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{where} holds a NaN or an infinity")


See = Callable[[Any, Tensor, Tensor | None, Tensor], None]


@contextlib.contextmanager
def _watched(convs: Iterable[FrozenConv], see: See) -> Iterator[None]:
    """Inside, every call of the convolutions is shown: (convolution, input, residual, result)."""

    def keep_residual(conv: nn.Module, args: Any, named: Any) -> Any:
        return args, {**named, "overwrite_residual": False}

    def shown(conv: nn.Module, args: Any, named: Any, y: Tensor) -> None:
        see(conv, args[0], args[1] if len(args) > 1 else named.get("residual"), y)

    handles = []
    for conv in convs:
        handles.append(conv.register_forward_pre_hook(keep_residual, with_kwargs=True))
        handles.append(conv.register_forward_hook(shown, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _errors(network: nn.Module, twins: Mapping[FrozenConv, FrozenConv], x: Tensor) -> dict[str, float]:
    """|| int8 - float || / || float || of each convolution's result, of the same float input, by name."""
    sums: dict[str, Tensor] = {}

    def compare(conv: Any, x: Tensor, residual: Tensor | None, y: Tensor) -> None:
        ours = twins[conv](x, residual)
        found = torch.stack([(ours - y).float().square().sum(), y.float().square().sum()])
        sums[conv.layer] = found + sums.get(conv.layer, 0.0)

    with _watched(twins, compare):
        network(x)
    return {name: float((error / size).sqrt()) for name, (error, size) in sums.items()}


class Int8Network(nn.Module):
    """A network with convolutions in int8; what it returns is in the float dtype.

    8 bits have no value for a NaN or an infinity in the input. On a CPU that raises; on a GPU, which nothing is to wait
    for, all floats that are returned are NaN then.

    Raises:
        ValueError: the input holds one, on a CPU.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def join_call(self, x: Value) -> Value:
        """The network, where its rounding of the input sees all that `forward` checks, and its result is in floats."""
        result = join(self.network, x)
        unseen = any(x.number in (step.x, step.residual) and step.op != cpu.QUANTISE for step in x.steps)
        if unseen or result.grid is not None:
            raise Apart
        return result

    def forward(self, x: Tensor) -> Any:
        if x.is_cpu and x.is_floating_point() and not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
            raise ValueError(
                "the input holds a NaN or an infinity, which int8 has no value for; a model frozen without quantize "
                "gives what the model gives"
            )
        y = tree_map_only(Quantised, Quantised.dense, self.network(x))
        return y if x.is_cpu else poisoned(x, y)


def poisoned(x: Tensor, y: Any) -> Any:
    """`y`, whose floats become NaN where `x` holds a NaN or an infinity; nothing waits for what it holds."""
    nothing = torch.where(x.isfinite().all(), 0.0, torch.nan)
    return tree_map_only(Tensor, lambda t: t + nothing.to(t.dtype) if t.is_floating_point() else t, y)
