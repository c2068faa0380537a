"""The contestants by name: what each does to the same model before it is timed.

`prepare(model, example, case)` receives its own copy of the model, already on the device, in the dtype, memory format
and mode of the case, and returns the callable that runs it; training keeps using the model's own parameters.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import nn

import resnet_fused
from resnet_fused import ops
from resnet_fused.bench.contestants import other_runtimes
from resnet_fused.measure.cases import MODES, Case, Unavailable
from resnet_fused.ops import onednn

Forward = Callable[[torch.Tensor], torch.Tensor]
Prepare = Callable[[nn.Module, torch.Tensor, Case], Forward]

BASELINE = "eager-channels-last"
CALIBRATION_BATCHES, CALIBRATION_BATCH, CALIBRATION_SEED = 4, 8, 20260101


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    summary: str
    prepare: Prepare
    memory_format: torch.memory_format = torch.channels_last
    modes: tuple[str, ...] = MODES
    plain: bool = False  # plain PyTorch: its error is the yardstick of the contract, not subject to it
    by_default: bool = True  # else only where it is named: it takes minutes
    graphed: bool = True  # its training step is a CUDA graph on a GPU; else kernel by kernel, as in a plain loop
    quantised: bool = False  # its error is that of 8 bits: not subject to the contract, and in no mean of speed-ups


def _as_it_is(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    return model


def _compile(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    """torch.compile; for inference with frozen weights, and on a GPU in a CUDA graph, as `frozen` is."""
    return _compiled(model, example, case, "reduce-overhead" if example.device.type == "cuda" else "default", "default")


def _max_autotune(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    """torch.compile with every choice measured; a training step is `graphed`, as everyone's is."""
    if example.device.type != "cuda":
        raise Unavailable("measured on a GPU only: on a CPU max-autotune takes minutes a model")
    return _compiled(model, example, case, "max-autotune", "max-autotune-no-cudagraphs")


def _compiled(model: nn.Module, example: torch.Tensor, case: Case, infer: str, train: str) -> Forward:
    try:
        from torch._inductor import config
    except ImportError as error:
        raise Unavailable(f"TorchInductor cannot be imported: {error}") from None
    if case.mode == "train":
        return torch.compile(model, dynamic=False, mode=train)
    compiled = torch.compile(model, dynamic=False, mode=infer)
    with config.patch(freezing=True), torch.inference_mode():
        compiled(example)  # compilation happens in the first call; freezing must be on then, and only then
    return compiled


def _fused(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    return resnet_fused.fuse(model)


def _plain_loop(prepare: Prepare) -> Prepare:
    """The same, to be trained without `graphed`: what a loop pays that launches every kernel."""

    def prepared(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
        if example.device.type != "cuda":
            raise Unavailable("measured on a GPU only: elsewhere there are no CUDA graphs to do without")
        return prepare(model, example, case)

    return prepared


def _frozen(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    return resnet_fused.freeze(model, example)


def _cudnn_graphs(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    """What `frozen` is compared with: all that cuDNN can fuse, and nothing of ours."""
    if problem := ops.unavailable("cudnn", example.device.type):
        raise Unavailable(problem)
    with resnet_fused.use_backend("cudnn"):
        frozen = resnet_fused.freeze(model, example)
    others = [row for row in frozen.plan.layers if row.backend != "cudnn"]
    if len(others) == len(frozen.plan.layers):
        raise Unavailable(others[0].reason if others else "the model has no convolution")
    if others:
        counted = f"{len(others)} of {len(frozen.plan.layers)} convolutions run through PyTorch"
        warnings.warn(f"cudnn-graphs: {counted}: {others[0].layer}: {others[0].reason}", stacklevel=2)
    return frozen


def _calibration(example: torch.Tensor, case: Case, images: int) -> list[torch.Tensor]:
    """Batches of other images than a contestant is judged by, of the same distribution."""
    if example.device.type != "cpu" or case.dtype == "fp16":
        raise Unavailable("int8 runs on a CPU only, in fp32 and bf16 networks")
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    shape = (images, *example.shape[1:])
    return [torch.randn(shape, generator=generator).to(example.dtype) for _ in range(CALIBRATION_BATCHES)]


def _frozen_int8(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
    inputs = _calibration(example, case, min(len(example), CALIBRATION_BATCH))
    if problem := onednn.int8_refusal():
        raise Unavailable(problem)
    return resnet_fused.freeze(model, example, quantize=inputs)


def _int8(prepare: Callable[..., Forward]) -> Prepare:
    """Another runtime's network in int8, which between is in fp32 whatever the case's dtype."""

    def prepared(model: nn.Module, example: torch.Tensor, case: Case) -> Forward:
        inputs = _calibration(example, case, len(example))  # exported for batches of this size alone
        run = prepare(model.float(), example.float(), dataclasses.replace(case, dtype="fp32"), inputs)
        return lambda x: run(x.float()).to(example.dtype)

    return prepared


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("eager", "plain PyTorch, NCHW", _as_it_is, memory_format=torch.contiguous_format, plain=True),
        Contestant(BASELINE, "plain PyTorch, channels_last: the baseline", _as_it_is, plain=True),
        Contestant("compile", "torch.compile; for inference with freezing", _compile),
        Contestant(
            "compile-max-autotune",
            "torch.compile that measures its choices; for inference with freezing",
            _max_autotune,
            by_default=False,
        ),
        Contestant(
            "onnxruntime",
            "exported to ONNX Runtime, NCHW",
            other_runtimes.onnxruntime,
            memory_format=torch.contiguous_format,
            modes=("infer",),
        ),
        Contestant(
            "openvino",
            "converted for OpenVINO, NCHW",
            other_runtimes.openvino,
            memory_format=torch.contiguous_format,
            modes=("infer",),
        ),
        Contestant(
            "cudnn-graphs",
            "frozen, every convolution a fused graph of cuDNN's (nvidia-cudnn-frontend)",
            _cudnn_graphs,
            modes=("infer",),
        ),
        Contestant("torch-tensorrt", "torch_tensorrt.compile(model)", other_runtimes.torch_tensorrt, modes=("infer",)),
        Contestant("fused", "resnet_fused.fuse(model)", _fused),
        Contestant(
            "eager-plain-loop",
            f"{BASELINE}, without a CUDA graph",
            _plain_loop(_as_it_is),
            modes=("train",),
            plain=True,
            graphed=False,
        ),
        Contestant(
            "fused-plain-loop", "fused, without a CUDA graph", _plain_loop(_fused), modes=("train",), graphed=False
        ),
        Contestant("frozen", "resnet_fused.freeze(model, example)", _frozen, modes=("infer",)),
        *(
            Contestant(
                f"{runtime.__name__}-int8",
                f"{runtime.__name__}, quantised by its own tools, NCHW",
                _int8(runtime),
                memory_format=torch.contiguous_format,
                modes=("infer",),
                by_default=False,
                quantised=True,
            )
            for runtime in (other_runtimes.onnxruntime, other_runtimes.openvino)
        ),
        Contestant(
            "frozen-int8",
            "resnet_fused.freeze(model, example, quantize=images)",
            _frozen_int8,
            modes=("infer",),
            quantised=True,
        ),
    )
}
PROFILED = (BASELINE, "fused", "frozen")  # the others are the same ops, or not ours
