"""Packaging beyond pyproject.toml: compiles csrc/ as RESNET_FUSED_BUILD says (csrc/build.py)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "resnet_fused: building without isolation needs setuptools>=77; pip install -U setuptools"
    ) from None

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("resnet_fused_build", ROOT / "csrc" / "build.py")
assert _spec is not None and _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = build  # dataclasses look their module up
_spec.loader.exec_module(build)


def files(kind: str) -> list[str]:
    """What a build of this kind leaves in the package: its record, and the library. Each kind has its own."""
    return [f"_C_{kind}.json"] if kind == "none" else [f"_C_{kind}.json", f"_C_{kind}.so"]


def choose() -> list[build.Target]:  # type: ignore[name-defined]
    try:
        return build.choose_all()
    except build.Unusable as problem:
        raise SystemExit(f"resnet_fused: {problem}") from None


class BuildLibrary(build_ext):
    """Compiles the library, no Python extension but a plain shared library of operators, and records what was built.

    In the checkout a build leaves libraries of other kinds alone; a wheel has no library but the one it was built with.
    """

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        package = (ROOT if inplace else Path(self.build_lib)) / "resnet_fused"
        package.mkdir(parents=True, exist_ok=True)
        for left in () if inplace else package.glob("_C_*"):
            left.unlink()
        for target in choose():
            self.build_one(target, package)

    def build_one(self, target: build.Target, package: Path) -> None:  # type: ignore[name-defined]
        print("\n".join(filter(None, (str(target), target.advice))), file=sys.stderr, flush=True)
        record, *library = files(target.kind)
        for name in library:
            work = ROOT / "build" / f"resnet_fused-{target.kind}"
            try:
                build.compile_library(target, work / name, work)
            except subprocess.CalledProcessError as problem:
                code = problem.returncode
                raise SystemExit(f"resnet_fused: compilation failed, see above (exit code {code})") from None
            # Replaced, so that a process that has the old library loaded keeps it.
            shutil.copy2(work / name, package / f"{name}.new")
            (package / f"{name}.new").replace(package / name)
        (package / record).write_text(target.describe())

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "resnet_fused" / name) for target in choose() for name in files(target.kind)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the library uses torch's stable ABI and no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", "any" if choose()[0].kind == "none" else platform


class BinaryDistribution(Distribution):
    """Asks what can be built only when a build asks for it: metadata and sdists need no torch."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=BinaryDistribution,
    ext_modules=[Extension("resnet_fused._C", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
