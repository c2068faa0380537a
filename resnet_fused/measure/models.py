"""Model names to models: torchvision's ResNets by name, timm's as `timm:<name>`, with random but realistic weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from resnet_fused._command import UsageError, choose, one_line

FAMILIES = ("resnet", "resnext", "wide_resnet")
CALIBRATED = 128  # side of the pictures that batch norms get their statistics of


def names() -> list[str]:
    """torchvision's ResNets, ResNeXts and wide ResNets."""
    try:
        from torchvision import models
    except ImportError as error:
        raise UsageError(f"the models come from torchvision, which cannot be imported here: {error}") from None
    return [name for name in models.list_models(module=models) if name.startswith(FAMILIES)]


def check(name: str) -> str:
    """Return `name` if `create` knows it; else raise UsageError with close choices."""
    if not name.startswith("timm:"):
        return choose(name, names(), "model")
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"model {name!r} needs timm, which cannot be imported here: {error}") from None
    short = name.removeprefix("timm:")
    choose(short, timm.list_models(), "timm model")
    return name


def create(name: str, seed: int = 0) -> nn.Module:
    """Build a model in fp32 and eval mode with seeded random weights and batch norms that look trained.

    Freshly initialised batch norms (mean 0, variance 1, gamma 1, beta 0) hide folding mistakes, so gamma and beta are
    drawn at random and the running statistics are those of a few seeded batches.

    Raises:
        UsageError: there is no such model, or it takes no pictures of 128 x 128.
    """
    check(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            import timm

            model = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        else:
            from torchvision import models

            model = models.get_model(name, weights=None)
        randomise_batch_norms(model)
        try:
            update_bn([torch.randn(4, 3, CALIBRATED, CALIBRATED) for _ in range(2)], model)
        except Exception as error:  # timm has models of every kind, each with its own way to refuse
            size = f"{CALIBRATED} x {CALIBRATED}"
            raise UsageError(f"model {name!r} is none for pictures of {size}: {one_line(error)}") from None
    return model.eval()


def randomise_batch_norms(model: nn.Module) -> None:
    """beta ~ N(0, 0.1^2); gamma ~ U(0.5, 1.5), and U(0.1, 0.3) where a residual branch ends; torch's global generator.

    Trained residual branches are small beside what they are added to. With gamma near 1 there, a deep network with
    random weights amplifies rounding errors until gradients in bf16 are noise, and comparing them would tell nothing.
    """
    ends = {id(_branch_end(module)) for module in model.modules() if hasattr(module, "downsample")}
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            low, high = (0.1, 0.3) if id(norm) in ends else (0.5, 1.5)
            nn.init.uniform_(norm.weight, low, high)
            nn.init.normal_(norm.bias, std=0.1)


def _branch_end(block: nn.Module) -> nn.Module | None:
    """The last batch norm on the residual branch of torchvision's and timm's BasicBlock and Bottleneck."""
    return getattr(block, "bn3", None) or getattr(block, "bn2", None)
