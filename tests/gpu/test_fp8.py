"""FP8 on a GPU that has it: the arithmetic a CPU emulates, runs that follow bf16's in every mode, checkpoints of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from workbench import TrainConfig, launch, load_model, train
from workbench.distributed import World
from workbench.errors import DeviceError
from workbench.losses import LossConfig, make_loss
from workbench.optim import OptimConfig
from workbench.training import carry_out, fp8, speed
from workbench.training.decisions import Decisions
from workbench.training.objective import Objective
from workbench.training.trial import Trial

CUDA = torch.device("cuda")
eight = pytest.mark.skipif(
    not torch.cuda.is_available() or fp8.lacking(CUDA) is not None, reason="there is no GPU with FP8 arithmetic"
)

NET = Path(__file__).resolve().parents[1] / "training" / "net.py"
LAYERS = ["attn.qkv", "mlp.fc1", "mlp.fc2"]
"""Of each block, those that gain: 17 tokens of 128 images are 2,176 rows, too few for the 1024 × 1024 of attn.proj."""


def small(**changes: Any) -> TrainConfig:
    """A vision transformer of width 1024 on digits."""
    base = TrainConfig(
        data={"name": "digits", "limit": 512, "batch_size": 128, "augment": ()},
        model={"name": f"{NET}:vit", "args": {"depth": 2, "heads": 8, "width": 1024}},
        optim={"name": "adamw", "lr": 1e-4},
        clip={"mode": "dynamic", "max_norm": 1.0},
        ema=0.9,
        epochs=4,
        device="cuda",
        precision="fp8",
        log_every=2,
        checkpoint={"every_epochs": 0},
        probes={"gradients": {"every": 4}, "activations": {"every": 4}},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


def norm_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double().cpu() - other.double().cpu()).norm() / other.double().cpu().norm())


@pytest.mark.skipif(torch.cuda.is_available() and fp8.lacking(CUDA) is None, reason="this GPU has FP8 arithmetic")
def test_a_gpu_without_fp8_is_told_its_compute_capability() -> None:
    with pytest.raises(DeviceError, match=r"compute capability 8.9 or above, and .* has \d+\.\d+"):
        train(small())


@eight
@pytest.mark.parametrize("shape", [(64,), (3, 7)])
def test_products_are_those_that_a_cpu_emulates(shape: tuple[int, ...]) -> None:
    """Rounded alike; sums of the forward pass are kept in the tensor cores' 14 bits or more."""
    torch.manual_seed(0)
    layer, x, g = nn.Linear(256, 128), torch.randn(*shape, 256), 1e-4 * torch.randn(*shape, 128).exp()
    found = []
    for device in ("cpu", "cuda"):
        mine, given = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        fp8.convert([mine])
        y = mine(given)
        y.backward(g.to(device))
        assert given.grad is not None and mine.weight.grad is not None
        found.append([y.detach(), given.grad, mine.weight.grad])
    for emulated, real in zip(*found, strict=True):
        assert norm_error(real, emulated) < 2e-3


@eight
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_compiled_kernels_compute_what_eager_ones_do(mode: str, activation: type[nn.Module]) -> None:
    """A ReLU is a maximum, which Inductor may fuse with the transposed FP8 store of the next layer's input."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), activation(), nn.Linear(2048, 512)).to(CUDA)
    fp8.convert(layer for layer in model if isinstance(layer, nn.Linear))
    x = torch.randn(1024, 512, device=CUDA, requires_grad=True)

    def step() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        x.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        assert x.grad is not None
        return [loss.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    eager = step()
    model.compile(mode=None if mode == "default" else mode)
    for _ in range(4):  # captured from the third on
        compiled = step()
    for one, two in zip(compiled, eager, strict=True):
        assert one.isfinite().all()
        assert norm_error(one, two) < 0.1  # a last bit of bf16 decides which way an e5m2 is rounded


@eight
@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_losses_follow_those_of_bf16(mode: str) -> None:
    result, other = train(small(compile=mode)), train(small(precision="bf16")).run
    run = result.run
    assert run.resolved["fp8"]["value"] == [f"blocks.{block}.{layer}" for block in (0, 1) for layer in LAYERS]
    assert "6 of 9 linear layers" in run.resolved["fp8"]["reason"] and "head (the output layer)" in run.resolved["fp8"]["reason"]
    difference = float(np.abs(run.history["loss"] - other.history["loss"]).max())
    print(f"{mode}: {difference:.1e}")
    assert 0 < difference < 0.1 and run.history["loss"].iloc[-1] < 0.8 * run.history["loss"].iloc[0]
    one, two = run.readings("activations"), other.readings("activations")
    assert len(one) and one[["step", "layer"]].to_numpy().tolist() == two[["step", "layer"]].to_numpy().tolist()
    assert not any(type(module) is fp8.Float8Linear for module in result.model.modules())
    x = torch.randn(4, 1, 8, 8, device=CUDA)
    torch.testing.assert_close(load_model(run.path, "cuda")(x), result.model(x), rtol=0, atol=0)


@eight
@pytest.mark.parametrize("mode", ["off", "default"])
def test_recomputed_blocks_compute_in_fp8_again(mode: str) -> None:
    kept, again = (train(small(compile=mode, memory__recompute=share)).run for share in (0.0, 1.0))
    assert float(np.abs(kept.history["loss"] - again.history["loss"]).max()) < (1e-3 if mode == "off" else 5e-2)


@eight
@pytest.mark.parametrize(("before", "after"), [("fp8", "bf16"), ("bf16", "fp8")])
def test_a_checkpoint_opens_in_another_precision(before: str, after: str) -> None:
    whole = train(small(precision=after)).run
    run = train(small(precision=before), replay=[(6, "stop", {})]).run
    file = run.path / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"precision": after}))
    carry_out(run)
    assert run.status == "finished" and run.history["step"].tolist() == list(range(1, 17))
    assert float(np.abs(run.history["loss"] - whole.history["loss"]).max()) < 0.1


@eight
@pytest.mark.parametrize(("worth", "chosen"), [(0.0, "fp8"), (1e9, "bf16")])
def test_compiled_steps_are_measured_in_both(worth: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.Linear(1024, 10)).to(CUDA)
    x, y = torch.randn(8192, 1024, device=CUDA), torch.arange(8192, device=CUDA) % 10
    choice = fp8.choose(model, x[:2], 2, len(x), lambda: torch.autocast("cuda", dtype=torch.bfloat16))
    assert list(choice.layers) == ["0", "2"]
    trial = Trial(Objective(model, make_loss(LossConfig())), (x, y), OptimConfig(), choice=choice)
    made = Decisions({"precision": {"value": "bf16", "reason": "by rule"}})
    monkeypatch.setattr(speed, "WORTH", worth)
    assert speed.measured_fp8(trial, "reduce-overhead", "bf16", 10**9, 1, World(device=CUDA), made) == chosen
    print(made.made["precision"]["reason"])
    assert all(type(layer) is nn.Linear for layer in choice.layers.values())
    assert (trial.objective._compiled_call_impl is not None) == (chosen == "fp8")


@eight
@pytest.mark.gpu(2)
@pytest.mark.parametrize("changes", [{}, {"compile": "default"}, {"mesh": {"shard": 2}}])
def test_two_ranks_follow_one(changes: dict[str, Any]) -> None:
    """Each rank scales by the largest numbers of its own samples."""
    one = train(small(data__batch_size=256)).run
    run = launch(small(data__batch_size=256, **changes), nproc=2).wait(timeout=300)
    assert run.resolved["fp8"]["value"] and float(np.abs(run.history["loss"] - one.history["loss"]).max()) < 0.1
