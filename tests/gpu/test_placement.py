"""Layers placed by hand on a GPU and the CPU, and where there are two, on two GPUs.

Copies between a GPU and the CPU wait by nature; that nothing else does is tested with all layers on GPUs.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench import Run, TrainConfig, train
from workbench.distributed import ParallelModel
from workbench.optim import AdamW, AdaptiveGradientClipper
from workbench.placement import place, return_output
from workbench.probes import PROBES, Probe, ProbeConfig, ProbeSet, StepContext
from workbench.training.average import WeightAverage

TRAINING = Path(__file__).resolve().parents[1] / "training"
BLOCKS = TRAINING / "blocks.py"
CUDA = torch.device("cuda", 0)
MIXED = {"1": "cpu", "7": "cuda:0"}
PLACES = [pytest.param(MIXED, id="cpu"), pytest.param({"1": "cuda:1", "7": "cuda:0"}, id="cuda", marks=pytest.mark.gpu(2))]
"""Convolution, normalization and pooling of the small net elsewhere, its input and its last layer on the run's device."""
ELSEWHERE = [pytest.param("cpu", id="cpu"), pytest.param("cuda:1", id="cuda", marks=pytest.mark.gpu(2))]
GPUS = [pytest.param("cuda:0", id="one"), pytest.param("cuda:1", id="two", marks=pytest.mark.gpu(2))]


@pytest.fixture(scope="module")
def given(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """A config without dropout, whose numbers each device draws for itself."""
    base = {"model__args": {"dropout": 0.0}, "optim__name": "sgd", "optim__lr": 0.05, "ema": 0.9}
    return lambda **changes: config(**base | changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, given: Callable[..., TrainConfig]) -> Run:
    return train(given(), root=tmp_path_factory.mktemp("one")).run


@pytest.mark.parametrize("devices", PLACES)
def test_a_placed_run_has_the_losses_and_readings_of_one_gpu(
    devices: dict[str, str], one: Run, given: Callable[..., TrainConfig], furthest: Callable[[Run, Run], float]
) -> None:
    result = train(given(mesh__devices=devices))
    difference = furthest(one, result.run)
    print(f"{devices}: {difference:.1e}")
    assert difference < 1e-5
    assert [str(p.device) for p in result.model.parameters()] == [devices["1"]] * 3 + [devices["7"]] * 2
    assert result.model(torch.rand(2, 1, 8, 8, device="cuda")).device == torch.device("cuda", 0)
    for kind, columns in (("gradients", ("norm", "max", "weight_norm")), ("activations", ("mean", "std"))):
        mine, its = result.run.readings(kind), one.readings(kind)
        assert mine[["step", "layer"]].to_numpy().tolist() == its[["step", "layer"]].to_numpy().tolist()
        for column in columns:
            np.testing.assert_allclose(mine[column], its[column], rtol=2e-3, atol=1e-5)
    gpus = {torch.device(device).index for device in devices.values() if device != "cpu"}
    total = sum(torch.cuda.get_device_properties(index).total_memory for index in gpus)
    memory = result.run.readings("memory")
    assert (memory["total"] == total).all() and (memory["allocated"] <= memory["peak"]).all()


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"optim": {"name": "adamw", "lr": 2e-3}}, 1e-4),
        ({"clip.mode": "agc", "clip.max_norm": 0.1}, 1e-5),
        ({"penalties": {"l1": 1e-4, "group_lasso": 1e-4}, "accumulate": 2}, 1e-5),
        ({"precision": "bf16"}, 8e-2),
        ({"compile": "default", "deterministic": False}, 1e-3),
    ],
    ids=["adamw", "agc", "penalties", "bf16", "compiled"],
)
def test_whatever_is_trained_with_looks_at_all_devices(
    devices: dict[str, str],
    changes: dict[str, Any],
    tolerance: float,
    tmp_path: Path,
    given: Callable[..., TrainConfig],
    furthest: Callable[[Run, Run], float],
) -> None:
    chosen = given(**changes)
    one, placed = (train(chosen.override({"mesh.devices": where}), root=tmp_path).run for where in ({}, devices))
    difference = furthest(one, placed)
    print(f"{devices}, {changes}: {difference:.1e}")
    assert difference < tolerance


@pytest.mark.gpu(2)
def test_a_scaled_loss_trains_on_two_gpus(
    one: Run, given: Callable[..., TrainConfig], furthest: Callable[[Run, Run], float]
) -> None:
    assert furthest(train(given(mesh__devices={"1": "cuda:1", "7": "cuda:0"}, precision="fp16")).run, one) < 5e-2


@pytest.mark.parametrize("devices", PLACES)
def test_a_placed_run_resumes_bit_for_bit(devices: dict[str, str], given: Callable[..., TrainConfig]) -> None:
    """With dropout on the other device, whose generator is part of the state."""
    chosen = given(mesh__devices=devices, model__args={"dropout": 0.2}, optim__name="adamw", optim__lr=5e-3)
    whole = train(chosen).run
    stopped = train(chosen, replay=[(11, "stop", {})]).run
    assert stopped.status == "stopped"
    resumed = stopped.resume().wait(timeout=300)
    for column in ("step", "loss", "lr", "val_loss"):
        assert resumed.history[column].equals(whole.history[column]), column
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize("placed_first", [True, False])
def test_a_checkpoint_opens_on_other_devices(
    devices: dict[str, str],
    placed_first: bool,
    one: Run,
    given: Callable[..., TrainConfig],
    furthest: Callable[[Run, Run], float],
) -> None:
    first, then = (devices, {}) if placed_first else ({}, devices)
    run = train(given(mesh__devices=first), replay=[(11, "stop", {})]).run
    assert run.status == "stopped"
    assert furthest(one, run.resume(1, mesh={"devices": then}).wait(timeout=300)) < 1e-5


