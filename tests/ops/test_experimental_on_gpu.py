"""TMA and Gluon formulations on the GPU they were written for: each configuration against float64, apart.

They run nowhere else; `verify --every-configuration` asks the same of the shapes of a network.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from conv_cases import problem

from resnet_fused.dispatch.conv import CONFIGURATIONS
from resnet_fused.dispatch.device import arch
from resnet_fused.dispatch.experimental import GRADIENTS, configurations, refuse_shape
from resnet_fused.dispatch.table import Choice, Problem
from resnet_fused.measure.workers import TaskFailure, isolated_map
from resnet_fused.tuning.checks import REFUSED, check_all, unusable
from resnet_fused.tuning.problems import Job, also

SHAPES = [
    problem(4, 64, 14, 14, 64, 3, 3, padding=(1, 1)),
    problem(3, 64, 9, 7, 72, 3, 3, padding=(1, 1)),  # boxes overhang on every side
    problem(2, 128, 28, 28, 128, 3, 3, stride=(2, 2), padding=(1, 1)),
    problem(5, 256, 7, 7, 64, 1, 1),
    problem(2, 128, 7, 7, 2048, 1, 1),  # more tiles than multiprocessors
    problem(2, 128, 14, 14, 256, 1, 1, stride=(2, 2)),
]


def tasks(op, dtype, arch, device):
    """With the whole epilogue; of a data gradient, which has one or the other, with each."""
    epilogues = [{"residual": op == "conv_fprop"}] if op != "conv_dgrad" else [{"residual": True}, {"epilogue": True}]
    for shape, epilogue in itertools.product(SHAPES, epilogues):
        for config in configurations(arch, op):
            if refuse_shape(shape, dtype, arch, config, op) is None:
                yield Job(Problem(op, shape, dtype, False, ()), **epilogue), Choice("triton", config), device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", CONFIGURATIONS)
def test_every_configuration_is_right(op):
    todo = list(tasks(op, torch.bfloat16, arch(torch.device("cuda")), torch.device("cuda")))
    if not todo:
        pytest.skip("no formulation on tensor maps for this GPU")
    wrong = []
    for index, result in isolated_map(check_all, todo, min(8, os.cpu_count() or 1), spoils=unusable):
        reasons = {op: result.reason} if isinstance(result, TaskFailure) else result
        for name, reason in reasons.items():
            if reason is not None and not reason.startswith(REFUSED):
                wrong.append(f"{name}: {todo[index][0].problem}, {todo[index][1]}: {reason}")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("arch, kernels", [(90, {"tma_gemm", "tma_conv", "wgmma_conv"}), (80, set())])
def test_every_formulation_of_an_architecture_is_among_them(arch, kernels):
    for op in ("conv_fprop", "conv_fprop_stats"):
        found = list(tasks(op, torch.bfloat16, arch, torch.device("cpu")))
        assert {choice.config.kernel for _, choice, _ in found} == kernels
        assert all(set(check_all(job, Choice("aten"), device)) == {op} for job, _, device in found[:1])


def test_and_the_data_gradient_with_all_that_it_serves():
    found = list(tasks("conv_dgrad", torch.bfloat16, 90, torch.device("cpu")))
    assert {choice.config.kernel for _, choice, _ in found} == set(GRADIENTS)
    assert {op for job, _, _ in found for op in also(job)} == {"conv_dgrad_join", "conv_backward"}
