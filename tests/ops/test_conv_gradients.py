"""What the matrix of test_conv.py does not see of the gradients: masks, padding, splits, ops that are two others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from conv_cases import (
    NHWC,
    SHAPES,
    SMALL,
    a_few_shapes,
    check,
    every_dtype,
    launch,
    problem,
    runs_kernels,
    sample,
)
from op_cases import DEVICE, reference

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.dispatch.table import Choice
from resnet_fused.kernels import conv_wgrad
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.measure.network import tiny_network
from resnet_fused.ops import OPS, arithmetic, comparison
from resnet_fused.ops.backends import implementation, implements
from resnet_fused.tuning import checks
from resnet_fused.tuning.problems import jobs

pytestmark = runs_kernels
NAN, INF = float("nan"), float("inf")
EPILOGUES = OPS["conv_dgrad"].options["epilogue"]
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered")  # of numpy, under the interpreter


# The data gradient


@pytest.mark.parametrize(
    "name", ["1x1 stride 2, odd image", "rows that no tap reaches", "stride larger than the filter"]
)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_pixel_that_no_tap_reaches_gets_the_residual_alone(epilogue, name):
    args = sample("conv_dgrad", SHAPES[name], prologue=True, epilogue=epilogue)
    dx = check("conv_dgrad", args, config=SMALL).dx
    ones = sample("conv_dgrad", SHAPES[name])
    reached = OPS["conv_dgrad"].reference(comparison.map_tensors(ones, torch.ones_like)).dx != 0
    assert not reached.all()
    addend = torch.zeros_like(dx) if args.residual is None else args.residual
    if args.residual_mask is not None:
        addend = torch.where(arithmetic.unpack_bits(args.residual_mask, addend), addend, 0)
    assert torch.equal(dx[~reached], addend[~reached])


def test_a_weight_of_any_strides_and_an_offset_view_of_the_gradient():
    args = sample("conv_dgrad", SHAPES["4 groups of 8"], torch.float16)
    expected = launch("conv_dgrad", args).dx
    longer = torch.cat([args.dy[:1], args.dy]).contiguous(memory_format=NHWC)[1:]
    for other in (args.weight.contiguous(), args.weight.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(launch("conv_dgrad", args._replace(dy=longer, weight=other)).dx, expected)


def test_a_gradient_of_one_pixel_or_one_channel_gives_nhwc_as_any_other_does():
    """It is NCHW too; what is made of it is for kernels that read NHWC."""
    for shape in (problem(2, 16, 2, 2, 24, 3, 3, (2, 2), (1, 1)), problem(2, 16, 4, 4, 1, 3, 3, padding=(1, 1))):
        args = sample("conv_dgrad", shape)
        args = args._replace(dy=args.dy.contiguous())
        assert args.dy.is_contiguous()
        check("conv_dgrad", args)


def test_a_nan_of_the_input_passes_the_mask_and_a_relud_zero_does_not():
    """As PyTorch's ReLU does: its gradient is dropped where its result is <= 0, and a NaN is not."""
    args = sample("conv_dgrad", SHAPES["3x3"], epilogue="batch norm")
    x, scale, shift = args.x, args.scale, args.shift
    x[0, 0], x[0, 1], x[0, 2] = 1.0, NAN, -1.0
    scale[:3], shift[:3] = 2.0, -2.0
    args.dy[1] = NAN  # a gradient that is NaN is dropped too
    dx = launch("conv_dgrad", args).dx
    assert not dx[0, 0].any() and not dx[0, 2].any()
    unmasked = args._replace(x=None, scale=None, shift=None, mean=None, invstd=None)
    assert torch.equal(dx[0, 1], launch("conv_dgrad", unmasked).dx[0, 1])
    passes = ~(x[1] * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) <= 0)
    assert torch.equal(dx[1].isnan(), passes) and not dx[1][~passes].any()


def test_a_masked_residual_drops_its_nan():
    args = sample("conv_dgrad", SHAPES["1x1"], epilogue="masked residual")
    keep = arithmetic.unpack_bits(args.residual_mask, args.residual)
    args.residual.fill_(NAN)
    assert torch.equal(launch("conv_dgrad", args).dx.isnan(), keep)