def test_placed_blocks_compute_again_with_the_same_dropout(
    tmp_path: Path, given: Callable[..., TrainConfig], furthest: Callable[[Run, Run], float]
) -> None:
    chosen = given(model={"name": f"{BLOCKS}:residual"}, mesh__devices={"1.1": "cpu", "1.2": "cuda:0"}, epochs=2)
    kept, again = (train(chosen.override({"memory.recompute": share}), root=tmp_path).run for share in (0.0, 1.0))
    assert furthest(kept, again) < 1e-6


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("mode", ["fixed", "dynamic", "agc"])
def test_a_loop_of_ones_own_is_clipped_and_averaged_as_on_one_gpu(mode: Any, elsewhere: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).cuda()
    one = copy.deepcopy(net)
    two = ParallelModel(net, {"2": elsewhere, "4": "cuda:0"})
    assert two.output == torch.device("cuda", 0)
    optimizers = [AdamW(model.parameters(), lr=0.01, fused=True) for model in (one, two)]
    clippers = [AdaptiveGradientClipper(0.2, mode, warmup=3) for _ in range(2)]
    average = WeightAverage(net, 0.9)
    by_hand = {name: value.detach().double().cpu() for name, value in net.named_parameters()}
    for step in range(1, 11):
        x, y = torch.randn(16, 6, device="cuda") * 3, torch.randint(3, (16,), device="cuda")
        for model, optimizer, clipper in zip((one, two), optimizers, clippers, strict=True):
            optimizer.zero_grad()
            with clipper:
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        average.update(step)
        weight = 1.0 if step == 1 else 1 - min(0.9, (1 + step) / (10 + step))
        for name, value in net.named_parameters():
            by_hand[name].lerp_(value.detach().double().cpu(), weight)
    state = two.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(state[name].cuda(), value, rtol=1e-4, atol=1e-5)
    for name, expected in by_hand.items():
        assert average.state[name].device == state[name].device
        torch.testing.assert_close(average.state[name].double().cpu(), expected, rtol=1e-5, atol=1e-6)
    placed = {name: value.clone() for name, value in state.items()}
    with average.swapped():
        assert all(torch.equal(value, average.state[name]) for name, value in net.named_parameters())
    assert all(torch.equal(value, placed[name]) for name, value in two.state_dict().items())


@pytest.mark.parametrize("elsewhere", [*GPUS, pytest.param("cpu", id="cpu")])
def test_readings_are_those_of_a_float64_model(elsewhere: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = runpy.run_path(str(BLOCKS))["residual"](in_channels=3, dropout=0.0).train()
    reference = copy.deepcopy(model).double()
    outputs: dict[str, Tensor] = {}
    for name, module in reference.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, a, output, name=name: outputs.__setitem__(name, output.detach().clone()))
    place(model, {"1.1": torch.device(elsewhere), "1.2": CUDA}, CUDA)
    return_output(model, CUDA)
    readings: dict[str, dict[str, Any]] = {}
    probes: dict[str, tuple[Probe, int]] = {
        kind: (PROBES.create(kind, ProbeConfig()), 1) for kind in ("gradients", "activations")
    }
    chosen = ProbeSet(probes, lambda kind, step, columns: readings.__setitem__(kind, columns))
    chosen.attach(model)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    chosen.begin(1)
    nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
    chosen.read(StepContext(1))
    chosen.collect(wait=True)
    nn.functional.cross_entropy(reference(x.double()), y).backward()
    gradients = dict(reference.named_parameters())
    table = readings["gradients"]
    assert table["layer"] == list(gradients)
    for row, layer in enumerate(table["layer"]):
        gradient, weight = gradients[layer].grad, gradients[layer].detach()
        assert gradient is not None
        assert table["norm"][row] == pytest.approx(float(gradient.norm()), rel=1e-3, abs=1e-6), layer
        assert table["max"][row] == pytest.approx(float(gradient.abs().max()), rel=1e-3, abs=1e-6), layer
        assert table["weight_norm"][row] == pytest.approx(float(weight.norm()), rel=1e-5, abs=1e-6), layer
    table = readings["activations"]
    assert table["layer"] == [name for name in outputs if name != "3" and not name.endswith("dropout")]
    for row, layer in enumerate(table["layer"]):
        value = outputs[layer]
        spread = float(value.std(correction=0))
        assert table["count"][row] == value.numel() and table["nonfinite"][row] == 0
        for name, expected in (
            ("mean", value.mean()),
            ("std", value.std(correction=0)),
            ("min", value.min()),
            ("max", value.max()),
        ):
            assert abs(table[name][row] - float(expected)) < 1e-3 * spread, (layer, name)


@pytest.mark.parametrize("second", GPUS)
def test_nothing_waits_for_a_gpu(second: str) -> None:
    model = runpy.run_path(str(BLOCKS))["residual"]().train()
    place(model, {"1.1": torch.device(second), "4": CUDA}, CUDA)
    return_output(model, CUDA)
    kinds = ("gradients", "activations", "memory")
    chosen = ProbeSet({kind: (PROBES.create(kind, ProbeConfig()), 2) for kind in kinds}, lambda *reading: None)
    chosen.attach(model)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    clipper, average = AdaptiveGradientClipper(0.2, "dynamic"), WeightAverage(model, 0.9)
    x, y = torch.randn(32, 1, 8, 8, device="cuda"), torch.randint(10, (32,), device="cuda")

    def step(number: int) -> None:
        chosen.begin(number)
        with clipper:
            nn.functional.cross_entropy(model(x), y).backward()
            chosen.read(StepContext(number))
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(number)

    for number in (1, 2):  # what is loaded and allocated once, is
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (3, 4):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen.collect(wait=True)
