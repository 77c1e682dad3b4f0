"""Notebooks as chained stages: ``workbench pipeline FILE.yaml``.

* :class:`PipelineConfig`, :class:`StageConfig` — the file: which notebooks, with which parameters, in which order.
* :func:`run_pipeline` — runs the stages through papermill. A stage whose inputs are unchanged is skipped; one that was cut off
  runs again in its own folder, where :func:`workbench.notebook.train_or_resume` goes on from its checkpoint.
* :mod:`workbench.stage` — a stage's folder: its state, its inputs' fingerprint, its execution.

A parameter refers to an earlier stage's output as ``${stage.name}``; see :func:`workbench.notebook.output`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from workbench import stage
from workbench.config import Config, load_yaml
from workbench.errors import ConfigError, RunError, unknown
from workbench.run import runs_folder

_REFERENCE = re.compile(r"\$\{([\w-]+)\.(\w+)\}")


class StageConfig(Config):
    """One notebook of a pipeline."""

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$", description="Name of the stage, by which others refer to it.")
    notebook: str = Field(description="The notebook, relative to the pipeline's file.")
    parameters: dict[str, Any] = Field(
        {}, description="Values for its parameters cell; ${stage.name} is an earlier stage's output."
    )
    config: dict[str, Any] | str | None = Field(None, description="Its parameter 'config': settings, or a YAML file of them.")
    overrides: list[str] = Field([], description="Its parameter 'overrides': changes to settings, e.g. optim.lr=0.1.")
    needs: list[str] = Field([], description="Stages that come before it, beside those that its parameters refer to.")
    files: list[str] = Field([], description="Further files that the notebook reads: when one changes, the stage runs again.")
    timeout: float | None = Field(None, gt=0, description="Seconds that one cell may take; by default as long as it wants.")

    @property
    def given(self) -> dict[str, Any]:
        """Every parameter of the notebook that has a value, references unresolved."""
        extra = {"config": self.config, "overrides": self.overrides}
        return {**self.parameters, **{name: value for name, value in extra.items() if value}}

    @property
    def before(self) -> list[str]:
        """Names of the stages that it waits for."""
        return list(dict.fromkeys([*self.needs, *(name for name, _ in _references(self.given))]))


class PipelineConfig(Config):
    """Stages, and how they hang together.

    Example:
        >>> config = PipelineConfig.from_yaml("notebooks/pipelines/compress.yaml")
        >>> run_pipeline(config.change(["train.epochs=2"])).outputs["train"]["accuracy"]
    """

    kind: ClassVar[str] = "pipeline"

    name: str = Field(
        "pipeline", pattern=r"^[\w.-]+$", description="Names the folder of its results; by default the file's name."
    )
    folder: str = Field(".", description="Where notebooks and files are looked up; by default the pipeline file's own folder.")
    stages: list[StageConfig] = Field(min_length=1, description="The notebooks; each runs once those that it needs are done.")

    @field_validator("stages")
    @classmethod
    def _names_are_distinct(cls, stages: list[StageConfig]) -> list[StageConfig]:
        names = [each.name for each in stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are named {', '.join(twice)}")
        return stages

    @model_validator(mode="after")
    def _can_be_ordered(self) -> Self:
        self.order()
        return self

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Self:
        """Read a pipeline's file; names of files in it are relative to its folder."""
        path = Path(source)
        try:
            values = load_yaml(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"The pipeline {str(path)!r} cannot be read: {error.strerror}.", "Check the path.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}, not a pipeline.", "Write 'stages:' and one stage an item.")
        home = path.resolve().parent / str(values.pop("folder", "."))
        return cls(**{"name": path.stem, **values, "folder": str(home)})

    def order(self) -> list[StageConfig]:
        """The stages, each after those it needs, else as they are listed.

        Raises:
            ConfigError: a stage needs one that does not exist, or stages wait for each other.
        """
        waiting, done = list(self.stages), list[StageConfig]()
        names = [each.name for each in self.stages]
        for each in waiting:
            for need in each.before:
                if need not in names:
                    raise unknown(f"stage (needed by {each.name!r})", need, names)
        while waiting:
            ready = next((each for each in waiting if all(any(d.name == need for d in done) for need in each.before)), None)
            if ready is None:
                raise ConfigError(
                    f"The stages {', '.join(each.name for each in waiting)} wait for each other.", "Break the circle."
                )
            waiting.remove(ready)
            done.append(ready)
        return done

    def change(self, changes: Sequence[str]) -> Self:
        """A copy with parameters changed: ``["train.epochs=2", "train.overrides=[optim.lr=0.1]"]``.

        Raises:
            ConfigError: there is no such stage, or a text without ``=``.
        """
        values = self.model_dump()
        by_name = {each["name"]: each for each in values["stages"]}
        for text in changes:
            path, equals, value = text.partition("=")
            name, dot, parameter = path.strip().partition(".")
            if not (equals and dot and parameter):
                raise ConfigError(
                    f"The change {text!r} is not of the form STAGE.PARAMETER=VALUE.", "Write it like train.epochs=2."
                )
            if name not in by_name:
                raise unknown("stage", name, by_name)
            home = by_name[name] if parameter in ("config", "overrides", "timeout") else by_name[name]["parameters"]
            home[parameter] = load_yaml(value, f"The value of {path.strip()!r}")
        return type(self)(**values)


