"""Who may import whom: the layers of the design, read from the source of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = """\
errors logs
config
registry
events storage
launcher
journal
commands status
run
supervisor
snapshots
snapshot_page
placement
distributed allocator
data
models
artefact
losses regularizers optim_config optim
probes
diagnosis
attribution_config attribution
training
remedies
memory
cluster
compress
deploy
comparison
serving
automl
report terminal notebook_client
stage
notebook pipeline
worker cli
""".splitlines()
"""Lowest first; modules of one line may import each other, but in no circle."""

RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def modules(package: str) -> dict[str, Path]:
    """Source files by module name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, name: str, *, whole: bool = True) -> Iterator[tuple[str, int]]:
    """Modules that a source file imports, with the line, not those for type checkers only; ``whole``: within functions too."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), orelse=others):
                for other in others:
                    yield from visit(other)
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not whole:
                return
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = module or ""
                if level:
                    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                    base = ".".join([*parents[: len(parents) - level + 1], *([module] if module else [])])
                for alias in names:
                    yield f"{base}.{alias.name}", node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


WORKBENCH = modules("workbench")
WIDGETS = modules("widgets")


def target(name: str, known: dict[str, Path]) -> str | None:
    """The module behind an imported name: itself, or what holds the imported attribute."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("name", WORKBENCH)
def test_a_module_imports_only_from_layers_below(name: str) -> None:
    wrong = []
    layer = name.split(".")[1] if "." in name else ""
    if not layer:
        return  # the package itself names what it exports, and imports it on first use
    assert layer in RANK, f"{name} has no layer: add it to DESIGN.md and here"
    for found, line in imported(WORKBENCH[name], name):
        if not found.startswith("workbench."):
            assert not found.startswith("widgets"), f"{name}:{line} imports {found}: nothing imports widgets"
            continue
        other = found.split(".")[1]
        if other in RANK and (RANK[other] > RANK[layer]):
            wrong.append(f"{WORKBENCH[name].relative_to(ROOT)}:{line} imports {found}, of a later layer")
    assert not wrong, "\n".join(wrong)


def test_modules_import_in_no_circle() -> None:
    """At import time: an import within a function is made when both modules are there."""
    known = WORKBENCH | WIDGETS
    edges = {
        name: {found for item, _ in imported(path, name, whole=False) if (found := target(item, known)) and found != name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for found in sorted(edges[name]):
                # A package's own modules import it by being imported; what counts is what they need from it.
                if not name.startswith(f"{found}."):
                    visit(found, (*trail, name))
            done.add(name)

    for name in known:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name, path in (WORKBENCH | WIDGETS).items() if path.name == "__init__.py"])
def test_no_export_shares_a_submodules_name(name: str) -> None:
    """Else ``from package import name`` means one or the other by import order."""
    path = (WORKBENCH | WIDGETS)[name]
    submodules = {child.stem for child in path.parent.glob("*.py")} | {
        child.parent.name for child in path.parent.glob("*/__init__.py")
    }
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exports: set[str] = set()
    for node in tree.body:
        match node:
            case ast.ImportFrom(names=names):
                exports |= {alias.asname or alias.name for alias in names}
            case ast.FunctionDef(name=defined) | ast.ClassDef(name=defined):
                exports.add(defined)
            case ast.Assign(targets=[ast.Name(id="_EXPORTS")], value=ast.Dict(keys=keys)):
                exports |= {key.value for key in keys if isinstance(key, ast.Constant)}  # type: ignore[misc]
    assert not exports & submodules


def test_every_export_is_there() -> None:
    import importlib

    for name, path in (WORKBENCH | WIDGETS).items():
        if path.name == "__init__.py":
            package = importlib.import_module(name)
            for export in getattr(package, "__all__", ()):
                assert getattr(package, export) is not None, f"{name}.{export}"


def test_widgets_are_imported_by_nothing() -> None:
    for name, path in WORKBENCH.items():
        assert not [found for found, _ in imported(path, name) if found.split(".")[0] == "widgets"], name
