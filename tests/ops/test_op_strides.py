"""Every op on every backend, called directly, with strides of every kind in every argument: right, or refused."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import pictures, small_resnet, step
from op_cases import DEVICE, NCHW, NHWC, OPS
from torch import Tensor, nn

from resnet_fused import fuse, ops
from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.ops.arithmetic import in_memory_order, pack_bits, unpack_bits
from resnet_fused.ops.operands import Operands

BACKENDS = [name for name in ("reference", "aten", "cuda", "triton") if ops.available(name, DEVICE)]
# Sizes of 1 make an activation NCHW and NHWC at once: that of the image, that of the convolution's result, or both.
SIZES = {  # image, output channels, stride
    "plain": ((2, 8, 3, 2), 8, 1),
    "one channel": ((2, 1, 3, 2), 8, 1),
    "one output channel": ((2, 8, 3, 2), 1, 1),
    "one pixel": ((2, 8, 1, 1), 8, 1),
    "to one pixel": ((3, 8, 2, 2), 8, 2),
}
# Which bits lie beside which activation, in the order of its memory.
BITS = {"mask": "x", "residual_mask": "residual"}


def _sizes_of_one(t: Tensor) -> Tensor | None:
    """Meaningless strides where a dimension has one element."""
    if 1 not in t.shape:
        return None
    return t.as_strided(t.shape, [77 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)])


def _offset(t: Tensor) -> Tensor:
    storage = torch.empty(t.numel() + 3, dtype=t.dtype, device=t.device)
    return storage[3:].as_strided(t.shape, t.stride(), 3).copy_(t)


def _other_order(t: Tensor) -> Tensor | None:
    return t.contiguous(memory_format=NCHW) if t.dim() == 4 else None


def _turned(t: Tensor) -> Tensor | None:
    """The last two dimensions the other way round in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else None


def _sliced(t: Tensor) -> Tensor:
    """Every other element of something larger."""
    larger = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7, dtype=t.dtype, device=t.device)
    return larger[..., ::2].copy_(t)


def _some_channels(t: Tensor) -> Tensor | None:
    """A slice of a wider NHWC activation, or of a wider matrix."""
    if t.dim() < 2:
        return None
    wider = torch.full((t.shape[0], t.shape[1] + 2, *t.shape[2:]), 7, dtype=t.dtype, device=t.device)
    wider = wider.contiguous(memory_format=NHWC) if t.dim() == 4 else wider
    return wider[:, 1 : 1 + t.shape[1]].copy_(t)


def _expanded(t: Tensor) -> Tensor:
    """One value for the whole of a dimension, which alone has other values than `t`."""
    return t[:1].expand(t.shape)


SAME_MEMORY: list[Callable[[Tensor], Tensor | None]] = [_sizes_of_one, _offset]  # of all arguments at once
FOREIGN: list[Callable[[Tensor], Tensor | None]] = [_other_order, _turned, _sliced, _some_channels, _expanded]


# Of the records' sample arguments: with all that an op takes, and where that excludes something, once more with that.
VARIANTS: dict[str, list[dict]] = {
    "bn_stats": [{"rows": 3}],
    "bn_apply": [{"residual": "affine", "with_mask": True}],
    "bn_backward_reduce": [{"masked": True, "rows": 3}],
    "bn_backward_apply": [{"with_dresidual": True}, {"masked": True, "constant": True, "with_dresidual": True}],
    "bn_act_max_pool_backward_reduce": [{"rows": 3}],
    "pack_weight": [{"flip": True}],
    "conv_fprop": [{"scaled": True, "residual": True}],
    "conv_fprop_int8": [{"residual": True}],
    "conv_fprop_stats": [{"prologue": True, "rows": 3}],
    "conv_dgrad": [{"prologue": True, "epilogue": "masked residual"}, {"epilogue": "batch norm"}],
    "conv_dgrad_join": [{"epilogue": "masked residual", "wgrad": True}],
    "conv_backward": [{"prologue": True}],
    "conv_wgrad": [{"x_prologue": True, "dy_prologue": True}],
}


