"""A model in stages: where it is cut, that the stages together are the model, and what is said where it can't be cut."""

from __future__ import annotations

import copy
import itertools
import math
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from workbench import Run, TrainConfig, launch, train
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model
from workbench.training.stages import Stage, divided, even_starts

pytestmark = pytest.mark.usefixtures("forked")
NET = Path(__file__).with_name("net.py")
net = runpy.run_path(str(NET))


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=9), st.integers(1, 4))
def test_stages_are_as_even_as_can_be(blocks: list[tuple[int, bool]], stages: int) -> None:
    costs, cuttable = [cost for cost, _ in blocks], [may for _, may in blocks]

    def dearest(starts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise([*starts, len(costs)]))

    places = [place for place in range(1, len(blocks)) if cuttable[place]]
    possible = [(0, *cuts) for cuts in itertools.combinations(places, stages - 1)]
    found = even_starts(costs, cuttable, stages)
    if not possible:
        assert found is None
    else:
        assert found is not None and tuple(found) in possible
        assert dearest(tuple(found)) == min(map(dearest, possible))


def in_stages(model: nn.Module, stages: int, x: torch.Tensor) -> list[tuple[nn.Module, Stage]]:
    copies = [copy.deepcopy(model) for _ in range(stages)]
    return [(part, divided(part, stages, number, x, nullcontext)) for number, part in enumerate(copies)]


MODELS: dict[str, tuple[int, torch.Tensor]] = {
    "resnet20": (4, torch.rand(2, 3, 32, 32)),
    "resnet18": (3, torch.rand(2, 3, 64, 64)),
    "vit_tiny_patch16_224": (2, torch.rand(2, 3, 224, 224)),
    "swin_tiny_patch4_window7_224": (2, torch.rand(2, 3, 224, 224)),
    "convnext_tiny": (3, torch.rand(2, 3, 64, 64)),
    "mobilenetv3_large_100": (2, torch.rand(2, 3, 64, 64)),
    "efficientnet_b0": (2, torch.rand(2, 3, 64, 64)),
    "bert_small": (4, torch.randint(1, 100, (2, 12))),
}


@pytest.mark.parametrize("name", MODELS)
def test_stages_together_are_the_model(name: str) -> None:
    stages, x = MODELS[name]
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, num_classes=5)).eval()
    parts = in_stages(model, stages, x)
    expected = model(x)
    expected.square().sum().backward()

    hidden: torch.Tensor | None = None
    ends: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    for part, stage in parts:
        entered = None if hidden is None else hidden.detach().requires_grad_()
        hidden = stage(lambda part=part: part(x), entered)
        ends.append((entered, hidden))
    assert torch.equal(ends[-1][1], expected)
    gradient: Any = None
    for entered, left in reversed(ends):
        (left.square().sum() if gradient is None else left).backward(gradient)
        gradient = None if entered is None else entered.grad

    owned: set[str] = set()
    for part, stage in parts:
        own = {key for key in part.state_dict() if stage.owns(key)}
        assert not owned & own
        owned |= own
        for key, parameter in part.named_parameters():
            if stage.owns(key):
                torch.testing.assert_close(parameter.grad, model.get_parameter(key).grad, rtol=1e-4, atol=1e-6)
            else:
                assert parameter.untyped_storage().nbytes() <= 8 and not parameter.requires_grad
    assert owned == set(model.state_dict())


class Tied(nn.Module):
    """Two blocks, and an embedding that is the classifier too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embedding(x)).mean(1) @ self.embedding.weight.T


class Again(nn.Module):
    """One block, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.blocks(x))


@pytest.mark.parametrize(
    ("model", "x", "error"),
    [
        (Tied(), torch.zeros(2, 3, dtype=torch.int64), r"'embedding.weight' is used in the stages \[0, 1\]"),
        (Again(), torch.zeros(2, 4), "is called twice"),
        (net["net"](), torch.zeros(2, 1, 8, 8), r"Sequential can be cut into 1 stage\(s\)"),
        (net["vit"](depth=1), torch.zeros(2, 1, 8, 8), r"can be cut into 1 stage\(s\)"),
    ],
)
def test_what_cannot_be_cut_is_said(model: nn.Module, x: torch.Tensor, error: str) -> None:
    with pytest.raises(ModelError, match=error):
        divided(model, 2, 0, x, nullcontext)


def furthest(one: Run, other: Run, column: str = "loss") -> float:
    assert one.history["step"].tolist() == other.history["step"].tolist()
    return float(np.nanmax(np.abs(one.history[column] - other.history[column])))


@pytest.fixture(scope="module")
def given_config(config: Callable[..., TrainConfig]) -> TrainConfig:
    """Residual blocks with batch normalization, which shows the smallest difference; stages keep images contiguous."""
    changes = {"accumulate": 4, "channels_last": False, "clip.mode": "off", "ema": 0.9, "eval_every": 2}
    return config(**{"model.name": "resnet20", "model.args": {"width": 4}}, **changes)


@pytest.fixture(scope="module")
def alone(given_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(given_config, root=tmp_path_factory.mktemp("alone")).run


def test_stages_of_copies_learn_as_one_process(given_config: TrainConfig, tmp_path: Path) -> None:
    # Copies normalize by their own batches' statistics: a net without these can be compared.
    given = given_config.override({"model": {"name": f"{NET}:vit", "args": {"depth": 3}}, "clip.mode": "dynamic"})
    one = train(given, root=tmp_path).run
    run = launch(given.override({"mesh": {"pipeline": 2, "shard": 2}}), nproc=4, root=tmp_path).wait(timeout=180)
    difference = furthest(one, run)
    print(f"pipeline × shard: largest difference of {len(one.history)} losses {difference:.1e}")
    assert difference < 1e-5 and furthest(one, run, "val_loss") < 1e-5 and furthest(one, run, "accuracy") == 0
    mine, its = (
        r.readings(kind).drop_duplicates(["step", "layer"]).sort_values(["step", "layer"], ignore_index=True)
        for kind in ("gradients",)
        for r in (run, one)
    )
    assert mine["layer"].tolist() == its["layer"].tolist()
    np.testing.assert_allclose(mine["norm"], its["norm"], rtol=2e-3, atol=2e-5)
    layers = [set(r.readings("activations")["layer"]) for r in (run, one)]
    assert layers[0] == layers[1]


def test_a_checkpoint_of_stages_opens_on_one_process(given_config: TrainConfig, alone: Run, tmp_path: Path) -> None:
    run = launch(given_config.override({"mesh.pipeline": 2}), nproc=2, root=tmp_path, replay=[(11, "stop", {})])
    assert run.wait(timeout=180).status == "stopped"
    run.resume(1, mesh={}).wait(timeout=180)
    assert furthest(alone, run) < 1e-5
    mine, its = (load_file(r.path / "model.safetensors") for r in (run, alone))
    assert mine.keys() == its.keys()
    for key, value in its.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4)


def test_what_needs_the_whole_model_is_refused(given_config: TrainConfig, tmp_path: Path) -> None:
    assert math.prod(given_config.mesh.arranged(1).values()) == 1
    with pytest.raises(ConfigError, match=r"pipeline=2 × replicate=1 takes 2 ranks, and there are 1"):
        train(given_config.override({"mesh.pipeline": 2}), root=tmp_path)
