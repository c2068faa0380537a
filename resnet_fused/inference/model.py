"""`freeze`, and the module that it returns."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from resnet_fused import dispatch
from resnet_fused.functional.common import autocast_dtype
from resnet_fused.fusion.nodes import is_holder
from resnet_fused.inference.block import use_one_call
from resnet_fused.inference.conv import FoldedConv, keep_nan
from resnet_fused.inference.graph import Graphs, leaves
from resnet_fused.inference.network import freeze_network, observe, prepare
from resnet_fused.inference.one_call import OneCall, join
from resnet_fused.inference.plan import FreezePlan
from resnet_fused.inference.quantize import Int8, check, quantised
from resnet_fused.inference.value import Value


def freeze(model: nn.Module, example_input: Tensor, quantize: Int8 | Iterable[Tensor] | None = None) -> Frozen:
    """An inference-only callable that computes what `model` computes: `y = model(x)`; on request nearly that, in int8.

    The network is planned once, as a whole, for the backend of the surrounding `use_backend`, else the plan's default
    for this device. Every fused convolution takes its batch norm, residual and ReLU with it: on native
    PyTorch's convolutions folded and, on a CPU, prepacked; on our kernels as an fp32 epilogue. On our
    kernels the tail of a bottleneck also becomes one op where that backend runs it: `conv_join` with the projection of
    the shortcut, else `conv_chain` with the first convolution of the next block. A convolution that a forced backend
    cannot run takes native PyTorch. `print(frozen.plan)` shows it all. On a GPU the network is captured in a CUDA graph
    for each shape of input it meets.

    With `quantize` its convolutions run in int8, on a CPU, and on our Triton kernels under `use_backend("triton")` or
    where a table has them as the fastest: every activation is rounded to one of 256 values

        x  ~  x_scale * (q - zero_point),    q = clamp(round(x / x_scale) + zero_point, 0, 255)

    per tensor, every folded weight to w_scale * v with v in [-128, 127], a scale for each output channel; products are
    added in int32, and batch norm, residual, ReLU and the next rounding are done in fp32 on the sum. The ranges come
    from the calibration inputs, by PyTorch's `HistogramObserver` and `PerChannelMinMaxObserver`. What is no fused
    convolution, a max pool excepted, is computed in the float dtype. `frozen.plan` has each layer's error, and why a
    convolution stays in float.

    Args:
        model: in eval mode, fused or not; it is left as it is. The Triton kernels read channels_last activations: give
            them a model and an input in that format, or each stage copies on its way in and out.
        example_input: an input such as the callable will get, on the model's device; other sizes work as well.
        quantize: None, or what calibrates an int8 network: a few inputs [N, C, H, W] such as the callable will get, in
            an iterable, of the example's dtype (float32, bfloat16; on Triton also float16) and device; or `Int8`, which
            also names layers to be kept in float.

    Returns:
        A module whose forward takes one tensor, as that of `model` does. It keeps no gradient. It computes what `model`
        computes under the autocast that surrounds `freeze`, and nothing later changes that: neither autocast around a
        call (a warning says so once; to run in half precision, freeze under autocast, or freeze a half-precision model)
        nor `use_backend` around it. What would need it to be made anew - another dtype or device, training mode, other
        weights, a pickle, a traced, scripted or exported program - raises, and is to be done to `model`.

    Raises:
        TypeError: `model` is not an `nn.Module`, `example_input` not a tensor; `quantize` is no iterable of tensors.
        ValueError: there is no calibration input, or all are constant, or one is not finite or not like the example;
            a name in `keep` that is no layer's.
        RuntimeError: `model`, or a part of it, is in training mode; the example has no values (meta device); int8 does
            not run here (a GPU that was not asked for it, a CPU without VNNI, another forced backend) or on no
            convolution of the model; whatever `model(example_input)` raises.

    Numerics:
        A NaN or an infinity in the input or in the result gives exactly what the model gives. One that arises inside a
        CPU network on oneDNN by overflow and leaves no trace in the result may read as 0. In int8 a NaN or an infinity
        in the input raises a ValueError; on a GPU, which is not to wait for it, every float of the result is NaN.

    Source:
        Int8 arithmetic: Jacob et al. (2018), Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, https://arxiv.org/abs/1712.05877.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"freeze: example_input must be a torch.Tensor, got {type(example_input).__name__}")
    if example_input.is_meta:
        raise RuntimeError("freeze: example_input is on the meta device; freeze runs the model, which needs values")
    modes = ((name, module.training and not is_holder(module)) for name, module in model.named_modules())
    training = next((name or "the model itself" for name, training in modes if training), None)
    if training is not None:
        raise RuntimeError(f"freeze: the model is in training mode ({training}); call .eval() on it first")
    chosen, on_triton = (None, False) if quantize is None else check(quantize, example_input)
    # what int8 on Triton leaves in float, and calibrates on, is native PyTorch's
    backend = dispatch.use_backend("aten") if on_triton else contextlib.nullcontext()
    with torch.no_grad():
        network, reasons = prepare(model)
        device, dtype = example_input.device, example_input.dtype
        setting = Setting(_argument(model), device, dtype, autocast_dtype(device.type))
        try:
            seen = observe(network, example_input)
        except RuntimeError as error:
            own = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
            if own is dtype:
                raise
            text = f"freeze: a model in {own} got an example_input of {dtype}; {_instead(dtype, own)}"
            raise RuntimeError(text) from error
        with backend:
            network, plan, sources = freeze_network(network, reasons, seen)
        frozen = Frozen(network, plan, setting).eval()
    try:
        frozen(example_input)
    except RuntimeError:  # code between the convolutions may want its activations in NCHW order, as `view` does
        if not frozen.keep_order():
            raise
        frozen(example_input)
    if chosen is not None:
        with frozen.surroundings():
            network, plan = quantised(network, plan, sources, example_input, chosen, on_triton)
        frozen = Frozen(network, plan, setting).eval()
        frozen(example_input)
    use_one_call(frozen)
    return frozen


