"""Memory on CUDA: what is saved, that nothing waits for the device, that predictions and advice hold under a real limit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench import TrainConfig, memory, train
from workbench.allocator import held_by
from workbench.errors import MemoryExhausted
from workbench.memory import MemoryConfig
from workbench.models import ModelConfig, build_model
from workbench.training.checkpointing import recompute_blocks
from workbench.training.offload import ActivationOffload, offload_state

RESIDUAL = f"{Path(__file__).resolve().parents[1] / 'training' / 'blocks.py'}:residual"
CUDA = torch.device("cuda")
BERT = {"width": 256, "layers": 6, "heads": 4, "vocab_size": 1000}


@pytest.fixture
def limited() -> Iterator[None]:
    """This process gets 4 GiB of the device."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(4 * 2**30 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def ids(count: int = 64, length: int = 128) -> tuple[Tensor, Tensor]:
    x = torch.randint(1, 1000, (count, length), generator=torch.Generator().manual_seed(0)).cuda()
    return x, x[:, 0] % 2


def bert() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="bert_small", num_classes=2, args=BERT)).cuda()


def step(model: nn.Module, x: Tensor, y: Tensor, offload: ActivationOffload | None = None) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    context = offload.forward() if offload is not None else torch.enable_grad()
    with context, torch.autocast("cuda", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", ["recompute", "offload", "both"])
def test_less_memory_gives_the_same_gradients_without_waiting_for_the_device(way: str) -> None:
    """Deterministic algorithms, so that equal means bit for bit; ten times, since a copy that came too late shows at times."""
    model, (x, y) = bert(), ids()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = [gradient.clone() for gradient in step(model, x, y)]
        plain = held_by(lambda: step(model, x, y), CUDA).most
        if way != "offload":
            recompute_blocks(model, 1.0)
        offload = ActivationOffload() if way != "recompute" else None
        step(model, x, y, offload)
        torch.cuda.synchronize()
        for _ in range(10):
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = step(model, x, y, offload)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for one, two in zip(found, expected, strict=True):
                assert torch.equal(one, two)
        saving = held_by(lambda: step(model, x, y, offload), CUDA).most
        print(f"{way}: {plain / 2**20:.0f} -> {saving / 2**20:.0f} MiB")
        assert saving < 0.6 * plain
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_optimizers_state_waits_in_main_memory() -> None:
    models = [bert() for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    offload_state(optimizers[1])
    x, y = ids()
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, x, y)
            optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True))
    away = [value for state in optimizers[1].state.values() for value in state.values() if not value.is_cuda]
    assert sum(value.nbytes for value in away) > 0.9 * 2 * sum(p.nbytes for p in models[1].parameters())
    assert all(value.is_pinned() for value in away)
    kept, moved = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for index, state in kept.items():
        assert torch.equal(state["exp_avg"].cpu(), moved[index]["exp_avg"].cpu())


def run_config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        data={"name": "digits", "limit": 512, "batch_size": 128},
        model={"name": RESIDUAL, "args": {"width": 16}},
        epochs=3,
        device="cuda",
        precision="fp32",
        deterministic=True,
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_runs_that_compute_blocks_again_learn_the_same(mode: str, tmp_path: Path) -> None:
    """Captured graphs too: dropout draws the same masks the second time."""
    plain, again = (
        train(run_config(compile=mode, memory__recompute=share), root=tmp_path).run.history["loss"] for share in (0.0, 1.0)
    )
    assert (plain - again).abs().max() < (1e-6 if mode == "off" else 1e-3)


@pytest.mark.parametrize("mode", ["off", "default"])
def test_a_run_with_everything_offloaded_learns_the_same_and_resumes(mode: str, tmp_path: Path) -> None:
    config = run_config(compile=mode, memory__offload="both")
    plain = train(run_config(compile=mode), root=tmp_path).run
    away = train(config, root=tmp_path).run
    stopped = train(config, root=tmp_path, replay=[(5, "stop", {})]).run.resume().wait(timeout=300)
    for run in (away, stopped):
        assert (run.history["loss"] - plain.history["loss"]).abs().max() < 1e-5


def test_the_choice_meets_the_budget_and_names_the_fastest() -> None:
    model, data = bert(), ids(256)
    before = copy.deepcopy(model.state_dict())
    whole = memory.optimizer(model, 60, data=data, precision="bf16")
    peak = whole.tried[0].measured.peak / 2**30  # type: ignore[union-attr]
    choice = memory.optimizer(model, 0.6 * peak, data=data, precision="bf16")
    print(choice.reason, choice.table, sep="\n")
    fitting = choice.table[choice.table["fits"]]
    assert (fitting["peak_gib"] <= 0.6 * peak).all() and len(fitting) >= 2
    assert fitting.set_index("chosen").loc[True, "seconds"] == fitting["seconds"].min()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_largest_batch_is_predicted_under_a_limit_of_the_device(limited: None) -> None:
    for plan in (MemoryConfig(), MemoryConfig(recompute=1.0), MemoryConfig(offload="both")):
        found = memory.largest_batch(bert(), data=ids(), precision="bf16", memory=plan)
        print(plan, found.samples, f"{found.error:+.2%}")
        assert found.measured is not None and found.measured <= found.budget
        assert abs(found.error) < 0.05
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("mode", ["off", "reduce-overhead"])
def test_advice_after_running_out_fits_under_the_same_limit(mode: str, limited: None, tmp_path: Path) -> None:
    large = run_config(
        compile=mode, model__args={"width": 512, "depth": 12}, data__batch_size=512, max_steps=2, deterministic=False
    )
    with pytest.raises(MemoryExhausted, match="each proved by a step to fit") as caught:
        train(large, root=tmp_path)
    print(caught.value)
    advised = caught.value.remedy.split("to fit: ")[1].split(" (")[0]
    del caught
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    train(large.override([part.strip() for part in advised.split(" with ")]), root=tmp_path)
