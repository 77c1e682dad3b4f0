"""Who holds memory, on a CPU: against storages counted by hand and autograd's own graph, alone and in runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from workbench import TrainConfig, train
from workbench.models.resnet import ResNet
from workbench.probes import ProbeConfig, ProbeSet, StepContext
from workbench.probes.holders import HOLDERS, RunParts, take_census
from workbench.probes.memory import LAYERS, MemoryProbe

BLOCKS = Path(__file__).resolve().parents[1] / "training" / "blocks.py"
CPU = torch.device("cpu")


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Dropout(0.5),
        nn.GELU(),
        nn.Linear(32, 10),
    )


class Functional(nn.Module):
    """Computes between its layers, and uses one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)
        self.head.weight = nn.Parameter(self.again.weight[:10].clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(x.flatten(1)))
        found: Tensor = self.head(self.again(self.again(hidden * hidden.tanh())).relu())
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": convolutional,
    "functional": Functional,
    "residual": lambda: ResNet((4, 8), (1, 1), in_channels=1),
}


def saved(node: Any, seen: set[Any] | None = None) -> Iterator[tuple[int, int]]:
    """Address and bytes of each storage that a graph keeps, read from its nodes' own attributes."""
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    yield tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    for parent, _ in node.next_functions:
        yield from saved(parent, seen)


def probed(model: nn.Module, parts: RunParts | None = None) -> tuple[ProbeSet, dict[tuple[str, int], dict[str, Any]]]:
    found: dict[tuple[str, int], dict[str, Any]] = {}
    probes = ProbeSet(
        {"memory": (MemoryProbe(ProbeConfig()), 1)}, lambda kind, step, columns: found.update({(kind, step): columns})
    )
    probes.attach(model)
    if parts is not None:
        probes.join(parts)
    return probes, found


@pytest.mark.parametrize("name", MODELS)
def test_holders_are_storages_and_activations_what_autograd_saves(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters())
    extra = torch.zeros(1000)
    parts = RunParts(model, optimizer, named={"average": lambda: [extra, extra[:5]]}, buckets=128)
    probes, found = probed(model, parts)
    x, y = torch.randn(24, 1, 8, 8), torch.randint(10, (24,))
    kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    for step in (1, 2, 3):
        probes.begin(step)
        with probes.forward():
            loss = nn.functional.cross_entropy(model(x), y)
        graph = {address: size for address, size in saved(loss.grad_fn) if address not in kept}
        loss.backward()
        probes.read(StepContext(step))
        probes.updated()
        row = {key: pa.array(value)[0].as_py() for key, value in found["memory", step].items()}
        assert row["allocated"] == sum(row[holder] for holder in HOLDERS) + row["other"]
        assert row["parameters"] == row["gradients"] == sum(p.nbytes for p in model.parameters())
        assert row["optimizer"] == sum(v.nbytes for state in optimizer.state.values() for v in state.values())
        assert row["buffers"] == sum(b.nbytes for b in model.buffers())
        assert row["average"] == extra.nbytes and row["exchange"] == 128 and row["teacher"] == row["data"] == 0
        assert row["activations"] == sum(graph.values()) and row["accumulated"] == 0 and np.isnan(row["fragmentation"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert {step for kind, step in found if kind == LAYERS} == {1, 2}, "the optimizer's state is there from the second step on"
    layers = found[LAYERS, 2]
    for holder in ("parameters", "gradients", "optimizer", "activations"):
        assert sum(layers[holder]) == pa.array(found["memory", 2][holder])[0].as_py()
    by_name = dict(zip(layers["layer"], layers["activations"], strict=True))
    if name == "convolutional":
        assert by_name["5"] == 24 * 32 * 4  # the mask of dropout
        assert "3" not in by_name  # a view keeps nothing
        inputs = {"0": 0, "4": 24 * 512 * 4, "6": 24 * 32 * 4}  # of the first the batch, which is not its own
        assert {key: by_name.get(key, 0) for key in inputs} == inputs | {"4": 0}  # the ReLU before it has saved it
    if name == "functional":
        assert by_name["Functional"] > 0  # what it computes between its layers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_watched_pass_gives_the_same_gradients_and_fails_clean() -> None:
    torch.manual_seed(0)
    model, x = convolutional(), torch.randn(24, 1, 8, 8)
    gradients = []
    for watching in (False, True):
        probes, _ = probed(model)
        model.zero_grad()
        torch.manual_seed(1)
        if watching:
            probes.begin(1)
        with probes.forward():
            loss = model(x).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    probes.begin(2)
    with pytest.raises(RuntimeError), probes.forward():
        model(torch.randn(24, 3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def run_config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        data={"name": "digits", "limit": 128, "batch_size": 32},
        model={"name": f"{BLOCKS}:residual", "args": {"width": 8}},
        optim={"name": "adamw"},
        epochs=1,
        device="cpu",
        checkpoint={"every_epochs": 0},
        probes={"memory": {"every": 1}},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


def test_a_run_tells_who_holds_its_memory(tmp_path: Path) -> None:
    found = {}
    for name, changes in {"plain": {}, "saving": {"memory__recompute": 1.0}, "parts": {"accumulate": 2, "ema": 0.9}}.items():
        run = train(run_config(**changes), root=tmp_path).run
        found[name] = run.readings("memory")
        assert (found[name]["allocated"] == found[name][[*HOLDERS, "other"]].sum(axis=1)).all()
        layers = run.readings(LAYERS)
        last = layers[layers["step"] == layers["step"].max()]
        assert last["activations"].sum() == found[name]["activations"].iloc[-1] and (last["parameters"].sum() > 0)
    last = {name: frame.iloc[-1] for name, frame in found.items()}
    assert last["plain"]["data"] > 128 * 64 and last["plain"]["average"] == 0 == last["plain"]["accumulated"]
    assert last["parts"]["average"] > 0.99 * last["parts"]["parameters"]
    assert last["parts"]["accumulated"] == last["parts"]["gradients"]  # the first micro-step's, when the second has computed
    assert last["saving"]["activations"] < 0.7 * last["plain"]["activations"]
    assert last["parts"]["activations"] < 0.6 * last["plain"]["activations"]  # of half as many samples


def test_a_rank_counts_its_own_part_of_what_is_spread() -> None:
    """Of two ranks, one that stands alone: nothing is exchanged."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12))
        for module, placement in ((model[0], Shard(0)), (model[1], Replicate())):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))
        held, by_layer = take_census(model, CPU, None)
        assert by_layer["parameters"] == {"0": (10 * 12 + 12) * 4 // 2, "1": 2 * 12 * 4}
        assert held["parameters"] == sum(by_layer["parameters"].values())
    finally:
        dist.destroy_process_group()
