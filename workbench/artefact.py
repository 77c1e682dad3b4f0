"""A model on disk without pickle: a folder of ``model.safetensors`` and ``structure.json``.

* :func:`save_model` writes both files; :func:`load_model` builds the model again and fills it.
* ``structure.json`` says what to build and what was done to it (see :class:`~workbench.models.structure.Structure`); each
  change is replayed by the function that :data:`TRANSFORMS` names, so opening a file never runs code that it carries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from workbench.errors import ArtefactError, ConfigError, DeviceError, WorkbenchError
from workbench.models.structure import Structure, check_module, count_parameters, is_channels_last, structure_of
from workbench.registry import Registry
from workbench.storage import write_atomic

FORMAT = 1
WEIGHTS, STRUCTURE = "model.safetensors", "structure.json"
_KEYS = {"format", "model", "transforms", "tied", "channels_last", "sha256"}

TRANSFORMS = Registry(
    "transform",
    {
        "prune": "workbench.compress.surgery:replay",
        "qat": "workbench.compress.qat:replay",
        "quantize": "workbench.compress.quantization:replay",
        "sparsify": "workbench.compress.sparsity:replay",
        "bake_masks": "workbench.compress.sparsity:replay_bake",
    },
)
"""Who replays a change on a freshly built model: a function from (model, record) to the changed model."""


def save_model(
    model: nn.Module, path: str | os.PathLike[str], *, weights_only: bool = False, state: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Write ``model`` into the folder ``path``; a model already there is replaced.

    Each file appears whole or not at all, the description last and with the weights' digest: a kill between the two leaves a
    folder that :func:`load_model` refuses, never one that it misreads.

    Args:
        model: a model built by the workbench, pruned and quantized ones included.
        path: a folder, made if need be; other files in it stay (a run folder's).
        state: the model's tensors by name, where it holds only parts of them itself.
        weights_only: accept a model that the workbench didn't build. Its weights and changes are saved, and loading it takes
            the module: ``load_model(path, model=module)``.

    Raises:
        ArtefactError: nothing says how to build the model, or ``path`` can't be written.
        ModelError: ``model`` isn't a module.
    """
    check_module(model)
    folder = Path(path)
    structure = structure_of(model)
    if structure.model is None and not weights_only:
        raise ArtefactError(
            f"This {type(model).__name__} carries no structure to build it from again.",
            'Build it by name, as in build_model(ModelConfig(name="file.py:factory")), or save with weights_only=True.',
        )
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{str(folder)!r} is a file.", "Pass a folder: the model is saved as two files in it.")
    tensors, tied = _distinct(dict(_plain(dict(model.state_dict() if state is None else state))))
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "model": structure.model,
        "transforms": structure.transforms,
        "parameters": count_parameters(model),
        "tied": tied,
        "channels_last": is_channels_last(model),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "versions": _versions(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS, weights)
        write_atomic(folder / STRUCTURE, json.dumps(description, ensure_ascii=False, allow_nan=False))
    except OSError as error:
        raise ArtefactError(f"{str(folder)!r} can't be written: {error.strerror}.", "Save it elsewhere.") from error
    return folder


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu", *, model: nn.Module | None = None) -> nn.Module:
    """The model in the folder ``path``, in evaluation mode, with outputs equal to the saved one's.

    Args:
        path: a folder written by :func:`save_model`.
        device: where to put it.
        model: the unchanged module, for an artefact saved with ``weights_only=True``; it becomes the loaded model.

    Raises:
        ArtefactError: a file is missing, cut short or of a newer format, or the weights don't fit the structure.
        ConfigError: the model's factory is gone.
        DeviceError: the device isn't there.
    """
    folder = Path(path)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device={str(device)!r}, and no CUDA device is there.", "Load it with device='cpu'.")
    description = read_structure(folder)
    tensors = _read_weights(folder / WEIGHTS, description["sha256"])
    for alias, name in description["tied"].items():
        if name in tensors:
            tensors[alias] = tensors[name]
    structure = Structure(description["model"], description["transforms"])
    loaded = (_build(structure, folder) if model is None else model).eval()
    for record in structure.transforms:
        if record["kind"] not in TRANSFORMS:
            raise ArtefactError(
                f"{folder} needs the unknown change {record['kind']!r}.", "It comes from a newer workbench: update."
            )
        loaded = _replayed(loaded, record, folder)
    _fill(loaded, tensors, folder)
    loaded.structure = structure  # type: ignore[assignment]
    if description["channels_last"]:  # another memory layout sums in another order, and the last bits differ
        loaded = loaded.to(memory_format=torch.channels_last)
    return loaded.eval().to(device)


