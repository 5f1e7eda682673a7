"""Who may import what, and that importing slimdiff is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slimdiff

ROOT = Path(slimdiff.__file__).parent

VOCABULARY = {
    "budget",
    "calls",
    "checksums",
    "config",
    "costs",
    "denoiser",
    "digest",
    "errors",
    "groups",
    "layers",
    "plan",
    "probes",
    "prompts",
    "resolve",
    "shapes",
    "statistics",
    "statistics_file",
    "wrapped",
}
# What a module (or the modules of a folder) may import of slimdiff, wherever in the file.
MAY_IMPORT = {
    "errors": set(),
    "allocate": {"errors"},
    "decompose": {"decompose", "errors"},
    "families": {"families", "groups", "resolve", "errors"},
    "slim_denoiser": set(),
    "slim_text_encoder": set(),
    "metrics": {"errors"},
    "picture": {"errors"},
    "report": {"report", "errors", "results"},
} | {name: VOCABULARY | {"families"} for name in VOCABULARY - {"errors"}}
# What a module may import of other packages when it is itself imported; torch alone by default.
MAY_LOAD = {
    "allocate": set(),
    "picture": set(),
    "report": set(),
    "slim_denoiser": {"torch", "diffusers"},
    "slim_text_encoder": {"torch", "transformers"},
    "cli": {"rich", "typer"},
    "reference": {"torch", "numpy"},
}
TOP = {"cli", "pipeline"}

FILES = sorted(ROOT.rglob("*.py"))


def unit(path: Path) -> str:
    """`allocate` for allocate.py, `cli` for everything in cli/, `slimdiff` for the door."""
    first = path.relative_to(ROOT).parts[0]
    return "slimdiff" if first == "__init__.py" else first.removesuffix(".py")


def statements(path: Path, everywhere: bool) -> Iterator[ast.stmt]:
    """Import statements: everywhere in the file, or those that run when it is imported."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not typing_only and (everywhere or not function):
            pending.extend(ast.iter_child_nodes(node))


def imported(path: Path, everywhere: bool) -> set[str]:
    """Modules by dotted name; `from slimdiff import allocate` is slimdiff.allocate."""
    names: set[str] = set()
    for node in statements(path, everywhere):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            joined = {f"slimdiff.{alias.name}" for alias in node.names}
            names |= joined if node.module == "slimdiff" else {str(node.module)}
    return names


def own(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(path, everywhere=True)]
    return {parts[1] for parts in names if parts[0] == "slimdiff" and len(parts) > 1}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_inside_slimdiff(path):
    name = unit(path)
    used = own(path)
    if name in MAY_IMPORT:
        assert used <= MAY_IMPORT[name]
    if name not in TOP | {"slimdiff", "__main__"}:
        assert not used & TOP, "nothing but the door imports the pipeline or the command line"
    if name not in {"cli", "reference"}:
        assert "reference" not in used, "the library does not know the bundled references"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_of_other_packages(path):
    name = unit(path)
    packages = {module.split(".")[0] for module in imported(path, everywhere=False)}
    foreign = packages - set(sys.stdlib_module_names) - {"slimdiff"}
    allowed = MAY_LOAD.get(name, {"torch"})
    assert foreign <= allowed, (
        f"import {sorted(foreign - allowed)} inside the function that needs it"
    )


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) == "families"], ids=relative)
def test_families_are_data(path):
    if path.name != "__init__.py":
        assert own(path) - {"families"} == {"groups"}
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines; split it"


def test_importing_slimdiff_is_light_and_silent():
    heavy = ["diffusers", "transformers", "torchmetrics", "matplotlib", "typer", "rich", "PIL"]
    code = f"import slimdiff, sys; assert not [m for m in {heavy} if m in sys.modules]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
