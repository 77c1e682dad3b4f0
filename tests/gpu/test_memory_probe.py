"""What holds memory on CUDA, against the allocator's own counters: eager, compiled, on two ranks; snapshots of runs."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from workbench import Run, TrainConfig, launch, memory, train
from workbench.errors import MemoryExhausted
from workbench.models import ModelConfig, build_model
from workbench.probes import ProbeConfig, ProbeSet, StepContext
from workbench.probes.holders import HOLDERS, RunParts
from workbench.probes.layer_memory import watched
from workbench.probes.memory import COMPILED, LAYERS, MemoryProbe
from workbench.snapshots import convert, read_snapshot
from workbench.training.checkpointing import recompute_blocks

RESIDUAL = f"{Path(__file__).resolve().parents[1] / 'training' / 'blocks.py'}:residual"
BERT = {"width": 256, "layers": 4, "heads": 4, "vocab_size": 1000}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.memory._record_memory_history(None)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="bert_small", num_classes=2, args=BERT)).cuda()


@pytest.mark.parametrize("mode", ["eager", "recompute", "default", "reduce-overhead"])
def test_holders_add_up_to_the_allocators_counters_and_nothing_waits(mode: str) -> None:
    torch.compiler.reset()
    model = bert()
    if mode == "recompute":
        recompute_blocks(model, 1.0)
    compiled = mode in ("default", "reduce-overhead")
    found: dict[tuple[str, int], dict[str, Any]] = {}
    probes = ProbeSet(
        {"memory": (MemoryProbe(ProbeConfig()), 1)}, lambda kind, step, columns: found.update({(kind, step): columns})
    )
    probes.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    probes.join(RunParts(model, optimizer, compiled=compiled))
    if compiled:
        model.compile(mode=mode)
    x = torch.randint(1, 1000, (64, 128), device="cuda")
    y = x[:, 0] % 2
    allocated: dict[int, tuple[int, int, int, int]] = {}
    gradients: dict[int, int] = {}

    def step(number: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        probes.begin(number)
        before = torch.cuda.memory_allocated()
        with probes.forward(), torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        full = torch.cuda.memory_allocated()
        loss.backward()
        stats = torch.cuda.memory_stats()
        allocated[number] = before, full, torch.cuda.memory_allocated(), stats["inactive_split_bytes.all.current"]
        storages = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
        gradients[number] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        probes.read(StepContext(number))
        optimizer.step()
        probes.updated()
        optimizer.zero_grad(set_to_none=True)

    for number in (1, 2, 3):  # compiled, recorded and replayed
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(4)
        step(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    weights = sum(p.nbytes for p in model.parameters())
    for number, (before, full, after, pieces) in allocated.items():
        row = {key: pa.array(value)[0].as_py() for key, value in found["memory", number].items()}
        assert row["allocated"] == after == sum(row[holder] for holder in HOLDERS) + row["other"]
        assert row["forward"] == full and row["activations"] == full - before and row["accumulated"] == 0
        assert row["parameters"] == weights and row["gradients"] == gradients[number] > 0.9 * weights
        assert row["fragmentation"] == pytest.approx(pieces / row["reserved"])
        assert row["other"] >= 0 and row["peak"] >= row["allocated"] <= row["reserved"] <= row["total"]
        if number > 1:
            assert 1.8 * weights <= row["optimizer"] < 2.01 * weights
    layers = found[LAYERS, max(step for kind, step in found if kind == LAYERS)]
    by_name = dict(zip(layers["layer"], layers["activations"], strict=True))
    if compiled:
        assert all(value is None for name, value in by_name.items() if name != COMPILED)
        assert mode != "default" or by_name[COMPILED] > 0  # captured graphs keep their memory between steps
    else:
        written = max(step for kind, step in found if kind == LAYERS)
        assert sum(layers["activations"]) == pa.array(found["memory", min(written, 2)]["activations"])[0].as_py()
    assert sum(layers["parameters"]) == weights
    print(mode, {key: value[0] for key, value in found["memory", 5].items()})


def test_layers_keep_what_can_be_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.ReLU(inplace=True)).cuda()
    x = torch.randn(4096, 512, device="cuda")
    model(x).sum().backward()  # libraries take their workspaces
    with watched(model, x.device) as found:
        loss = model(x).square().mean()
    output = 4096 * 1024 * 4
    for name in "012":  # what each gives, which the next one saves; a block may be larger by what is not worth splitting off
        assert output <= found[name] <= output + 2**20
    assert found.get("3", 0) == 0  # in place
    assert sum(found.values()) >= 3 * output and loss.isfinite()


def run_config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        data={"name": "digits", "limit": 512, "batch_size": 128},
        model={"name": RESIDUAL, "args": {"width": 32}},
        optim={"name": "adamw"},
        epochs=3,
        device="cuda",
        precision="fp32",
        ema=0.9,
        probes={"memory": {"every": 1}},
    )
    return base.override({name.replace("__", "."): value for name, value in changes.items()})


def check_readings(run: Run) -> None:
    readings = run.readings("memory")
    assert len(readings) and (readings["allocated"] == readings[[*HOLDERS, "other"]].sum(axis=1)).all()
    assert (readings["other"] >= 0).all() and (readings["forward"] > 0).all()
    settled = readings[readings["step"] > 2]
    spread = settled.groupby("rank")["allocated"].agg(lambda values: values.max() - values.min())
    assert spread.max() < 2**20, "the same moment of every step: the same bytes, losses on their way to the host apart"


@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_a_run_tells_what_holds_its_memory(mode: str, tmp_path: Path) -> None:
    run = train(run_config(compile=mode), root=tmp_path).run
    check_readings(run)
    last = run.readings("memory").iloc[-1]
    print(mode, last.to_dict())
    assert last["average"] > 0.99 * last["parameters"] and last["data"] > 0
    layers = run.readings(LAYERS)
    layers = layers[layers["step"] == layers["step"].max()]
    assert layers["parameters"].sum() == last["parameters"] and layers["optimizer"].sum() == last["optimizer"]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("mode", ["off", "default"])
@pytest.mark.parametrize("mesh", [{}, {"shard": "all"}])
def test_two_ranks_count_their_own_parts(mesh: dict[str, Any], mode: str, tmp_path: Path) -> None:
    run = launch(run_config(mesh=mesh, compile=mode), nproc=2, root=tmp_path).wait(timeout=300)
    check_readings(run)
    readings = run.readings("memory")
    last = readings[readings["step"] == readings["step"].max()]
    print(mesh, mode, last.to_dict("records"))
    alone = train(run_config(max_steps=3), root=tmp_path).run.readings("memory").iloc[-1]
    if mesh:
        assert alone["parameters"] <= last["parameters"].sum() < 1.2 * alone["parameters"]
    else:
        assert (last["parameters"] == alone["parameters"]).all()
        assert (last["gradients"] >= alone["gradients"]).all() and (last["accumulated"] > 0).all()  # views of the buckets


# -- snapshots --------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_run_converts_and_agrees_with_pytorchs_own(tmp_path: Path) -> None:
    asked: list[tuple[int, str, dict[str, float]]] = [(4, "snapshot", {"steps": 2})]
    run = train(run_config(probes__memory__snapshot_steps=2), root=tmp_path, replay=asked).run
    assert [path.stem for path in run.snapshots] == ["step-2-rank-0", "step-6-rank-0"]
    for path in run.snapshots:
        content = read_snapshot(path)
        raw = pickle.loads(path.with_suffix(".pickle").read_bytes())
        active = sum(b["size"] for s in raw["segments"] for b in s["blocks"] if b["state"] == "active_allocated")
        assert content["totals"]["allocated"] == active
        assert content["totals"]["reserved"] == sum(segment["total_size"] for segment in raw["segments"])
        columns = content["allocations"]
        at_end = sum(size for size, end in zip(columns["size"], columns["end"], strict=True) if end == -1)
        assert at_end + content["totals"]["rounding"] == pytest.approx(active, rel=0.001)
        assert [phase for _, _, phase in content["marks"]][:4] == ["between", "forward", "backward", "update"]
        held: dict[str, int] = {}
        for size, holder in zip(columns["size"], columns["holder"], strict=True):
            held[content["holders"][holder]] = held.get(content["holders"][holder], 0) + size
        print(path.stem, content["events"], path.stat().st_size, held)
        assert {"parameters", "optimizer", "average", "gradients", "activations", "temporary", "data"} <= set(held)
        assert held["parameters"] == run.readings("memory").iloc[-1]["parameters"]
        assert content["frames"], "allocations have their Python frames"
        assert memory.snapshot_page(path).stat().st_size < 20_000_000


def test_pieces_are_those_of_the_allocators_counters() -> None:
    kept = [torch.empty(3 * 2**20, device="cuda", dtype=torch.uint8) for _ in range(40)]
    del kept[1::2]
    whole = torch.empty(64 * 2**20, device="cuda", dtype=torch.uint8)
    del whole
    stats = torch.cuda.memory_stats()
    found = convert(torch.cuda.memory._snapshot(), torch.cuda.current_device())["totals"]
    assert found["free_pieces"] == stats["inactive_split_bytes.all.current"] > 0
    assert found["reserved"] == stats["reserved_bytes.all.current"]
    assert found["allocated"] == stats["allocated_bytes.all.current"]
    assert found["rounding"] == found["allocated"] - stats["requested_bytes.all.current"]
    assert found["largest_free"] >= 64 * 2**20


def test_running_out_of_memory_leaves_a_snapshot(tmp_path: Path) -> None:
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(4 * 2**30 / total)
    large = run_config(model__args={"width": 512, "depth": 12}, data__batch_size=512, max_steps=2)
    try:
        for steps in (0, 2):
            with pytest.raises(MemoryExhausted, match=r"What held the memory then is in snapshots/step-\d+-rank-0\.json"):
                train(large.override({"probes.memory.snapshot_steps": steps}), root=tmp_path)
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with_history, without = (read_snapshot(run.snapshots[-1]) for run in Run.all(tmp_path))
    assert without["events"] == 0 and not without["recorded"] and without["segments"]
    assert with_history["events"] > 0 and with_history["refused"] and with_history["recorded"]
    for content in (with_history, without):
        assert content["reason"] == "out of memory" and content["totals"]["allocated"] > 2**30
        assert "parameters" in {content["holders"][holder] for holder in content["allocations"]["holder"]}
        assert json.dumps(content)