@dataclass(frozen=True)
class Setting:
    """What a model was frozen for.

    Attributes:
        argument: the name of its input.
        device, dtype: of the input.
        autocast: the dtype of autocast around `freeze`; None where it was off.
    """

    argument: str
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None


def _instead(given: torch.dtype, dtype: torch.dtype) -> str:
    """What to do with an input of another dtype than a network takes."""
    if not (given.is_floating_point or given.is_complex):
        return f"convert it, as in x.to({dtype}) / 255, and normalise it as in training"
    under_autocast = ", or freeze under autocast" if given in (torch.float16, torch.bfloat16) else ""
    return f"convert it, as in x.to({dtype}), or freeze a model of that dtype{under_autocast}"


def _argument(model: nn.Module) -> str:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # of a compiled forward
        parameters = ()  # type: ignore[assignment]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return next((p.name for p in parameters if p.kind in kinds), "x")


class Frozen(nn.Module):
    """What `freeze` returns: the frozen network behind its checks and, on a GPU, its CUDA graphs.

    A graph has one place for its input: on a GPU a frozen model serves one thread at a time.

    Attributes:
        plan: how each convolution is run.
    """

    def __init__(self, network: nn.Module, plan: FreezePlan, setting: Setting) -> None:
        super().__init__()
        self.network = network
        self.plan = plan
        self._setting = setting
        self._graphs = Graphs(network)
        self._loses_nan = any(
            isinstance(module, FoldedConv) and module.packed == "onednn" for module in network.modules()
        )
        self._warned = False
        self.one_call: OneCall | None = None

    def join_call(self, x: Value) -> Value:
        return join(self.network, x)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model computes of its one input, positional or by the model's name for it."""
        x = self._input(inputs, named)
        if x.dtype is self._setting.dtype:
            return self._run(x)
        try:  # the model may take it, as under autocast
            return self._run(x)
        except RuntimeError as error:
            frozen, given = self._setting.dtype, x.dtype
            text = f"a model frozen in {frozen} got an input of {given}; {_instead(given, frozen)}"
            raise RuntimeError(text) from error

    def _run(self, x: Tensor) -> Any:
        with self.surroundings():
            if x.is_cuda and x.device == self._setting.device:
                return self._graphs(x)
            if self.one_call is not None and (whole := self.one_call(x)) is not None:
                return whole
            y = self.network(x)
            if self._loses_nan and not all(map(_finite, (x, *leaves(y)))):
                token = keep_nan.set(True)
                try:
                    y = self.network(x)
                finally:
                    keep_nan.reset(token)
            return y

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """What the network runs in, whatever the caller is in: no gradient, and the autocast it was frozen under."""
        device, dtype = self._setting.device, self._setting.autocast
        # Without the cache: it would hand memory of before a capture to the captured graph.
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            yield

    def _input(self, inputs: Any, named: Any) -> Tensor:
        """The model's one input; whatever else a frozen model is called with, it says so."""
        name = self._setting.argument
        if isinstance(inputs, fx.Proxy) or any(isinstance(x, fx.Proxy) for x in inputs):
            self._refuse("traced")
        if len(inputs) + len(named) != 1 or not named.keys() <= {name}:
            given = ", ".join([*(type(x).__name__ for x in inputs), *(f"{key}=..." for key in named)])
            raise TypeError(f"a frozen model takes what freeze was given, one tensor ({name}), not ({given})")
        x = inputs[0] if inputs else named[name]
        if not isinstance(x, Tensor):
            raise TypeError(f"a frozen model takes a torch.Tensor, got {type(x).__name__}")
        if torch.jit.is_tracing():
            self._refuse("traced")
        if torch.compiler.is_exporting():
            self._refuse("exported")
        frozen, now = self._setting.autocast, autocast_dtype(self._setting.device.type)
        if now is not None and now is not frozen and not self._warned:
            self._warned = True
            state = "without autocast" if frozen is None else f"under autocast to {frozen}"
            warnings.warn(
                f"autocast to {now} has no effect on this model, which was frozen {state}; "
                "freeze it under autocast, or freeze a model of that dtype",
                stacklevel=5,
            )
        return x

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        """A conversion (`half`, `to`, `cuda`, ...) that changes neither dtype nor device has nothing to do."""
        for dtype, device in {(t.dtype, t.device) for t in (*self.parameters(), *self.buffers())}:
            result = fn(torch.empty(0, dtype=dtype, device=device))
            if (result.dtype, result.device) != (dtype, device):
                self._refuse(f"converted from {dtype} on {device} to {result.dtype} on {result.device}")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own code was left with; a warning says that it is not the model."""
        warnings.warn(
            "the state_dict of a frozen model holds only what was not frozen: save that of the model it was made from",
            stacklevel=2,
        )
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("given other weights")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"a frozen model cannot be {what}: it was prepared as it is, for this machine. Do that with the model it "
            "was made from, unfused where it was fused; freeze again to run it here"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        self._refuse("scripted")

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        twin = Frozen(copy.deepcopy(self.network, memo), self.plan, self._setting).eval()
        twin.one_call = None if self.one_call is None else OneCall(twin)
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            "a frozen model cannot be pickled: save the state_dict of the model it was made from, load that where it "
            "is to run, and freeze there"
        )


def _finite(value: Any) -> bool:
    """Whether a tensor holds no NaN and no infinity; a sum that overflows counts as one, and costs a second run."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    total = value.sum(dtype=torch.float32 if value.dtype is torch.float16 else None)
    return bool(total.isfinite())
