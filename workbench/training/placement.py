"""``mesh.devices`` in a run: what it doesn't go together with, and putting it into effect.

The mechanism is :mod:`workbench.placement`. A run's own device stays where batches come in and the loss is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from workbench.data.order import derive_seed
from workbench.distributed import World
from workbench.errors import ConfigError
from workbench.placement import find_device, place, release, return_output
from workbench.training.blocks import blocks_of
from workbench.training.config import TrainConfig
from workbench.training.decisions import Decisions

SETTING = "mesh.devices"


def with_others(world: World, config: TrainConfig) -> World:
    """``world`` with the further devices that the config names.

    Raises:
        ConfigError: what doesn't go together with placed layers.
        DeviceError: a device that isn't there.
    """
    named = config.mesh.devices
    if not named:
        return world
    others = tuple(device for device in dict.fromkeys(map(find_device, named.values())) if device != world.device)
    if world.size > 1 and world.device.type != "cpu":
        raise ConfigError(
            f"mesh.devices={dict(named)!r} puts layers of {world.size} copies on one device, and GPUs exchange their gradients.",
            "Launch with nproc=1, or take device=cpu.",
        )
    if not others:
        return world
    if config.compile in ("reduce-overhead", "max-autotune"):
        raise ConfigError(
            f"compile={config.compile!r} captures graphs, each of one device, and mesh.devices names several.",
            "Take compile=default or off.",
        )
    if "auto" in (config.memory.recompute, config.memory.offload):
        raise ConfigError(
            "memory: auto measures steps on one device, and mesh.devices names several.",
            "Set memory.recompute to a share of the blocks, e.g. 1, and memory.offload to none or activations.",
        )
    return replace(world, others=others)


def check_precision(precision: str, world: World) -> None:
    """Refuse to scale the loss where some layers lie on a CPU.

    Raises:
        ConfigError: that.
    """
    if precision == "fp16" and any(device.type == "cpu" for device in world.others):
        raise ConfigError(
            "precision='fp16' trains on CUDA only, and mesh.devices puts layers on the CPU: it has no fast fp16 arithmetic.",
            "Take precision=bf16 or fp32.",
        )


def place_layers(model: nn.Module, config: TrainConfig, world: World, decided: Decisions) -> None:
    """Move a model to the run's device, or its layers where the config says; what that comes to is written down.

    Raises:
        ConfigError: a pattern that names no layer; layers on two devices that share a weight; a block on two devices, which is to
            be computed again.
    """
    if not config.mesh.devices:
        release(model)  # of a run that gave it
        model.to(world.device)
        decided.made.pop(SETTING, None)  # of an attempt on other devices
        return
    plan = {layer: torch.device(device) for layer, device in config.mesh.devices.items()}
    found = place(model, plan, world.device)
    return_output(model, world.device)
    if config.memory.recompute:
        _check_blocks(model)
    decided.revise(SETTING, _beginnings(found), "layers not named go with the one before them")


def draw_apart(world: World, *seed: int) -> None:
    """Seed the generators of further devices, so that equal layers drop other units on each."""
    for device in world.others:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive_seed(*seed, 1 + device.index))


def _check_blocks(model: nn.Module) -> None:
    names = {module: name for name, module in model.named_modules()}
    for block in blocks_of(model):
        devices = sorted({str(p.device) for p in block.parameters()})
        if len(devices) > 1:  # only the generator of the device of its inputs would draw the same again
            raise ConfigError(
                f"memory.recompute computes blocks again, and mesh.devices divides the block {names[block]!r} over "
                f"{' and '.join(devices)}, where other random numbers would be drawn.",
                "Place blocks as wholes, or set memory.recompute=0.",
            )


def _beginnings(layers: Mapping[str, torch.device]) -> dict[str, str]:
    """Of a layout, the layers at which another device than before begins."""
    found: dict[str, str] = {}
    before = None
    for name, device in layers.items():
        if device != before:
            found[name or "(first)"] = str(device)
        before = device
    return found
