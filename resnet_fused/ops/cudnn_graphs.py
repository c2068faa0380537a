"""`conv_fprop` as one fused graph of cuDNN's, in NHWC order: the backend `cudnn`, for frozen networks.

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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape, uses_tf32
from resnet_fused.ops.arithmetic import fold
from resnet_fused.ops.refusals import first_line

OLDEST_CUDNN = 90000
PATIENCE_S = 1.0  # with the plans of one graph; those that are compiled at run time take half a second each
ACTS = (None, "relu")
_NAMES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
_REQUIRED = ("pygraph", "create_handle", "set_stream", "data_type", "heur_mode", "numerical_note", "backend_version")

Size = tuple[int, ...]


class NoEngine(RuntimeError):
    """cuDNN has nothing that runs a graph here."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What distinguishes one graph from another.

    Attributes:
        shape: of the convolution.
        dtype: of all tensors: fp32, fp16 or bf16. Accumulation, sum and ReLU are in fp32.
        relu: whether the result is rectified.
        residual: whether a tensor of the result's shape is added before.
        tf32: whether fp32 operands may be rounded to TF32.
        deterministic: whether the same operands must give the same bits.
    """

    shape: ConvShape
    dtype: torch.dtype
    relu: bool
    residual: bool = False
    tf32: bool = False
    deterministic: bool = False

    def __str__(self) -> str:
        s = self.shape
        parts = f"{list(s.image)} by {list(s.filter)}, stride {list(s.stride)}, padding {list(s.padding)}"
        return f"a {str(self.dtype).removeprefix('torch.')} convolution of {parts}, dilation {list(s.dilation)}"


class Library:
    """cuDNN's graph API on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cudnn, self.device = importlib.import_module("cudnn"), device
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


def unavailable(device_type: str) -> str | None:
    """Why no graph can run: another device than a GPU, no package, another one of that name, or a cuDNN before 9."""
    if device_type != "cuda":
        return "cuDNN runs on an NVIDIA GPU"
    try:
        cudnn = importlib.import_module("cudnn")
    except Exception as error:  # a package that breaks on import, for want of libcudnn say, is as good as none
        return f"cudnn cannot be imported ({first_line(error)}); it needs nvidia-cudnn-frontend"
    missing = [name for name in _REQUIRED if not hasattr(cudnn, name)]
    if missing:
        return f"the installed package cudnn has no {', '.join(missing)}; it needs nvidia-cudnn-frontend"
    if cudnn.backend_version() < OLDEST_CUDNN:
        return f"cuDNN {cudnn.backend_version()} is too old; it needs {OLDEST_CUDNN} or newer"
    return None


class Graph:
    """The graph of `x`, `weight`, `bias` and perhaps `residual` to `y`; tensors dense in NHWC order.

    The residual is added before the bias: that order is the pattern of cuDNN's precompiled engines, and the other is
    left to those that are compiled at run time. The sum is in fp32, rounded once.

    Attributes:
        graph: the package's.
        tensors: what has memory, by name.
        sizes: of each.

    Raises:
        NoEngine: cuDNN takes no such operands.
    """

    def __init__(self, library: Library, spec: Spec) -> None:
        if spec.dtype not in _NAMES:
            raise NoEngine(f"cuDNN's graphs take fp32, fp16 and bf16, not {spec.dtype}")
        self.library, self.spec = library, spec
        types, shape = library.cudnn.data_type, spec.shape
        self._type, fp32 = getattr(types, _NAMES[spec.dtype]), types.FLOAT
        self.graph = library.cudnn.pygraph(
            io_data_type=self._type, intermediate_data_type=fp32, compute_data_type=fp32, **library.context()
        )
        self.tensors: dict[str, Any] = {}
        self.sizes: dict[str, Size] = {}
        value = self.graph.conv_fprop(
            image=self._input("x", shape.image),
            weight=self._input("weight", shape.filter),
            pre_padding=list(shape.padding),
            post_padding=list(shape.padding),
            stride=list(shape.stride),
            dilation=list(shape.dilation),
        )
        if spec.residual:
            value = self.graph.add(a=value, b=self._input("residual", shape.output))
        value = self.graph.bias(input=value, bias=self._input("bias", (1, shape.k, 1, 1)))
        if spec.relu:
            value = self.graph.relu(input=value)
        value.set_output(True).set_data_type(self._type)
        value.set_dim(list(shape.output))
        value.set_stride(nhwc_strides(shape.output))
        self.tensors["y"], self.sizes["y"] = value, shape.output

    def _input(self, name: str, size: Size) -> Any:
        value = self.graph.tensor(name=name, dim=list(size), stride=nhwc_strides(size), data_type=self._type)
        self.tensors[name], self.sizes[name] = value, size
        return value

    def plan(self) -> None:
        """Let the heuristics list plans, without those that the spec forbids."""
        cudnn, forbidden = self.library.cudnn, []
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        if self.spec.dtype == torch.float32 and not self.spec.tf32:
            forbidden += [cudnn.numerical_note.TENSOR_CORE, cudnn.numerical_note.DOWN_CONVERT_INPUTS]
        if self.spec.deterministic:
            forbidden.append(cudnn.numerical_note.NONDETERMINISTIC)
        if forbidden:
            self.graph.deselect_numeric_notes(forbidden)
        self.graph.check_support()

    def run(self, index: int, workspace_bytes: int, operands: dict[str, Tensor]) -> None:
        """Launch a plan on the current stream; its workspace is the allocator's, as in a capture."""
        workspace = torch.empty(max(workspace_bytes, 1), dtype=torch.uint8, device=self.library.device)
        pack = {tensor: operands[name] for name, tensor in self.tensors.items()}
        self.library.launch(self.graph, pack, workspace, index)


