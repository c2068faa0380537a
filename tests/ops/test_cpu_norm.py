"""The kernels for CPUs of batch norm in training: what is theirs alone, beside what all backends are asked."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import assert_no_worse
from op_cases import NHWC, OPS, activation, check_train, plain_stem, statistics, stem, vector, weights
from torch import nn

from resnet_fused import dispatch, functional, fuse, ops, use_backend

pytestmark = pytest.mark.skipif(not ops.available("cpu", "cpu"), reason=f"{ops.unavailable('cpu', 'cpu')}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _whatever_the_size(monkeypatch):
    """What runs by default on large activations does so on those of the tests."""
    monkeypatch.setattr(functional.common, "SMALL", 0)


@dtypes
@pytest.mark.parametrize("shape", [(2, 144, 9, 8), (3, 256, 31, 31), (1, 20, 57, 41), (4, 2048, 3, 3)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_wide_rows_and_several_parts(dtype, shape, residual):
    """More values than one sum takes, rows that are read one by one, and rows of several pixels."""
    x, dy = (activation(shape, dtype, NHWC) for _ in range(2))
    added = activation(shape, dtype, NHWC) if residual else None
    check_train("cpu", x * 2 + 3, *weights(shape[1]), dy, residual=added, mask_from="bits" if residual else "x")


@dtypes
def test_a_first_pixel_far_away_costs_no_digits(dtype):
    x = activation((4, 32, 16, 16), dtype, NHWC)
    x[0, :, 0, 0] = 1e4
    values = x.double().permute(0, 2, 3, 1).reshape(-1, 32)[1:]
    mean, m2, _ = OPS.bn_stats(x[:, :, 1:].contiguous(memory_format=NHWC), 1, backend="cpu")
    assert mean.isfinite().all() and m2.isfinite().all()
    mean, m2, count = OPS.bn_stats(x, 1, backend="cpu")
    everything = torch.cat([x.double()[:1, :, 0, 0], values])
    truth = (everything - everything.mean(0)).square().sum(0)
    assert ((m2[0] - truth).abs() / truth).max() < 1e-6 and count == 1024
    assert ((mean[0] - everything.mean(0)).abs() / everything.std(0)).max() < 1e-6


def test_what_is_not_finite_stays_so():
    x = activation((2, 16, 4, 4), torch.float32, NHWC)
    x[0, 0, 0, 0], x[1, 1, 1, 1], x[1, 2, 3, 3] = float("inf"), float("nan"), float("-inf")
    actual, expected = (statistics(backend, x, 2) for backend in ("cpu", "reference"))
    for name, ours, theirs in zip(("scale", "shift", "mean", "invstd"), actual, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name
    assert actual[2][0] == float("inf") and actual[2][2] == float("-inf")


def test_results_do_not_depend_on_the_number_of_threads():
    x, dy = (activation((3, 48, 29, 30), torch.float32, NHWC) for _ in range(2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale, shift, mean, invstd = statistics("cpu", x, 5)
            y, mask = OPS.bn_apply(x, scale, shift, dy, None, None, True, True, backend="cpu")
            args = dy, x, mask, scale, shift, mean, invstd
            sums = OPS.bn_backward_reduce(*args, True, 5, backend="cpu")
            dx, _ = OPS.bn_backward_apply(*args, *sums, float(x.numel() // 48), True, False, backend="cpu")
            results.append((scale, shift, y, mask, *sums, dx, *stem("cpu", x, torch.float32).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@dtypes
@pytest.mark.parametrize("shape", [(2, 64, 33, 30), (1, 24, 5, 1)], ids=str)
def test_the_stem_of_several_parts(dtype, shape):
    n, c, h, w = shape
    x = torch.stack([torch.randperm(n * h * w).view(n, h, w) for _ in range(c)], 1)
    x = ((x - n * h * w / 2) / 16).to(dtype).to(memory_format=NHWC)
    dy = activation((n, c, (h + 1) // 2, (w + 1) // 2), dtype, NHWC)
    given = (x, *weights(c), dy)
    names = ("pooled", "stem dbias") if dtype == torch.bfloat16 else ("pooled", "stem dx", "stem dbias", "stem dweight")
    actual = stem("cpu", x, dtype, 3, dy, *given[1:3])
    if dtype == torch.float32:
        terms = {name: dy.double().abs().sum((0, 2, 3)) * (4 if "weight" in name else 1) for name in names[2:]}
        assert_no_worse({name: actual[name] for name in names}, plain_stem, given, terms=terms)
    else:  # equal values, which rounding makes, may be won by others
        expected = stem("reference", x, dtype, 3, dy, *given[1:3])
        assert torch.equal(actual["pooled"], expected["pooled"]) and torch.equal(actual["index"], expected["index"])


def test_refusals_name_the_value():
    x, v = activation((2, 16, 4, 5), torch.float32, NHWC), vector(16)

    def apply(x, scale=v, residual=None):
        return OPS.bn_apply(x, scale, v, residual, None, None, True, False, backend="cpu")

    cases = [
        (lambda: apply(x[0]), "must be 4-D and dense in NHWC order, got Float"),
        (lambda: apply(x.double()), "must be Float or BFloat16, got Double"),
        (lambda: apply(x.half()), "must be Float or BFloat16, got Half"),
        (lambda: apply(x.contiguous()), "dense in NHWC order"),
        (lambda: apply(x, residual=x.contiguous()), "residual must be like x"),
        (lambda: apply(x, v[:7]), "scale must be a contiguous Float vector of 16, got Float"),
        (lambda: OPS.bn_stats(x, 0, backend="cpu"), "at least one row, got rows=0"),
        (
            lambda: OPS.bn_backward_reduce(x, x, v.byte(), v, v, v, v, True, 1, backend="cpu"),
            r"mask must be contiguous Byte \[80\]",
        ),
        (
            lambda: OPS.bn_act_max_pool_backward_reduce(x, x.byte(), x, v, v, v, v, 1, backend="cpu"),
            "dy must be of the pooled",
        ),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def _backend_of(x, training=True):
    vectors = [torch.rand(16, requires_grad=i > 1) for i in range(4)]
    y = functional.batch_norm_act(x, *vectors, training=training)
    return "cpu" if "BatchNormAct" in type(y.grad_fn).__name__ else "aten"


@pytest.mark.parametrize(
    ("x", "training", "expected"),
    [
        (activation((2, 16, 4, 4), torch.float32, NHWC), True, "cpu"),
        (activation((2, 16, 4, 4), torch.bfloat16, NHWC), True, "cpu"),
        (activation((2, 16, 4, 4), torch.float32, NHWC), False, "aten"),
        (activation((2, 16, 4, 4)), True, "aten"),
    ],
    ids=["float32", "bfloat16", "constant statistics", "NCHW"],
)
def test_they_run_by_default_where_they_were_measured(x, training, expected):
    assert dispatch.default_backend("bn_apply", "cpu") == "cpu"
    assert _backend_of(x, training) == expected
    with use_backend("aten"):
        assert _backend_of(x, training) == "aten"


def test_small_activations_stay_with_native_pytorch_unless_it_is_forced(monkeypatch):
    monkeypatch.setattr(functional.common, "SMALL", 1 << 19)
    large, small = (activation((2, 16, 128, width), torch.float32, NHWC) for width in (128, 127))
    assert (_backend_of(large), _backend_of(small)) == ("cpu", "aten")
    with use_backend("cpu"):
        assert _backend_of(small) == "cpu"


def test_a_forced_backend_says_what_it_reads():
    with use_backend("cpu"), pytest.raises(RuntimeError, match="kernels for CPUs read channels_last activations"):
        _backend_of(activation((2, 16, 4, 4)))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="take float32, bfloat16, got float16"):
        functional.add_act(*(activation((2, 16, 4, 4), torch.float16, NHWC) for _ in range(2)))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_trains_with_them(autocast):
    torchvision = pytest.importorskip("torchvision")
    stem_and_block = torchvision.models.resnet18(num_classes=5)
    stem_and_block.layer3, stem_and_block.layer4 = nn.Identity(), nn.Identity()
    stem_and_block.fc = nn.Linear(128, 5)
    model = stem_and_block.to(memory_format=NHWC)
    x = activation((2, 3, 33, 35), torch.float32, NHWC)

    def step(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and x.dtype == torch.float32):
            model(x).float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())

    ours = step(fuse(copy.deepcopy(model)), x)
    assert_no_worse(ours, step, (model, x), norm=True)


@pytest.mark.parametrize("with_residual", [False, True])
def test_derivatives_of_derivatives(with_residual):
    given = (
        activation((2, 16, 5, 4), torch.float32, NHWC),
        *weights(16),
        activation((2, 16, 5, 4), torch.float32, NHWC),
    )

    def second(x, weight, bias, residual):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        added = leaves[3] if with_residual else None
        y = functional.batch_norm_act(leaves[0], None, None, *leaves[1:3], added, training=True)
        first = torch.autograd.grad(y.square().sum(), leaves[:3], create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in first), leaves[:3]))

    def plain(*tensors):
        with use_backend("aten"):
            return second(*tensors)

    assert_no_worse(second(*given), plain, given, joint=True)


def test_a_compiled_step_runs_them_where_they_are_forced():
    def step(x, weight, bias):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = functional.batch_norm_act(leaves[0], None, None, *leaves[1:], training=True)
        return list(torch.autograd.grad(y.square().sum(), leaves))

    given = (activation((2, 16, 5, 4), torch.float32, NHWC), *weights(16))
    with use_backend("cpu"):
        expected, actual = step(*given), torch.compile(step, backend="aot_eager")(*given)
    assert all(map(torch.equal, actual, expected))
