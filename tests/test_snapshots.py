"""Memory snapshots: converted without loss against the allocator's own figures, drawn by a browser, asked of runs."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from pretend_gpu import Allocator, Training

from workbench import Run, TrainConfig, memory, train
from workbench.errors import RunError
from workbench.snapshots import HOLDERS, STATES, convert, read_snapshot, totals, write_snapshot
from workbench.training.snapshots import NONE_ON_A_CPU


def trained(steps: int = 2, recording_from: int = 1) -> tuple[Training, dict[str, Any]]:
    training = Training(recording_from=recording_from)
    for number in range(1, steps + 1):
        training.step(number)
    facts = {"step": steps, "first": recording_from, "rank": 0, "recorded": True, "device": "pretend GPU", "reason": "asked for"}
    return training, convert(training.gpu.snapshot(), known=training.known, marks=training.marks, facts=facts)


def held(content: dict[str, Any], event: int) -> dict[str, int]:
    """Bytes by holder after an event, from the columns."""
    found = dict.fromkeys(content["holders"], 0)
    columns = content["allocations"]
    for size, start, end, holder in zip(*(columns[key] for key in ("size", "start", "end", "holder")), strict=True):
        if start <= event and (end == -1 or end > event):
            found[content["holders"][holder]] += size
    return found


def test_the_timeline_is_the_allocators_and_names_who_holds_what() -> None:
    training, content = trained()
    by_phase = {(step, phase): event - 1 for event, step, phase in content["marks"]}
    weights = sum(training.sizes)
    activations = sum(training.activation(i) + (training.activation(i) // 4 if i % 2 else 0) for i in range(training.depth))
    full = held(content, by_phase[2, "backward"])  # when the forward pass has ended
    assert full["parameters"] == weights and full["optimizer"] == 2 * weights and full["gradients"] == 0
    assert full["activations"] == activations and full["temporary"] == 0
    assert full["data"] == 32 * 3 * 224 * 224 * 4, "the batch, made between steps"
    computed = held(content, by_phase[2, "update"])
    assert computed["gradients"] == weights and computed["activations"] == 0
    assert held(content, by_phase[1, "forward"])["optimizer"] == 0, "the first update makes it"
    last = held(content, content["events"])
    rounding = content["totals"]["rounding"]
    assert sum(last.values()) + rounding == content["totals"]["allocated"] == training.gpu.allocated
    assert len(content["stacks"]) < 60 and sum(map(len, content["stacks"])) < 250, "each stack once"
    assert ["torch/nn/modules/conv.py", 553, "_conv_forward"] in json.loads(json.dumps(content["frames"]))


def test_what_was_there_before_the_history_counts_from_its_beginning() -> None:
    training, content = trained(steps=3, recording_from=3)
    first = held(content, 0)
    assert first["parameters"] == sum(training.sizes) and first["optimizer"] == 2 * first["parameters"]
    assert all(size > 0 for size in content["allocations"]["size"])
    older = Allocator()
    older.recording = False
    gone, stays = older.allocate(1000), older.allocate(3000)
    older.recording = True
    older.free(gone)
    found = convert(older.snapshot())
    assert sum(held(found, 0).values()) == 4000 and sum(held(found, 1).values()) == 3000
    assert found["allocations"]["end"] == [1, -1] or found["allocations"]["end"] == [-1, 1]
    assert stays and found["events"] == 1


def test_segments_tell_what_is_free_in_pieces() -> None:
    gpu = Allocator()
    kept = [gpu.allocate(2 * 2**20) for _ in range(8)]
    for address in kept[1:-1:2]:
        gpu.free(address)
    alone = gpu.allocate(30 * 2**20)
    gpu.free(alone)
    found = convert(gpu.snapshot())["totals"]
    assert found["free_whole"] == 30 * 2**20 == found["largest_free"]
    assert found["free_pieces"] == (3 * 2 + 4) * 2**20 and found["reserved"] == 50 * 2**20
    assert found["allocated"] == gpu.allocated == found["reserved"] - found["free_whole"] - found["free_pieces"]
    assert totals([]) == dict.fromkeys(found, 0)
    blocks = [block for segment in convert(gpu.snapshot())["segments"] for block in segment[4]]
    assert sum(block[0] for block in blocks if STATES[block[2]] == "allocated") == found["allocated"]


def test_a_snapshot_that_pytorch_made_is_read_as_well() -> None:
    """Of its memory profiler on a CPU, with its own words for who holds what; its segments span the address space."""
    from torch.cuda._memory_viz import _profile_to_snapshot

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    x, y = torch.randn(128, 64), torch.randint(10, (128,))
    with torch.profiler.profile(record_shapes=True, profile_memory=True, with_stack=True) as profiler:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    raw = _profile_to_snapshot(profiler)
    raw["segments"] = []
    trace = next(trace for trace in raw["device_traces"] if trace)
    content = convert(raw, raw["device_traces"].index(trace))
    assert content["events"] == sum(entry["action"] in ("alloc", "free_requested") for entry in trace)
    live: dict[int, int] = {}
    most = 0
    for entry in trace:
        if entry["action"] == "alloc":
            live[entry["addr"]] = entry["size"]
        elif entry["action"] == "free_requested":
            live.pop(entry["addr"], None)
        most = max(most, sum(live.values()))
    columns = content["allocations"]
    inside = [e for e, start in zip(columns["end"], columns["start"], strict=True) if start > 0]
    assert len(inside) == sum(entry["action"] == "alloc" for entry in trace)
    assert sum(
        size for size, start, end in zip(columns["size"], columns["start"], columns["end"], strict=True) if start and end == -1
    )
    peak = max(sum(held(content, event).values()) for event in range(content["events"] + 1))
    assert peak >= most > 0
    assert {"gradients", "activations"} & {HOLDERS[holder] for holder in columns["holder"]}


def test_files_are_read_without_running_anything(tmp_path: Path) -> None:
    training, content = trained(steps=1)
    path = write_snapshot(tmp_path / "snapshots", "step-1-rank-0", training.gpu.snapshot(), content)
    assert read_snapshot(path) == json.loads(json.dumps(content))
    raw = path.with_suffix(".pickle")
    assert pickle.loads(raw.read_bytes()) == training.gpu.snapshot()
    with pytest.raises(RunError, match="trust=True"):
        read_snapshot(raw)
    assert read_snapshot(raw, trust=True)["totals"] == content["totals"]
    html = memory.snapshot_page(path)
    assert html == path.with_suffix(".html") and "</script>" in html.read_text()
    for text, words in (
        ("[1]", "not a memory snapshot"),
        ('{"version": 99}', "is of version 99"),
        ("{", "not a memory snapshot"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=words):
            read_snapshot(path)
    with pytest.raises(RunError, match="There is no snapshot"):
        read_snapshot(tmp_path / "none.json")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    gpu = Allocator()
    gpu.allocate(1000, ("</script><script>alert(1)</script>", 1, "<img src=x onerror=alert(2)>"))
    path = write_snapshot(tmp_path, "step-1-rank-0", {}, convert(gpu.snapshot()))
    assert "alert(1)</script>" not in memory.snapshot_page(path).read_text()


def test_a_run_on_a_cpu_says_that_it_has_no_history(tmp_path: Path) -> None:
    config = TrainConfig(
        data={"name": "digits", "limit": 128, "batch_size": 32},
        model={"name": "mlp", "args": {"widths": [8]}},
        device="cpu",
        epochs=1,
        probes={"memory": {"snapshot_steps": 2}},
    )
    run = train(config, root=tmp_path, replay=[(2, "snapshot", {"steps": 1})]).run
    said = [finding.message for finding in run.findings if finding.name == "memory_snapshot"]
    assert said == [NONE_ON_A_CPU] * 2 and run.snapshots == []
    with pytest.raises(RunError, match="has no memory snapshot of rank 0"):
        memory.snapshot_page(run)
    with pytest.raises(RunError, match="is finished, so it cannot snapshot"):
        run.memory_snapshot()
    with pytest.raises(RunError, match="steps=0 must lie"):
        run.memory_snapshot(steps=0)


def test_snapshots_are_listed_by_step_and_rank(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "snapshots").mkdir()
    for name in ("step-10-rank-0", "step-9-rank-1", "step-9-rank-0"):
        (tmp_path / "snapshots" / f"{name}.json").write_text("{}")
    assert [path.stem for path in run.snapshots] == ["step-9-rank-0", "step-9-rank-1", "step-10-rank-0"]
