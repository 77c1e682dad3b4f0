"""Commands to a live run, on one rank and on two; and the run repeated from its ``repro.py``, the commands included."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import Run, TrainConfig, launch, train
from workbench.errors import RunError
from workbench.events import CommandApplied
from workbench.training import repro

pytestmark = pytest.mark.usefixtures("forked")


def applied(run: Run) -> dict[str, int]:
    """Steps of the commands, by name; the last of each name."""
    return {event.name: event.step for event in run.events if isinstance(event, CommandApplied)}


def repeat(run: Run, folder: Path) -> Run:
    """Execute ``repro.py`` in a fresh process from another folder."""
    folder.mkdir()
    environment = os.environ | {"WORKBENCH_RUNS": str(folder / "runs"), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, str(run.path / "repro.py")], cwd=folder, env=environment, check=True, timeout=120)
    (again,) = Run.all(folder / "runs")
    return again.wait(timeout=120)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_obeys_while_it_trains_and_repeats_from_its_code(
    nproc: int,
    config: Callable[..., TrainConfig],
    until: Callable[..., Any],
    assert_same: Callable[..., None],
    assert_whole: Callable[[Run], None],
    tmp_path: Path,
) -> None:
    slow = config(epochs=6, checkpoint__keep=20, model__args={"pause": 0.02}, probes__gradients__every=1, log_every=1)
    run = launch(slow, nproc, root=tmp_path)
    run.pause()  # posted before training starts
    until(lambda: run.status == "paused")
    paused = applied(run)["pause"]
    time.sleep(0.5)
    assert run.status == "paused" and run.progress.step == paused  # it stays where it is
    run.save()
    until(lambda: (run.path / "checkpoints" / f"step-{paused}").is_dir())
    run.set(lr=1e-3)
    until(lambda: "set" in applied(run))
    run.stop()  # stopped while paused, after a checkpoint of this step without the new rate
    run.wait(timeout=60)
    assert run.status == "stopped" and run.progress.step == paused

    run.resume()
    until(lambda: run.status == "running" and run.progress.step > paused + 3)
    assert run.history["lr"].iloc[paused] == pytest.approx(1e-3, rel=1e-12)  # the rate survived the restart
    run.set(lr=2e-3, weight_decay=0.1)
    until(lambda: applied(run)["set"] > paused)
    changed = applied(run)["set"]
    run.save()
    run.wait(timeout=120)
    assert run.status == "finished"
    assert_whole(run)
    rates = run.history["lr"]
    assert rates.iloc[changed] == pytest.approx(2e-3, rel=1e-12)
    assert rates.iloc[changed - 1] < 1.0001e-3
    assert (run.path / "checkpoints" / f"step-{applied(run)['save']}").is_dir()

    if nproc == 2:  # both ranks stepped from the same weights all along
        readings = run.readings("gradients").set_index(["step", "layer"])
        one, two = (readings[readings["rank"] == rank].drop(columns="rank") for rank in (0, 1))
        assert len(one) > 0 and one.equals(two)

    code = (run.path / "repro.py").read_text()
    assert f"({changed}, 'set'" in code and "'stop'" not in code
    again = repeat(run, tmp_path / "again")
    assert_same(again, run)


CLOCK = """
import os, pathlib, sys, time
sys.path.insert(0, {folder!r})
import net as nets

class Clock(nets.nn.Module):
    def forward(self, x):
        if self.training:
            with open(pathlib.Path({clocks!r}) / os.environ["RANK"], "a") as file:
                file.write(f"{{time.time()}}\\n")
            time.sleep(0.3)
        return x

def net(num_classes=10, in_channels=1):
    return nets.nn.Sequential(Clock(), nets.net(num_classes, in_channels, dropout=0.0))
