"""Models by name: the workbench's own, timm's, import paths, saved folders."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ConfigError, ModelError, WorkbenchError
from workbench.models.config import MODELS, ModelConfig
from workbench.models.structure import Structure, structure_of
from workbench.registry import find_source, load_object
from workbench.storage import load_dumped

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "ModelConfig", "Structure", "build_model", "structure_of"]


def build_model(config: ModelConfig, *, root: Path | None = None) -> nn.Module:
    """Build the model that ``config`` names, on the CPU, in training mode.

    Args:
        config: with ``num_classes`` and ``in_channels`` filled in where the model needs them.
        root: folder against which relative files and folders are looked up first (a run folder).

    Returns:
        The module; its attribute ``structure`` says how to build it again.

    Raises:
        ConfigError: unknown name, or arguments that the factory does not take.
        ModelError: the factory failed.
    """
    name = find_source(config.name, root)
    if ":" not in name and Path(name).is_dir():
        # By name: reading saved models lies in a later layer.
        model: nn.Module = load_object("workbench.artefact:load_model")(Path(name))
        return model.train()
    from torch import nn

    shape = {"num_classes": config.num_classes, "in_channels": config.in_channels}
    given = {key: value for key, value in shape.items() if value is not None}
    try:
        if name.endswith(".pkl"):
            model = load_dumped(Path(name))
        elif MODELS.known(name):
            factory = MODELS.factory(name)
            model = factory(**_accepted(factory, given), **config.args)
        else:
            model = _from_timm(name, config, given)
    except WorkbenchError:
        raise
    except TypeError as error:
        raise ConfigError(f"The model {config.name!r} does not take these arguments: {error}.", "See model.args.") from error
    except Exception as error:
        raise ModelError(f"The model {config.name!r} could not be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The factory of the model {config.name!r} returned {type(model).__name__}.", "Return a torch.nn.Module."
        )
    # The name where it was found: a model saved elsewhere later still finds the file that made it.
    model.structure = Structure(model=config.model_dump(mode="json") | {"name": name})  # type: ignore[assignment]
    return model


def _accepted(factory: object, given: dict[str, int]) -> dict[str, int]:
    """The shape arguments that a factory declares; a user's own function need not know of them."""
    parameters = inspect.signature(factory).parameters  # type: ignore[arg-type]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _from_timm(name: str, config: ModelConfig, given: dict[str, int]) -> nn.Module:
    import timm

    renamed: dict[str, Any] = {"num_classes": given.get("num_classes"), "in_chans": given.get("in_channels")}
    arguments = {key: value for key, value in renamed.items() if value is not None} | config.args
    return timm.create_model(name, pretrained=config.pretrained, **arguments)