def read_structure(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of the artefact in the folder ``path``; no model is built.

    Raises:
        ArtefactError: it is missing, unreadable, or of a newer format.
    """
    file = Path(path) / STRUCTURE
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(f"{str(file)!r} can't be read: {error.strerror}.", "Pass a folder written by save_model.") from None
    except ValueError as error:
        raise ArtefactError(f"{str(file)!r} isn't JSON: {error}.", "Copy the artefact again from where it was made.") from None
    if not isinstance(description, dict) or _KEYS - description.keys() or not _is_list_of_records(description["transforms"]):
        raise ArtefactError(f"{str(file)!r} doesn't describe a model.", "Pass a folder written by save_model.")
    if description["format"] != FORMAT:
        raise ArtefactError(f"{str(file)!r} has format {description['format']!r}; this reads {FORMAT}.", "Update the workbench.")
    return description


def size_on_disk(path: str | os.PathLike[str]) -> int:
    """Bytes of the model in the folder ``path``: weights and description."""
    return sum((Path(path) / name).stat().st_size for name in (WEIGHTS, STRUCTURE))


def _plain(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """State as ordinary tensors: a tensor subclass (torchao's INT8 weights) becomes the tensors that it wraps."""
    for name, tensor in state.items():
        value = tensor.data if isinstance(tensor, nn.Parameter) else tensor
        if not isinstance(value, torch.Tensor):
            raise ArtefactError(f"The state {name!r} is a {type(value).__name__}, not a tensor.", "Keep it out of state_dict.")
        if is_traceable_wrapper_subclass(value):
            inner, _ = value.__tensor_flatten__()
            yield from _plain({f"{name}.{part}": getattr(value, part) for part in inner})
        else:
            yield name, value


def _distinct(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, each once, and {other name: written name} for tied ones."""
    written: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            # A copy of its own: two views of one storage, or channels-last strides, are nothing safetensors would write.
            written[name] = tensor.detach().cpu().contiguous().clone()
    return written, tied


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    slots = dict(_plain(model.state_dict()))
    missing, extra = sorted(slots.keys() - tensors.keys()), sorted(tensors.keys() - slots.keys())
    if missing or extra:
        raise ArtefactError(
            f"The weights in {folder} don't fit the model: missing {_some(missing)}, unexpected {_some(extra)}.",
            "The model's code has changed since it was saved: restore it, or train again.",
        )
    for name, slot in slots.items():
        if slot.shape != tensors[name].shape or slot.dtype != tensors[name].dtype:
            raise ArtefactError(
                f"{name} in {folder} is {_kind(tensors[name])}; the model has {_kind(slot)}.",
                "The model's code or settings have changed since it was saved: restore them, or train again.",
            )
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[name])


def _build(structure: Structure, folder: Path) -> nn.Module:
    if structure.model is None:
        raise ArtefactError(f"{folder} holds weights only.", "Pass the module they belong to: load_model(path, model=module).")
    from workbench.models import ModelConfig, build_model

    try:
        config = ModelConfig(**structure.model)
    except ConfigError as error:
        raise ArtefactError(f"{folder} describes a model this version can't build: {error.what}", error.remedy) from error
    # The saved weights replace the pretrained ones: don't download those.
    return build_model(config.override({"pretrained": False}), root=folder)


def _replayed(model: nn.Module, record: dict[str, Any], folder: Path) -> nn.Module:
    try:
        replayed: nn.Module = TRANSFORMS.create(record["kind"], model, record)
    except ArtefactError:
        raise
    except WorkbenchError as error:
        raise ArtefactError(f"{folder}: the change {record['kind']!r} can't be replayed: {error.what}", error.remedy) from error
    except Exception as error:  # a record that doesn't fit the model may fail anywhere
        raise ArtefactError(
            f"{folder}: the change {record['kind']!r} can't be replayed: {type(error).__name__}: {error}.",
            f"{STRUCTURE} or the model's code was changed since it was saved, or another version saved it: restore them.",
        ) from error
    return replayed


def _is_list_of_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(record, dict) and isinstance(record.get("kind"), str) for record in value)


def _read_weights(file: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load_file(file)
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        raise ArtefactError(f"{str(file)!r} is missing.", "Pass a folder written by save_model.") from None
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{str(file)!r} is damaged: {error}.", "It was cut short or changed: copy it again.") from None
    if found != digest:
        raise ArtefactError(
            f"{str(file)!r} isn't the file that {STRUCTURE} describes.",
            "It was changed, or saving was interrupted: copy or save it again.",
        )
    return tensors


def _versions() -> dict[str, str]:
    found = {}
    for name in ("workbench", "torch", "torchao", "torch-pruning", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})" if names else "none"


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
