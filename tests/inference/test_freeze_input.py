"""A frozen model given anything but what it was frozen for: PyTorch's words, or a sentence that says what to do."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from agreement import assert_same_words
from contract import assert_within_contract
from small_net import Net
from torch import nn

from resnet_fused import freeze, use_backend

BACKENDS = ["auto", "reference"]  # folded and prepacked for oneDNN; on an epilogue of ours


def _frozen(model, x, backend="auto"):
    with use_backend(backend):
        return freeze(model, x)


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=BACKENDS)
def pair(request, x):
    """A model and its frozen copy."""
    model = Net().eval()
    return model, _frozen(model, x, request.param)


WRONG = {
    "sparse": lambda x: x.to_sparse(),
    "2-D": lambda x: x[0, 0],
    "3-D": lambda x: x[0],
    "5-D": lambda x: x[None],
    "channels": lambda x: x[:, :2],
    "no pixels": lambda x: x[:, :, :0, :0],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tensor_gets_the_words_of_the_plain_model(pair, kind, x):
    model, frozen = pair
    assert_same_words(model, frozen, WRONG[kind](x))


_INTEGER = "convert it, as in x.to(torch.float32) / 255, and normalise it as in training"
_OTHER = "convert it, as in x.to(torch.float32), or freeze a model of that dtype"
INSTEAD = {
    torch.uint8: _INTEGER,
    torch.int64: _INTEGER,
    torch.bool: _INTEGER,
    torch.complex64: _OTHER,
    torch.float64: _OTHER,
    torch.float16: f"{_OTHER}, or freeze under autocast",
    torch.bfloat16: f"{_OTHER}, or freeze under autocast",
}


@pytest.mark.parametrize("dtype", INSTEAD, ids=str)
def test_a_wrong_dtype_is_named_with_what_to_do(pair, dtype, x):
    model, frozen = pair
    with pytest.raises(RuntimeError) as error:
        frozen(x.to(dtype))
    assert str(error.value) == f"a model frozen in torch.float32 got an input of {dtype}; {INSTEAD[dtype]}"
    with pytest.raises(RuntimeError) as error:
        freeze(model, x.to(dtype))
    assert str(error.value) == f"freeze: a model in torch.float32 got an example_input of {dtype}; {INSTEAD[dtype]}"


def test_a_tensor_without_values_reaches_no_kernel(pair, x):
    model, frozen = pair
    with pytest.raises(RuntimeError, match="meta"):
        model(x.to("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        frozen(x.to("meta"))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:0],
        lambda x: x[:1, :, :1, :1],
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.clone().requires_grad_(),
        lambda x: nn.Parameter(x),
    ],
    ids=["empty batch", "one pixel", "channels_last", "transposed", "strided", "requires grad", "parameter"],
)
def test_every_other_tensor_gives_what_the_model_gives(pair, change, x):
    model, frozen = pair
    with torch.no_grad():
        torch.testing.assert_close(frozen(change(x)), model(change(x)), rtol=1e-4, atol=1e-5)


def test_what_is_no_tensor_is_named(pair, x):
    _, frozen = pair
    for wrong, name in ((x.numpy(), "ndarray"), ([x], "list"), (None, "NoneType"), ({"x": x}, "dict")):
        with pytest.raises(TypeError, match=rf"takes a torch.Tensor, got {name}$"):
            frozen(wrong)


def test_the_input_has_the_name_that_it_has_in_the_model(pair, x):
    _, frozen = pair
    assert torch.equal(frozen(x=x), frozen(x))
    sequential = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert torch.equal(freeze(sequential, x)(input=x), freeze(sequential, x)(x))
    for inputs, named, given in [
        ((), {}, "()"),
        ((x, x), {}, "(Tensor, Tensor)"),
        ((x,), {"mask": x}, "(Tensor, mask=...)"),
        ((), {"y": x}, "(y=...)"),
    ]:
        with pytest.raises(TypeError) as error:
            frozen(*inputs, **named)
        assert str(error.value) == f"a frozen model takes what freeze was given, one tensor (x), not {given}"


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "a parent's": lambda m: nn.Sequential(m).half(),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_is_refused_and_changes_nothing(pair, kind, x):
    _, frozen = pair
    expected = frozen(x)
    with pytest.raises(RuntimeError, match="cannot be converted from .*Do that with the model it was made from"):
        CONVERSIONS[kind](frozen)
    assert torch.equal(frozen(x), expected)


def test_a_conversion_to_what_it_is_leaves_it(pair, x):
    _, frozen = pair
    expected = frozen(x)
    for same in (
        frozen.float(),
        frozen.cpu(),
        frozen.to("cpu", torch.float32),
        frozen.to(memory_format=torch.channels_last),
        frozen.eval(),
        frozen.requires_grad_(False),
    ):
        assert same is frozen and torch.equal(frozen(x), expected)


def test_other_weights_are_refused_and_its_own_are_not_to_be_saved(pair):
    model, frozen = pair
    with pytest.warns(UserWarning, match="holds only what was not frozen: save that of the model it was made from"):
        frozen.state_dict()
    with pytest.raises(RuntimeError, match="cannot be given other weights"):
        frozen.load_state_dict(model.state_dict(), strict=False)


PROGRAMS = {
    "jit.trace": lambda m, x: torch.jit.trace(m, x),
    "jit.trace, in a model": lambda m, x: torch.jit.trace(nn.Sequential(nn.ReLU(), m), x),
    "jit.script": lambda m, x: torch.jit.script(m),
    "jit.script, in a model": lambda m, x: torch.jit.script(nn.Sequential(nn.ReLU(), m)),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "fx, in a model": lambda m, x: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), m)),
    "export": lambda m, x: torch.export.export(m, (x,)),
    "export, strict": lambda m, x: torch.export.export(m, (x,), strict=True),
}


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning")
def test_a_program_is_to_be_made_of_the_model(pair, kind, x):
    _, frozen = pair
    with pytest.raises(Exception, match="a frozen model cannot be (traced|scripted|exported)"):
        PROGRAMS[kind](frozen, x)


def test_autocast_around_a_call_is_said_once_to_have_no_effect(x):
    frozen = freeze(Net().eval(), x)
    expected = frozen(x)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="to torch.bfloat16 has no effect.*without autocast; freeze it") as said:
            assert torch.equal(frozen(x), expected)
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(frozen(x), expected)


def test_a_model_frozen_under_autocast_stays_under_it(x):
    model = Net().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        frozen, expected = freeze(model, x), model(x)
    copied = copy.deepcopy(frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = frozen(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frozen(x), y) and torch.equal(copied(x), y)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="under autocast to torch.bfloat16"):
        assert torch.equal(frozen(x), y)


def test_autocast_that_the_forward_did_not_enter_for_the_example_is_refused_by_name(x):
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=x.shape[0] > 2):
                return self.body(x)

    frozen = freeze(Switch().eval(), x)
    with pytest.raises(RuntimeError, match="autocast was off around body.conv1 .* torch.bfloat16 in this call"):
        frozen(torch.cat((x, x)))


def test_a_unit_that_runs_in_two_dtypes_is_left_to_the_model(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                half = self.body(x)
            return half, self.body(x)

    model = Twice().eval()
    frozen = freeze(model, x)
    assert "more than one dtype" in frozen.plan.layers[0].reason and frozen.plan.layers[0].op == "-"
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        for ours, plain, exact in zip(frozen(x), model(x), truth, strict=True):
            assert_within_contract(ours, plain, exact)


def test_a_residual_of_another_dtype_is_added_apart_as_the_model_adds_it():
    model = nn.Sequential(Net().layer[1]).eval()
    wide = torch.randn(2, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = freeze(model, wide)
        expected, actual = model(wide), frozen(wide)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    assert {row.op for row in frozen.plan.layers} == {"conv_fprop"}
    assert any("the residual is" in row.reason and "torch.float32" in row.reason for row in frozen.plan.layers)


@dataclasses.dataclass
class _Output:
    logits: torch.Tensor
    features: list


RESULTS = {
    "dict": lambda y: {"out": y, "aux": [y, None]},
    "tuple": lambda y: (y, y.shape[0]),
    "dataclass": lambda y: _Output(y, [y]),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_model_returns_what_it_returns(kind, x):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()

        def forward(self, x):
            return RESULTS[kind](self.body(x))

    model = Returning().eval()
    frozen = freeze(model, x)
    for given in (x, torch.full_like(x, 3e38)):  # which overflows in the network, and must be seen in the result
        with torch.no_grad():
            ours, plain = frozen(given), model(given)
        assert type(ours) is type(plain)
        if kind == "dataclass":
            ours, plain = vars(ours), vars(plain)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_frozen_and_called_in_any_mode(mode, x):
    model = Net().eval()
    with torch.no_grad():
        expected = model(x)
    with mode():
        frozen = freeze(model, x.clone().requires_grad_())
    for call in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with call():
            y = frozen(x.clone().requires_grad_())
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert not y.requires_grad


def test_a_model_that_takes_bytes_is_frozen_for_bytes():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()

        def forward(self, x):
            return self.body(x.float() / 255)

    model, x = Bytes().eval(), torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_wrong_examples(x):
    for wrong, name in ((x.numpy(), "ndarray"), ((x,), "tuple"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"example_input must be a torch.Tensor, got {name}"):
            freeze(Net().eval(), wrong)
    for wrong in (x[0], x[:, :2]):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as plain:
            Net().eval()(wrong)
        with pytest.raises(plain.type) as ours:
            freeze(Net().eval(), wrong)
        assert str(ours.value) == str(plain.value)
    with pytest.raises(RuntimeError, match="example_input is on the meta device"):
        freeze(Net().eval().to("meta"), x.to("meta"))
    with pytest.raises(RuntimeError, match="device"):
        freeze(Net().eval().to("meta"), x)