class FastestPlan:
    """The plan of a graph that was fastest on a device; without `torch.backends.cudnn.benchmark`, the first that runs.

    Attributes:
        index: of that plan among those the heuristics offer.
        workspace_bytes: what it needs.

    Raises:
        NoEngine: none runs.
    """

    def __init__(self, library: Library, spec: Spec) -> None:
        try:
            self.graph = Graph(library, spec)
            self.graph.plan()
            self.index, self.workspace_bytes = self._fastest()
        except NoEngine:
            raise
        except Exception as error:  # cuDNN's "not supported" is an exception of its package's own
            raise NoEngine(f"cuDNN has no engine for {spec}: {first_line(error)}") from None

    def __call__(self, operands: dict[str, Tensor]) -> None:
        """Launch on the current stream; every tensor of the graph, dense in NHWC order."""
        self.graph.run(self.index, self.workspace_bytes, operands)

    def _fastest(self) -> tuple[int, int]:
        graph, made = self.graph, self.graph.graph
        limit = torch.backends.cudnn.benchmark_limit if torch.backends.cudnn.benchmark else 1
        operands = {name: self._some(size) for name, size in graph.sizes.items()}
        found: list[tuple[float, int, int]] = []
        deadline = time.monotonic() + PATIENCE_S
        problem: Exception = RuntimeError("the heuristics offer no plan")
        for index in range(made.get_execution_plan_count()):
            if found and (len(found) == limit or time.monotonic() > deadline):
                break
            try:
                made.build_plan_at_index(index)
                size = made.get_workspace_size_plan_at_index(index)
                run = functools.partial(graph.run, index, size, operands)
                found.append((graph.library.milliseconds(run), index, size))
            except Exception as error:  # filtered out, cannot be built, wants more memory than there is
                problem = error
        if not found:
            raise NoEngine(f"cuDNN has no engine that runs {graph.spec}: {first_line(problem)}")
        _, index, size = min(found)
        return index, size

    def _some(self, size: Size) -> Tensor:
        """A random operand: arithmetic on zeros draws less power, and is faster."""
        made = torch.randn(size, device=self.graph.library.device).to(self.graph.spec.dtype)
        return made.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1024)
def fastest_plan(library: Library, spec: Spec) -> FastestPlan:
    return FastestPlan(library, spec)


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
) -> Tensor:
    """`conv_fprop`, its result in NHWC order; the first call of a kind times cuDNN's plans, and cannot be captured.

    Raises:
        NoEngine: cuDNN has no engine for it, or `act` is another than ReLU.
    """
    if act not in ACTS:
        raise NoEngine(f"cuDNN's graphs here apply ReLU or nothing, not {act}")
    shape = ConvShape.of(x.shape, weight.shape, stride, padding, dilation, groups)
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    spec = Spec(shape, x.dtype, act is not None, residual is not None, uses_tf32(x.dtype), deterministic)
    run = fastest_plan(library(x.device), spec)
    weight = fold(weight, scale)
    bias = weight.new_zeros(shape.k) if shift is None else shift.to(weight.dtype).contiguous()
    given = {"x": x, "weight": weight, **({} if residual is None else {"residual": residual})}
    operands = {name: t.contiguous(memory_format=torch.channels_last) for name, t in given.items()}
    y = torch.empty(shape.output, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    run({**operands, "bias": bias.view(1, -1, 1, 1), "y": y})
    return y


def nhwc_strides(size: Size) -> list[int]:
    _, c, h, w = size
    return [c * h * w, 1, c * w, c]
