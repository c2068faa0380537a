"""What `torch.jit.script` is told, which compiles modules from their source."""

from __future__ import annotations

from typing import NoReturn


class NotScriptable:
    """A module that `torch.jit.script` cannot compile.

    Attributes:
        _way_out: what to do instead.
    """

    _way_out = "torch.jit.trace and torch.export take it"

    def __prepare_scriptable__(self) -> NoReturn:
        """Asked for by `torch.jit.script`, of a module and of all modules in it, before it looks at their source."""
        name = type(self).__name__
        raise RuntimeError(f"torch.jit.script cannot compile a {name} that resnet_fused runs: {self._way_out}")