def _samples(size: str) -> Iterator[tuple[str, tuple]]:
    """Arguments of every op, in NHWC order: a 3x3 from c channels of h x w pixels to k, and what goes with it."""
    image, k, stride = SIZES[size]
    n, c, h, w = image
    conv = ConvShape(n, c, h, w, k, 3, 3, (stride, stride), (1, 1))
    joins = ("conv_join", "conv_join_int8")
    shapes: dict[str, Any] = {"pack_weight": (6, c, 3, 2), "reduce_rows": image}
    shapes |= dict.fromkeys(joins, ConvShape(*conv.output, c, 1, 1))
    more: dict[str, dict] = {
        **dict.fromkeys(joins, {"shortcut_channels": c, "shortcut_stride": stride}),
        "conv_chain": {"outputs": c, "following": k},
    }
    for name, record in ops.OPS.items():
        # In a dtype that the Triton kernel takes.
        make = Operands(torch.device(DEVICE), torch.float16 if name == "conv_chain" else torch.float32, guarded=False)
        for variant in VARIANTS.get(name, [{}]):
            shape = shapes.get(name, conv if name.startswith("conv") else image)
            args = record.case(make, shape, **variant, **more.get(name, {}))
            if name in ("bn_finalize", "bn_finalize_apply"):
                rows = {"mean": make.vector(3, c).double(), "m2": make.vector(3, c, positive=True)}
                running = {"running_mean": make.vector(c), "running_var": make.vector(c, positive=True)}
                args = args._replace(**rows, count=torch.full((3,), 13.0, device=DEVICE), **running)
            if name == "reduce_rows":
                args = args._replace(partials=make.vector(5, c, 3))
            yield name, tuple(args)


def _names(op: str) -> list[str]:
    return [argument.name for argument in getattr(OPS, op).default._schema.arguments if not argument.kwarg_only]


def _dense(t: Tensor, like: Tensor) -> Tensor:
    """The values of `t` in the strides of `like`."""
    return torch.empty_like(like).copy_(t)


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def _run(op: str, backend: str, args: list) -> list[Tensor]:
    """The results, and what the op wrote to its arguments."""
    results = _tensors(getattr(OPS, op)(*args, backend=backend))
    names = _names(op)
    return results + [args[names.index(name)] for name in ("running_mean", "running_var") if name in names]


