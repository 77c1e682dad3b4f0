"""Checkpoints: the whole state of a run after a step, in ``checkpoints/step-N``.

Written by torch.distributed.checkpoint into ``step-N.tmp``, then fsync, then rename: a folder without ``.tmp`` is complete.
``trainer.json`` beside it holds what is not a tensor. Reading needs pickle, so a checkpoint opens only from a folder that this
user owns.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map_only

from workbench.distributed import World, barrier
from workbench.storage import as_run_error, check_owner, fsync_folder, fsync_tree, write_atomic
from workbench.training.mesh import Mesh


def save(folder: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any], world: World, keep: int) -> Path:
    """Write the checkpoint of ``step``; all ranks call it. Older ones beyond ``keep`` are removed.

    Args:
        folder: the run's ``checkpoints`` folder.
        tensors: nested state of tensors, as :func:`training_state` gives it.
        facts: JSON values.

    Raises:
        RunError: the disk is full.
    """
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if world.others:  # the writer waits for its copies from one device only
        tensors = tree_map_only(Tensor, lambda value: value.cpu() if value.device in world.others else value, tensors)
    if world.main:
        for stale in folder.glob("*.tmp"):  # of a save that was killed
            shutil.rmtree(stale, ignore_errors=True)
    barrier(world)
    try:
        with _alone_is_fine():
            dcp.save(tensors, checkpoint_id=temporary, no_dist=world.size == 1)
        if world.main:
            write_atomic(temporary / "trainer.json", json.dumps(facts))
            fsync_tree(temporary)
            replaced = folder / f"step-{step}.replaced.tmp"
            if final.exists():
                os.replace(final, replaced)
            os.replace(temporary, final)
            fsync_folder(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            complete = sorted((p for p in folder.glob("step-*") if p.suffix != ".tmp"), key=lambda p: int(p.name[5:]))
            for old in complete[:-keep]:
                # Renamed first, so that a kill in the middle leaves no folder that looks complete.
                doomed = old.with_suffix(".tmp")
                os.replace(old, doomed)
                shutil.rmtree(doomed)
    except BaseException as error:  # the checkpoint library's own error is no Exception
        cause = _disk_error(error)
        if cause is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            raise as_run_error(cause, temporary) from error
        raise
    barrier(world)
    return final


def _disk_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind what the checkpoint writer raised, if it was one."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        wrapped = getattr(error, "failures", None)
        if isinstance(wrapped, dict) and wrapped:
            found = next((_disk_error(pair[0]) for pair in wrapped.values()), None)
            if found is not None:
                return found
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Silence the checkpoint library's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint."""
    facts: dict[str, Any] = json.loads((path / "trainer.json").read_bytes())
    return facts


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor], mesh: Mesh, owns: Callable[[str], bool]
) -> dict[str, Any]:
    """Model, optimizer, this rank's random states, and further tensors, as one nested state.

    Args:
        owns: whether this rank has a tensor of the model, by name.
    """
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    if mesh["pipeline"] > 1:
        state["param_groups"] = _of_all_stages(state["param_groups"], mesh)
    return {
        "model": _owned(model, owns),
        "optimizer": state,
        "random": {f"rank-{mesh.world.rank}": random_state(*mesh.world.devices)},
        "extra": extra,
    }


def restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Tensor],
    world: World,
    owns: Callable[[str], bool],
) -> dict[str, Tensor]:
    """Load a checkpoint into model, optimizer and random generators; all ranks call it.

    Ranks and devices that the checkpoint does not know keep the random states they have.

    Args:
        owns: whether this rank has a tensor of the model, by name.

    Returns:
        The further tensors, by name.
    """
    check_owner(path)
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    known = metadata.state_dict_metadata
    own: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
    state: dict[str, Any] = {
        "model": _owned(model, owns),
        "optimizer": {**own, "param_groups": _groups_of(metadata)},
        "extra": {name: value for name, value in extra.items() if f"extra.{name}" in known},
    }
    mine = f"rank-{world.rank}"
    drawn = random_state(*world.devices)
    if found := {name: value for name, value in drawn.items() if f"random.{mine}.{name}" in known}:
        state["random"] = {mine: found}
    with _alone_is_fine():
        dcp.load(state, storage_reader=reader, no_dist=world.size == 1)
    whole = all(map(owns, model.state_dict()))
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=whole))
    state["optimizer"]["param_groups"] = _regrouped(state["optimizer"]["param_groups"], own["param_groups"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    set_random_state({**drawn, **found}, *world.devices)
    further: dict[str, Tensor] = state["extra"]
    return further


def _owned(model: nn.Module, owns: Callable[[str], bool]) -> dict[str, Any]:
    return {name: value for name, value in get_model_state_dict(model).items() if owns(name)}


def _of_all_stages(groups: Any, mesh: Mesh) -> list[dict[str, Any]]:
    """Parameter groups with the parameters of every stage, those of the same settings as one."""
    said: list[Any] = [None] * mesh["pipeline"]
    dist.all_gather_object(said, groups, mesh.along("pipeline").get_group())
    found: dict[str, dict[str, Any]] = {}
    for group in itertools.chain(*said):
        settings = {name: value for name, value in group.items() if name != "params"}
        found.setdefault(repr(sorted(settings.items())), {**settings, "params": []})["params"] += group["params"]
    return list(found.values())


def _groups_of(metadata: Any) -> list[dict[str, Any]]:
    """Parameter groups to be filled by a checkpoint, as they are there: on another mesh, the optimizer's are others."""
    saved: dict[str, Any] = {}
    for key, path in metadata.planner_data.items():
        if path[:2] == ("optimizer", "param_groups"):
            kept = metadata.state_dict_metadata[key]
            tensor = torch.empty(kept.size, dtype=kept.properties.dtype) if hasattr(kept, "properties") else None
            set_element(saved, path, tensor)
    groups: list[dict[str, Any]] = saved["optimizer"]["param_groups"]
    return groups


def _regrouped(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of ``own``, each with the settings that ``saved`` has for its parameters."""
    settings = {name: group for group in saved for name in group["params"]}
    return [{**settings[group["params"][0]], "params": group["params"]} for group in own]


def random_state(device: torch.device, *others: torch.device) -> dict[str, Tensor]:
    """States of every generator that training may draw from, as tensors: ``device`` is the run's, ``others`` have layers too."""
    drawn: Any = np.random.get_state()  # noqa: NPY002 - the global generator is what users draw from
    _, key, position, has_gauss, gauss = drawn
    _, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.concatenate([key.astype(np.int64), [position, has_gauss]])),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss_next is None else gauss_next], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state | {str(other): torch.cuda.get_rng_state(other) for other in others if other.type == "cuda"}


def set_random_state(state: dict[str, Tensor], device: torch.device, *others: torch.device) -> None:
    """Give the generators the states that :func:`random_state` read."""
    torch.set_rng_state(state["torch"])
    words = state["numpy"].numpy()
    gauss = float(state["numpy_gauss"])
    np.random.set_state(("MT19937", words[:-2].astype(np.uint32), int(words[-2]), int(words[-1]), gauss))  # noqa: NPY002
    pending = float(state["python_gauss"])
    random.setstate((3, tuple(state["python"].tolist()), None if pending != pending else pending))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    for other in others:
        if other.type == "cuda":
            torch.cuda.set_rng_state(state[str(other)], other)
