"""Inside a notebook: the ``%%model`` cell, settings from a parameters cell, and results for the stages of a pipeline.

* ``%load_ext workbench``, then a cell that starts with ``%%model``: its classes and functions can be trained in other processes,
  ``TrainConfig(model={"name": Net})``, since the cell's source is kept as a file.
* :func:`configure` — a Config from the parameters ``config`` and ``overrides``.
* :func:`output` — names a result for later stages; :func:`results_folder` — where files go.
* :func:`train_or_resume` — as :func:`workbench.train`, but goes on with what a killed notebook left.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workbench import storage
from workbench.config import Config
from workbench.errors import ConfigError, RunError
from workbench.registry import load_object
from workbench.run import Run, runs_folder

if TYPE_CHECKING:
    from torch import nn

    from workbench.training import TrainConfig, TrainResult

STAGE = "WORKBENCH_STAGE"
"""Environment variable that names the stage's folder, in a kernel that a pipeline started."""

C = TypeVar("C", bound=Config)


# -- parameters and results ---------------------------------------------------------------------------------------------


def configure(default: C, config: Mapping[str, Any] | str | None = None, overrides: Iterable[str] = ()) -> C:
    """The settings of a notebook, from the usual three parameters.

    Args:
        default: built from the flat parameters; used when ``config`` is None.
        config: all settings instead: a YAML file's path, or a dict.
        overrides: dotted changes, applied last, e.g. ``["optim.lr=1e-3"]``.

    Raises:
        ConfigError: a setting is wrong.

    Example:
        >>> settings = configure(TrainConfig(epochs=epochs, optim={"lr": lr}), config, overrides)
    """
    if isinstance(config, str | os.PathLike):
        default = type(default).from_yaml(config)
    elif config is not None:
        default = type(default)(**config)
    return default.override(list(overrides))


def results_folder() -> Path:
    """Where a notebook puts its files: the stage's folder in a pipeline, else the present folder."""
    return Path(os.environ.get(STAGE) or ".").resolve()


def output(**values: Any) -> None:
    """Name results for the later stages of a pipeline, which refer to them as ``${stage.name}``; elsewhere this does nothing.

    Args:
        values: numbers, text, lists and dicts of these, paths, runs.

    Raises:
        RunError: a value of another type.

    Example:
        >>> output(run=result.run, accuracy=result.metrics["accuracy"])
    """
    given = {name: _plain(name, value) for name, value in values.items()}
    if os.environ.get(STAGE):
        path = results_folder() / "outputs.json"
        before = json.loads(path.read_bytes()) if path.exists() else {}
        storage.write_atomic(path, json.dumps({**before, **given}, indent=2))


def _plain(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Run):
        value = value.path
    if isinstance(value, Path):
        return {"path": str(value.resolve())}
    if callable(getattr(value, "item", None)):  # a number of numpy's or torch's
        value = value.item()
    try:
        return {"value": json.loads(json.dumps(value))}
    except (TypeError, ValueError):
        remedy = "Pass numbers, text, lists or dicts of these, a Path or a Run; save a model and pass its folder."
        raise RunError(f"The output {name!r} is a {type(value).__name__}.", remedy) from None


def train_or_resume(config: TrainConfig, *, model: nn.Module | None = None, data: Any = None) -> TrainResult:
    """Train as :func:`workbench.train` does, but once: a run of the same config and model that was cut off goes on from its
    last checkpoint, and one that has finished is loaded.

    Args:
        config: what to train.
        model: start from this module instead of building ``config.model``.
        data: in place of ``config.data``; not looked at when telling runs apart.

    Raises:
        WorkbenchError: as :func:`workbench.train`.
    """
    from workbench.training import TrainResult, carry_out, prepare

    marker = runs_folder() / ".resumable" / _key(config, model)
    run = _marked(marker)
    if run is None:
        run = prepare(config, model=model)
        marker.parent.mkdir(exist_ok=True)
        storage.write_atomic(marker, run.id)
    elif run.status == "finished":
        return TrainResult(run, run.load_model(), run.metrics)
    run.kill()  # whoever still writes to it was cut off from us
    return carry_out(run, data=data)


def _marked(marker: Path) -> Run | None:
    try:
        return Run.open(marker.parent.parent / marker.read_text())
    except (FileNotFoundError, RunError):
        return None


def _key(config: TrainConfig, model: nn.Module | None) -> str:
    digest = hashlib.sha256(config.to_yaml().encode())
    if model is not None:
        from workbench.artefact import save_model

        with tempfile.TemporaryDirectory() as folder:
            digest.update((save_model(model, folder) / "structure.json").read_bytes())  # it holds the weights' digest
    return digest.hexdigest()[:32]


# -- %%model ------------------------------------------------------------------------------------------------------------


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext workbench``: register ``%%model``."""
    shell.register_magic_function(lambda line, cell: shell.push(define(cell, line)), "cell", "model")


def define(source: str, name: str = "") -> dict[str, Any]:
    """Keep a cell's source as a file and import it from there: what it defines, by name.

    The file lies under ``WORKBENCH_RUNS``, named by its content, so that what was trained stays what it was. Each class and
    function gets ``__workbench_source__``, the import path by which a Config names it.

    Args:
        source: Python that stands on its own: it imports what it uses.
        name: of the file; by default that of the last class or function.

    Raises:
        ConfigError: the source is not Python, defines nothing, uses a name that it neither defines nor imports, or fails.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ConfigError(f"The %%model cell is not valid Python: {error.msg} at line {error.lineno}.") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    if not defined:
        raise ConfigError(
            "The %%model cell defines no class and no function.", "Put the model's class, or a function that returns it, there."
        )
    if missing := sorted(_used(tree) - _bound(tree) - set(dir(builtins)) - {"__name__", "__file__", "__doc__"}):
        raise ConfigError(
            f"The %%model cell uses {', '.join(missing)}, which it neither defines nor imports.",
            "It is imported by other processes, which know nothing of the other cells: import or define it in this cell.",
        )
    stem = re.sub(r"\W", "_", name.strip() or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", defined[-1]).lower())
    folder = runs_folder() / ".cells" / hashlib.sha256(source.encode()).hexdigest()[:16]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{stem}.py"
    if not path.exists():
        storage.write_atomic(path, source)
    names: dict[str, Any] = {}
    for each in defined:
        names[each] = load_object(f"{path}:{each}")
        names[each].__workbench_source__ = f"{path}:{each}"
    return names


def _used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _bound(tree: ast.AST) -> set[str]:
    """Every name that is bound somewhere in the tree, whatever the scope."""
    bound: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                bound.add(name)
            case ast.alias():
                bound.add((node.asname or node.name).partition(".")[0])
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
    return bound
