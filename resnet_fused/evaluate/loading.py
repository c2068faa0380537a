"""Models and their checkpoints: ours, torchvision's and timm's."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused._command import UsageError, choose, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PRETRAINED = "pretrained"
_WRAPPERS = ("module.", "_orig_mod.")


class Normalised(nn.Module):
    """A model behind its normalisation: `model((x - mean) / std)` for pictures `[N, 3, H, W]` in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pictures in [0, 1]."""
        return self.model((x - self.mean) / self.std)


@dataclass(frozen=True)
class Loaded:
    """A model to evaluate.

    Attributes:
        name: as it was asked for.
        model: in eval mode, behind its normalisation.
        crop: side of the pictures it was trained on.
        checkpoint: where its weights come from.
        sha256: of that file; None for weights that torchvision or timm bring.
    """

    name: str
    model: Normalised
    crop: int
    checkpoint: str
    sha256: str | None


def load(text: str, classes: int | None = None) -> Loaded:
    """The model that `NAME=CHECKPOINT` names.

    NAME is one of `resnet_fused.models.list_models()`, `torchvision:<name>` or `timm:<name>`. CHECKPOINT is a file of
    `torch.save` or safetensors: a state_dict, bare or under "state_dict" or "model", with or without the prefixes that
    DistributedDataParallel and torch.compile put before the keys; or `pretrained`, what torchvision or timm bring.

    Args:
        text: `NAME=CHECKPOINT`.
        classes: the classes that `pretrained` weights must have; those of a file are read off its last matrix.

    Raises:
        UsageError: no such model or file, a file that is no checkpoint, or one of another network.
    """
    name, separator, checkpoint = text.partition("=")
    if not separator or not checkpoint:
        raise UsageError(
            f"--model {text}: name its weights, too: {name or 'NAME'}=FILE, or torchvision:NAME={PRETRAINED}"
        )
    if checkpoint == PRETRAINED:
        model = _create(name, pretrained=True)
        if classes is not None and (found := outputs(model.state_dict())) < classes:
            raise UsageError(f"--model {text}: {found} classes, the pictures have {classes}")
        return Loaded(name, *_prepared(name, model), checkpoint, None)
    path = Path(checkpoint)
    state, options = _read(path)
    model = _create(name, num_classes=outputs(state), **options)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"--model {text}: the weights are of another network: {one_line(error)}") from None
    return Loaded(name, *_prepared(name, model), checkpoint, hashlib.sha256(path.read_bytes()).hexdigest())


def _create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    library, _, short = name.rpartition(":")
    try:
        if library == "torchvision":
            from torchvision import models as torchvision_models

            choose(short.lower(), torchvision_models.list_models(module=torchvision_models), "torchvision model")
            return torchvision_models.get_model(short, weights="DEFAULT" if pretrained else None, **options)
        if library == "timm":
            import timm

            choose(short.partition(".")[0], timm.list_models(), "timm model")  # behind the dot: which weights
            return timm.create_model(short, pretrained=pretrained, **options)
        if library:
            raise UsageError(
                f"--model {name}: unknown library {library!r}; choose torchvision or timm, or a name of ours"
            )
        if pretrained:
            raise UsageError(
                f"--model {name}={PRETRAINED}: only torchvision:NAME and timm:NAME bring weights; name a file"
            )
        return models.create(name, **options)
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"--model {name}: {library} cannot be imported here: {error}") from None
    except Exception as error:  # each library has its own way to say that it does not know a name, or cannot download
        raise UsageError(f"--model {name}: {one_line(error)}") from None


def _prepared(name: str, model: nn.Module) -> tuple[Normalised, int]:
    mean, std, crop = IMAGENET_MEAN, IMAGENET_STD, 224
    if name.startswith("cifar_"):
        mean, std, crop = CIFAR_MEAN, CIFAR_STD, 32
    elif name.startswith("timm:"):
        about = getattr(model, "pretrained_cfg", {})
        mean, std = tuple(about.get("mean", mean)), tuple(about.get("std", std))
        crop = about.get("input_size", (3, crop, crop))[-1]
    return Normalised(model, mean, std).eval(), crop


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict of a checkpoint, and the options of the network where it says them."""
    if not path.is_file():
        raise UsageError(f"--model: no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's and timm's recipes keep theirs
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it advises to load it without `weights_only`
        raise UsageError(
            f"--model: {path} is no checkpoint: it takes a file of torch.save(model.state_dict()) or safetensors"
        ) from None
    except Exception as error:  # zip, safetensors: each with errors of its own
        raise UsageError(f"--model: cannot read {path} as a checkpoint: {one_line(error)}") from None
    options = content.get("options", {}) if isinstance(content, Mapping) else {}
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(f"--model: {path} holds no state_dict, bare or under 'state_dict' or 'model'")
    state = {str(key): value for key, value in content.items()}
    for wrapper in _WRAPPERS * 2:
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state, dict(options)


def outputs(state: Mapping[str, Tensor]) -> int:
    """How many classes a network tells apart, by its last matrix."""
    matrices = [value for value in state.values() if value.dim() == 2]
    if not matrices:
        raise UsageError("--model: the checkpoint has no matrix, so no classifier")
    return len(matrices[-1])