@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2, odd image", "4 groups of 8"])
@pytest.mark.parametrize("value", [NAN, INF])
@quiet
def test_a_masked_gradient_that_is_not_finite_is_written_and_not_summed(value, name):
    """dx keeps it, since a hook must see it; the sums drop it where the mask is zero, as `bn_backward_reduce` does."""
    args = sample("conv_dgrad_join", SHAPES[name], epilogue="masked residual")
    args.dy[0, -1, 0, 0] = value
    dx = launch("conv_dgrad_join", args).dx
    bits = torch.where(dx.isfinite(), arithmetic.unpack_bits(args.mask, dx), False)
    packed = arithmetic.pack_bits(arithmetic.in_memory_order(bits.contiguous(memory_format=NHWC)))
    dropped, *sums, _ = launch("conv_dgrad_join", args._replace(mask=packed))
    assert torch.equal(dropped.isfinite(), dx.isfinite()) and not dx.isfinite().all()
    assert all(s.isfinite().all() for s in sums)


# The weight gradient


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("width", [7, 16], ids=["ragged pixels", "whole tiles of pixels"])
@pytest.mark.parametrize("splits", [1, 2, 5, 100])
def test_every_number_of_splits(splits, width, prologue):
    """Ranges of pixels that run out early, or hold none at all, add nothing."""
    args = sample("conv_wgrad", problem(1, 16, 9, width, 24, 1, 1), x_prologue=prologue, dy_prologue=prologue)
    check("conv_wgrad", args, config=ConvConfig(64, 32, 16, 4, 2, True, splits))


@pytest.mark.parametrize("options", list(OPS["conv_wgrad"].variants()), ids=str)
@pytest.mark.parametrize("channels", [64, 24])
def test_padding_contributes_nothing_behind_the_prologue(channels, options):
    """Ones everywhere: a weight's gradient counts the pixels that its tap sees inside the image."""
    shape = problem(2, channels, 9, 7, 40, 3, 3, stride=(2, 2), padding=(1, 1))
    args = sample("conv_wgrad", shape, torch.float16, **options)
    args.x.fill_(0.0 if options["x_prologue"] else 1.0)
    args.dy.fill_(0.0 if options["dy_prologue"] else 1.0)
    if options["x_prologue"]:
        args.x_shift.fill_(1.0)
    if options["dy_prologue"]:
        args.dy_x.zero_()
        args.dy_coefficients.fill_(1.0)
    rows, columns = (
        torch.tensor([sum(0 <= p * 2 - 1 + tap < size for p in range(out)) for tap in range(3)], dtype=torch.float32)
        for size, out in ((shape.h, shape.p), (shape.w, shape.q))
    )
    expected = shape.n * rows[:, None] * columns
    assert torch.equal(launch("conv_wgrad", args), expected.to(DEVICE).expand(shape.k, shape.c, 3, 3))


