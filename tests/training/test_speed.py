"""Precision and compilation by measurement: what the figures say is what is taken, and the model stays as it was."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from workbench import TrainConfig, train
from workbench.distributed import World
from workbench.losses import LossConfig, make_loss
from workbench.optim import OptimConfig
from workbench.training import speed
from workbench.training.decisions import Decisions
from workbench.training.objective import Objective
from workbench.training.trial import Trial

NET = Path(__file__).with_name("net.py")
LONG = 10**9


@pytest.fixture
def trial() -> Trial:
    torch.manual_seed(0)
    model = runpy.run_path(str(NET))["net"](width=16)
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    return Trial(Objective(model, make_loss(LossConfig())), (x, y), OptimConfig())


def decided(value: str) -> Decisions:
    return Decisions({name: {"value": value, "reason": "by rule"} for name in ("precision", "compile")})


def milliseconds(reason: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.e+]+) ms", reason)]


@pytest.mark.parametrize("rule", ["fp32", "bf16"])
def test_the_most_exact_precision_that_is_fast_enough_is_taken(rule: str, trial: Trial) -> None:
    weights = {name: value.clone() for name, value in trial.objective.state_dict().items()}
    drawn = torch.get_rng_state()
    made = decided(rule)
    chosen = speed.measured_precision(trial, rule, LONG, 1, World(), made)
    exact, fast = milliseconds(made.made["precision"]["reason"])
    assert chosen == made.made["precision"]["value"] == ("fp32" if exact <= speed.WORTH * min(exact, fast) * 1.01 else "bf16")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, weights[name]) for name, value in trial.objective.state_dict().items())


def test_a_short_run_measures_nothing_more(trial: Trial) -> None:
    made = decided("fp32")
    assert speed.measured_precision(trial, "fp32", 600, 1, World(), made) == "fp32"
    assert "doesn't pay for measuring others" in made.made["precision"]["reason"]
    assert speed.measured_compile(trial, "default", "fp32", 600, 1, World(), made) == "off"
    assert "doesn't pay for a minute of compiling" in made.made["compile"]["reason"]


def test_compiled_steps_are_taken_if_they_are_faster(trial: Trial) -> None:
    made = decided("default")
    chosen = speed.measured_compile(trial, "default", "fp32", LONG, 2, World(), made)
    eager, compiled = milliseconds(made.made["compile"]["reason"])
    assert chosen == made.made["compile"]["value"] == ("default" if compiled * speed.WORTH <= eager * 1.01 else "off")
    assert (trial.objective._compiled_call_impl is not None) == (chosen == "default")


def test_a_run_says_what_was_measured_and_learns_as_without(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    given = config(epochs=70)
    plain = train(given.override({"precision": "fp32"}), root=tmp_path).run
    run = train(given.override({"precision": "auto"}), root=tmp_path).run
    assert run.resolved["precision"]["value"] == "fp32" and "a run of about" in run.resolved["precision"]["reason"]
    assert run.history["loss"].equals(plain.history["loss"])
