"""A stage of a pipeline: a notebook, the folder of its state and results, and its execution.

The folder holds ``stage.json`` (:class:`State`: how far it is, and the fingerprint of its inputs), ``outputs.json`` (what the
notebook named by :func:`workbench.notebook.output`), the executed notebook, ``kernel.log``, ``runs/`` and whatever else the
notebook wrote. It is written so that a kill at any moment leaves either "begun" or "done".
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import nbformat
from nbformat import NotebookNode

from workbench import launcher, storage
from workbench.errors import ConfigError, RunError, unknown

MAX_BYTES = 200_000
"""Size of an executed notebook above which its largest outputs are left out."""


@dataclass(frozen=True)
class Output:
    """Something a stage gave: the value (a :class:`Path` for files and folders), and a digest of its content."""

    value: Any
    digest: str


@dataclass
class State:
    """``stage.json``."""

    status: str = ""
    fingerprint: str = ""
    kernel: dict[str, Any] | None = None
    seconds: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        try:
            return cls(**json.loads((folder / "stage.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        storage.write_atomic(folder / "stage.json", json.dumps(asdict(self), indent=2))


class Stage:
    """One stage's folder.

    Args:
        folder: of the stage.
        home: where ``notebook`` and ``files`` are looked up.
        files: further files whose content counts.
    """

    def __init__(self, folder: Path, home: Path, notebook: str, files: Iterable[str] = ()) -> None:
        self.folder, self.notebook = folder, home / notebook
        self.files = [home / file for file in files]
        self.executed = folder / self.notebook.name

    def fingerprint(self, given: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """Digest of all that decides the result.

        Args:
            given: parameters with references to earlier stages as they are written, so that where they lie doesn't count.
            inputs: digests of what is referred to.
        """
        code = [cell.source for cell in _read(self.notebook).cells if cell.cell_type == "code"]
        facts = [code, given, sorted(inputs.items()), [_digest(file) for file in self.files], _versions()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def begun(self, fingerprint: str) -> bool:
        """Whether a run with these inputs was cut off or failed."""
        state = State.read(self.folder)
        return state.status in ("running", "failed") and state.fingerprint == fingerprint

    def done(self, fingerprint: str) -> bool:
        """Whether the stage has run with these inputs, and what it gave is still there as it was."""
        state = State.read(self.folder)
        if state.status != "done" or state.fingerprint != fingerprint or not self.executed.exists():
            return False
        return {name: made.digest for name, made in self.outputs().items()} == state.digests

    def outputs(self) -> dict[str, Output]:
        """What the notebook named."""
        try:
            given = json.loads((self.folder / "outputs.json").read_bytes())
        except FileNotFoundError:
            return {}
        return {
            name: Output(Path(made["path"]), _digest(Path(made["path"])))
            if "path" in made
            else Output(made["value"], hashlib.sha256(json.dumps(made["value"], sort_keys=True).encode()).hexdigest())
            for name, made in given.items()
        }

    def run(self, fingerprint: str, parameters: Mapping[str, Any], timeout: float | None) -> float:
        """Execute the notebook; seconds it took.

        What a run of other inputs left is removed first; what one of these inputs left is kept for it to go on from.

        Raises:
            RunError: a cell failed or took too long, or the kernel died.
        """
        if not self.begun(fingerprint):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._end_leftover()
        (self.folder / "runs").mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.folder / "outputs.json").unlink(missing_ok=True)
        state = State("running", fingerprint)
        state.write(self.folder)
        start = time.monotonic()
        try:
            _execute(self, dict(parameters), timeout, state)
        except BaseException:
            state.status = "failed"
            state.write(self.folder)
            raise
        finally:
            _slim(self.executed)
        state.status, state.seconds = "done", time.monotonic() - start
        state.digests = {name: made.digest for name, made in self.outputs().items()}
        state.write(self.folder)
        return state.seconds

    def _end_leftover(self) -> None:
        """End the kernel of a run that was cut off, should it live still: two must not write here."""
        kernel = State.read(self.folder).kernel
        if kernel is not None:
            launcher.terminate(launcher.Process(**kernel), grace=2.0)


def check(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Fail before anything runs: the notebook exists and knows each of the parameters.

    Raises:
        ConfigError: it does not.
    """
    cells = [cell.source for cell in _read(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        assigned = [node for node in ast.walk(ast.parse("\n".join(cells))) if isinstance(node, ast.Name)]
    except SyntaxError as error:
        raise ConfigError(f"The parameters cell of {notebook.name} is not valid Python: {error.msg}.") from None
    known = {node.id for node in assigned if isinstance(node.ctx, ast.Store)}
    if parameters and not cells:
        raise ConfigError(
            f"{notebook.name} has no parameters cell.", "Give the cell that holds its parameters the tag 'parameters'."
        )
    for name in parameters:
        if name not in known:
            raise unknown(f"parameter of {notebook.name}", name, known)


def _read(notebook: Path) -> NotebookNode:
    try:
        return nbformat.read(notebook, as_version=4)
    except OSError as error:
        raise ConfigError(f"The notebook {str(notebook)!r} cannot be read: {error.strerror}.", "Check the path.") from None
    except ValueError as error:
        raise ConfigError(f"{str(notebook)!r} is not a notebook: {error}.") from None


# -- execution ----------------------------------------------------------------------------------------------------------


def _execute(stage: Stage, parameters: dict[str, Any], timeout: float | None, state: State) -> None:
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    from workbench.notebook_client import Client

    environment = os.environ | {
        "WORKBENCH_STAGE": str(stage.folder),
        "WORKBENCH_RUNS": str(stage.folder / "runs"),
        "PYTHONHASHSEED": "0",
    }

    def started(pid: int) -> None:
        state.kernel = asdict(launcher.Process.of(pid))
        state.write(stage.folder)

    class Engine(NBClientEngine):  # type: ignore[misc]
        """papermill's own, with our client."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **_: Any) -> None:
            with (stage.folder / "kernel.log").open("ab") as log:
                Client(nb_man, kernel_name, environment, log, started, timeout).execute()

    papermill_engines.register("workbench", Engine)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of comments in parameters cells that it cannot parse
    where = f"The executed notebook is {stage.executed}."
    try:
        papermill.execute_notebook(
            str(stage.notebook),
            str(stage.executed),
            parameters,
            engine_name="workbench",
            progress_bar=False,
            cwd=str(stage.notebook.parent),
        )
    except PapermillExecutionError as error:
        raise RunError(
            f"The stage {stage.folder.name!r} failed in cell [{error.exec_count}]: {error.ename}: {error.evalue}", where
        ) from None
    except DeadKernelError:
        remedy = f"It may have run out of memory. {where} What its processes printed: {stage.folder / 'kernel.log'}."
        raise RunError(f"The kernel of the stage {stage.folder.name!r} died.", remedy) from None
    except CellTimeoutError:
        raise RunError(
            f"A cell of the stage {stage.folder.name!r} took longer than its timeout of {timeout:g} s.", where
        ) from None


def _slim(path: Path) -> None:
    """Leave out the largest outputs until the notebook is within :data:`MAX_BYTES`."""
    if not path.exists() or path.stat().st_size <= MAX_BYTES:
        return
    book = nbformat.read(path, as_version=4)
    book.metadata.pop("widgets", None)
    outputs = [(len(json.dumps(output)), output) for cell in book.cells for output in cell.get("outputs", [])]
    for size, output in sorted(outputs, key=lambda pair: -pair[0]):
        if len(nbformat.writes(book)) <= MAX_BYTES:
            break
        note = f"(an output of {size / 1000:,.0f} kB was left out)\n"
        output.clear()
        output.update(output_type="stream", name="stdout", text=note)
    storage.write_atomic(path, nbformat.writes(book))


# -- digests ------------------------------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    """Of a file's content; of a folder's: a model's two files where it holds one, else all of its files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return "absent"
    model = [path / "structure.json", path / "model.safetensors"]
    files = model if model[0].is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    names = [(str(file.relative_to(path)), _digest(file)) for file in files]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _versions() -> list[str]:
    found = [".".join(map(str, sys.version_info[:3]))]
    for package in ("workbench", "torch"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("absent")
    return found
