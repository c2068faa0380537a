"""No GPU needed: Triton in its interpreter, CUDA kernels host-executed, fresh memory poisoned with NaN."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import pytest
from ranks import Ranks


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Fixed random numbers, and NaN in whatever `torch.empty` returns, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes of a group, started once."""
    both = Ranks(str(tmp_path_factory.mktemp("ranks") / "rendezvous"))
    yield both
    both.close()
