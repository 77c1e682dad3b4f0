"""Steps that take less memory and learn the same; what is predicted of them, chosen and advised, against the allocator."""

from __future__ import annotations

import copy
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.training.blocks import Counting, residual
from workbench import Run, TrainConfig, launch, memory, train
from workbench.allocator import held_by
from workbench.errors import ConfigError, MemoryExhausted, ModelError
from workbench.memory import MemoryConfig
from workbench.models import ModelConfig, build_model
from workbench.probes import PROBES, ProbeConfig, StepContext
from workbench.training import fitting
from workbench.training.checkpointing import recompute_blocks
from workbench.training.economy import check_memory
from workbench.training.failure import in_words
from workbench.training.offload import ActivationOffload, offload_state

pytestmark = pytest.mark.usefixtures("forked")
CPU = torch.device("cpu")
RESIDUAL = f"{Path(__file__).with_name('blocks.py')}:residual"
PREDICTED = 0.02
"""Share by which a predicted peak may differ from the measured one."""


# -- computing again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"memory.recompute": 1.0}, {"memory.recompute": 0.5, "accumulate": 2, "precision": "bf16"}],
    ids=["all", "half-bf16-accumulated"],
)
def test_a_run_that_computes_blocks_again_is_the_same_bit_for_bit(
    changes: dict[str, Any], config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    """Losses, weights, batch statistics, dropout, and readings, which count each layer once."""
    base = config(**({"model.name": RESIDUAL, "epochs": 2} | {name: changes[name] for name in changes if "memory" not in name}))
    plain, again = (train(chosen, root=tmp_path) for chosen in (base, base.override(changes)))
    assert_same(plain.run, again.run)
    assert not any("forward" in vars(module) for module in again.model.modules())  # it is given back as it was


def test_a_compiled_step_that_computes_blocks_again_is_the_same_and_keeps_less() -> None:
    """Through the compiler's own division of the graph into the two passes, without the minutes of making kernels."""
    x = torch.randn(64, 1, 8, 8)
    found, kept, counts = [], [], []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        model = residual(width=16)
        probe = PROBES.create("activations", ProbeConfig(every=1))
        detach = probe.attach(model)
        recompute_blocks(model, share)
        torch.compiler.reset()
        model.compile(backend="aot_eager_decomp_partition")
        probe.arm()
        found.append([*gradients(model, x), *model.buffers()])
        reading = probe.read(StepContext(1))
        assert reading is not None
        counts.append(probe.table(1, reading.numpy())["count"].tolist())
        kept.append(saved(model, x))
        detach()
    torch.compiler.reset()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert counts[0] == counts[1]
    assert kept[1] < 0.6 * kept[0]


def test_a_teacher_is_learned_from_the_same(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The terms look at layers within blocks that compute again."""
    teacher = train(config(**{"model.name": RESIDUAL, "epochs": 1}), root=tmp_path).run
    base = config(
        **{
            "model.name": RESIDUAL,
            "epochs": 1,
            "distill": {"teacher": str(teacher.path), "terms": {"soft": 0.5, "features": 0.5}, "layers": ["1.?.norm"]},
        }
    )
    plain, again = (train(base.override({"memory.recompute": share}), root=tmp_path).run for share in (0.0, 1.0))
    assert plain.history["loss"].tolist() == again.history["loss"].tolist()


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass leaves behind for its backward pass."""
    outputs: list[Tensor] = []
    gc.collect()
    return held_by(lambda: outputs.append(model(x).sum()), x.device).kept


def perceptrons(count: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) for _ in range(count))
    )