@quiet
@pytest.mark.parametrize("dy_prologue", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_behind_a_prologue_an_infinite_gradient_reaches_the_weights_that_see_it(value, dy_prologue):
    """Without one it meets the padding's zero, as in PyTorch."""
    shape = problem(1, 64, 4, 4, 16, 1, 3, padding=(0, 1))
    args = sample("conv_wgrad", shape, x_prologue=True, dy_prologue=dy_prologue)
    args.dy[0, 3, 0, 0] = value
    special = ~launch("conv_wgrad", args).isfinite()
    sees_padding = torch.tensor([True, False, False], device=DEVICE)
    truth = ~OPS["conv_wgrad"].reference(comparison.double(args)).isfinite()
    assert torch.equal(special, truth & ~sees_padding) and special.any()


def test_a_nan_shift_stays_out_of_taps_that_no_pixel_sees():
    """A batch norm whose statistics are NaN makes its channel NaN, and padding zero all the same."""
    args = sample("conv_wgrad", SHAPES["1x1 image under 3x3"], x_prologue=True)
    args.x_shift[3] = NAN
    dweight = launch("conv_wgrad", args)
    assert dweight[:, 3, 1, 1].isnan().all() and int(dweight.isnan().sum()) == dweight.shape[0]


def test_the_weight_gradient_is_that_of_autograd():
    shape = SHAPES["3x3 stride 2, odd image"]
    args = sample("conv_wgrad", shape)
    weight = torch.zeros(shape.k, shape.c, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.nn.functional.conv2d(args.x.double(), weight, None, shape.stride, shape.padding)
    (truth,) = torch.autograd.grad(y, weight, args.dy.double())
    torch.testing.assert_close(launch("conv_wgrad", args).double(), truth, rtol=0, atol=1e-4)


def test_division_by_multiplication():
    largest = 2**31 - 1
    for divisor in (1, 2, 3, 7, 49, 56 * 56, 112 * 112, 2**20, 2**30 - 1, 2**30 + 1, largest):
        factor, shift = conv_wgrad._magic(divisor)
        assert -(2**31) <= factor < 2**31
        for n in {0, 1, divisor - 1, divisor, divisor + 1, 2 * divisor - 1, largest - largest % divisor - 1, largest}:
            if 0 <= n <= largest:
                assert (n * (factor % 2**32)) >> shift == n // divisor, (n, divisor)


# Ops that are two others


def _by(backend):
    """An op by a backend: (its name, arguments, options of the launcher) to its results as a tuple."""
    if backend == "triton":
        return lambda op, args, **config: launch(op, args, **config)

    def run(op, args, **config):
        """What native PyTorch has no op for, it runs as the reference does."""
        return OPS[op].results(implementation(backend if implements(backend, op) else "reference", op)(*args))

    return run


def _part(op, args, **changes):
    """The arguments of another op: those that the two share, and changes."""
    fields = OPS[op].args._fields
    return OPS[op].args(**dict.fromkeys(fields) | {k: v for k, v in args._asdict().items() if k in fields} | changes)


def _both_gradients(run, args, **config):
    """`conv_backward` by an op for each gradient, and one for the activation."""
    dgrad = run("conv_dgrad", _part("conv_dgrad", args, size=args.x.shape[2:]), **config)
    x, scale, shift = args.x, args.scale, args.shift
    if not args.x_prologue:
        norm = OPS["bn_apply"].args(x, scale, shift, None, None, None, True, False)
        x, scale, shift = run("bn_apply", norm).y, None, None
    given = {"x": x, "x_scale": scale, "x_shift": shift, "filter": args.weight.shape[2:]}
    return (*dgrad, run("conv_wgrad", _part("conv_wgrad", args, **given)))


def _check_both(args, backend="triton", **config):
    together = _by(backend)("conv_backward", args, **config)
    for got, expected in zip(together, _both_gradients(_by(backend), args, **config), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    return together


@a_few_shapes
def test_both_gradients_are_an_op_for_each(name):
    _check_both(sample("conv_backward", SHAPES[name], torch.bfloat16))


@every_dtype
@pytest.mark.parametrize("options", list(OPS["conv_backward"].variants()), ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference", "aten"])
def test_both_gradients_behind_every_prologue(backend, options, dtype):
    _check_both(sample("conv_backward", SHAPES["3x3 stride 2, odd image"], dtype, **options), backend)


@pytest.mark.larger
def test_many_tiles_and_many_ranges_are_added_in_one_launch_and_one_order():
    args = sample("conv_backward", problem(1, 8, 36, 36, 8, 3, 3, padding=(1, 1)), torch.float16)
    assert all(map(torch.equal, _check_both(args, config=SMALL), launch("conv_backward", args, config=SMALL)))


@pytest.mark.parametrize("rows", [1, 300, 1100])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_one_launch_are_those_of_many(count, rows):
    alike = [torch.randn(rows, 24, device=DEVICE) for _ in range(count)]
    other = torch.randn(5, 3, 40, device=DEVICE)
    expected = [reduce_alike(t)[0] for t in alike]
    assert all(map(torch.equal, reduce_alike(*alike), expected))
    assert all(map(torch.equal, reduce_alike(*alike, other=other), [*expected, *reduce_alike(other)]))


def _dx_alone(args):
    return _part("conv_dgrad", args, x=None, scale=None, shift=None, mean=None, invstd=None)


def _dweight_alone(args):
    return _part("conv_wgrad", args, x=args.activation, x_scale=None, x_shift=None, filter=[*args.weight.shape[2:]])


def _check_join(args, backend="triton", **options):
    """dx and dweight of the op are those of an op for each, bit for bit."""
    run = _by(backend)
    found = run("conv_dgrad_join", args, **options)
    assert torch.equal(found.dx, run("conv_dgrad", _dx_alone(args), **options).dx)
    if args.activation is None:
        assert found.dweight.numel() == 0 and found.dweight.dtype == torch.float32
    else:
        alone = run("conv_wgrad", _dweight_alone(args))
        assert torch.equal(found.dweight, alone) and found.dweight.stride() == alone.stride()
    return found


@a_few_shapes
def test_across_a_join_dx_is_that_of_the_data_gradient(name):
    _check_join(sample("conv_dgrad_join", SHAPES[name], torch.bfloat16, epilogue="masked residual"))


@every_dtype
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2, odd image"])
def test_across_a_join_both_gradients_are_an_op_for_each(name, prologue, dtype):
    options = {"epilogue": "masked residual", "prologue": prologue, "wgrad": True}
    _check_join(sample("conv_dgrad_join", SHAPES[name], dtype, **options))


@pytest.mark.larger
def test_across_a_join_many_tiles_and_ranges_are_added_in_one_launch_and_one_order():
    shape = problem(1, 8, 36, 36, 8, 3, 3, padding=(1, 1))
    args = sample("conv_dgrad_join", shape, torch.float16, epilogue="masked residual", wgrad=True)
    assert all(map(torch.equal, _check_join(args, config=SMALL), launch("conv_dgrad_join", args, config=SMALL)))


@pytest.mark.parametrize("backend", ["reference", "aten"])
@every_dtype
def test_across_a_join_the_sums_are_those_of_the_reduction(backend, dtype):
    """Those that `bn_backward_reduce` finds in what was written, bit for bit in the reference, whose order is one."""
    args = sample("conv_dgrad_join", SHAPES["1x1"], dtype, epilogue="masked residual", wgrad=True)
    found = _check_join(args, backend)
    dx, sums = found.dx, (found.sum_dz, found.sum_dz_xhat, found.sum_dz_shortcut)
    expected = [
        reference.bn_backward_reduce(dx, z, args.mask, m, m, m, i, True, 3)
        for z, m, i in (
            (args.x, args.mean, args.invstd),
            (args.shortcut, args.shortcut_mean, args.shortcut_invstd),
        )
    ]
    for got, exact in zip(sums, (*expected[0], expected[1][1]), strict=True):
        if backend == "aten":
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, exact)


@pytest.mark.parametrize(
    "op, index", [("conv_backward", index) for index in range(4)] + [("conv_dgrad_join", index) for index in range(5)]
)
def test_verification_finds_what_is_wrong_with_it(index, op, monkeypatch):
    found = jobs(tiny_network(), ("train",), 2, torch.float32, 80, False)
    job = next(j for j in found if j.problem.op == "conv_dgrad" and j.epilogue == (op == "conv_backward"))
    device, right = torch.device(DEVICE), checks.caller

    def wrong(name, choice):
        def call(*operands):
            results = list(right(name, choice)(*operands))
            results[index] = results[index] * (1 + 1e-3)
            return results

        return call if name == op else right(name, choice)

    choice = Choice("triton", SMALL)
    assert checks.check_all(job, choice, device) == {"conv_dgrad": None, op: None}
    monkeypatch.setattr(checks, "caller", wrong)
    found = checks.check_all(job, choice, device)
    assert found["conv_dgrad"] is None and "errs by" in found[op]
