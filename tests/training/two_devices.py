"""Tests of placed layers on two devices, for a process of its own: ``test_placement.py`` runs them (see ``tests/far.py``).

The second device computes the same bits, and refuses tensors of the first. So whatever is equal bit for bit was moved when it had
to be, and computed as on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import far
from workbench import Run, TrainConfig, launcher, save_model, train
from workbench.distributed import ParallelModel, stacked, whole_norms
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model
from workbench.optim import AdamW, AdaptiveGradientClipper
from workbench.placement import place
from workbench.training.session import execute

FAR, CPU = far.register(), torch.device("cpu")
BLOCKS = Path(__file__).with_name("blocks.py")
PLACED = {"mesh.devices": {"1.1": "far:0", "4": "cpu"}}
"""The second block of three, the third, pooling and flattening on one device, what is before and after on the other."""


@pytest.fixture(scope="module")
def given(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Everything that looks at all weights, or at several layers, at once."""
    model = {"name": f"{BLOCKS}:residual", "args": {"width": 4}}
    teacher = build_model(ModelConfig(**model, num_classes=10, in_channels=1))
    return config(
        model=model,
        distill={
            "teacher": str(save_model(teacher, tmp_path_factory.mktemp("teacher"))),
            "terms": {"soft": 0.5, "features": 0.1},
            "layers": ["1.1"],
        },
        penalties={"l1": 1e-4, "group_lasso": 1e-5},
        accumulate=2,
        ema=0.9,
        epochs=2,
        data__limit=128,
        channels_last=False,  # the second device knows one layout
    )


@pytest.fixture(scope="module")
def near(given: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(given, root=tmp_path_factory.mktemp("near")).run


def go_on(run: Run, mesh: dict[str, Any]) -> Run:
    """Resume in this process, on another mesh."""
    full = type(run.config.mesh)(**mesh).model_dump(mode="json")
    number = launcher.claim(run.path, 1)
    launcher.record(run.path, number, 1, launcher.Process.current(), full)
    execute(run, number)
    return Run.open(run.path)


def test_a_placed_run_is_that_of_one_device(given: TrainConfig, near: Run, assert_same: Any, tmp_path: Path) -> None:
    result = train(given.override(PLACED), root=tmp_path)
    assert_same(result.run, near)
    devices = {name: p.device for name, p in result.model.named_parameters()}
    assert {name for name, device in devices.items() if device == FAR} == {n for n in devices if n.startswith(("1.1", "1.2"))}
    x = torch.randn(3, 1, 8, 8)
    found = result.model(x)  # works as it is, and on one device
    assert found.device == CPU
    torch.testing.assert_close(result.model.to(CPU)(x), found, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "then"), [({}, PLACED), (PLACED, {}), (PLACED, PLACED)])
def test_a_checkpoint_opens_on_other_devices(
    first: Any, then: Any, given: TrainConfig, near: Run, assert_same: Any, tmp_path: Path
) -> None:
    run = train(given.override(first), root=tmp_path, replay=[(5, "stop", {})]).run
    assert run.status == "stopped"
    assert_same(go_on(run, {"devices": then.get("mesh.devices", {})}), near)


def test_a_join_of_layers_on_two_devices_is_refused_in_words(given: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"same device.* Set mesh\.devices so that layers whose outputs are added or joined"):
        train(given.override({"mesh.devices": {"1.1.norm": "far:0"}, "distill": None}), root=tmp_path)


def test_a_divided_block_is_not_computed_again(given: TrainConfig, tmp_path: Path) -> None:
    changes = {"mesh.devices": {"1.1.conv": "far:0", "1.1.norm": "cpu"}, "distill": None, "memory.recompute": 1.0}
    with pytest.raises(ConfigError, match=r"mesh\.devices divides the block '1\.1' over cpu and far:0"):
        train(given.override(changes), root=tmp_path)


@pytest.mark.parametrize("mode", ["fixed", "dynamic", "agc"])
def test_a_loop_of_ones_own(mode: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    one = copy.deepcopy(net)
    two = ParallelModel(net, {"1": "far:0", "4": "cpu"})
    assert two.model is net and {name for name, device in two.devices.items() if device == FAR} == {"1", "2", "3"}
    optimizers = [AdamW(model.parameters(), lr=0.01) for model in (one, two)]
    clippers = [AdaptiveGradientClipper(0.2, mode, warmup=3) for _ in range(2)]
    for _ in range(8):
        x, y = torch.randn(16, 6) * 3, torch.randint(3, (16,))
        for model, optimizer, clipper in zip((one, two), optimizers, clippers, strict=True):
            optimizer.zero_grad()
            with clipper:
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    state = two.state_dict()
    assert list(state) == list(one.state_dict())
    for name, value in one.state_dict().items():
        # The norm of all gradients is a sum over devices, of the same numbers in the same order.
        assert torch.equal(state[name].cpu(), value), name
    again = ParallelModel(copy.deepcopy(one), {"3": "far:0"}, output="far:0")
    again.load_state_dict(state)
    assert again.eval()(x).device == FAR
    assert torch.equal(again(x).cpu(), one.eval()(x))


class Pair(nn.Module):
    """Takes what it needs by position, by name, in a list and in a dict, and gives it so."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Linear(4, 4), nn.Linear(4, 4), Join()
        self.word = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        left = self.left(x)
        right = self.right(x * self.word)
        return self.join([left, {"right": right}], scale=self.word, note="kept")


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, parts: list[Any], *, scale: Tensor, note: str) -> dict[str, Any]:
        return {"sum": (parts[0] + parts[1]["right"] * scale * self.weight,), "note": note}


@pytest.mark.parametrize("devices", [{"right": "far:0", "join": "cpu"}, {"left": "far:0"}, {"*": "far:0"}, {"join": "far:0"}])
def test_whatever_a_layer_is_given_comes_to_it(devices: dict[str, str]) -> None:
    torch.manual_seed(0)
    one = Pair()
    two = ParallelModel(copy.deepcopy(one), devices, output="cpu")
    x = torch.randn(3, 4)
    expected, found = one(x), two(x)
    assert found["note"] == "kept" and torch.equal(found["sum"][0], expected["sum"][0])
    expected["sum"][0].sum().backward()
    found["sum"][0].sum().backward()
    for (name, mine), its in zip(one.named_parameters(), two.parameters(), strict=True):
        assert mine.grad is not None and its.grad is not None
        assert torch.equal(its.grad.cpu(), mine.grad), name


class Same(nn.Linear):
    def forward(self, x: Any) -> Any:
        return x


def test_packed_sequences_travel_whole() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    net = Same(3, 3)
    place(net, {"*": FAR}, CPU)
    found = net(packed)
    assert found.data.device == FAR and found.batch_sizes.device == CPU  # where an LSTM wants the sizes
    assert torch.equal(found.data.cpu(), packed.data)


def test_norms_are_those_of_each_tensor_wherever_it_lies() -> None:
    torch.manual_seed(0)
    near = [torch.randn(size) for size in (3, 1, 0, 7)]
    mixed = [tensor.to(FAR) if index % 2 else tensor for index, tensor in enumerate(near)]
    for order in (2.0, float("inf")):
        filled = [index for index, tensor in enumerate(near) if tensor.numel()]
        found = whole_norms([mixed[index] for index in filled], order)
        assert torch.equal(found, whole_norms([near[index] for index in filled], order))
    scalars = [tensor.sum() for tensor in near]
    assert torch.equal(stacked([tensor.sum() for tensor in mixed]), torch.stack(scalars))
