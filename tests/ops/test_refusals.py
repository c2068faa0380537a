"""What the Triton kernels cannot run is refused beforehand, with a line that names the value."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from conv_cases import NHWC, placed, problem, runs_kernels, sample
from op_cases import DEVICE

from resnet_fused import kernels, ops
from resnet_fused.ops.operands import Operands

pytestmark = runs_kernels
SHAPES = {
    "conv_chain": problem(1, 16, 4, 4, 16, 3, 3, padding=(1, 1)),
    "conv_join": problem(1, 16, 3, 3, 32, 1, 1),
    "conv_join_int8": problem(1, 16, 3, 3, 32, 1, 1),
    "pack_weight": (4, 3, 3, 3),
}
CONVOLUTION, ACTIVATION = problem(2, 8, 5, 5, 6, 3, 3), (2, 4, 3, 3)
OPTIONS = {
    "conv_chain": {"outputs": 32, "following": 8},
    "conv_join": {"shortcut_channels": 8, "shortcut_stride": 2},
    "conv_join_int8": {"shortcut_channels": 8, "shortcut_stride": 2},
    "conv_dgrad_join": {"projection": False},
    "bn_apply": {"residual": ""},
}


def nhwc(*size, dtype=torch.float32):
    return torch.zeros(size, dtype=dtype).contiguous(memory_format=NHWC)


def half(*size):
    return nhwc(*size, dtype=torch.float16)


def eight(*size):
    return nhwc(*size, dtype=torch.int8)


X, DY, IMAGE, W, V = nhwc(2, 8, 5, 5), nhwc(2, 6, 3, 3), nhwc(2, 8, 5, 5), torch.zeros(6, 8, 3, 3), torch.zeros(8)
NORM = {"x": IMAGE, "scale": V, "shift": V, "mean": V, "invstd": V}
PROLOGUE = [
    ({"dy_x": DY}, "only dy_x"),
    ({"dy_coefficients": torch.zeros(3, 6)}, "only dy_coefficients"),
    ({"dy_x": DY, "dy_coefficients": torch.zeros(3, 5)}, "[3, 6]"),
    ({"dy_x": DY, "dy_coefficients": torch.zeros(6, 3).t()}, "contiguous"),
]
ACTIVATIONS = torch.zeros(2, 4, 3, 3)  # of the memory-bound ops
FOUR = torch.zeros(4)
REFUSED = {
    "conv_fprop": [
        ({"x": X[0]}, "4-D"),
        ({"x": X.contiguous()}, "NHWC"),
        ({"x": X[:, :, ::2]}, "dense"),
        ({"weight": W.half()}, "float16"),
        ({"weight": W[0]}, "3-D"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, "do not fit 8 input channels"),
        ({"groups": 4}, "groups=4"),
        ({"weight": torch.zeros(6, 8, 16, 3)}, "15x15"),
        ({"weight": torch.zeros(6, 8, 7, 3)}, "larger than the padded image"),
        ({"residual": nhwc(2, 6, 5, 5)}, "residual"),
        ({"residual": torch.zeros(2, 6, 3, 3)}, "residual"),
        ({"scale": torch.zeros(5)}, "scale"),
        ({"shift": torch.zeros(12)[::2]}, "shift"),
        ({"act": "gelu"}, "no activation 'gelu'; choose one of relu, silu, hardswish"),
    ],
    "conv_fprop_int8": [
        ({"x": X}, "the kernels take int8, got float32"),
        ({"x": eight(2, 8, 5, 5).contiguous()}, "NHWC"),
        ({"weight": W}, "weight is float32, the activations are int8"),
        ({"weight": eight(6, 5, 3, 3)}, "do not fit 8 input channels"),
        ({"weight": eight(6, 8, 7, 3)}, "larger than the padded image"),
        ({"x": eight(1, 2**15, 3, 3), "weight": eight(6, 2**15, 2, 2)}, "at most 65536 products are sure to fit int32"),
        ({"residual": DY}, "residual must be int8"),
        ({"x_zero": V}, "x_zero must be a contiguous int8 vector of 8"),
        ({"offset": torch.zeros(6)}, "offset must be a contiguous int32 vector of 6"),
        ({"scale": torch.zeros(6).half()}, "scale must be a contiguous float32 vector of 6"),
        ({"shift": torch.zeros(5)}, "shift"),
        ({"residual_scale": 0.0}, "residual_scale must be a number above 0, got 0.0"),
        ({"y_scale": float("nan")}, "y_scale must be a number above 0, got nan"),
        ({"y_zero": 200}, "y_zero must be a value of int8, -128 to 127, got 200"),
        ({"dtype": torch.uint8}, "of a result the kernels take int8, float32, float16, bfloat16, got uint8"),
        ({"act": "gelu"}, "no activation 'gelu'"),
    ],
    "conv_join_int8": [
        ({"x": X}, "the kernels take int8, got float32"),
        ({"shortcut": half(1, 8, 6, 6)}, "the kernels take int8, got float16"),
        ({"shortcut_weight": eight(16, 8, 1, 1)}, "shortcut_weight"),
        ({"shortcut_stride": (1, 2)}, "stride (1, 2)"),
        ({"shortcut_offset": torch.zeros(32)}, "shortcut_offset must be a contiguous int32 vector of 32"),
        ({"shortcut_scale": torch.zeros(8)}, "shortcut_scale"),
        ({"y_zero": -129}, "y_zero"),
    ],
    "conv_fprop_stats": [
        ({"x": X.contiguous()}, "NHWC"),
        ({"weight": W.half()}, "float16"),
        ({"groups": 4}, "groups=4"),
        ({"x_scale": V}, "only x_scale"),
        ({"x_shift": V}, "only x_shift"),
        ({"x_scale": V[:6], "x_shift": V}, "x_scale must be a contiguous vector of 8"),
        ({"x_scale": V, "x_shift": torch.zeros(16)[::2]}, "x_shift"),
        ({"rows": 0}, "rows=0"),
    ],
    "conv_dgrad": [
        ({"dy": DY.contiguous()}, "NHWC"),
        ({"dy": DY[:, :, :2]}, "dense"),
        ({"dy": nhwc(2, 6, 2, 3)}, "dy is (2, 6, 2, 3)"),
        ({"weight": W.half()}, "float16"),
        ({"groups": 4}, "groups=4"),
        ({"weight": torch.zeros(6, 8, 16, 3)}, "15x15"),
        ({"size": (2, 5)}, "larger than the padded image"),
        ({"size": (6, 5)}, "(6, 5)"),
        ({"stride": (2, 2), "dilation": (2, 2), "size": (9, 9)}, "dilation at stride 1"),
        *PROLOGUE,
        ({"dy_x": DY.half(), "dy_coefficients": torch.zeros(3, 6)}, "dy_x must be float32"),
        ({"residual": DY}, "residual must be"),
        ({"residual_mask": torch.zeros(50, dtype=torch.uint8)}, "comes with a residual"),
        ({"residual": IMAGE, "residual_mask": torch.zeros(49, dtype=torch.uint8)}, "[50]"),
        ({"residual": IMAGE, "residual_mask": torch.zeros(50)}, "uint8"),
        ({"residual": IMAGE, **NORM}, "exclude each other"),
        ({"x": IMAGE}, "only x"),
        (NORM | {"x": IMAGE.contiguous()}, "x must be"),
        (NORM | {"mean": torch.zeros(7)}, "mean must be a contiguous vector of 8"),
    ],
    "conv_dgrad_join": [
        ({"weight": W.half()}, "float16"),
        ({"residual_mask": torch.zeros(50, dtype=torch.uint8)}, "residual_mask comes with a residual"),
        ({"x": DY}, "x must be"),
        ({"x": IMAGE.contiguous()}, "x must be"),
        ({"mask": torch.zeros(49, dtype=torch.uint8)}, "mask must be contiguous uint8 [50]"),
        ({"mask": torch.zeros(50)}, "mask must be contiguous uint8"),
        ({"mean": torch.zeros(7)}, "mean must be a contiguous vector of 8"),
        ({"activation": DY}, "activation must be"),
        ({"shortcut": IMAGE}, "only shortcut"),
        ({"shortcut": DY, "shortcut_mean": V, "shortcut_invstd": V}, "shortcut must be"),
        ({"shortcut": IMAGE, "shortcut_mean": V, "shortcut_invstd": V[:7]}, "shortcut_invstd must be"),
    ],
    "conv_backward": [
        ({"x": IMAGE.contiguous()}, "x must be"),
        ({"scale": torch.zeros(7)}, "scale must be a contiguous vector of 8"),
        ({"dy_x": DY}, "only dy_x"),
    ],
    "conv_wgrad": [
        ({"x": X[0]}, "4-D"),
        ({"x": X.contiguous()}, "NHWC"),
        ({"dy": DY[0]}, "3-D"),
        ({"dy": DY.half()}, "float16"),
        ({"dy": nhwc(2, 6, 5, 5)}, "(2, 6, 3, 3)"),
        ({"dy": DY.contiguous()}, "dy must be"),
        *PROLOGUE,
        ({"dy_x": DY, "dy_coefficients": torch.zeros(3, 6).double()}, "float32 [3, 6]"),
        ({"x_scale": V}, "x_shift"),
        ({"x_scale": V, "x_shift": torch.zeros(7)}, "x_shift"),
        ({"groups": 4}, "groups=4"),
        ({"filter": (16, 3)}, "15x15"),
        ({"filter": (7, 3)}, "larger than the padded image"),
    ],
    "conv_chain": [
        ({"x": torch.zeros(1, 16, 4, 4).half()}, "NHWC"),
        ({"x": nhwc(1, 16, 4, 4)}, "float16"),
        ({"weight2": half(16, 8, 3, 3)}, "16 input channels"),
        ({"weight2": half(136, 16, 3, 3), "weight3": half(32, 136, 1, 1)}, "136"),
        ({"weight2": half(12, 16, 3, 3), "weight3": half(32, 12, 1, 1)}, "multiples of 8"),
        ({"weight3": half(32, 16, 3, 3)}, "weight3"),
        ({"weight1": half(8, 16, 1, 1)}, "weight1"),
        ({"weight1": half(256, 32, 1, 1), "shift1": torch.zeros(256)}, "256"),
        ({"shift1": None}, "shift1"),
        ({"weight1": None}, "weight1"),
        ({"residual": half(1, 32, 2, 2)}, "(1, 32, 4, 4)"),
        ({"scale2": torch.zeros(8)}, "scale2"),
        ({"shift3": torch.zeros(64)[::2]}, "shift3"),
        ({"padding": (0, 0), "dilation": (2, 2)}, "larger than the padded image"),
    ],
    "conv_join": [
        ({"x": torch.zeros(1, 16, 3, 3)}, "NHWC"),
        ({"weight": torch.zeros(32, 8, 1, 1)}, "weight must be"),
        ({"weight": torch.zeros(32, 16, 3, 3)}, "weight must be"),
        ({"shortcut": half(1, 8, 6, 6), "shortcut_weight": half(32, 8, 1, 1)}, "shortcut must be"),
        ({"shortcut_weight": torch.zeros(16, 8, 1, 1)}, "shortcut_weight"),
        ({"x": nhwc(1, 0, 3, 3), "weight": torch.zeros(32, 0, 1, 1)}, "weight must be [outputs, 0, 1, 1]"),
        ({"shortcut": nhwc(1, 0, 6, 6), "shortcut_weight": torch.zeros(32, 0, 1, 1)}, "shortcut_weight must be"),
        ({"shortcut_stride": (1, 2)}, "stride (1, 2)"),
        ({"shift": torch.zeros(16)}, "shift"),
    ],
    "bn_stats": [({"x": ACTIVATIONS[0]}, "3-D"), ({"x": ACTIVATIONS[:, ::2]}, "dense")],
    "add_act": [({"other": ACTIVATIONS.half()}, "float16")],
    "add_act_backward": [({"y": ACTIVATIONS[:1]}, "shape")],
    "bn_apply": [
        ({"residual": nhwc(2, 4, 3, 3)}, "memory order"),
        ({"residual": ACTIVATIONS, "residual_scale": FOUR}, "residual_shift"),
        ({"scale": torch.zeros(16)[::4]}, "scale must be a contiguous float32 vector"),
    ],
    "bn_backward_reduce": [
        ({"dy": ACTIVATIONS.half()}, "dy"),
        ({"mask": torch.zeros(2, 4, 3, 3).byte()}, "mask must be contiguous uint8 [9]"),
        ({"rows": 0}, "at least one row"),
    ],
    "bn_backward_apply": [
        ({"dy": ACTIVATIONS[:1]}, "dy"),
        ({"sum_dy": ACTIVATIONS, "sum_dy_xhat": None}, "sum_dy_xhat"),
    ],
    "bn_backward_apply_join": [
        ({"shortcut": ACTIVATIONS[:, :2]}, "shortcut"),
        ({"shortcut_mean": torch.zeros(3)}, "shortcut_mean must be a contiguous float32 vector of 4"),
        ({"sum_dz_shortcut": FOUR.half()}, "sum_dz_shortcut must be"),
        ({"mask": torch.zeros(9)}, "mask must be contiguous uint8 [9]"),
    ],
    "bn_act_max_pool": [({"x": ACTIVATIONS[0]}, "3-D")],
    "bn_act_max_pool_backward_reduce": [({"dy": ACTIVATIONS}, "pooled")],
    "bn_act_max_pool_backward_apply": [({"dy": ACTIVATIONS}, "pooled")],
    "bn_finalize": [
        ({"mean": torch.zeros(3, 4)}, "mean must be contiguous float64"),
        ({"m2": torch.zeros(4, 3).t()}, "m2 must be contig"),
        ({"running_mean": torch.zeros(1).expand(4)}, "running_mean is written"),
    ],
    "bn_backward_finalize": [
        ({"sum_dy_xhat": torch.zeros(3)}, "(4,)"),
        ({"scale": FOUR.double()}, "float64"),
        ({"mean": torch.zeros(8)[::2]}, "contiguous"),
        ({"sum_dy": torch.zeros(4, 1)}, "sum_dy"),
    ],
    "pack_weight": [({"weight": torch.zeros(4, 3, 3, 3).int()}, "int32")],
    "reduce_rows": [({"partials": torch.tensor(0.0)}, "scalar")],
}


def _sample(op):
    if op.startswith("conv_"):
        dtype = torch.float16 if op == "conv_chain" else torch.float32
        return sample(op, SHAPES.get(op, CONVOLUTION), dtype, **OPTIONS.get(op, {}))
    made = Operands(torch.device(DEVICE), torch.float32, nhwc=False)
    return ops.OPS[op].case(made, SHAPES.get(op, ACTIVATION), **OPTIONS.get(op, {}))


@pytest.mark.parametrize(("op", "changes", "message"), [(op, *row) for op, rows in REFUSED.items() for row in rows])
def test_refusals_name_the_value(op, changes, message):
    args = _sample(op)
    assert kernels.refuse(op, args) is None
    changed = args._replace(**{name: placed(value) for name, value in changes.items()})
    assert message in kernels.refuse(op, changed)


def test_another_device_and_an_unknown_op_are_named():
    x = torch.zeros(2, 4, 3, 3, device=DEVICE)
    assert "CUDA" in kernels.refuse("bn_stats", ops.OPS["bn_stats"].args(x.to("meta"), 1))
    with pytest.raises(ValueError, match=r"bn_forward.*bn_stats"):
        kernels.refuse("bn_forward", (x,))