def _bits_beside(args: list, names: list[str], changed: int, before: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The bit masks that follow the memory of argument `changed`, which was `before`."""
    for mask, beside in BITS.items():
        if beside == names[changed] and mask in names and isinstance(args[names.index(mask)], Tensor):
            bits = unpack_bits(args[names.index(mask)], before)
            yield names.index(mask), pack_bits(in_memory_order(_dense(bits.to(torch.uint8), args[changed])) != 0)


def _clone(args: tuple | list) -> list:
    """Fresh arguments, which an op may write to."""
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def _assert_right(op: str, actual: list[Tensor], x: Tensor, right: list[Tensor], right_x: Tensor, what: str) -> None:
    """Equal but for the order of the summands; `x` and `right_x` are the activations that bits follow in memory."""
    for a, e in zip(actual, right, strict=True):
        if op == "bn_apply" and a.dtype == torch.uint8:
            assert torch.equal(unpack_bits(a, x), unpack_bits(e, right_x)), what
            continue
        largest = float(e.abs().max()) if e.numel() else 0.0
        tolerance = (1 + largest) * (1e-2 if e.dtype == torch.float16 else 1e-4)
        torch.testing.assert_close(a, e, rtol=0.0, atol=tolerance, msg=what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_no_op_misreads_a_stride(backend, size):
    foreign = FOREIGN if backend != "triton" or size == "plain" or DEVICE == "cuda" else [_sliced]  # interpreted
    answered = 0
    for op, sample in _samples(size):
        if not ops.implements(backend, op):
            continue
        try:
            expected = _run(op, backend, _clone(sample))
        except RuntimeError:  # channels that this backend does not take, in any order
            assert op == "conv_chain" and backend == "triton" and size != "plain"
            continue
        for variant in SAME_MEMORY:
            args = [variant(a) if isinstance(a, Tensor) else a for a in _clone(sample)]
            args = [old if new is None else new for old, new in zip(_clone(sample), args, strict=True)]
            actual, what = _run(op, backend, args), f"{op}: {_name(variant)}"
            if backend in ("cuda", "triton"):
                assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), what
            _assert_right(op, actual, args[0], expected, sample[0], what)
        for i, argument in enumerate(sample):
            if isinstance(argument, Tensor) and argument.numel() > 1:
                answered += sum(_one_is_foreign(op, backend, sample, expected, i, variant) for variant in foreign)
    assert answered > 2


def _one_is_foreign(
    op: str, backend: str, sample: tuple, right: list[Tensor], i: int, variant: Callable[[Tensor], Tensor | None]
) -> bool:
    """Whether the op took argument `i` with other strides: then with the right result; else it gave a reason."""
    argument, name = sample[i], _names(op)[i]
    changed = variant(argument)
    if changed is None or changed.stride() == argument.stride():
        return False
    what = f"{op}: {name} {_name(variant)}, {tuple(changed.shape)} {changed.stride()}"
    args = _clone(sample)
    args[i] = changed
    if variant is _expanded:
        others = _clone(sample)
        others[i] = _dense(changed, argument)
        right = _run(op, backend, others)
    try:
        for k, bits in _bits_beside(args, _names(op), i, argument):
            args[k] = bits
        actual = _run(op, backend, args)
    except RuntimeError as refusal:
        assert _gives_a_reason(refusal), f"{what}: {refusal}"
        # native PyTorch kernels read any strides; only bits need a memory order, and elements a place of their own.
        bits = name in (*BITS, *BITS.values()) or (op == "bn_apply" and name == "x")
        overlapping = variant is _expanded and name.startswith("running")
        assert backend in ("cuda", "triton") or bits or overlapping, f"{what}: {refusal}"
        return False
    _assert_right(op, actual, args[0], right, sample[0], what)
    return True


def _name(variant: Callable[..., object]) -> str:
    return variant.__name__.strip("_").replace("_", " ")


def _gives_a_reason(refusal: RuntimeError) -> bool:
    words = ("contiguous", "dense", "strides", "memory order", "NHWC", "single memory location")
    return any(word in str(refusal) for word in words)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [size for size in SIZES if size != "plain"])
def test_fake_kernels_say_the_strides_of_ambiguous_results(backend, size):
    for op, sample in _samples(size):
        if ops.implements(backend, op) and op != "conv_chain":
            utility = "test_faketensor"
            torch.library.opcheck(
                getattr(OPS, op).default, tuple(_clone(sample)), {"backend": backend}, test_utils=utility
            )


def _projection(size: int, channels: int) -> nn.Module:
    resnet = pytest.importorskip("torchvision.models.resnet")
    shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))
    return resnet.BasicBlock(channels, channels, 2, shortcut)


def _assert_gradients(plain: nn.Module, x: Tensor, backend: str, tolerance: float) -> None:
    fused = fuse(copy.deepcopy(plain.to(DEVICE)))
    expected, actual = step(plain, x.to(DEVICE)), step(fused, x.to(DEVICE), backend)
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        error = (actual[name] - right).abs().max() / right.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name}: {float(error):.2g} of the largest value"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_projection_block_with_one_pixel_behind_it(backend):
    _assert_gradients(_projection(2, 16), torch.randn(4, 16, 2, 2), backend, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_projection_block_of_one_channel(backend):
    block = _projection(4, 1)
    _assert_gradients(block, torch.randn(4, 1, 4, 4), backend, 1e-3)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("part", ["conv2", "downsample"])
def test_gradients_where_the_branches_meet_in_two_memory_orders(backend, part):
    """A weight in channels_last order makes its branch's result NHWC, and leaves the other's NCHW."""
    block = _projection(4, 8)
    getattr(block, part).to(memory_format=NHWC)
    _assert_gradients(block, torch.randn(2, 8, 6, 6), backend, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_whose_last_images_are_of_one_pixel(backend):
    plain = small_resnet()
    x = pictures(4, 8)
    _assert_gradients(plain, x, backend, 1e-3)


@pytest.mark.skipif("triton" not in BACKENDS or DEVICE == "cuda", reason="needs Triton's interpreter")
@pytest.mark.parametrize("kernel", ["tma_gemm", "tma_conv"])
@pytest.mark.parametrize("size", ["one pixel", "plain"])
def test_kernels_with_tensor_descriptors_do_not_misread_either(kernel, size, monkeypatch):
    """Where the plan has them: an op's refusals come first, and what they cannot read the pointer kernel does."""
    kernels = importlib.import_module("resnet_fused.kernels")
    config = ConvConfig(16, 16, 16, 4, 2, kernel=kernel)
    monkeypatch.setattr(kernels, "conv_config", lambda *problem: config)
    (h, w) = (1, 1) if size == "one pixel" else (3, 2)
    shape = (1, 1) if kernel == "tma_gemm" else (3, 3)
    weight = torch.randn(16, 16, *shape).half().to(memory_format=NHWC)
    x, residual = (torch.randn(2, 16, h, w).half().to(memory_format=NHWC) for _ in range(2))
    geometry = [1, 1], [shape[0] // 2] * 2, [1, 1], 1
    for op, sample in {
        "conv_fprop": (x, weight, torch.rand(16), torch.rand(16), residual, *geometry, "relu"),
        "conv_fprop_stats": (x, weight, None, None, *geometry, 3),
    }.items():
        right = _run(op, "triton", _clone(sample))
        for i, argument in enumerate(sample):
            for variant in SAME_MEMORY if isinstance(argument, Tensor) else ():
                args = _clone(sample)
                args[i] = variant(argument) if variant(argument) is not None else argument
                _assert_right(op, _run(op, "triton", args), x, right, x, f"{op} {_name(variant)}")
            if isinstance(argument, Tensor):
                _one_is_foreign(op, "triton", sample, right, i, _sliced)
