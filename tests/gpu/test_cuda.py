"""What must also hold on CUDA: readings, precision, resuming, two ranks. Skipped where there is no device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench import Run, TrainConfig, launch, train
from workbench.models.resnet import ResNet
from workbench.optim import AdamW, AdaptiveGradientClipper
from workbench.probes import PROBES, Probe, ProbeConfig, ProbeSet, StepContext


def same(one: Run, other: Run) -> None:
    for column in ("step", "loss", "lr", "val_loss"):
        assert one.history[column].equals(other.history[column]), column
    assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by parameter and outputs by leaf layer of a float64 copy."""
    model = copy.deepcopy(model).double()
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, a, output, name=name: outputs.__setitem__(name, output.detach().clone()))
    nn.functional.cross_entropy(model(x.double()), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, outputs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["eager", "default", "reduce-overhead"])
def test_readings_are_those_of_a_float64_model(mode: str, layout: torch.memory_format) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    torch.compiler.reset()
    model = ResNet((8, 16), (1, 1), in_channels=3).cuda().to(memory_format=layout).train()
    readings: dict[tuple[str, int], dict[str, Any]] = {}
    probes: dict[str, tuple[Probe, int]] = {
        kind: (PROBES.create(kind, ProbeConfig()), 3) for kind in ("gradients", "activations")
    }
    chosen = ProbeSet(probes, lambda kind, step, columns: readings.__setitem__((kind, step), columns))
    chosen.attach(model)
    data = [
        (torch.randn(64, 3, 16, 16, device="cuda").to(memory_format=layout), torch.randint(10, (64,), device="cuda"))
        for _ in range(7)
    ]
    expected = [by_hand(model, *pair) for pair in data]
    if mode != "eager":
        model.compile(mode=None if mode == "default" else mode)
    for step, (x, y) in enumerate(data, start=1):
        model.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        chosen.begin(step)
        nn.functional.cross_entropy(model(x), y).backward()
        chosen.read(StepContext(step))
        chosen.updated()
    chosen.collect(wait=True)
    assert {step for _, step in readings} == {1, 3, 6}
    worst = 0.0
    for step in (1, 3, 6):
        gradients, outputs = expected[step - 1]
        table = readings["gradients", step]
        for layer, norm in zip(table["layer"], table["norm"], strict=True):
            assert norm == pytest.approx(float(gradients[layer].norm()), rel=1e-3), layer
        table = readings["activations", step]
        for row, layer in enumerate(table["layer"]):
            value = outputs[layer]
            spread = float(value.std(correction=0))
            assert table["count"][row] == value.numel() and table["nonfinite"][row] == 0
            for name, reference in (
                ("mean", value.mean()),
                ("std", value.std(correction=0)),
                ("min", value.min()),
                ("max", value.max()),
            ):
                error = abs(table[name][row] - float(reference)) / spread
                worst = max(worst, error)
                assert error < 1e-3, (layer, name)
    print(f"{mode}: {worst:.1e}")


def test_nonfinite_numbers_are_counted() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).cuda()
    with torch.no_grad():
        model[0].bias[1] = float("nan")
    probe = PROBES.create("activations", ProbeConfig())
    probe.attach(model)
    probe.arm()
    model(torch.randn(7, 6, device="cuda"))
    value = probe.read(StepContext(1))
    table = probe.table(1, value.cpu().numpy())
    assert list(table["nonfinite"]) == [7, 28]


