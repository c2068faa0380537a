"""One convolution as a fused graph of cuDNN's own, y = act(conv(x, weight) + residual + bias), in NHWC.

cuDNN's graph API has no PyTorch binding; the package `nvidia-cudnn-frontend` (import name `cudnn`, not a dependency) is
its Python one. Each graph is asked of heuristics mode A with the fallback list behind it, and its plans are timed once,
as many as `torch.backends.cudnn.benchmark_limit` lets PyTorch time for a convolution of its own, for a second at most.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused._command import one_line
from resnet_fused.dispatch.conv import uses_tf32
from resnet_fused.measure.cases import Unavailable

OLDEST_CUDNN = 90000
PATIENCE_S = 1.0  # with the plans of one graph; those that are compiled at run time take half a second each
_NAMES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
_REQUIRED = ("pygraph", "create_handle", "set_stream", "data_type", "heur_mode", "numerical_note", "backend_version")

Shape = tuple[int, int, int, int]
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What distinguishes one graph from another.

    Attributes:
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        dtype: of all tensors: fp32, fp16 or bf16. Accumulation, sum and ReLU are in fp32.
        residual: whether a tensor of y's shape is added before the ReLU.
    """

    x: Shape
    weight: Shape
    stride: Pair
    padding: Pair
    dilation: Pair
    dtype: torch.dtype
    relu: bool
    residual: bool = False

    @property
    def y(self) -> Shape:
        sizes = zip(self.x[2:], self.weight[2:], self.stride, self.padding, self.dilation, strict=True)
        p, q = ((size + 2 * pad - dilation * (taps - 1) - 1) // step + 1 for size, taps, step, pad, dilation in sizes)
        return self.x[0], self.weight[0], p, q

    @property
    def geometry(self) -> dict[str, list[int]]:
        """As keywords of the graph's convolutions."""
        pads = {"pre_padding": list(self.padding), "post_padding": list(self.padding)}
        return {**pads, "stride": list(self.stride), "dilation": list(self.dilation)}

    def __str__(self) -> str:
        parts = f"{list(self.x)} by {list(self.weight)}, stride {list(self.stride)}, padding {list(self.padding)}"
        return f"a {str(self.dtype).removeprefix('torch.')} convolution of {parts}, dilation {list(self.dilation)}"


class Library:
    """cuDNN's graph API on a device.

    Raises:
        Unavailable: the package is not installed or not usable, or cuDNN is too old, or the device is no GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.cudnn, self.device = imported(), device
        if device.type != "cuda":
            raise Unavailable("cuDNN runs on an NVIDIA GPU")
        with torch.cuda.device(device):
            self.handle = self.cudnn.create_handle()

    def launch(self, graph: Any, pack: dict[Any, Tensor], workspace: Tensor, index: int) -> None:
        """Run a plan on PyTorch's current stream: in a capture, the one that is captured."""
        with torch.cuda.device(self.device):
            self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute_plan_at_index(pack, workspace, index, handle=self.handle)

    def context(self) -> dict[str, Any]:
        """Where a graph is for, as keywords of `pygraph`."""
        return {"handle": self.handle}

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The median of five runs, after two."""
        times = []
        stream = torch.cuda.current_stream(self.device)
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[2:])


@functools.cache
def library(device: torch.device) -> Library:
    """The one of a device: a handle holds memory of the GPU."""
    return Library(device)


def imported() -> Any:
    """The package `cudnn`.

    Raises:
        Unavailable: it is not installed, is another package of that name, or brings a cuDNN before 9.
    """
    try:
        cudnn = importlib.import_module("cudnn")
    except Exception as error:  # a package that breaks on import, for want of libcudnn say, is as good as none
        raise Unavailable(f"cudnn cannot be imported ({one_line(error)}); it needs nvidia-cudnn-frontend") from None
    missing = [name for name in _REQUIRED if not hasattr(cudnn, name)]
    if missing:
        raise Unavailable(f"the installed package cudnn has no {', '.join(missing)}; it needs nvidia-cudnn-frontend")
    if cudnn.backend_version() < OLDEST_CUDNN:
        raise Unavailable(f"cuDNN {cudnn.backend_version()} is too old; it needs {OLDEST_CUDNN} or newer")
    return cudnn


class Recording:
    """A graph as it is written: tensors dense in NHWC order, arithmetic in fp32.

    Attributes:
        graph: the package's.
        tensors: what has memory, by name.
        operands: its shapes and dtypes.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        if dtype not in _NAMES:
            raise Unavailable(f"cudnn-graphs takes fp32, fp16 and bf16, not {dtype}")
        self.cudnn, self.dtype = library.cudnn, dtype
        fp32 = self.cudnn.data_type.FLOAT
        self.graph = self.cudnn.pygraph(
            io_data_type=self.type(dtype), intermediate_data_type=fp32, compute_data_type=fp32, **library.context()
        )
        self.tensors: dict[str, Any] = {}
        self.operands: dict[str, tuple[Shape, torch.dtype]] = {}

    def type(self, dtype: torch.dtype) -> Any:
        return getattr(self.cudnn.data_type, _NAMES[dtype])

    def input(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or self.dtype
        value = self.graph.tensor(name=name, dim=list(shape), stride=nhwc_strides(shape), data_type=self.type(dtype))
        self.tensors[name], self.operands[name] = value, (shape, dtype)
        return value

    def output(self, name: str, value: Any, shape: Shape, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.dtype
        value.set_output(True).set_data_type(self.type(dtype))
        value.set_dim(list(shape))
        value.set_stride(nhwc_strides(shape))
        self.tensors[name], self.operands[name] = value, (shape, dtype)


class Graph:
    """A recorded graph, and the plan of it that was fastest on a device.

    Args:
        what: names it in messages.

    Attributes:
        index: of that plan among those the heuristics offer.
        workspace_bytes: what it needs.

    Raises:
        Unavailable: cuDNN has no engine for it here.
    """

    def __init__(self, library: Library, recording: Recording, what: object) -> None:
        self.library, self.recording, self.what = library, recording, what
        self._limit = torch.backends.cudnn.benchmark_limit if torch.backends.cudnn.benchmark else 1
        self._graph = recording.graph
        try:
            offer(library, self._graph, recording.dtype)
            self.index, self.workspace_bytes = self._fastest()
        except Unavailable:
            raise
        except Exception as error:  # cuDNN's "not supported" is an exception of its package's own
            raise Unavailable(f"cuDNN has no engine for {what}: {one_line(error, kind=True)}") from None

    def run(self, operands: dict[str, Tensor], workspace: Tensor) -> None:
        """Launch on the current stream.

        Args:
            operands: every tensor of the recording, dense in NHWC order.
            workspace: of `workspace_bytes` or more.
        """
        self._run(self.index, operands, workspace)

    def _run(self, index: int, operands: dict[str, Tensor], workspace: Tensor) -> None:
        pack = {tensor: operands[name] for name, tensor in self.recording.tensors.items()}
        self.library.launch(self._graph, pack, workspace, index)

    def _fastest(self) -> tuple[int, int]:
        """Index and workspace of the fastest plan that was timed; without `benchmark`, of the first that runs."""
        operands = {name: self._some(name) for name in self.recording.tensors}
        found: list[tuple[float, int, int]] = []
        deadline = time.monotonic() + PATIENCE_S
        problem: Exception = RuntimeError("the heuristics offer no plan")
        for index in range(self._graph.get_execution_plan_count()):
            if found and (len(found) == self._limit or time.monotonic() > deadline):
                break
            try:
                self._graph.build_plan_at_index(index)
                size = self._graph.get_workspace_size_plan_at_index(index)
                run = functools.partial(self._run, index, operands, self.workspace(size))
                found.append((self.library.milliseconds(run), index, size))
            except Exception as error:  # filtered out, cannot be built, wants more memory than there is
                problem = error
        if not found:
            raise Unavailable(f"cuDNN has no engine that runs {self.what}: {one_line(problem, kind=True)}")
        _, index, size = min(found)
        return index, size

    def workspace(self, size: int | None = None) -> Tensor:
        size = self.workspace_bytes if size is None else size
        return torch.empty(max(size, 1), dtype=torch.uint8, device=self.library.device)

    def _some(self, name: str) -> Tensor:
        """A random operand: arithmetic on zeros draws less power, and is faster."""
        shape, dtype = self.recording.operands[name]
        return torch.randn(shape, device=self.library.device).to(dtype).contiguous(memory_format=torch.channels_last)


def record(library: Library, spec: Spec) -> Recording:
    """The graph of `x`, `weight`, `bias` and perhaps `residual` to `y`. Groups are what their channels say.

    The residual is added before the bias: that order is the pattern of cuDNN's precompiled engines, and the other is
    left to those that are compiled at run time. The sum is in fp32, rounded once.
    """
    recording = Recording(library, spec.dtype)
    graph = recording.graph
    x, weight = recording.input("x", spec.x), recording.input("weight", spec.weight)
    value = graph.conv_fprop(image=x, weight=weight, **spec.geometry)
    if spec.residual:
        value = graph.add(a=value, b=recording.input("residual", spec.y))
    value = graph.bias(input=value, bias=recording.input("bias", (1, spec.weight[0], 1, 1)))
    if spec.relu:
        value = graph.relu(input=value)
    recording.output("y", value, spec.y)
    return recording


def graph_of(library: Library, spec: Spec) -> Graph:
    return Graph(library, record(library, spec), spec)


def offer(library: Library, graph: Any, dtype: torch.dtype) -> None:
    """Let the heuristics list plans for a graph, without those that PyTorch's flags forbid."""
    cudnn = library.cudnn
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    forbidden = []
    if dtype == torch.float32 and not uses_tf32(dtype):
        forbidden += [cudnn.numerical_note.TENSOR_CORE, cudnn.numerical_note.DOWN_CONVERT_INPUTS]
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        forbidden.append(cudnn.numerical_note.NONDETERMINISTIC)
    if forbidden:
        graph.deselect_numeric_notes(forbidden)
    graph.check_support()


class Convolution:
    """act(conv(x, weight) + residual + bias) by one graph of cuDNN's; built once, called often.

    Attributes:
        workspace: may be replaced by a larger one, which graphs that run one after the other can share.
    """

    def __init__(self, graph: Graph, spec: Spec, weight: Tensor, bias: Tensor | None) -> None:
        self.graph, self.spec = graph, spec
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        self._weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self._bias = bias.detach().to(weight.dtype).reshape(1, -1, 1, 1).contiguous()
        self.workspace = graph.workspace()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y: [N, K, P, Q] in channels_last order.

        Args:
            x: of the shape and dtype it was built for.
            residual: of y's; required if it was built with one.

        Raises:
            ValueError: it was built for other operands.
        """
        spec = self.spec
        if tuple(x.shape) != spec.x or x.dtype != spec.dtype:
            raise ValueError(f"built for {list(spec.x)} {spec.dtype}, got {list(x.shape)} {x.dtype}")
        if spec.residual != (residual is not None):
            raise ValueError(f"built with{'' if spec.residual else 'out'} a residual, called the other way")
        operands = {"x": x.contiguous(memory_format=torch.channels_last), "weight": self._weight, "bias": self._bias}
        if residual is not None:
            if tuple(residual.shape) != spec.y or residual.dtype != spec.dtype:
                raise ValueError(f"the residual must be {list(spec.y)} {spec.dtype}, got {list(residual.shape)}")
            operands["residual"] = residual.contiguous(memory_format=torch.channels_last)
        y = torch.empty(spec.y, dtype=spec.dtype, device=x.device, memory_format=torch.channels_last)
        self.graph.run({**operands, "y": y}, self.workspace)
        return y


def conv_bias_act(
    x_shape: tuple[int, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = True,
    residual: bool = False,
) -> Convolution:
    """One convolution, alone: y = act(conv(x, weight) + residual + bias).

    Args:
        x_shape: [N, C, H, W] of the inputs it will be called with; groups are C / weight.shape[1].
        weight: [K, C/groups, R, S] on a GPU, in the dtype of x, y and the residual: fp32, fp16 or bf16.
        bias: [K].
        residual: whether it will be called with one.

    Raises:
        Unavailable: the package or a GPU is missing, or cuDNN has no engine for it.
    """
    shapes = (tuple(x_shape), tuple(weight.shape))
    spec = Spec(*shapes, tuple(stride), tuple(padding), tuple(dilation), weight.dtype, relu, residual)  # type: ignore[arg-type]
    return Convolution(graph_of(library(weight.device), spec), spec, weight, bias)


def nhwc_strides(shape: Shape) -> list[int]:
    _, c, h, w = shape
    return [c * h * w, 1, c * w, c]
