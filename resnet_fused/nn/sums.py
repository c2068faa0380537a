"""The sum of a branch and its residual, as its author wrote it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sum:
    """branch + residual: `a + b` promotes and broadcasts, `a += b` keeps the dtype and the shape of `a`, or raises.

    Where both have the same shape and dtype a kernel may add (`functional.common.fits`); this is what runs elsewhere.

    Attributes:
        function: the author's own: `operator.add`, `operator.iadd`, `torch.add`, `torch.Tensor.add_`, ...
        branch_first: whether the branch is `a`.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    branch_first: bool = True

    def __call__(self, branch: Tensor, residual: Tensor) -> Tensor:
        return self.function(branch, residual) if self.branch_first else self.function(residual, branch)


PLUS = Sum(operator.add)  # branch + residual
INTO_BRANCH = Sum(operator.iadd)  # branch += residual