def test_a_run_resumes_bit_for_bit(config: Callable[..., TrainConfig]) -> None:
    """Dropout, augmentation, dynamic clipping; killed in words, by a stop within an epoch."""
    whole = train(config()).run
    stopped = train(config(), replay=[(11, "stop", {})]).run
    assert stopped.status == "stopped"
    same(stopped.resume().wait(timeout=300), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_of_the_device(workers: int, config: Callable[..., TrainConfig]) -> None:
    same(
        train(config(data__placement="loader", data__workers=workers)).run,
        train(config(data__placement="loader", data__workers=1)).run,
    )


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-2), ("bf16", 8e-2), ("fp16", 5e-2)])
def test_lower_precision_has_the_losses_of_full_precision_within_its_tolerance(
    precision: str, tolerance: float, config: Callable[..., TrainConfig]
) -> None:
    full = train(config(model__args={"dropout": 0.0})).run.history["loss"]
    lower = train(config(model__args={"dropout": 0.0}, precision=precision)).run.history["loss"]
    difference = float(np.abs(full - lower).max())
    print(f"{precision}: {difference:.1e}")
    assert difference < tolerance


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_has_the_losses_of_the_eager_one(mode: str, config: Callable[..., TrainConfig]) -> None:
    chosen = config(model__args={"dropout": 0.0}, deterministic=False)
    eager, compiled = train(chosen).run, train(chosen.override({"compile": mode})).run
    assert float(np.abs(eager.history["loss"] - compiled.history["loss"]).max()) < 1e-3
    one, two = eager.readings("activations"), compiled.readings("activations")
    assert one["layer"].tolist() == two["layer"].tolist() and one["step"].tolist() == two["step"].tolist()
    np.testing.assert_allclose(two["mean"], one["mean"], atol=1e-2)


def test_probes_do_not_change_what_is_trained(config: Callable[..., TrainConfig]) -> None:
    off = {f"probes__{kind}__every": 0 for kind in ("gradients", "activations", "memory")}
    same(train(config(**off)).run, train(config(probes__gradients__every=1, probes__activations__every=1)).run)


def test_memory_is_the_allocators_own(config: Callable[..., TrainConfig]) -> None:
    run = train(config()).run
    memory = run.readings("memory")
    assert (memory["allocated"] <= memory["peak"]).all() and (memory["peak"] <= memory["total"]).all()
    assert memory["total"].iloc[0] == torch.cuda.get_device_properties(0).total_memory
    assert memory["allocated"].iloc[-1] <= torch.cuda.max_memory_allocated()


def test_switches_and_generators_are_given_back(config: Callable[..., TrainConfig]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    train(config(precision="fp32", epochs=1))
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("mode", ["fixed", "dynamic", "agc"])
def test_fused_and_scaled_steps_are_clipped_as_plain_ones(mode: Any) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).cuda()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    optimizers = [AdamW(m.parameters(), lr=0.01, fused=fused) for m, fused in zip(models, (False, True, True), strict=True)]
    clippers = [AdaptiveGradientClipper(0.2, mode, warmup=3) for _ in models]
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for _ in range(10):
        x, y = torch.randn(16, 6, device="cuda") * 3, torch.randint(3, (16,), device="cuda")
        for index, (model, optimizer, clipper) in enumerate(zip(models, optimizers, clippers, strict=True)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            with clipper:
                if index == 2:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    loss.backward()
                    optimizer.step()
    for model in models[1:]:
        for one, two in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_fit_becomes_advice(config: Callable[..., TrainConfig]) -> None:
    from workbench.errors import MemoryExhausted

    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(MemoryExhausted, match=r"Out of memory with data.batch_size=1024.*accumulate=2.*data.batch_size=512"):
            train(
                config(
                    data={"name": "digits", "batch_size": 1024},
                    model={"name": "mlp", "args": {"widths": [120_000, 600]}},
                    deterministic=False,
                )
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_an_operation_that_cannot_repeat_is_named(tmp_path: Path, config: Callable[..., TrainConfig]) -> None:
    from workbench.errors import DeviceError

    source = tmp_path / "pooled.py"
    source.write_text(
        "from torch import nn\n"
        "def pooled(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    with pytest.raises(DeviceError, match=r"deterministic=true, but adaptive_avg_pool2d_backward_cuda"):
        train(config(model={"name": f"{source}:pooled"}))


def test_a_label_out_of_range_is_named_before_it_reaches_the_device(config: Callable[..., TrainConfig]) -> None:
    from workbench.errors import ModelError

    with pytest.raises(ModelError, match="3 outputs, but the data has the label"):
        train(config(model__num_classes=3))
    assert torch.ones(1, device="cuda").item() == 1.0  # the device is still of use


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., TrainConfig]) -> Run:
    return launch(config(model__args={"dropout": 0.0}), root=tmp_path_factory.mktemp("one")).wait(timeout=300)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_on_nccl_have_the_losses_of_one(accumulate: int, one_rank: Run, config: Callable[..., TrainConfig]) -> None:
    run = launch(config(model__args={"dropout": 0.0}, accumulate=accumulate), nproc=2).wait(timeout=300)
    difference = float(np.abs(run.history["loss"] - one_rank.history["loss"]).max())
    print(f"2 ranks, accumulate={accumulate}: {difference:.1e}")
    assert difference < 1e-5
    one, two = one_rank.readings("gradients"), run.readings("gradients")
    for rank in (0, 1):
        mine = two[two["rank"] == rank].reset_index(drop=True)
        np.testing.assert_allclose(mine["norm"], one["norm"], rtol=2e-3)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "ema": 0.9}, {"compile": "default", "deterministic": False}])