@pytest.mark.parametrize(("share", "blocks"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_a_block_that_computes_again_keeps_its_input_alone(share: float, blocks: int) -> None:
    """Linear -> ReLU -> Linear of widths w, 4w, w keeps its input and the ReLU's output: 5 w numbers a sample, or 1 w."""
    model, x = perceptrons(4, 64), torch.randn(1024, 64)
    undo = recompute_blocks(model, share)
    number = 1024 * 64 * 4
    # Random states take some bytes too. The last output is not kept, the first input was there before.
    expected = (4 * 4 + 3 - 4 * blocks) * number
    assert saved(model, x) == pytest.approx(expected, abs=number // 4)
    undo()
    assert saved(model, x) == pytest.approx((4 * 4 + 3) * number, abs=number // 4)


def test_a_block_that_changes_its_state_is_refused() -> None:
    model = nn.Sequential(Counting(), Counting())
    recompute_blocks(model, 1.0)
    with pytest.raises(ModelError, match=r"The buffer 'calls' of a Counting changes.*memory.recompute=0"):
        model(torch.randn(2, 8))
    with torch.no_grad():
        model(torch.randn(2, 8))


def test_a_model_without_blocks_is_refused(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="takes a model of repeated blocks, and Sequential has none"):
        train(config(memory__recompute=1.0))


# -- main memory ------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor, offload: ActivationOffload | None = None) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    if offload is None:
        loss = model(x).square().sum()
    else:
        with offload.forward():
            loss = model(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_activations_that_waited_elsewhere_give_the_same_gradients(share: float) -> None:
    model, x = residual(), torch.randn(16, 1, 8, 8)
    expected = gradients(copy.deepcopy(model), x)
    recompute_blocks(model, share)
    offload = ActivationOffload(smallest=1)
    for _ in range(2):
        for one, two in zip(gradients(copy.deepcopy(model), x, offload), expected, strict=True):
            assert torch.equal(one, two)
        assert offload.moved > 0


def test_a_tensor_travels_once_and_parameters_and_small_ones_stay() -> None:
    model, x = perceptrons(2, 64), torch.randn(32, 64, requires_grad=True)
    offload = ActivationOffload(smallest=1)
    gradients(model, x, offload)
    # Inputs [32, 64] of two blocks, ReLU's outputs [32, 256], saved by ReLU and by the next layer; the output that is squared.
    assert offload.moved == 4 * 32 * (3 * 64 + 2 * 256)
    offload = ActivationOffload(smallest=4 * 32 * 256)
    gradients(model, x, offload)
    assert offload.moved == 4 * 32 * 2 * 256
    repeated = torch.randn(1, 64).expand(512, 64)
    with ActivationOffload(smallest=1).forward() as _:
        (repeated * torch.randn(512, 64, requires_grad=True)).sum().backward()


def test_offload_of_the_optimizers_state_changes_no_update() -> None:
    """On a CPU it is there already; what matters is that hooks leave updates and saved state alone."""
    torch.manual_seed(0)
    models = [nn.Linear(8, 8) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    undo = offload_state(optimizers[1])
    x = torch.randn(4, 8)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(models[0].weight, models[1].weight)
    state = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert torch.equal(state[0][0]["exp_avg"], state[1][0]["exp_avg"])
    undo()
    assert not optimizers[1]._optimizer_step_pre_hooks and not optimizers[1]._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("memory", "device", "mode", "sharded", "words"),
    [
        ({"offload": "optimizer"}, "cpu", "off", False, "moves tensors from a GPU"),
        ({"offload": "both"}, "cuda", "reduce-overhead", False, "captures graphs whose memory is fixed"),
        ({"offload": "optimizer"}, "cuda", "off", True, "this mesh has spread it"),
        ({"recompute": "auto"}, "cuda", "off", True, "on this mesh no rank holds one"),
    ],
)
def test_what_cannot_save_memory_is_refused(memory: dict[str, Any], device: str, mode: str, sharded: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}.* (Set|Take) "):
        check_memory(MemoryConfig(**memory), torch.device(device), mode, sharded=sharded)


# -- predicting and choosing ------------------------------------------------------------------------------------------


def bert() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 4, "heads": 2, "vocab_size": 100}
    ids = torch.randint(1, 100, (64, 32))
    return build_model(ModelConfig(name="bert_small", num_classes=2, args=sizes)), (ids, ids[:, 0] % 2)


def test_the_choice_is_the_fewest_blocks_that_fit_and_leaves_everything_as_it_was() -> None:
    model, data = bert()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    whole = memory.optimizer(model, 1, data=data)
    assert whole.overrides == {"memory.recompute": 0.0, "memory.offload": "none"} and "nothing is faster" in whole.reason
    budget = 0.75 * whole.tried[0].measured.peak / 2**30  # type: ignore[union-attr]
    choice = memory.optimizer(model, budget, data=data)
    table = choice.table.set_index("recompute")
    chosen = float(choice.memory.recompute)
    row = table.loc[chosen]
    assert 0 < chosen < 1 and row["chosen"] and row["fits"] and row["peak_gib"] <= budget and row["seconds"] > 0
    assert abs(row["predicted_gib"] / row["peak_gib"] - 1) < PREDICTED
    fewer = memory.largest_batch(model, budget, data=data, memory=MemoryConfig(recompute=chosen - 0.25))
    assert fewer.samples < 64  # with one block fewer, the batch would not fit
    assert f"{budget:.3g} GiB" in choice.reason and "keeping everything would take" in choice.reason
    with pytest.raises(MemoryExhausted, match=r"Nothing brings a step of 64 samples under .*the least, recomputing"):
        memory.optimizer(model, budget / 10, data=data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["bert", "images"])
def test_the_largest_batch_is_predicted_within_a_stated_error(kind: str, config: Callable[..., TrainConfig]) -> None:
    given: dict[str, Any]
    if kind == "bert":
        model, data = bert()
        given = {"model": model, "data": data}
    else:
        given = {"model": config(model__name=RESIDUAL)}
    limit = 0.03
    found = memory.largest_batch(budget=limit, **given)
    print(f"{kind}: {found.samples} samples, predicted {found.error:+.2%} off")
    assert found.measured is not None and found.measured <= limit * 2**30
    assert abs(found.error) < PREDICTED
    saving = memory.largest_batch(budget=limit, memory=MemoryConfig(recompute=1.0), **given)
    assert saving.samples > 1.3 * found.samples
    with pytest.raises(MemoryExhausted, match="No batch fits"):
        memory.largest_batch(budget=1e-5, **given)


def test_a_module_needs_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"does not tell what it trains on. Give a batch"):
        memory.optimizer(bert()[0], 1)
    with pytest.raises(ConfigError, match="auto chooses for one batch size"):
        memory.largest_batch(bert()[0], 1, data=bert()[1], memory=MemoryConfig(recompute="auto"))


def test_a_run_chooses_once_says_why_and_learns_the_same(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = config(**{"model.name": RESIDUAL, "model.args": {"width": 32}, "epochs": 2})
    auto = base.override({"memory.recompute": "auto", "memory.offload": "auto", "memory.budget": 0.003})
    plain, chosen = (train(one, root=tmp_path).run for one in (base, auto))
    assert_same(plain, chosen)
    resolved = yaml.safe_load((chosen.path / "resolved.yaml").read_text())
    assert 0 < resolved["memory.recompute"]["value"] <= 1 and resolved["memory.offload"]["value"] == "none"
    assert "of 0.003 GiB" in resolved["memory.recompute"]["reason"]
    stopped = train(auto, root=tmp_path, replay=[(5, "stop", {})]).run
    monkeypatch.setattr(fitting, "choose", None)  # decided already
    from workbench import launcher
    from workbench.training.session import execute

    execute(stopped, launcher.claim(stopped.path, 1))
    assert_same(Run.open(stopped.path), chosen)


@pytest.mark.parametrize("shard", [1, 2])
def test_ranks_compute_blocks_again_as_one_process_does(shard: int, config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Copies, which choose for themselves, and shards."""
    base = config(**{"model.name": RESIDUAL, "model.args": {"dropout": 0.0, "normed": False}, "epochs": 1, "accumulate": 2})
    saving = {"recompute": 1.0} if shard == 2 else {"recompute": "auto", "budget": 0.0002}
    alone = train(base, root=tmp_path).run
    ranks = launch(base.override({"memory": saving, "mesh.shard": shard}), nproc=2, root=tmp_path).wait(timeout=120)
    np.testing.assert_allclose(ranks.history["loss"], alone.history["loss"], rtol=0, atol=1e-5)
    if shard == 1:
        assert yaml.safe_load((ranks.path / "resolved.yaml").read_text())["memory.recompute"]["value"] > 0


# -- advice -----------------------------------------------------------------------------------------------------------

LIMITED = """
import psutil, resource, sys
import torch, workbench.training.session
from workbench import TrainConfig, train
workbench.training.advice.ENOUGH = 1
config = TrainConfig.from_yaml(sys.argv[1])
size = psutil.Process().memory_info().vms + 1_050_000_000
resource.setrlimit(resource.RLIMIT_AS, (size, size))
train(config.override(sys.argv[3:]), root=sys.argv[2])
"""


def test_advice_after_running_out_of_memory_fits_under_the_same_limit(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """A limit of the system on a process; the same process with each of the settings advised."""
    large = config(
        **{
            "data": {"name": "digits", "batch_size": 1400},
            "model": {"name": RESIDUAL.replace("residual", "wide")},
            "optim.name": "sgd",
            "clip.mode": "off",
            "precision": "fp32",
            "max_steps": 1,
            "eval_every": 0,
            "checkpoint": {"every_epochs": 0},
            "probes": {kind: {"every": 0} for kind in ("gradients", "activations", "memory")},
        }
    )
    large.to_yaml(tmp_path / "config.yaml")

    def limited(*changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(tmp_path / "config.yaml"), str(tmp_path / "runs"), *changes]
        # Else each thread that allocates reserves 128 MB of addresses, at a time of its own.
        env = os.environ | {"MALLOC_ARENA_MAX": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)

    assert limited().returncode == 1
    (run,) = Run.all(tmp_path / "runs")
    assert run.error is not None
    print(run.error)
    assert re.search(r"A step takes about [\d.]+ GiB, and there are [\d.]+ for it. Set one of these, each proved", run.error)
    advised = re.findall(r"([\w.]+=\w+) \(([\d.]+) GiB predicted, ([\d.]+) measured", run.error)
    assert advised[0][0].startswith("accumulate=")
    for _, predicted, measured in advised:
        assert float(predicted) == pytest.approx(float(measured), rel=0.1)
    followed = limited(advised[0][0])
    assert followed.returncode == 0, followed.stderr


def test_advice_that_could_not_be_tested_says_so(config: Callable[..., TrainConfig]) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB.")
    said = in_words(full, config(precision="fp32", data__batch_size=64))
    assert isinstance(said, MemoryExhausted)
    assert said.what == "Out of memory with data.batch_size=64, asking for 2.50 GiB."
    untested = "Try accumulate=2, or memory.recompute=1, or precision=bf16, or data.batch_size=32; none of it could be tested."
    assert said.remedy == untested