@dataclass
class PipelineResult:
    """What a pipeline gave.

    Attributes:
        folder: of the pipeline, one folder a stage in it.
        outputs: by stage, what it named by :func:`workbench.notebook.output`; paths as :class:`Path`.
        skipped: stages that were done already.
    """

    folder: Path
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def run_pipeline(
    config: PipelineConfig, output: str | os.PathLike[str] | None = None, *, echo: Callable[[str], None] = lambda line: None
) -> PipelineResult:
    """Run the stages that are not done yet, in this process, one after another, each in a kernel of its own.

    Args:
        config: the stages.
        output: folder of state and results; by default ``WORKBENCH_RUNS/pipelines/<name>-<hash of where the pipeline lies>``.
        echo: called with a line whenever something happens.

    Raises:
        ConfigError: a notebook is missing or has no such parameter, or an output that a parameter refers to does not exist.
        RunError: a stage failed, its kernel died, or another process runs this pipeline.
    """
    where = hashlib.sha256(f"{Path(config.folder).resolve()}".encode()).hexdigest()[:6]
    folder = Path(output).resolve() if output is not None else runs_folder() / "pipelines" / f"{config.name}-{where}"
    order = config.order()
    for each in order:
        stage.check(Path(config.folder) / each.notebook, each.given)
    result = PipelineResult(folder)
    with _alone(folder):
        config.to_yaml(folder / "pipeline.yaml")
        found: dict[str, dict[str, stage.Output]] = {}
        for number, each in enumerate(order, start=1):
            label = f"[{number}/{len(order)}] {each.name}"
            parameters, inputs = _resolve(each.given, found, each.name), _inputs(each, found)
            files = list(each.files)
            if isinstance(each.config, str) and not _REFERENCE.search(each.config):
                files.append(each.config)
                parameters["config"] = str(Path(config.folder).resolve() / each.config)
            work = stage.Stage(folder / each.name, Path(config.folder), each.notebook, files)
            mark = work.fingerprint(each.given, inputs)
            if work.done(mark):
                result.skipped.append(each.name)
                echo(f"{label}: unchanged, skipped")
            else:
                echo(f"{label}: goes on" if work.begun(mark) else f"{label}: runs")
                seconds = work.run(mark, parameters, each.timeout)
                echo(f"{label}: done in {seconds:.1f} s")
            found[each.name] = work.outputs()
            result.outputs[each.name] = {name: made.value for name, made in found[each.name].items()}
    return result


# -- parts --------------------------------------------------------------------------------------------------------------


def _references(value: Any) -> Iterator[tuple[str, str]]:
    """(stage, output) of every ``${stage.output}`` in a value."""
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _references(part)


def _resolve(value: Any, found: Mapping[str, Mapping[str, stage.Output]], who: str) -> Any:
    """``value`` with every reference replaced; a text that is one reference becomes the output itself."""
    if isinstance(value, Mapping):
        return {key: _resolve(part, found, who) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(part, found, who) for part in value]
    if not isinstance(value, str):
        return value

    def look_up(name: str, key: str) -> Any:
        if key not in found[name]:
            raise unknown(f"output of the stage {name!r} (wanted by {who!r})", key, found[name])
        made = found[name][key].value
        return str(made) if isinstance(made, Path) else made

    if whole := _REFERENCE.fullmatch(value):
        return look_up(*whole.groups())
    return _REFERENCE.sub(lambda match: str(look_up(*match.groups())), value)


def _inputs(each: StageConfig, found: Mapping[str, Mapping[str, stage.Output]]) -> dict[str, str]:
    """Digests of what the stage takes from others, or of all that they gave when it only waits for them."""
    wanted = {f"{name}.{key}": found[name][key].digest for name, key in _references(each.given) if key in found[name]}
    return wanted | {f"{name}.{key}": made.digest for name in each.needs for key, made in found[name].items()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from running the same pipeline; the lock goes with this process, however it ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"The folder {folder} cannot be made: {error.strerror}.", "Choose another: --output.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"Another process runs the pipeline in {folder}.", "Wait for it, or choose another folder: --output."
            ) from None
        yield
    finally:
        os.close(descriptor)