def test_a_model_spread_over_two_ranks_has_the_losses_of_one(
    changes: dict[str, Any], one_rank: Run, config: Callable[..., TrainConfig]
) -> None:
    run = launch(config(**{"model.args": {"dropout": 0.0}, "mesh": {"shard": 2}} | changes), nproc=2).wait(timeout=300)
    difference = float(np.abs(run.history["loss"] - one_rank.history["loss"]).max())
    print(f"2 shards, {changes}: {difference:.1e}")
    assert difference < (1e-3 if "compile" in changes else 1e-5)
    readings = run.readings("gradients")
    for rank in (0, 1):
        mine = readings[readings["rank"] == rank].reset_index(drop=True)
        np.testing.assert_allclose(
            mine["norm"], one_rank.readings("gradients")["norm"], rtol=2e-2 if "compile" in changes else 2e-3
        )


@pytest.mark.gpu(2)
def test_shards_refuse_a_scaled_loss(config: Callable[..., TrainConfig]) -> None:
    run = launch(config(mesh={"shard": 2}, precision="fp16"), nproc=2).wait(timeout=300, check=False)
    assert run.status == "failed" and "replicate the model" in str(run.error)


@pytest.mark.gpu(2)
def test_a_checkpoint_of_shards_opens_on_one_gpu(one_rank: Run, tmp_path: Path, config: Callable[..., TrainConfig]) -> None:
    spread = config(**{"model.args": {"dropout": 0.0}, "mesh": {"shard": 2}})
    run = launch(spread, nproc=2, root=tmp_path, replay=[(13, "stop", {})]).wait(timeout=300)
    assert run.status == "stopped"
    run.resume(1, mesh={}).wait(timeout=300)
    assert float(np.abs(run.history["loss"] - one_rank.history["loss"]).max()) < 1e-5


@pytest.mark.gpu(2)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_two_compiled_ranks_have_the_losses_and_readings_of_eager_ones(mode: str, config: Callable[..., TrainConfig]) -> None:
    """The compiled (captured) graph lies within DistributedDataParallel, the probes' operators within the graph."""
    chosen = config(model__args={"dropout": 0.0}, deterministic=False, epochs=4)
    eager, compiled = (launch(c, nproc=2).wait(timeout=300) for c in (chosen, chosen.override({"compile": mode})))
    difference = float(np.abs(eager.history["loss"] - compiled.history["loss"]).max())
    print(f"2 ranks, {mode}: {difference:.1e}")
    assert difference < 1e-3
    for kind, column in (("gradients", "norm"), ("activations", "std")):
        one, two = (run.readings(kind).sort_values(["step", "rank", "layer"]) for run in (eager, compiled))
        assert one[["step", "rank", "layer"]].to_numpy().tolist() == two[["step", "rank", "layer"]].to_numpy().tolist()
        assert set(two["rank"]) == {0, 1}
        np.testing.assert_allclose(two[column], one[column], rtol=2e-2, atol=1e-4)


@pytest.mark.gpu(2)
def test_two_ranks_on_nccl_obey_and_resume_bit_for_bit(tmp_path: Path, config: Callable[..., TrainConfig]) -> None:
    wait: Callable[[Run], Run] = lambda run: run.wait(timeout=300)  # noqa: E731
    whole = wait(launch(config(), nproc=2, root=tmp_path, replay=[(9, "set", {"lr": 1e-3})]))
    parted = wait(launch(config(), nproc=2, root=tmp_path, replay=[(9, "set", {"lr": 1e-3}), (13, "stop", {})]))
    assert parted.status == "stopped"
    same(wait(parted.resume()), whole)
