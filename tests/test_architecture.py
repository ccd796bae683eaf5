"""The tree keeps its promises: imports flow one way, names are frozen, only one module prints."""

from __future__ import annotations

import ast
from pathlib import Path

import rvconvert

PACKAGE = Path(rvconvert.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Modules imported by a file at its top level (not under TYPE_CHECKING); with ``lazy`` inside functions too."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def test_public_names_are_frozen() -> None:
    assert sorted(rvconvert.__all__) == [
        "ConversionError",
        "Options",
        "REGISTRY",
        "RandomVariable",
        "calibrate",
        "convert",
        "expected_squared_error",
        "export",
        "load",
        "load_weights",
        "optimal_sigma_nll",
        "plan",
        "rule",
        "save",
        "to_plain",
        "transfer_weights",
        "variance_penalty",
        "verify",
    ]
    assert all(hasattr(rvconvert, name) for name in rvconvert.__all__)


def test_imports_have_no_cycle() -> None:
    known = modules()
    graph = {name: {i for i in imports(path, lazy=False) if i in known and i != name} for name, path in known.items()}
    graph = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for target in graph[name]:
            walk(target, (*trail, name))
        done.add(name)

    for name in graph:
        walk(name, ())


def importers(target: str) -> set[str]:
    return {
        name
        for name, path in modules().items()
        if any(i == target or i.startswith(f"{target}.") for i in imports(path, lazy=True))
    }


def test_rules_never_import_what_uses_them() -> None:
    for engine in ("rvconvert.capture", "rvconvert.program", "rvconvert._convert", "rvconvert.conversion", "rvconvert.converted"):
        assert not {name for name in importers(engine) if name.startswith("rvconvert.rules")}


def test_nothing_imports_the_command_line() -> None:
    outside = {name for name in importers("rvconvert.cli") if not name.startswith("rvconvert.cli")}
    assert outside == {"rvconvert.__main__"}


def test_only_render_imports_rich() -> None:
    assert importers("rich") == {"rvconvert.render"}
