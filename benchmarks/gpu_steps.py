"""What a GPU run consists of: one table of steps, in order of value, and what a rehearsal changes in it.

Native PyTorch is measured before ours; max-autotune alone comes after, because it compiles for minutes. It is no less
fair there: every run has the same baseline, interleaved.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from resnet_fused import _library

ROOT = Path(__file__).resolve().parents[1]
CLI = (sys.executable, "-m", "resnet_fused.cli")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
OP_TESTS = ("tests/ops", "tests/functional/test_block*.py", "tests/inference/test_freeze_triton.py")
SANITIZER = "compute-sanitizer"
MARGIN_S = 15  # of a step's time, for what it does beside measuring
Options = Mapping[str, str | None]  # None as value: a flag
NONE: Options = {}


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: also of its entry in `state.json`.
        program: what runs.
        options: its options, and their values. "{work}" in one is a folder for its files, "{name}" its name,
            "{seconds}" what is left of its time. A `{name}.json` and PNGs that it leaves in the folder are kept.
        headline: the last line of its output that matches is shown in the summary.
        limit_s: it is ended after so long.
        least_s: it is not begun with less.
        tiny: the options that a rehearsal adds, changes, or leaves out ("-").
        files: positional arguments; `tiny_files` are a rehearsal's.
        wrapper: what runs the program, but in a rehearsal.
        environment: of the process.
        absent: why it cannot run here, or None; asked when its turn has come.
        uses_plan: whether it sees the run's plan table; what judges the kernels themselves does not.
        each_call: it runs in every call, whatever is recorded: what it makes lives on the machine.
    """

    name: str
    program: tuple[str, ...]
    options: Options
    headline: str
    limit_s: int
    least_s: int = 30
    tiny: Options = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    tiny_files: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: Callable[[bool], str | None] = lambda rehearse: None
    uses_plan: bool = False
    each_call: bool = False

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "-")

    def command(self, seconds: int, work: Path, rehearse: bool = False) -> list[str]:
        """The command line; a rehearsal's is the same but for the options in `tiny`."""
        options = {**self.options, **(self.tiny if rehearse else {})}
        values = {"work": str(work), "name": self.slug, "seconds": str(max(10, seconds - MARGIN_S))}
        words = [*(() if rehearse else self.wrapper), *self.program, *(self.tiny_files if rehearse else self.files)]
        for option, value in options.items():
            if value != "-":
                words += [option] if value is None else [option, value.format(**values)]
        return words


def _pytest(name: str, options: Options, limit_s: int, files: tuple[str, ...], tiny: Options, tiny_file: str) -> Step:
    return Step(
        name,
        PYTEST,
        options,
        r"\d+ (passed|failed|skipped)|ERROR SUMMARY: [1-9]",
        limit_s,
        tiny=tiny,
        files=files,
        tiny_files=(tiny_file,),
    )


def _sanitized(tool: str, tests: str, files: tuple[str, ...], limit_s: int) -> Step:
    """A tool of compute-sanitizer on small tests."""
    command = (SANITIZER, "--tool", tool, "--target-processes", "all", "--error-exitcode", "1", "--print-limit", "20")
    return dataclasses.replace(
        _pytest(tool, {"-k": tests}, limit_s, files, {"-k": "refusals"}, "tests/ops/test_ops.py"),
        wrapper=command,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # PyTorch's allocator hides what lies beside a tensor
        absent=lambda rehearse: None if rehearse or shutil.which(SANITIZER) else f"{SANITIZER} is not on the PATH",
    )


BENCH: Options = {"--model": "resnet50", "--dtype": "bf16", "--budget": "{seconds}", "--json": "{work}/{name}.json"}
TINY: Options = {
    **{"--model": "resnet18", "--image-size": "32", "--batch": "2", "--dtype": "fp32", "--rounds": "1"},
    "--no-images": None,
}
RIVALS = "eager,eager-channels-last,compile,cudnn-graphs,onnxruntime,torch-tensorrt"
BASELINES: Options = {**TINY, "--contestants": "eager,cudnn-graphs,torch-tensorrt"}  # compiling takes too long


def _bench(name: str, options: Options, limit_s: int, least_s: int = 60, tiny: Options = NONE) -> Step:
    headline = r"speed-up over .*: |error:"
    wide = {"COLUMNS": "400"}  # the headline is one line
    options, tiny = {**BENCH, **options}, {**TINY, **tiny}
    return Step(name, (*CLI, "bench"), options, headline, limit_s, least_s, tiny, environment=wide)


def _ours(name: str, options: Options, limit_s: int, least_s: int = 60, tiny: Options = NONE) -> Step:
    return dataclasses.replace(_bench(name, options, limit_s, least_s, tiny), uses_plan=True)