"""
"""A model that writes down when each rank begins each step."""


def test_four_ranks_obey_after_the_same_step_within_two(
    config: Callable[..., TrainConfig], until: Callable[..., Any], tmp_path: Path
) -> None:
    clocks = tmp_path / "clocks"
    clocks.mkdir()
    (tmp_path / "clock.py").write_text(CLOCK.format(folder=str(Path(__file__).parent), clocks=str(clocks)))
    every = {"probes__gradients__every": 1, "probes__activations__every": 0}
    slow = config(epochs=9, model__name=f"{tmp_path / 'clock.py'}:net", log_every=1, **every)
    run = launch(slow, nproc=4, root=tmp_path)

    def begun(rank: int = 0) -> int:
        """Steps that a rank has begun."""
        path = clocks / str(rank)
        return len(path.read_text().splitlines()) if path.exists() else 0

    def post(name: str, *settings: Any) -> tuple[int, int]:
        """Post a command as a step begins: that step, and the one after which the command took effect."""
        count = begun()
        until(lambda: begun() > count, 60)
        underway = begun()
        run.set(**settings[0]) if settings else getattr(run, name)()
        until(lambda: applied(run).get(name, 0) >= underway, 60)
        return underway, applied(run)[name]

    until(lambda: begun() > 2, 120)
    lags = {}
    for name, *settings in (("set", {"lr": 1e-4}), ("pause",)):
        underway, step = post(name, *settings)
        lags[name] = step - underway
    until(lambda: run.status == "paused")
    time.sleep(0.7)
    assert {begun(rank) for rank in range(4)} == {step}  # nobody went on
    run.resume()
    until(lambda: begun() > step, 60)
    underway, step = post("stop")
    lags["stop"] = step - underway
    run.wait(timeout=60)
    print(f"steps from the one underway to the command's: {lags}")
    assert all(0 <= lag <= 2 for lag in lags.values())
    assert run.status == "stopped" and {begun(rank) for rank in range(4)} == {step}
    changed = applied(run)["set"]
    assert (run.history["lr"].iloc[changed:] < 1.01e-4).all() and run.history["lr"].iloc[changed - 1] > 1e-4
    readings = run.readings("gradients")
    norms = readings.pivot_table(index=["step", "layer"], columns="rank", values="weight_norm")
    assert list(norms) == [0, 1, 2, 3] and norms.eq(norms[0], axis=0).all().all()  # the new rate took hold at the same step


def test_a_stopped_run_repeats_to_where_it_stopped(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    run = train(config(epochs=2), replay=[(3, "set", {"lr": 1e-3}), (7, "stop", {})]).run
    assert run.status == "stopped"
    again = repeat(run, tmp_path / "again")
    assert again.status == "stopped" and again.progress.step == 7
    assert_same(again, run, weights=False)


def test_a_repeated_run_that_was_stopped_resumes_with_the_changes_still_to_come(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None]
) -> None:
    whole = train(config(epochs=2), replay=[(3, "set", {"lr": 1e-3}), (12, "set", {"lr": 1e-4})]).run
    parted = train(config(epochs=2), replay=[(3, "set", {"lr": 1e-3}), (7, "stop", {}), (12, "set", {"lr": 1e-4})]).run
    assert_same(parted.resume().wait(timeout=120), whole)


def test_code_names_the_files_as_the_run_keeps_them(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    text = Path(config().model.name.partition(":")[0]).read_text()
    source.write_text(
        text
        + "\n\ndef darker(x, draw):\n    return x // 2\n"
        + "\n\ndef size(model):\n    return sum(p.square().sum() for p in model.parameters())\n"
    )
    plugged = {"data__augment": (f"{source}:darker",), "penalties": {f"{source}:size": 0.1}}
    run = train(config(epochs=1, model__name=f"{source}:net", **plugged)).run
    source.write_text("raise RuntimeError('edited since')")
    assert repeat(run, tmp_path / "again").history["loss"].equals(run.history["loss"])


def test_a_run_resumes_with_the_files_as_they_were(
    config: Callable[..., TrainConfig], assert_same: Callable[..., None], tmp_path: Path
) -> None:
    whole = train(config(epochs=1)).run
    source = tmp_path / "mine.py"
    text = Path(config().model.name.partition(":")[0]).read_text()
    source.write_text(text + "\n\ndef loss():\n    return nn.CrossEntropyLoss()\n")
    given = config(epochs=1, model__name=f"{source}:net", loss__name=f"{source}:loss")
    run = train(given, replay=[(3, "stop", {})]).run
    source.write_text("raise RuntimeError('edited since')")
    assert_same(run.resume().wait(timeout=120), whole)


def test_a_recorded_stop_counts_only_while_the_run_was_not_resumed() -> None:
    from workbench.events import AttemptStarted

    begun = AttemptStarted(total_steps=9, steps_per_epoch=3, world_size=1, device="cpu", parameters=1)
    stop = CommandApplied(step=4, id="", name="stop")
    assert "(4, 'stop', {})" in repro.code(TrainConfig(), [begun, stop])
    assert "stop" not in repro.code(TrainConfig(), [begun, stop, begun])


def test_commands_are_refused_in_words(config: Callable[..., TrainConfig]) -> None:
    run = train(config(max_steps=1)).run
    for post in (run.pause, run.stop, run.save):
        with pytest.raises(RunError, match="is finished, so it cannot"):
            post()
    with pytest.raises(RunError, match="has finished.*Train further by a new run"):
        run.resume()
    with pytest.raises(RunError, match="no command 'explode'.*stop, pause, resume"):
        run.command("explode")
    with pytest.raises(RunError, match="'momentum' cannot be changed.*lr, weight_decay"):
        run.set(momentum=0.5)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RunError, match=f"lr={value} must be a finite number"):
            run.set(lr=value)
