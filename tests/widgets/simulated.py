"""Run folders as a trainer would write them, without training: for the Inspector's tests.

``Simulation(folder)`` makes the folder; ``step()`` advances one reading interval; ``run(seconds)`` does so from a thread.
"""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from workbench import events, launcher, storage

BINS = 163
SAMPLE = 512


def resnet_names(blocks: tuple[int, ...] = (3, 3, 3)) -> tuple[list[str], list[str]]:
    """Parameters and leaf modules, named as a ResNet's."""
    parameters, modules = ["conv1.weight", "bn1.weight", "bn1.bias"], ["conv1", "bn1", "relu"]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            for part in ("conv1", "bn1", "conv2", "bn2"):
                name = f"layer{stage}.{block}.{part}"
                modules.append(name)
                parameters += [f"{name}.weight"] + ([f"{name}.bias"] if part.startswith("bn") else [])
            modules.append(f"layer{stage}.{block}.relu")
    return [*parameters, "fc.weight", "fc.bias"], [*modules, "fc"]


class Simulation:
    """A run that seems to train.

    Args:
        folder: the run folder to make.
        total: optimizer steps of the run.
        every: steps between readings.
        ranks: processes.
        fault: None, "vanishing", "exploding", "dead", "nan" or "slow".
        rich: with the columns that a probe may also tell: of gradients update_ratio, zeros and histogram, of activations dead
            and saturated, with the sampling's error and the reading's overhead.
        told: whether its readings tell what holds the memory.
    """

    def __init__(
        self,
        folder: Path,
        total: int = 2000,
        every: int = 5,
        ranks: int = 1,
        fault: str | None = None,
        blocks: tuple[int, ...] = (3, 3, 3),
        rich: bool = False,
        told: bool = True,
    ) -> None:
        self.rich, self.told = rich, told
        self.folder, self.total, self.every, self.ranks, self.fault = folder, total, every, ranks, fault
        self.at, self.attempt = 0, 0
        self.parameters, self.modules = resnet_names(blocks)
        self.random = np.random.default_rng(0)
        for name in ("events", "readings", "attempts", "commands", "checkpoints", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("kind: train\n")
        self._peak = [0.0] * ranks
        self._ended = threading.Event()
        self.start()

    def start(self, at: int = 0) -> None:
        """A new attempt, from step ``at``."""
        self.at = at
        self.attempt = launcher.claim(self.folder, self.ranks)
        launcher.record(self.folder, self.attempt, self.ranks, launcher.Process.current())
        self.journal = storage.Journal(self.folder / "events" / "rank-00000.jsonl")
        self.writers = [storage.SegmentWriter(self.folder / "readings", self.attempt, rank) for rank in range(self.ranks)]
        self.emit(
            events.AttemptStarted(
                total_steps=self.total, steps_per_epoch=100, world_size=self.ranks, device="cpu", parameters=272_474, step=self.at
            )
        )

    def emit(self, event: events.Event) -> None:
        self.journal.append(event.model_copy(update={"attempt": self.attempt}).model_dump_json())

    def step(self) -> None:
        """``every`` steps and one reading."""
        first, self.at = self.at + 1, self.at + self.every
        steps = np.arange(first, self.at + 1)
        loss = 2.3 * np.exp(-steps / 600) + 0.12 + 0.08 * self.random.random(len(steps))
        if self.fault == "exploding" and self.at > 300:
            loss = loss + 0.02 * (steps - 300)
        losses = [None if self.fault == "nan" and s > 200 else float(v) for s, v in zip(steps, loss, strict=True)]
        rates = [0.1 * 0.5 * (1 + math.cos(math.pi * s / self.total)) for s in steps]
        epoch = 1 + (self.at - 1) // 100
        pace = 1523.4 + 40 * self.random.random()
        self.emit(events.Steps(first=first, step=self.at, loss=losses, lr=rates, epoch=epoch, samples_per_s=pace))
        self._read()
        if self.at % 100 == 0:
            metrics = {"loss": float(loss[-1] + 0.05), "accuracy": float(1 - 0.9 * math.exp(-self.at / 500))}
            self.emit(events.Evaluated(step=self.at, epoch=epoch, metrics=metrics))
        now = time.time()
        launcher.Heartbeat(launcher.Process.current(), now, self.attempt, self.at, now).write(self.folder)

    def _read(self) -> None:
        for rank, writer in enumerate(self.writers):
            names, depth = self.parameters, np.linspace(1, 0, len(self.parameters))
            norm = 0.4 * np.exp(-self.at / 900) * 10 ** (-0.7 * depth) * np.exp(0.25 * self.random.standard_normal(len(names)))
            nonfinite = np.zeros(len(names), dtype=int)
            if self.fault == "vanishing":
                norm = norm * 10 ** (-7 * depth)
            if self.fault == "exploding" and self.at > 300:
                norm = norm * math.exp(min(12, (self.at - 300) / 40))
            if self.fault == "nan" and self.at > 200:
                norm, nonfinite = np.full(len(names), np.nan), nonfinite + 7
            columns = {"step": [self.at] * len(names), "layer": names, "norm": norm, "max": norm / 10, "nonfinite": nonfinite}
            more = self._more(norm) if self.rich else {}
            writer.write("gradients", pa.table({**columns, "weight_norm": np.full(len(names), 3.0), **more}), self.at)
            writer.write("activations", self._activations(), self.at)
            used = 3.1e8 + 2e7 * math.sin(self.at / 80) + 1e6 * min(self.at, 120) + rank * 3e7
            self._peak[rank] = max(self._peak[rank], used)
            fields = {"allocated": int(used), "reserved": int(used * 1.2), "peak": int(self._peak[rank]), "total": 17_179_869_184}
            writer.write("memory", pa.table({"step": [self.at], **{k: [v] for k, v in self._held(fields).items()}}), self.at)
            if self.told and self.at == self.every:
                writer.write("memory_layers", self._layers(), self.at)
            writer.write("communication", pa.table(self._times(rank)), self.at)

    def _more(self, norm: np.ndarray) -> dict[str, object]:
        """Gradients of 1,000 elements, a tenth of them 0, the others log-normal about 1/30 of the norm; by octaves."""
        octaves = np.log2(norm / 30)[:, None] + 3 * self.random.standard_normal((len(norm), 900))
        place = np.clip(np.floor(octaves) + 49, 0, 65).astype(int)
        counts = np.stack([np.bincount(row, minlength=66) for row in place])
        counts[:, 0] += 100
        more: dict[str, object] = {"update_ratio": 1e-3 * norm / norm.max(), "zeros": np.full(len(norm), 0.1)}
        return more | {"histogram": pa.array(list(counts.astype(np.int32)))}

    def _held(self, fields: dict[str, int]) -> dict[str, float]:
        """What holds the memory, as a GPU's allocator would say; an earlier version's readings told no more than ``fields``."""
        if not self.told:
            return dict(fields)
        weights, activations = 44_700_000, 170_000_000 + 400_000 * (self.at % 7)
        found = {"parameters": weights, "gradients": weights, "optimizer": 2 * weights, "buffers": 38_000, "average": weights}
        found |= dict.fromkeys(("exchange", "teacher"), 0) | {"data": 38_500_000}
        found["other"] = fields["allocated"] - sum(found.values())
        forward = sum(found.values()) - weights + activations
        fields["peak"] = max(fields["peak"], forward + 9_000_000)
        fields["reserved"] = int(1.1 * fields["peak"])
        return {**fields, **found, "forward": forward, "accumulated": 0, "activations": activations, "fragmentation": 0.043}

    def _layers(self) -> pa.Table:
        names = self.modules
        share = np.array([0 if "relu" in name else 4.0 ** (index / len(names)) for index, name in enumerate(names)])
        kept = np.array([4.0 ** (1 - index / len(names)) for index in range(len(names))])
        weights = (44_700_000 * share / share.sum()).astype(int)
        columns = {"parameters": weights, "gradients": weights, "optimizer": 2 * weights}
        columns["activations"] = (170_000_000 * kept / kept.sum()).astype(int)
        return pa.table({"step": [self.at] * len(names), "layer": names, **columns})

    def _times(self, rank: int) -> dict[str, list[object]]:
        """Of a step of 24 ms; the last rank takes longest over its own work, with ``slow`` by half."""
        slowest = 0.0225 + 0.0004 * math.sin(self.at / 30)
        own = slowest - 0.0012 * (self.ranks - 1 - rank) + 0.0002 * math.cos(7 * self.at + rank)
        if self.fault == "slow" and rank < self.ranks - 1:
            own -= slowest / 3
        seconds = {"busy": own, "waited": 0.0008, "exposed": 0.024 - own}
        known = {"payload": 1_089_896, "bandwidth": 3.09e11, "network": math.nan, "hosts": 1, "link": "NVLink, 18 links"}
        return {"step": [self.at], **{name: [value] for name, value in (seconds | known).items()}}

    def _activations(self) -> pa.Table:
        from widgets.inspector.histograms import edges

        inner = np.array(edges(BINS))
        inner[0], inner[-1] = -np.inf, np.inf
        rows: dict[str, list[object]] = {}
        for index, name in enumerate(self.modules):
            values = self.random.standard_normal(SAMPLE) * (0.6 + 0.5 * math.sin(index) ** 2) * (1 + self.at / 3000)
            if name.endswith("relu"):
                values = np.maximum(values, 0)
                if self.fault == "dead" and name.startswith("layer2") and self.at > 100:
                    values = np.zeros_like(values)
            facts = {"step": self.at, "layer": name, "count": 40_960, "mean": values.mean(), "std": values.std()}
            facts |= {"min": values.min(), "max": values.max(), "zeros": float((values == 0).mean()), "nonfinite": 0}
            facts["histogram"] = np.histogram(values, bins=inner)[0].astype(np.int32)
            if self.rich:
                dead = float(self.fault == "dead" and not values.any())
                facts |= {"dead": dead, "saturated": 0.02, "error": 0.008, "overhead": 0.012}
            for key, value in facts.items():
                rows.setdefault(key, []).append(value)
        return pa.table(rows)

    def finish(self) -> None:
        self.emit(events.Finished(step=self.at, metrics={"accuracy": 0.91}))
        self.journal.close()

    def until(self, step: int) -> Simulation:
        while self.at < step:
            self.step()
        return self

    def live(self, pause: float) -> Simulation:
        """Go on to the end from a thread, ``pause`` seconds between readings."""

        def go() -> None:
            while self.at < self.total and not self._ended.is_set():
                self.step()
                time.sleep(pause)
            if not self._ended.is_set():
                self.finish()

        threading.Thread(target=go, daemon=True).start()
        return self

    def stop(self) -> None:
        self._ended.set()
