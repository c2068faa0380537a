"""A stand-in for the package `cudnn` of nvidia-cudnn-frontend: the graphs it is given, executed by PyTorch on a CPU.

It has what `ops/cudnn_graphs.py` uses, with that package's names and keywords, and the rules that can be broken: the
stages in order, inputs by their declared strides over raw memory, outputs marked and typed. Arithmetic is float64
between tensors in memory, which are rounded to their declared types. `test_cudnn_package.py` holds it against the real
package where that is installed.
"""

from __future__ import annotations

import enum
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.measure import models
from resnet_fused.ops.cudnn_graphs import Library, Spec

data_type = enum.Enum("data_type", ["FLOAT", "HALF", "BFLOAT16", "NOT_SET"])
heur_mode = enum.Enum("heur_mode", ["A", "B", "FALLBACK"])
numerical_note = enum.Enum("numerical_note", ["TENSOR_CORE", "DOWN_CONVERT_INPUTS", "NONDETERMINISTIC"])
DTYPES = {
    data_type.FLOAT: torch.float32,
    data_type.HALF: torch.float16,
    data_type.BFLOAT16: torch.bfloat16,
}
STAGES = ("new", "validate", "build_operation_graph", "create_execution_plans", "check_support")


class cudnnGraphNotSupportedError(Exception):
    pass


class Tensor:
    def __init__(self, dim=None, stride=None, data_type=data_type.NOT_SET, virtual=True, value=None):
        self.dim, self.stride, self.data_type, self.virtual, self.value = dim, stride, data_type, virtual, value

    def set_output(self, is_output):
        self.virtual = not is_output
        return self

    def set_data_type(self, value):
        self.data_type = value
        return self

    def set_dim(self, value):
        self.dim = value
        return self

    def set_stride(self, value):
        self.stride = value
        return self