def _not_built(rehearse: bool) -> str | None:
    """Asked after the build, of what it wrote."""
    _library._record.cache_clear()
    _library.load.cache_clear()
    return _library.load("cpu" if rehearse else "cuda")


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def steps() -> list[Step]:
    """In order of value. With all of their time the steps up to the profile take three calls of nine minutes."""
    tests = tuple(sorted(str(path.relative_to(ROOT)) for one in OP_TESTS for path in ROOT.glob(one)))
    marked = tuple(
        str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/test_*.py")) if "mark.gpu" in path.read_text()
    )
    memory = ("tests/ops/test_bn_ops.py", "tests/ops/test_stem_ops.py", "tests/ops/test_ops.py")
    products = ("tests/ops/test_conv.py", "tests/ops/test_conv_fprop.py", "tests/ops/test_conv_gradients.py")
    verify: Options = {"--model": "resnet50", "--json": "{work}/{name}.json"}
    little: Options = {"--model": "-", "--rehearse": None, "--mode": "infer", "--dtype": "fp32"}
    right = r"checks against float64|error:"
    train: Options = {"--mode": "train", "--batch": "256"}
    infer: Options = {"--mode": "infer", "--batch": "256,32,1"}
    both: Options = {"--mode": "train,infer", "--batch": "256"}
    little_net = "timm:test_resnet"  # Triton's interpreter takes minutes for ResNet-18
    small: Options = {"--model": little_net, "--mode": "infer", "--contestants": "frozen"}
    return [
        Step(
            "build",
            (sys.executable, "setup.py", "--quiet", "build_ext"),
            {"--inplace": None},
            r"cuda sm_|not built|[Ee]rror|none",
            120,
            tiny={"--inplace": "-", "--build-lib": "{work}/build"},
            each_call=True,
        ),
        _pytest(
            "check",
            {"-m": "not gpu", "-n": str(min(16, os.cpu_count() or 1))},
            150,
            tests,
            {"-n": "0", "-k": "refusals"},
            "tests/ops/test_ops.py",
        ),
        _pytest("gpu tests", {"-m": "gpu"}, 70, marked, NONE, "tests/integration/test_training_machinery.py"),
        Step("verify", (*CLI, "verify"), {**verify, "--dtype": "bf16,fp16,fp32"}, right, 120, 30, little),
        _sanitized("memcheck", "(3x35x5x7 and bfloat16 or every_epilogue) and not reference", (*memory, *products), 60),
        _bench("baselines train", {**train, "--contestants": f"{RIVALS},eager-plain-loop"}, 120, 90, BASELINES),
        _bench("baselines infer", {**infer, "--contestants": RIVALS}, 150, 90, BASELINES),
        Step(
            "tune",
            (*CLI, "tune"),
            {"--model": "resnet50", "--budget": "{seconds}s"},
            r"^predicted|problems measured|error:",
            200,
            60,
            {"--model": "-", "--rehearse": None, "--mode": "infer"},
            uses_plan=True,
        ),
        Step(
            "tune inference",
            (*CLI, "tune"),
            {"--model": "resnet50", "--mode": "infer", "--batch": "32,1", "--budget": "{seconds}s"},
            r"^predicted|problems measured|error:",
            90,
            45,
            {"--model": "-", "--rehearse": None},
            uses_plan=True,
        ),
        _ours(
            "train", {**train, "--contestants": "compile,fused,fused-plain-loop"}, 130, 60, {"--contestants": "fused"}
        ),
        _ours("infer", {**infer, "--contestants": "compile,fused,frozen"}, 150, 60, {"--contestants": "fused,frozen"}),
        dataclasses.replace(
            _ours(
                "profile",
                {**both, "--profile": None, "--chart": "{work}/profile.png", "--budget": "-"},
                60,
                30,
                {"--rounds": "-"},
            ),
            headline=r"^roof:|error:",
        ),
        _bench("max-autotune train", {**train, "--contestants": "compile-max-autotune"}, 240, 120),
        _bench("max-autotune infer", {**infer, "--contestants": "compile-max-autotune"}, 240, 120),
        dataclasses.replace(
            _ours("triton", {**both, "--contestants": "fused,frozen", "--backend": "triton"}, 120, 45, small),
            absent=lambda rehearse: _missing("timm") if rehearse else None,
        ),
        _ours("loader", {**train, "--contestants": "fused", "--loader": None}, 120, 45),
        dataclasses.replace(
            _ours("cuda", {**both, "--contestants": "fused,frozen", "--backend": "cuda"}, 90, 45, small),
            absent=lambda rehearse: _not_built(rehearse) or (_missing("timm") if rehearse else None),
        ),
        dataclasses.replace(
            _pytest(
                "ops",
                {"--benchmark-json": "{work}/{name}.json"},
                150,
                ("benchmarks",),
                {"-k": "stem and eager"},
                "benchmarks",
            ),
            absent=lambda rehearse: _missing("pytest_benchmark"),
            uses_plan=True,
        ),
        Step(
            "verify all",
            (*CLI, "verify"),
            {**verify, "--dtype": "bf16", "--every-configuration": None},
            right,
            240,
            60,
            {**little, "--every-configuration": "-"},
        ),
        _sanitized("racecheck", "(3x35x5x7 or constant) and cuda", memory, 120),
    ]
