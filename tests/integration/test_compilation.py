"""torch.compile, operator checks, export and CUDA graphs: a fused model compiles whole, and once."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch._dynamo.testing
from networks import AVAILABLE, DEVICE, QUICK, assert_same_step, pictures, small_resnet, step
from tiers import larger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import freeze, fuse, unfuse, use_backend

OPS = torch.ops.resnet_fused


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b if b == "auto" else larger(b) for b in QUICK])
def test_training_steps_compile_once_and_whole(backend):
    """Forward and backward, several steps with an optimizer between them: no graph break, no second compilation."""
    plain = small_resnet()
    fused = fuse(copy.deepcopy(plain))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (plain, fused)]
    for k in range(3):
        x = pictures()
        expected = step(plain, x)
        with torch._dynamo.config.patch(error_on_recompile=k > 0):
            actual = step(compiled, x, backend)
        assert_same_step(dict(_renamed(actual)), expected, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
    assert counter.frame_count == 1


def _renamed(results: dict) -> list:
    return [(name.replace("_orig_mod.", ""), value) for name, value in results.items()]


@pytest.mark.parametrize("backend", [b if b == "auto" else larger(b) for b in QUICK])
def test_inference_compiles_once_and_whole(backend):
    plain = small_resnet().eval()
    fused = fuse(copy.deepcopy(plain))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            x = pictures()
            with use_backend(backend):
                actual = compiled(x)
            torch.testing.assert_close(actual, plain(x), rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1


def test_inductor_compiles_a_training_step():
    """The compiler that users get, end to end, on the default backend."""
    plain, x = small_resnet().layer1, torch.randn(2, 8, 6, 6, device=DEVICE)
    compiled = torch.compile(fuse(copy.deepcopy(plain)), fullgraph=True)
    assert_same_step(dict(_renamed(step(compiled, x))), step(plain, x), 1e-3)


@pytest.mark.parametrize("backend", ["auto", larger("reference")])
def test_a_batch_of_another_size_compiles_once_more_and_then_no_more(backend):
    fused = fuse(small_resnet()).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad(), use_backend(backend):
        for n in (2, 3, 4, 5, 7):
            x = pictures(n)
            torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


def test_changing_mode_or_backend_compiles_anew_and_right():
    fused, x = fuse(small_resnet().layer1), torch.randn(2, 8, 6, 6, device=DEVICE)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for training in (True, False, True):
        for backend in ("auto", "reference"):
            fused.train(training)
            expected = step(unfuse(copy.deepcopy(fused)), x)
            assert_same_step(dict(_renamed(step(compiled, x, backend))), expected, 1e-3)


def test_a_frozen_model_compiles_without_a_word_of_dynamos():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)).to(DEVICE).eval()
    x = torch.randn(1, 3, 8, 8, device=DEVICE)
    frozen = freeze(model, x)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="Dynamo ")
        y = torch.compile(frozen, backend="eager")(x)
    torch.testing.assert_close(y, frozen(x))


# --- export -----------------------------------------------------------------------------------------------------------


def _namespaces(program: torch.export.ExportedProgram) -> set[str]:
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = [n.target for g in graphs for n in g.nodes if n.op == "call_function"]
    return {t.namespace for t in calls if isinstance(t, torch._ops.OpOverload)}


def test_exported_programs_hold_aten_ops_only():
    """After `unfuse`, and on a CPU before it too; of a copy in evaluation as of one in training."""
    plain, x = small_resnet(), pictures()
    for training in (False, True):
        model = unfuse(fuse(copy.deepcopy(plain))).train(training)
        program = torch.export.export(model, (x,))
        assert _namespaces(program) == {"aten"}
        expected = copy.deepcopy(plain).train(training)(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    fused = fuse(copy.deepcopy(plain)).eval()
    assert _namespaces(torch.export.export(fused, (x,))) == {"aten"} or DEVICE == "cuda"


def test_a_forced_backend_leaves_no_op_of_ours_behind_unfuse():
    fused, x = fuse(small_resnet()).eval(), pictures()
    with use_backend("reference"), torch.no_grad():
        assert _namespaces(torch.export.export(unfuse(fused), (x,))) == {"aten"}


def test_dynamic_batches_export():
    model, x = unfuse(fuse(small_resnet())).eval(), pictures()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    y = pictures(5)
    torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-4)


def test_torchscript_after_unfuse():
    model, x = unfuse(fuse(small_resnet())).eval(), pictures()
    script = torch.jit.script(model)
    assert "resnet_fused" not in str(script.inlined_graph)
    torch.testing.assert_close(script(x), model(x))


def test_onnx_after_unfuse():
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model, file = unfuse(fuse(small_resnet())).eval(), io.BytesIO()
    torch.onnx.export(model, (pictures(),), file, dynamo=True)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert {"Conv", "Relu", "MaxPool"} <= {node.op_type for node in graph.node}


# --- no synchronisation, and CUDA graphs ------------------------------------------------------------------------------


class _Synchronisations(TorchDispatchMode):
    """The operations that would make a GPU wait: values that travel to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_training_step_asks_for_no_value(backend):
    """What a CUDA graph could not capture; also on the CPU, where it shows as `aten._local_scalar_dense`."""
    channels, size = (8, 24) if backend != "triton" else (4, 16)
    fused, x = fuse(small_resnet(channels=channels)), pictures(2, size)
    step(fused, x, backend)
    with _Synchronisations() as mode:
        step(fused, x, backend)
    assert mode.seen == []


def _capture(call, warmup: int = 3):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_a_training_step_is_captured_in_a_cuda_graph(backend):
    """Replays are steps: weights, statistics and counters move with each one as they do without a graph."""
    plain = small_resnet()
    fused, x = fuse(copy.deepcopy(plain)), pictures(8, 64)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, foreach=True) for m in (fused, plain)]

    def one(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
        optimizer.zero_grad(set_to_none=False)
        with use_backend(name):
            model(x).square().mean().backward()
        optimizer.step()

    graph, _ = _capture(lambda: one(fused, optimizers[0], backend))
    before = int(fused.bn1.num_batches_tracked)
    for _ in range(4):
        graph.replay()
    assert int(fused.bn1.num_batches_tracked) == before + 4
    for _ in range(before + 4):
        one(plain, optimizers[1], "auto")
    assert_same_step(dict(fused.state_dict()), dict(plain.state_dict()), 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inference_is_captured_in_a_cuda_graph():
    fused, x = fuse(small_resnet()).eval(), pictures(8, 64)
    with torch.no_grad():
        graph, y = _capture(lambda: fused(x))
        x.copy_(pictures(8, 64))
        graph.replay()
        torch.testing.assert_close(y, fused(x))
        assert freeze(fused, x)(x).shape == y.shape