class pygraph:
    """Records nodes; `plans` says which of the offered plans can be built."""

    plans = (True, False, True)
    refuses: Any = staticmethod(lambda graph: False)
    workspace = (16, 0, 64)
    made: list[pygraph] = []

    def __init__(
        self,
        name="test_graph",
        io_data_type=data_type.NOT_SET,
        intermediate_data_type=data_type.NOT_SET,
        compute_data_type=data_type.NOT_SET,
        handle=None,
    ):
        assert intermediate_data_type is data_type.FLOAT and compute_data_type is data_type.FLOAT
        self.io, self.handle = io_data_type, handle
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.nodes: list[tuple[str, dict[str, Any]]] = []
        self.stage, self.built, self.executed, self.deselected = 0, set(), [], []
        type(self).made.append(self)

    def tensor(self, dim, stride=None, data_type=data_type.NOT_SET, name=""):
        self.inputs.append(Tensor(dim, stride, data_type, False))
        return self.inputs[-1]

    def _node(self, name, compute, **attributes):
        self.nodes.append((name, attributes))
        self.outputs.append(Tensor(value=compute))
        return self.outputs[-1]

    def conv_fprop(self, image, weight, pre_padding, post_padding, stride, dilation, name=""):
        assert pre_padding == post_padding

        def compute(read):
            x, w = read(image), read(weight)
            return F.conv2d(x, w, None, stride, pre_padding, dilation, x.shape[1] // w.shape[1])

        attributes = {"padding": pre_padding, "stride": stride, "dilation": dilation, "weight": weight.dim}
        return self._node("conv_fprop", compute, **attributes)

    def add(self, a, b, name=""):
        return self._node("add", lambda read: read(a) + read(b))

    def bias(self, input, bias, name=""):
        assert bias.dim[0] == bias.dim[2] == bias.dim[3] == 1
        return self._node("bias", lambda read: read(input) + read(bias))

    def relu(self, input, name=""):
        return self._node("relu", lambda read: read(input).relu())

    def _advance(self, name):
        assert STAGES[self.stage + 1] == name, f"{name} after {STAGES[self.stage]}"
        self.stage += 1

    def validate(self):
        self._advance("validate")
        assert all(t.data_type in DTYPES for t in self.inputs)
        assert all(t.data_type in DTYPES for t in self.outputs if not t.virtual)

    def build_operation_graph(self):
        self._advance("build_operation_graph")

    def create_execution_plans(self, modes):
        self._advance("create_execution_plans")
        if type(self).refuses(self):
            raise cudnnGraphNotSupportedError("no engine\nof many lines")

    def deselect_numeric_notes(self, notes):
        assert STAGES[self.stage] == "create_execution_plans"
        self.deselected += notes

    def check_support(self):
        self._advance("check_support")

    def get_execution_plan_count(self):
        return len(self.plans)

    def build_plan_at_index(self, index):
        assert STAGES[self.stage] == "check_support"
        if not self.plans[index]:
            raise cudnnGraphNotSupportedError("Deselecting execution plan")
        self.built.add(index)

    def get_workspace_size_plan_at_index(self, index):
        assert index in self.built
        return self.workspace[index]

    def execute_plan_at_index(self, tensor_to_device_buffer, workspace, index, handle=None):
        assert index in self.built and handle == self.handle
        assert workspace.dtype == torch.uint8 and workspace.numel() >= self.workspace[index]
        self.executed.append(index)
        outputs = [t for t in self.outputs if not t.virtual]
        assert set(tensor_to_device_buffer) == set(self.inputs + outputs)
        values: dict[Tensor, torch.Tensor] = {}

        def view(tensor):
            buffer = tensor_to_device_buffer[tensor]
            assert buffer.dtype == DTYPES[tensor.data_type]
            return torch.as_strided(buffer, tensor.dim, tensor.stride)

        def read(tensor):
            if tensor not in values:
                values[tensor] = view(tensor).double() if tensor in self.inputs else tensor.value(read)
                if not tensor.virtual:  # what is in memory is rounded
                    values[tensor] = values[tensor].to(DTYPES[tensor.data_type]).double()
            return values[tensor]

        for output in outputs:
            view(output).copy_(read(output))


class CPULibrary(Library):
    """The double as a `Library`; `costs` are the milliseconds of the runs that are timed, in turn."""

    def __init__(self, device=None, costs=()):
        self.cudnn, self.device, self.handle = package(), torch.device("cpu"), "handle"
        self.costs = list(costs)

    def launch(self, graph, pack, workspace, index):
        graph.execute_plan_at_index(pack, workspace, index, handle=self.handle)

    def milliseconds(self, run):
        run()
        return self.costs.pop(0) if self.costs else 1.0


def package(**changes: Any) -> Any:
    """A new module of this double's, with some of its attributes changed."""
    module = types.ModuleType("cudnn")
    own: dict[str, Any] = {
        "pygraph": type("pygraph", (pygraph,), {"made": []}),
        "data_type": data_type,
        "heur_mode": heur_mode,
        "numerical_note": numerical_note,
        "cudnnGraphNotSupportedError": cudnnGraphNotSupportedError,
        "backend_version": lambda: 91900,
        "create_handle": lambda: "handle",
        "set_stream": lambda handle, stream: None,
    }
    for name, value in {**own, **changes}.items():
        if value is not None:
            setattr(module, name, value)
    return module


def model_of(name: str) -> nn.Module:
    """Of torchvision or timm, for ten classes, with batch norms that look trained."""
    torch.manual_seed(0)
    timm = name.startswith("timm:")
    make = pytest.importorskip("timm").create_model if timm else torchvision.models.get_model
    model = make(name.removeprefix("timm:"), num_classes=10)
    models.randomise_batch_norms(model)
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 32, 32)], model)
    return model.eval()


def spec_of(dtype=torch.float32, relu=True, residual=False) -> Spec:
    return Spec(ConvShape.of((2, 8, 6, 6), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1)), dtype, relu, residual)
