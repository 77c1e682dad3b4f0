"""What readings may cost: the interval that follows from a known cost, on a clock of the test's own; and in runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import Run, TrainConfig, events, launch, train
from workbench.errors import ConfigError
from workbench.probes import Probe, ProbeConfig, ProbesConfig, ProbeSet
from workbench.training import repro
from workbench.training.budget import COUNTED, LEAST, READ, Budget
from workbench.training.decisions import MOST, Decisions, decide_every

SLOW = Path(__file__).with_name("slow_probe.py")


class Bench:
    """Steps of 1 s on a made-up clock, and ``cost`` more by each probe that reads.

    Args:
        every: of each probe, by name.
        auto: of these, those on auto.
        late: seconds in the step after a reading, in which the host writes it down.
        light: of these on auto, those that cost next to nothing.
    """

    def __init__(
        self,
        every: dict[str, int],
        auto: str = "",
        cost: float = 0.1,
        overhead: float = 0.01,
        total: int = 20_000,
        epoch: int = 10**6,
        late: float = 0.0,
        light: str = "",
    ) -> None:
        self.seconds, self.cost, self.late, self.total = 0.0, cost, late, total
        self.probes = ProbeSet({name: (Probe(ProbeConfig()), number) for name, number in every.items()}, lambda *reading: None)
        self.said: list[tuple[events.ReadingsTimed, str]] = []
        self.waiting: list[dict[str, Any]] = []
        self.read: list[int] = []
        self.step = 0
        self.interrupt: Callable[[int], float] = lambda step: 0.0
        steps, now = (total, epoch), lambda: self.seconds
        say = lambda *said: self.said.append(said)  # noqa: E731
        self.budget = Budget(self.probes, auto.split(), overhead, *steps, now, self._post, say, light.split())

    def _post(self, name: str, **settings: Any) -> None:
        assert name == READ
        self.waiting.append(settings)

    def run(self, steps: int) -> Bench:
        late = 0.0
        for _ in range(steps):
            self.step += 1
            self.budget.begin(self.step)
            due = len(self.probes._due)
            if due:
                self.read.append(self.step)
            self.seconds += 1 + late + due * self.cost
            late = self.late if due else 0.0
            if other := self.interrupt(self.step):
                self.seconds += other
                self.budget.interrupted()
            self.budget.after()
            while self.waiting:
                self.budget.interrupted()
                self.budget.apply(self.step, **self.waiting.pop())
        return self


@pytest.mark.parametrize("late", [0.0, 0.03])
@pytest.mark.parametrize("cost", [0.004, 0.07, 0.21, 0.9, 3.0])
def test_the_interval_becomes_that_of_the_cost(cost: float, late: float) -> None:
    """Whatever of a reading the host does a step later is part of what it costs."""
    bench = Bench({"one": 10, "two": 50}, "one two", cost / 2, total=4000 if cost < 0.9 else 20_000, late=late).run(3000)
    expected = max(bench.total // MOST, math.ceil((cost + late) / 0.01))
    assert bench.probes.every == {"one": pytest.approx(expected, abs=1), "two": pytest.approx(expected, abs=1)}
    event, reason = bench.said[-1]
    assert event.cost == pytest.approx(cost + late) and event.every == bench.probes.every["one"]
    assert event.overhead <= 0.01 and f"one in {event.every} keeps to 1 %" in reason
    steps, seconds = bench.step, bench.seconds
    bench.run(3000)
    assert 1 - (bench.step - steps) / (bench.seconds - seconds) <= 0.011  # a reading more may fall into the time than its share


def test_what_costs_next_to_nothing_is_read_as_often_as_before() -> None:
    """And whenever the others are, so that what all of them cost is known."""
    bench = Bench({"dear": 20, "light": 4}, "dear light", 0.2, total=800, light="light").run(800)
    assert bench.probes.every == {"dear": 40, "light": 4} and "one in 40" in bench.said[-1][1]
    assert sum(step % 4 == 0 for step in bench.read) > 0.9 * 200
    alone = Bench({"light": 4, "fixed": 7}, "light", 0.11, total=4000, light="light").run(4000)
    assert alone.probes.every["light"] == max(4000 // MOST, 11)  # nothing else is on auto


def test_a_cost_that_changes_is_followed_and_a_small_change_is_not() -> None:
    bench = Bench({"one": 10}, "one", 0.1, overhead=0.005).run(1000)
    assert bench.probes.every == {"one": 100}  # the fewest that 200 readings over the run leave
    bench.cost = 1.0
    bench.run(2000)
    assert bench.probes.every == {"one": 200}
    bench.cost = 1.2
    bench.run(4000)
    assert bench.probes.every == {"one": 200} and bench.said[-1][0].cost == pytest.approx(1.2)
    assert "one in 200 takes 0.6 % of the time" in bench.said[-1][1]


def test_a_run_is_read_some_times_whatever_it_costs_and_not_more_often_than_tells() -> None:
    dear = Bench({"one": 5}, "one", 2.0, total=400).run(400)
    assert dear.probes.every == {"one": 400 // LEAST}
    assert "one in 20 takes 9.1 % of the time, and rarer would be fewer than 20" in dear.said[-1][1]
    short = Bench({"one": 5}, "one", 2.0, total=60).run(60)
    assert short.said and short.probes.every == {"one": 5}  # a dear reading is no reason to read more often
    cheap = Bench({"one": 50}, "one", 1e-4, total=4000).run(2000)
    assert cheap.probes.every == {"one": 4000 // MOST}


def test_readings_that_are_free_are_left_out_now_and_then_to_be_timed() -> None:
    bench = Bench({"one": 5}, "one", 1e-3, total=MOST).run(MOST)
    assert bench.probes.every == {"one": 1}
    said = len(bench.said)
    bench.run(1000)
    left_out = 1000 - sum(step > MOST for step in bench.read)
    assert 0 < left_out < 0.06 * 1000 and len(bench.said) > said


def test_interrupted_readings_do_not_count() -> None:
    """An evaluation after a reading, or after either of the steps that follow it."""
    often, always = (Bench({"one": 10}, "one", 0.2) for _ in range(2))
    often.interrupt = lambda step: 100.0 if step % 40 in (0, 11, 22) else 0.0
    assert {round(event.cost, 6) for event, _ in often.run(3000).said} == {0.2}
    always.interrupt = lambda step: 100.0 if step % 20 in (0, 12) else 0.0
    assert not always.run(3000).said and always.probes.every == {"one": 10}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("epoch", "epochs"), [(100, 200), (2, 2000), (5, 400), (22, 20), (50, 20)])
def test_readings_do_not_all_fall_on_the_end_of_an_epoch(device: str, epoch: int, epochs: int) -> None:
    total, decided = epoch * epochs, Decisions()
    names = ("communication", "gradients")
    every = {name: decide_every(name, "auto", torch.device(device), total, epoch, decided) for name in names}
    assert every["gradients"] % every["communication"] == 0  # steps on which both read can be timed
    bench = Bench(every, " ".join(names), 1.0, total=total, epoch=epoch).run(total)
    assert all(held % epoch for held in (*every.values(), *bench.probes.every.values()))
    assert len(set(bench.probes.every.values())) == 1 or epoch == 2


def test_first_readings_do_not_count() -> None:
    bench = Bench({"one": 10}, "one", 50.0)
    bench.run(25)
    bench.cost = 0.2
    bench.run(500)
    assert {round(event.cost, 6) for event, _ in bench.said} == {0.2}


def test_a_fixed_interval_is_never_changed() -> None:
    fixed = Bench({"one": 7, "two": 7}, "", 0.1).run(1000)
    assert fixed.probes.every == {"one": 7, "two": 7}
    assert fixed.said[-1][0].overhead == pytest.approx(0.2 / 7.2)  # but what it takes is told
    mixed = Bench({"fixed": 7, "free": 10}, "free", 0.3).run(3000)
    assert mixed.probes.every == {"fixed": 7, "free": pytest.approx(100, abs=1)}
    assert mixed.said[-1][0].cost == pytest.approx(0.3)


def test_nothing_is_told_where_no_step_is_unread() -> None:
    for every, auto in (({"one": 1}, ""), ({"one": 2}, ""), ({"fixed": 1, "free": 10}, "free"), ({"one": 7, "two": 9}, "")):
        bench = Bench(every, auto).run(1000)
        assert not bench.said and bench.probes.every == every
        assert bench.read == [step for step in range(1, 1001) if step == 1 or any(step % n == 0 for n in every.values())]


def test_ranks_leave_out_the_same_readings_whatever_they_measure() -> None:
    one, two = (Bench({"one": 1, "two": 5}, "one two", cost) for cost in (0.01, 0.5))
    one.budget._post = two.budget._post = None  # neither is the one that says
    assert one.run(1000).read == two.run(1000).read != list(range(1, 1001))


@pytest.mark.parametrize("overhead", [0.0, -0.1, 1.5])
def test_a_share_of_the_time_lies_between_nothing_and_all(overhead: float) -> None:
    with pytest.raises(ConfigError, match="overhead"):
        ProbesConfig(overhead=overhead)


# -- in runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(config: Callable[..., TrainConfig]) -> TrainConfig:
    """All on auto: a probe that takes many times as long as a step, gradients, and communication."""
    auto = {f"probes.{name}.every": "auto" for name in ("gradients", "communication")}
    off = {f"probes.{name}.every": 0 for name in ("activations", "memory")}
    more = {"probes.more": {f"{SLOW}:Slow": {}}, "checkpoint.every_steps": 50, "eval_every": 0}
    return config(epochs=20, **auto, **off, **more)


def told(run: Run) -> Iterator[events.ReadingsTimed]:
    return (event for event in run.events if isinstance(event, events.ReadingsTimed))


def test_a_run_keeps_to_its_budget_and_goes_on_with_what_it_found(slow: TrainConfig, tmp_path: Path) -> None:
    run = train(slow, root=tmp_path, replay=[(80, "stop", {})]).run
    settings = [f"probes.{name}.every" for name in ("gradients", f"{SLOW}:Slow")]
    first = next(told(run))
    assert first.every == 9 and run.overhead == [*told(run)][-1].overhead > slow.probes.overhead
    assert {run.resolved[setting]["value"] for setting in settings} == {first.every}
    assert run.resolved["probes.communication.every"]["value"] == 1  # it costs next to nothing
    assert f"one in {first.every} takes" in run.resolved[settings[0]]["reason"]
    assert READ not in (code := repro.code(run.config, run.events)) and "replay=[(80, 'stop', {})]" in code
    run.resume().wait(timeout=120)
    steps = run.readings("gradients")["step"]
    assert set(steps[steps > 80]) == set(range(81, 161, 9)) and set(steps[steps <= first.step]) >= {1, 5, 10, 15, 20}


def test_a_deterministic_run_keeps_to_the_rule(slow: TrainConfig, tmp_path: Path) -> None:
    run = train(slow.override({"deterministic": True, "epochs": 8}), root=tmp_path).run
    assert sorted(set(run.readings("gradients")["step"])) == [1, *range(5, 65, 5)]


def test_two_ranks_change_after_the_same_step(slow: TrainConfig, tmp_path: Path) -> None:
    run = launch(slow, nproc=2, root=tmp_path).wait(timeout=120)
    first = next(told(run))
    for kind in ("gradients", "communication"):
        readings = run.readings(kind)
        one, two = (sorted(set(readings.loc[readings["rank"] == rank, "step"])) for rank in (0, 1))
        every = {"gradients": 9, "communication": 1}[kind]
        expected = [n for n in range(every, 161, every) if n > first.step]
        assert one == two and set(one) >= {n for n in expected if n % 9 == 0}
        assert kind == "communication" or [step for step in one if step > first.step] == expected
    assert first.counted <= COUNTED and first.every == 9  # of 160 steps, in epochs of 8
