"""What a run was given beside its config, kept in its folder: Python files, a model, commands to repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workbench.errors import RunError
from workbench.registry import find_source, load_object
from workbench.run import Replay
from workbench.storage import check_owner, dump_object, write_atomic
from workbench.training.config import TrainConfig

MODEL, MODEL_OBJECT, DATA_OBJECT = "source/model", "source/model.pkl", "source/data.pkl"
"""Where a run folder keeps the module or the data that a run was given as objects."""
TEACHER = "source/teacher"
"""Where it keeps the model that a run learns from."""


def keep_model(model: Any, folder: Path) -> None:
    """Keep the module that a run starts from as :data:`MODEL`, or pickled when nothing says how to build it again.

    Raises:
        RunError: it can be kept in neither way.
    """
    if model_name(model) == MODEL:
        load_object("workbench.artefact:save_model")(model, folder / MODEL)  # by name: it imports torch, and few runs need it
    else:
        dump_object(model, folder / MODEL_OBJECT)


def keep_teacher(name: str, folder: Path) -> None:
    """Copy the model to learn from into the run folder, so that the run goes on wherever it lies.

    Args:
        name: a folder with a model, or a pickled module.

    Raises:
        RunError: there is no such folder or file, or the file is another user's.
        ArtefactError: it holds no model.
    """
    path, kept = Path(name), folder / teacher_name(name)
    if not (path.is_file() if path.suffix == ".pkl" else name and path.is_dir()):
        raise RunError(f"distill.teacher={name!r} is not there.", "Give the folder of a saved model or of a finished run.")
    if path.suffix == ".pkl":
        check_owner(path)  # the copy will be this user's
        write_atomic(kept, path.read_bytes())
    else:
        load_object("workbench.artefact:save_model")(load_object("workbench.artefact:load_model")(path), kept)


def teacher_name(name: str) -> str:
    """What ``distill.teacher`` becomes in a run folder, which keeps the model."""
    return f"{TEACHER}.pkl" if name.endswith(".pkl") else TEACHER


def model_name(model: Any) -> str:
    """What ``model.name`` becomes when a run is given this module."""
    built = getattr(getattr(model, "structure", None), "model", None)
    return MODEL_OBJECT if built is None else MODEL


def copy_sources(config: TrainConfig, folder: Path) -> None:
    """Keep the Python files that the config names beside the run, so that later edits don't change what it was.

    Raises:
        RunError: a file is missing, or two of one name differ.
    """
    for name in named(config):
        path = Path(name.partition(":")[0])
        if path.suffix != ".py":
            continue
        target = folder / "source" / path.name
        if not path.is_file():
            raise RunError(f"The file {str(path)!r}, named by {name!r}, does not exist.", "Check the path.")
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise RunError(f"Two different files are named {path.name}.", "Rename one of them.")
        target.write_bytes(path.read_bytes())


def named(config: TrainConfig) -> list[str]:
    """Every name in a config that may be a file's: of the model, the data, the loss and whatever else is plugged in."""
    plugged = [*(config.data.augment or ()), *config.probes.more, *config.penalties, config.mesh.plan]
    if config.distill is not None:
        plugged += [config.distill.teacher, *config.distill.terms]
    return [config.model.name, config.data.name, config.loss.name, config.optim.name, *plugged]


def as_kept(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config with the files that a run was given, however the originals changed since.

    Those of the loss, the optimizer and whatever is plugged in; models, data and plans are found where they are loaded.
    """
    kept: dict[str, Any] = {f"{part}.name": find_source(getattr(config, part).name, folder) for part in ("loss", "optim")}
    if config.data.augment is not None:
        kept["data.augment"] = [find_source(name, folder) for name in config.data.augment]
    kept["penalties"] = {find_source(name, folder): factor for name, factor in config.penalties.items()}
    if config.distill is not None:
        kept["distill.terms"] = {find_source(name, folder): weight for name, weight in config.distill.terms.items()}
    return config.override(kept)


def kept_name(name: str) -> str:
    """Where the run folder keeps the Python file that an import path names; other names as they are."""
    location, colon, attribute = name.partition(":")
    return f"source/{Path(location).name}{colon}{attribute}" if location.endswith(".py") else name


def write_remedy(folder: Path, origin: str, words: str) -> None:
    """Keep beside a run that it was started as a remedy: of which run, and what was changed."""
    write_atomic(folder / "remedy.json", json.dumps({"of": origin, "words": words}))


def read_remedy(folder: Path) -> str:
    """What :func:`write_remedy` kept, in words; empty for a run that is none."""
    path = folder / "remedy.json"
    return str(json.loads(path.read_bytes())["words"]) if path.exists() else ""


def write_replay(folder: Path, replay: Replay) -> None:
    """Keep the commands to repeat beside the run, for every process and attempt of it."""
    write_atomic(folder / "replay.json", json.dumps(replay))


def read_replay(folder: Path) -> Replay:
    """The commands to repeat, by step; empty without any."""
    path = folder / "replay.json"
    return [(step, name, settings) for step, name, settings in json.loads(path.read_bytes())] if path.exists() else []
