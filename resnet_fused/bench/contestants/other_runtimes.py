"""Contestants that are packages of their own: ONNX Runtime, OpenVINO and Torch-TensorRT. None is a dependency."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fused._command import one_line
from resnet_fused.measure.cases import Case, Unavailable

_NEEDS = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "nncf": ("nncf", "openvino"),
    "torch_tensorrt": ("torch_tensorrt",),
}


def _imported(runtime: str) -> Any:
    """The runtime's package.

    Raises:
        Unavailable: it, or what exports to it, is not installed.
    """
    try:
        return [importlib.import_module(package) for package in _NEEDS[runtime]][0]
    except ModuleNotFoundError:
        package = "torch_tensorrt" if runtime == "torch_tensorrt" else "'resnet_fused[rivals]'"
        raise Unavailable(f"not installed, needs {', '.join(_NEEDS[runtime])}: pip install {package}") from None
    except Exception as error:  # a package that breaks on import is as good as none
        raise Unavailable(f"{runtime} cannot be imported: {one_line(error, kind=True)}") from None


def onnxruntime(
    model: nn.Module, example: torch.Tensor, case: Case, calibration: list[torch.Tensor] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The exported graph under ONNX Runtime's own optimiser, input and output bound to the device's memory; with
    images to calibrate by in int8, as its own static quantisation makes it.

    ONNX is an NCHW format: the runtime chooses its layouts itself.
    """
    runtime = _imported("onnxruntime")
    on_gpu = example.device.type == "cuda"
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Unavailable(f"this onnxruntime has no {provider}, only {', '.join(runtime.get_available_providers())}")
    if case.dtype == "bf16" and not on_gpu:
        raise Unavailable("onnxruntime has no bfloat16 convolution on a CPU")
    example = example.contiguous()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    assert program is not None
    graph = program.model_proto if calibration is None else _quantized(program.model_proto, calibration)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    try:
        session = runtime.InferenceSession(graph.SerializeToString(), settings, providers=[provider])
    except Exception as error:  # no kernel for an op in this dtype, say
        raise Unavailable(f"onnxruntime does not take the exported model: {one_line(error, kind=True)}") from None
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    element = {"fp32": 1, "fp16": 10, "bf16": 16}[case.dtype]  # onnx.TensorProto.DataType
    with torch.no_grad():
        logits = torch.empty_like(model(example))

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.shape != example.shape:
            raise ValueError(f"exported for inputs of {tuple(example.shape)}, got {tuple(x.shape)}")
        x = x.contiguous()
        binding = session.io_binding()
        device = (x.device.type, x.device.index or 0)
        binding.bind_input(entry.name, *device, element, tuple(x.shape), x.data_ptr())
        binding.bind_output(result.name, *device, element, tuple(logits.shape), logits.data_ptr())
        session.run_with_iobinding(binding)
        return logits

    return run


def _quantized(graph: Any, calibration: list[torch.Tensor]) -> Any:
    """An ONNX model with its operands in 8 bits: weights by channel, activations by tensor."""
    onnx, tools = (importlib.import_module(name) for name in ("onnx", "onnxruntime.quantization"))
    images = iter([{graph.graph.input[0].name: image.float().numpy()} for image in calibration])

    class Images(tools.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def get_next(self) -> dict[str, Any] | None:
            return next(images, None)

    types = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder, _without_log(""):
        path = Path(folder, "quantized.onnx")
        tools.quantize_static(graph, path, Images(), per_channel=True, **types)
        return onnx.load(path)


@contextlib.contextmanager
def _without_log(logger: str) -> Iterator[None]:
    """Advice that a runtime logs on the way is not for who reads the bench."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def openvino(
    model: nn.Module, example: torch.Tensor, case: Case, calibration: list[torch.Tensor] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The converted model compiled by OpenVINO for its least latency, in the case's dtype and on PyTorch's threads; in
    int8, as NNCF's post-training quantisation makes it, where there are images to calibrate by.

    Its graph reads and writes fp32; bf16 is how it computes between.
    """
    runtime = _imported("openvino")
    if example.device.type != "cpu":
        raise Unavailable("OpenVINO runs on a CPU, or an Intel GPU")
    precision = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[case.dtype]
    core = runtime.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}[precision] not in capabilities:
        raise Unavailable(f"OpenVINO has no {case.dtype} on this CPU, only {', '.join(capabilities)}")
    shape = list(example.shape)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = runtime.convert_model(model.float(), example_input=example.float(), input=[shape])
    if calibration is not None:
        nncf = _imported("nncf")
        with _without_log("nncf"), contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            images = nncf.Dataset(calibration, lambda image: image.float().numpy())
            converted = nncf.quantize(converted, images, subset_size=len(calibration))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(converted, "CPU", settings).create_infer_request()

    def run(x: torch.Tensor) -> torch.Tensor:
        if list(x.shape) != shape:
            raise ValueError(f"converted for inputs of {tuple(shape)}, got {tuple(x.shape)}")
        found = request.infer([x.float().contiguous().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(found.values()))).to(x.dtype)

    return run


def torch_tensorrt(model: nn.Module, example: torch.Tensor, case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model compiled by Torch-TensorRT in the case's dtype. Written after its documentation; not run here yet."""
    runtime = _imported("torch_tensorrt")
    if example.device.type != "cuda":
        raise Unavailable("TensorRT runs on an NVIDIA GPU")
    compiled: Callable[[torch.Tensor], torch.Tensor] = runtime.compile(
        model, ir="dynamo", inputs=[example], enabled_precisions={case.torch_dtype}
    )
    return compiled
