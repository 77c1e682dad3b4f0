"""Layers placed by hand: which goes where, what is refused; and runs on two devices, in a process that has a second one."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import far
from workbench import TrainConfig, train
from workbench.distributed import ParallelModel, World
from workbench.errors import ConfigError, DeviceError, WorkbenchError
from workbench.placement import layout, place, release
from workbench.training.mesh_config import MeshConfig
from workbench.training.placement import check_precision, with_others

HOME, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [torch.device("cuda", index) for index in range(3)]


def tree(depth: int = 3) -> nn.Module:
    return nn.Sequential(*(tree(depth - 1) for _ in range(2))) if depth else nn.Linear(2, 2)


NAMES = [name for name, _ in tree().named_modules()]
patterns = st.sampled_from([*NAMES[1:], "*", "?", "0.*", "*.1", "1.?", "?.0.*", "1*"])


def within(name: str, pattern: str) -> bool:
    """Whether a pattern takes a layer or one that it is part of."""
    parts = name.split(".") if name else []
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(len(parts) + 1))


@settings(max_examples=200)
@given(plan=st.dictionaries(patterns, st.sampled_from(DEVICES), max_size=4))
def test_every_layer_has_its_pattern_s_device_or_the_one_before_it(plan: dict[str, torch.device]) -> None:
    taken = {name: [pattern for pattern in plan if within(name, pattern)] for name in NAMES}
    if unused := [pattern for pattern in plan if not any(some and some[-1] == pattern for some in taken.values())]:
        with pytest.raises(ConfigError, match=re.escape(f"of the layers {unused[0]!r}, later patterns take every one")):
            layout(NAMES, plan, HOME)
        return
    found = layout(NAMES, plan, HOME)
    assert list(found) == NAMES
    before = HOME
    for name in NAMES:
        assert found[name] == (plan[taken[name][-1]] if taken[name] else before)
        before = found[name]
    whole = {name: device for name, device in found.items() if name and not any(n.startswith(f"{name}.") for n in NAMES)}
    again = layout(NAMES, whole, HOME)  # said in full, it is the same
    assert all(again[name] == device for name, device in whole.items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("model", "devices", "error", "words"),
    [
        (tree(), {"0.2": "cpu"}, ConfigError, "devices names the layer '0.2', which the model doesn't have. It has 0.1"),
        (tree(), {"encoder": "cpu"}, ConfigError, "the model doesn't have. It has 0, 1."),
        (tree(), {"0.1": "cpu", "*": "cpu"}, ConfigError, "of the layers '0.1', later patterns take every one"),
        (tree(), {"0": "cuda:77"}, DeviceError, "devices names 'cuda:77', and this process has cpu"),
        (tree(), {"0": "tpu"}, DeviceError, "devices names 'tpu', and this process has cpu"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    model: nn.Module, devices: dict[str, str], error: type[WorkbenchError], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        ParallelModel(model, devices)


def test_layers_that_share_a_weight_are_not_parted() -> None:
    meta = torch.device("meta")
    with pytest.raises(ConfigError, match="layers 'embedding' and 'head' share a weight, 'weight'.* on cpu and meta"):
        place(Tied(), {"head": meta}, HOME)
    model = Tied()
    found = place(model, {"body": meta, "head": HOME}, HOME)
    assert [str(found[name]) for name in ("embedding", "body", "head")] == ["cpu", "meta", "cpu"]
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ConfigError, match="layers '0' and '2' share a weight"):
        place(nn.Sequential(layer := nn.Linear(2, 2), nn.ReLU(), layer), {"2": meta}, HOME)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_follows_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    meta, x = torch.device("meta"), torch.randn(3, 2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model, {"1": HOME}, HOME)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert other.to(meta)(x).device == meta and model(x).device == HOME
    release(other)
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert all(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("devices", [{"0": "gpu"}, {"0": "cuda"}, {"0": "cuda:-1"}])
def test_a_device_is_a_kind_and_a_number(devices: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"mesh\.devices: '0' has '.*'; a device is cpu, or a kind and a number, e\.g\. cuda:1"):
        TrainConfig(mesh={"devices": devices})


@pytest.mark.parametrize("name", ["shard", "tensor", "pipeline"])
def test_placed_layers_are_not_divided_over_ranks(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"places whole layers, and mesh\.{name}=2 divides them"):
        MeshConfig(**{name: 2, "devices": {"0": "cpu"}}).arranged(2)


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"compile": "reduce-overhead"}, World(device=GPU), "captures graphs, each of one device"),
        ({"memory.recompute": "auto"}, World(device=GPU), "memory: auto measures steps on one device"),
        ({}, World(size=2, device=GPU), "puts layers of 2 copies on one device"),
    ],
)
def test_what_takes_one_device_is_refused(changes: dict[str, Any], world: World, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_others(world, TrainConfig(mesh={"devices": {"0": "cpu"}}).override(changes))


def test_copies_do_not_take_one_another_s_devices() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.devices names 'cuda:1', and each of 2 ranks has a GPU"):
        MeshConfig(devices={"0": "cuda:1"}).arranged(2)
    assert MeshConfig(devices={"0": "cpu"}).arranged(2)["replicate"] == 2


def test_no_loss_is_scaled_for_layers_on_a_cpu() -> None:
    world = with_others(World(device=GPU), TrainConfig(mesh={"devices": {"0": "cpu"}}))
    assert world.devices == (GPU, HOME)
    check_precision("bf16", world)
    with pytest.raises(ConfigError, match="precision='fp16' trains on CUDA only, and mesh.devices puts layers on the CPU"):
        check_precision("fp16", world)


def test_all_on_one_device_is_no_placement(config: Callable[..., TrainConfig], assert_same: Any) -> None:
    chosen = config(ema=0.9)
    assert_same(train(chosen.override({"mesh.devices": {"*": "cpu"}})).run, train(chosen).run)


def test_a_wrong_layer_is_refused_by_a_run(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="devices names the layer 'blocks', which the model doesn't have"):
        train(config(mesh__devices={"blocks": "cpu"}))


@pytest.mark.skipif(not far.KNOWN, reason="this PyTorch has no backends in Python")
def test_runs_and_loops_on_two_devices() -> None:
    """All of ``two_devices.py``, where the second device is."""
    script = Path(__file__).with_name("two_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", str(script)]
    root = script.parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
