"""Nothing imports upwards: a package stands above all that it imports, and imports are absolute."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import resnet_fused

# From below. What stands in one row does not know of each other; the empty name is `resnet_fused/__init__.py`.
LAYERS = (
    {"_compiling", "_records", "_rows", "contract", "_library"},
    {"dispatch"},
    {"ops"},
    {"kernels", "_command"},
    {"functional"},
    {"nn"},
    {"fusion", "models", "training"},
    {"inference", "evaluate", "info"},
    {""},
    {"measure"},
    {"bench", "tuning"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# What a function imports when it runs, or an annotation alone.
LATE = {
    ("ops", "kernels"),  # `ops.backends`: the launchers, and Triton with them, where one is about to run
    ("", "tuning"),  # `verify` and `tune`
    ("bench", "tuning"),  # `preparation`: our kernels are checked and timed before a race on a GPU
    ("info", ""),  # the version
}
ROOT = Path(resnet_fused.__file__).parent


def imports(tree: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """(what is imported, whether only in a function or for annotations) of a module, `importlib.import_module` too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", late) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = (arg.values[0] if isinstance(arg, ast.JoinedStr) else arg for arg in node.args)
            yield from ((name.value, late) for name in names if isinstance(name, ast.Constant))
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        annotations = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from imports(node, late or function or annotations)


def package(name: str) -> str:
    """The package or module that a dotted name belongs to; what `resnet_fused` itself exports is its own."""
    first = name.split(".")[1] if "." in name else ""
    return first if (ROOT / first).is_dir() or (ROOT / f"{first}.py").exists() else ""


def edges() -> Iterator[tuple[str, str, str, bool]]:
    """(file, its package, the package that it imports, whether late) of all that packages import of each other."""
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT)
        own = "" if file.name == str(file) == "__init__.py" else file.parts[0].removesuffix(".py")
        for name, late in imports(ast.parse(path.read_text())):
            if name.split(".")[0] == "resnet_fused" and package(name) != own:
                yield str(file), own, package(name), late


def test_nothing_imports_upwards():
    found = list(edges())
    assert {own for _, own, _, _ in found} <= set(RANK)
    upward = [edge for edge in found if RANK[edge[1]] <= RANK[edge[2]]]
    assert [edge for edge in upward if not edge[3]] == []
    assert {(own, other) for _, own, other, _ in upward} == LATE


def test_imports_are_absolute():
    for path in ROOT.rglob("*.py"):
        assert [name for name, _ in imports(ast.parse(path.read_text())) if name.startswith(".")] == [], path


def test_every_kind_of_import_is_seen():
    source = """
import a.b
from c import d
from .e import f
if TYPE_CHECKING:
    from g import h
class C:
    import i
def run():
    import j
    importlib.import_module("k.l")
    importlib.import_module(f"m.{n}")
"""
    now = [("a.b", False), ("c.d", False), (".e.f", False), ("i", False)]
    assert sorted(imports(ast.parse(source))) == sorted([*now, ("g.h", True), ("j", True), ("k.l", True), ("m.", True)])
