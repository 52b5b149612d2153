"""The house rules that a machine can check: sizes, docstrings, the one-way order of imports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("compression", "offload", "policy_search", "flexrun")  # each may import those before it
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
TORCH_FREE = (
    "policy_search",
    "flexrun.zigzag",
    "flexrun.progress",
    "flexrun.micro_batches",
    "flexrun.scheduler",
    "flexrun.schedulers",
    "offload.tiers",
    "offload.disk_layout",
    "offload.prepared_layout",
    "offload.placement",
    "offload.page_table",
    "offload.pages",
)
# Written in two parts, so that this file does not contain them.
FORBIDDEN_TEXTS = ("/work" + "/", ".." + "/shared", "/opt" + "/wheels")

SOURCES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def is_entry_point(path: Path) -> bool:
    """Entry points wire things together, so they may import any package."""
    return path.name == "__main__.py" or path == ROOT / "flexrun" / "cli.py"


def for_each(paths: list[Path]) -> pytest.MarkDecorator:
    ids = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=ids)


every_source = for_each(SOURCES)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(node: ast.AST) -> list[str]:
    """Full names of our modules, or of packages outside, that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are written with their full name"
        base = node.module or ""
        inner = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else base for name in inner]
    return []


def imports_at_load(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What a module imports while it is loaded: not inside functions or `if TYPE_CHECKING`."""
    for node in nodes:
        yield from imported_modules(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_at_load(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_at_load(ast.iter_child_nodes(node))


@every_source
def test_file_is_short(path: Path):
    """A file has at most 300 lines."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines: split it, one noun per file"


@every_source
def test_functions_are_short(path: Path):
    """A function has at most 60 lines."""
    functions = (
        node
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


@every_source
def test_module_says_what_it_is_for(path: Path):
    """A module begins with a docstring."""
    assert ast.get_docstring(parse(path)), "the first line must say what the module is for"


@for_each([path for path in SOURCES if not is_entry_point(path)])
def test_imports_point_one_way(path: Path):
    """A package imports none that comes after it: compression, offload, policy_search, flexrun."""
    rank = ORDER.index(path.relative_to(ROOT).parts[0])
    later = ORDER[rank + 1 :]
    names = [name for node in ast.walk(parse(path)) for name in imported_modules(node)]
    assert [name for name in names if name.split(".")[0] in later] == []


def test_imports_have_no_cycle():
    """No module, while it is loaded, imports itself by way of others."""
    graph = {
        name: {target for target in imports_at_load([parse(path)]) if target in MODULES}
        for name, path in MODULES.items()
    }
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert sorted(graph) == [], "these modules import each other, or import some that do"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_needs_no_torch(module: str):
    """Planning and scheduling are pure data: importing them does not import torch."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules and 'torch was imported')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_exported_name_exists():
    """Each name in `flexrun.__all__` can be imported from flexrun."""
    flexrun = importlib.import_module("flexrun")
    assert [name for name in flexrun.__all__ if getattr(flexrun, name, None) is None] == []


def test_repository_names_no_private_path():
    """No file that belongs to the repository names a path of the machine it was written on."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    texts = {path: path.read_text(encoding="utf-8", errors="ignore") for path in files}
    found = [
        f"{path.relative_to(ROOT)}: {needle}"
        for path, text in texts.items()
        for needle in FORBIDDEN_TEXTS
        if needle in text
    ]
    assert found == []
