"""One contestant on one case: built, run once for its numbers, and run as the step that is timed.

Inference is one forward in `inference_mode` with model and input in the case's dtype. Training is one full step -
forward, cross-entropy, backward, SGD with momentum - with fp32 parameters, under autocast when the case's dtype is not
fp32, and with a gradient scaler for fp16. Forward, loss and backward run by `resnet_fused.graphed`, on a GPU a CUDA
graph, as in a user's loop; of contestants that are not `graphed`, kernel by kernel.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused.bench.contestants import Contestant, Forward
from resnet_fused.measure.cases import Case
from resnet_fused.training.cuda_graph import WARM_UP, graphed

Gradients = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of images and labels, into `.grad`; the loss


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The numbers of one evaluation; in inference only the logits."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    gradients: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    statistics: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class GraphMemory:
    """Memory that the CUDA graphs of several contestants share: each needs as much as a whole step.

    They replay one after the other; what one leaves there is gone once another has run. A graph of its own keeps the
    pool: PyTorch lets nobody into a pool whose graphs are all gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._anchor, pool=self.pool):
            torch.zeros(1, device=device)


class Runner:
    """A contestant that was built for a case.

    Args:
        contestant: what to build.
        model: the fp32 model on the CPU; it is copied, never changed.
        case: mode, dtype, device.
        images: [N, 3, H, W] fp32 on the CPU.
        labels: [N] int64 on the CPU; training only.
        memory: where a training step's CUDA graph has its tensors; None: in memory of its own.
    """

    def __init__(
        self,
        contestant: Contestant,
        model: nn.Module,
        case: Case,
        images: torch.Tensor,
        labels: torch.Tensor,
        memory: GraphMemory | None = None,
    ):
        self.case = case
        device, training = torch.device(case.device), case.mode == "train"
        parameter_dtype = torch.float32 if training else case.torch_dtype
        module = copy.deepcopy(model).train(training).to(device, parameter_dtype)
        self.module = module.to(memory_format=contestant.memory_format)  # type: ignore[call-overload]
        own = images.to(device, parameter_dtype, copy=True)  # `feed` writes into it
        self._images = own.contiguous(memory_format=contestant.memory_format)
        self._labels = labels.to(device, copy=True)
        self._memory_format = contestant.memory_format
        self.forward: Forward = contestant.prepare(self.module, self._images, case)
        if training:
            self._optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
            self._scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "fp16")
        self._graphed: Gradients = self._gradients
        if training and contestant.graphed:
            self._graphed = graphed(self._gradients, self.module, pool=None if memory is None else memory.pool)

    def infer(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images on the CPU, in the case's dtype on the device."""
        images = images.to(self._images.device, self._images.dtype).contiguous(memory_format=self._memory_format)
        with torch.inference_mode():
            return self.forward(images).clone()

    def evaluate(self, limit: int | None = None) -> Outcome:
        """Run once on the first `limit` images and return the numbers; parameters stay as they are."""
        if self.case.mode == "infer":
            return Outcome(self.infer(self._images)[:limit])
        scale = 1024.0 if self.case.dtype == "fp16" else 1.0
        logits, loss = self.loss(limit)
        (loss * scale).backward()
        outcome = _outcome(self.module, logits, loss, scale)
        self.module.zero_grad(set_to_none=True)
        return outcome

    def step(self) -> object:
        """What is timed."""
        if self.case.mode == "infer":
            with torch.inference_mode():
                return self.forward(self._images)
        return self._train(self._graphed)

    def warm_up(self) -> None:
        """Step until the steps that follow are alike: where a training step becomes a CUDA graph, until it is one."""
        for _ in range(WARM_UP + 1 if self._graphed != self._gradients else 1):
            self.step()

    def feed(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Copy another batch to where the step reads it."""
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)

    def step_by_step(self) -> object:
        """The same step, never as a CUDA graph: for a profiler, which must see its ops."""
        return self.step() if self.case.mode == "infer" else self._train(self._gradients)

    def _gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self._loss(images, labels)[1]
        self._scaler.scale(loss).backward()
        return loss

    def _train(self, gradients: Gradients) -> object:
        loss = gradients(self._images, self._labels)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def loss(self, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and loss of the first `limit` images, with autograd's graph behind them."""
        return self._loss(self._images[:limit], self._labels[:limit])

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(images.device.type, self.case.torch_dtype, enabled=self.case.dtype != "fp32"):
            logits = self.forward(images)
            return logits, F.cross_entropy(logits.float(), labels)


def reference(model: nn.Module, case: Case, images: torch.Tensor, labels: torch.Tensor) -> Outcome:
    """The float64 model's numbers, on the CPU, for the same weights and input: the judge of every contestant."""
    device, training = torch.device(case.device), case.mode == "train"
    module = copy.deepcopy(model).train(training).to(device, torch.float64)
    images, labels = images.to(device, torch.float64), labels.to(device)
    if not training:
        with torch.inference_mode():
            return Outcome(module(images).cpu())
    logits = module(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return _outcome(module.cpu(), logits.cpu(), loss.cpu())


def _outcome(module: nn.Module, logits: torch.Tensor, loss: torch.Tensor, scale: float = 1.0) -> Outcome:
    """Copies of what a backward from the loss, scaled by so much, has left."""
    gradients = {name: p.grad.double() / scale for name, p in module.named_parameters() if p.grad is not None}
    buffers = module.named_buffers()
    statistics = {name: b.clone() for name, b in buffers if name.endswith(("running_mean", "running_var"))}
    return Outcome(logits.detach().clone(), loss.detach().clone(), gradients, statistics)
