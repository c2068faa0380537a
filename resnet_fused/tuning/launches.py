"""What launchers would launch on an architecture, noted instead of launched: for who compiles kernels without a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

SHARED_MEMORY_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class _Recorder:
    """Stands in for a kernel: `kernel[grid](*args, **options)` is noted instead of launched."""

    def __init__(
        self, kernel: Any, name: str, launches: list[tuple[Any, str, tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, self.name, args, options))


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, str, tuple[Any, ...], dict[str, Any]]]]:
    """Replace every kernel of `resnet_fused.kernels` by a recorder while the block runs."""
    from resnet_fused.kernels import experimental

    for formulation in experimental.KERNELS:  # imports it
        experimental.available(formulation)

    launches: list[tuple[Any, str, tuple[Any, ...], dict[str, Any]]] = []
    replaced = []
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_fused.kernels."):
            for attribute, kernel in list(vars(module).items()):
                if attribute.endswith("_kernel"):
                    replaced.append((module, attribute, kernel))
                    setattr(module, attribute, _Recorder(kernel, attribute, launches))
    try:
        yield launches
    finally:
        for module, attribute, kernel in replaced:
            setattr(module, attribute, kernel)
