"""No GPU needed: Triton in its interpreter, CUDA kernels host-executed, fresh memory poisoned with NaN.

On a GPU the same tests run on CUDA tensors, through compiled kernels: never through the interpreter.
"""

import gc
import os
import tempfile

import torch

if torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or every product warns that it may not repeat
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
if not os.access(os.path.expanduser("~"), os.W_OK):  # where Triton keeps what it has compiled
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}"))
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # What Inductor has compiled for other vector units crashes, and its cache does not ask about them.
    units = torch.backends.cpu.get_cpu_capability().replace(" ", "_"), os.environ.get("ONEDNN_MAX_CPU_ISA", "default")
    folder = "-".join(("torchinductor", str(os.getuid()), *units))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)

import interpreter
import pytest
import tiers
from ranks import Ranks

interpreter.speed_up()

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption("--tier", choices=tiers.TIERS, help="how much of the suite runs (support/tiers.py); default: all")


def pytest_ignore_collect(collection_path, config):
    """Files that have no test in the tier are not even imported."""
    if config.getoption("tier") == "check" and collection_path.suffix == ".py":
        files = {listed.partition("::")[0] for listed in tiers.CHECK}
        return f"{collection_path.parent.name}/{collection_path.name}" not in files or None
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    kept = tiers.select(items, config.getoption("tier") or "all")
    config.stash[LEFT_OUT] = len(items) - len(kept)
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


def pytest_collection_finish():
    """What is imported and collected stays: no later collection of garbage needs to walk over it."""
    gc.freeze()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Of pytest-xdist: every worker collects the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """The last line, for who asked for a tier."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("tier") is None or reporter is None or hasattr(config, "workerinput"):
        return
    stats = {name: len(reports) for name, reports in reporter.stats.items()}
    print(tiers.verdict(config.getoption("tier"), torch.__version__, stats, config.stash.get(LEFT_OUT, 0)))


# Without a GPU torch.manual_seed keeps the stack trace of every call: a second in five hundred tests.
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Fixed random numbers, and NaN in whatever `torch.empty` returns, so that an element nobody wrote shows."""
    SEED(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _forgets_what_was_replaced(request):
    """Decisions and launches are remembered; a test that replaces what makes them must not meet those of others."""
    if "monkeypatch" not in request.fixturenames:
        yield
        return
    from resnet_fused.dispatch import choice

    choice.forget()
    yield
    choice.forget()


@pytest.fixture(autouse=torch.cuda.is_available())
def _fp32_is_fp32():
    """PyTorch's default on a GPU is TF32 in convolutions, with another error in every algorithm of cuDNN's; tests of it
    ask for it.
    """
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes of a group, started once."""
    both = Ranks(str(tmp_path_factory.mktemp("ranks") / "rendezvous"))
    yield both
    both.close()


@pytest.fixture(scope="module")
def one_thread():
    """For tensors so tiny that more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
