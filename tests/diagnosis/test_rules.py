"""Each fault planted in tables of known statistics, and found alone; the same tables without it, in which nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.diagnosis import RULES, diagnose
from workbench.diagnosis.base import Tables, finding
from workbench.events import EVENT, Finding
from workbench.training.config import TrainConfig

BINS = 66
LAYERS = [f"{index}.weight" for index in range(5)]


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def history(loss: Any, steps: int = 200, lr: float = 1e-3, **columns: Any) -> pd.DataFrame:
    """A loss by step: a function of the step over the number of steps, or an array."""
    step = np.arange(1, steps + 1)
    values = loss(step / steps) if callable(loss) else loss
    return pd.DataFrame({"step": step, "epoch": 1 + step // 20, "loss": values, "lr": lr, **columns})


def falling(share: np.ndarray) -> np.ndarray:
    return np.asarray(0.05 + 2.2 * np.exp(-6 * share) + 0.03 * random().standard_normal(len(share)))


def still(share: np.ndarray) -> np.ndarray:
    return np.asarray(2.3 + 0.02 * random().standard_normal(len(share)))


def gradients(
    norms: Any = 0.1, update: Any = 1e-3, histogram: Callable[[np.random.Generator], np.ndarray] | None = None, zeros: float = 0.0
) -> pd.DataFrame:
    """Ten readings of five layers; by layer, norms and updates as given."""
    draws = random()
    norms, update = np.broadcast_to(norms, 5), np.broadcast_to(update, 5)
    rows = [
        {"step": step, "rank": 0, "layer": layer, "norm": norms[i] * draws.uniform(0.8, 1.2), "max": norms[i] / 10}
        | {"nonfinite": 0, "weight_norm": 4.0, "update_ratio": update[i] * draws.uniform(0.8, 1.2), "zeros": zeros}
        | {"histogram": histogram(draws) if histogram else np.zeros(BINS, dtype=np.int32)}
        for step in range(20, 201, 20)
        for i, layer in enumerate(LAYERS)
    ]
    return pd.DataFrame(rows)


def counted(values: np.ndarray) -> np.ndarray:
    """By log2 magnitude, as the probe counts: bin 0 below 2^-48, bin k from 2^(k - 49), the last from 2^16."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-60)))
    return np.bincount(np.clip(exponent + 49, 0, 65).astype(int), minlength=BINS).astype(np.int32)


def in_half(draws: np.random.Generator) -> np.ndarray:
    """Gradients of about 2^-24, as fp16 rounds them: with most below its smallest number."""
    return counted((3e-8 * draws.standard_normal(5000)).astype(np.float16).astype(np.float64))


def units_off(draws: np.random.Generator) -> np.ndarray:
    """Gradients of ordinary size, most of them zero because their units are off."""
    values = 1e-3 * draws.standard_normal(5000)
    return counted(np.where(np.arange(5000) < 3500, 0.0, values))


def activations(values: np.ndarray, **columns: Any) -> pd.DataFrame:
    row = {"layer": "act", "rank": 0, "count": values.size, "mean": values.mean(), "std": values.std(), "nonfinite": 0}
    row |= {"min": values.min(), "max": values.max(), "zeros": (values == 0).mean(), "dead": 0.0, "saturated": math.nan}
    return pd.DataFrame([{"step": step, **row, **columns} for step in (20, 40, 60)])


def memory(used: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
    step = np.arange(1, 81)
    allocated = used(step.astype(float)) * 2**20
    return pd.DataFrame({"step": step, "rank": 0, "allocated": allocated.astype(np.int64), "total": 16 * 2**30})


def times(**columns: Any) -> pd.DataFrame:
    row = {"rank": 0, "busy": 0.03, "waited": 0.0, "exposed": 0.0, "payload": 0, "network": math.nan, "idle": 0.0}
    return pd.DataFrame([{"step": step, **row, **columns} for step in range(10, 90, 10)])


def evaluated(held: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
    """A loss that falls to nothing, and a held-out one after each tenth of the run."""
    table = history(lambda share: 2.3 * np.exp(-8 * share))
    ends = np.arange(19, 200, 20)
    table["val_loss"] = np.nan
    table.loc[ends, "val_loss"] = held(ends / 200)
    return table


SLOW = history(still, lr=1e-6)
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: tables with the fault, settings, the same tables without it
    "non_finite_loss": (
        {"history": history(lambda s: np.where(s > 0.9, np.nan, falling(s)))},
        {},
        {"history": history(lambda s: np.where(s == 0.5, np.nan, falling(s)))},
    ),
    "diverging_loss": (
        {"history": history(lambda s: falling(s) + 8 * np.maximum(s - 0.5, 0))},
        {},
        {"history": history(falling)},
    ),
    "plateau": ({"history": SLOW}, {}, {"history": history(falling)}),
    "noisy_loss": (
        {"history": history(lambda s: 1.5 + 1.2 * random().standard_normal(len(s)))},
        {},
        {"history": history(lambda s: 1.0 - 0.3 * s + 0.15 * random().standard_normal(len(s)))},
    ),
    "overfitting": (
        {"history": evaluated(lambda s: 0.6 + 0.8 * np.abs(s - 0.3))},
        {},
        {"history": evaluated(lambda s: 0.3 + 0.7 * np.exp(-4 * s))},
    ),
    "exploding_gradients": ({"gradients": gradients(np.array([0.1, 0.1, 1.0, 30.0, 300.0]))}, {}, {"gradients": gradients()}),
    "vanishing_gradients": (
        {"gradients": gradients(10.0 ** -np.arange(9, 0, -2))},
        {"optim.name": "sgd"},
        {"gradients": gradients(10.0 ** -np.arange(4, 1.5, -0.5))},
    ),
    "gradient_underflow": (
        {"gradients": gradients(histogram=in_half, zeros=0.6)},
        {"precision": "fp16"},
        {"gradients": gradients(histogram=units_off, zeros=0.7)},
    ),
    "rate_too_high": ({"history": history(still, 140), "gradients": gradients(update=0.3)}, {}, {"gradients": gradients()}),
    "rate_too_low": (
        {"history": history(still, 140), "gradients": gradients(update=1e-6)},
        {},
        {"history": history(falling), "gradients": gradients(update=1e-6)},  # however small, it learns
    ),
    "overflowing_activations": (
        {"activations": activations(1.5e4 * random().standard_normal(4000))},
        {"precision": "fp16"},
        {"activations": activations(15 * random().standard_normal(4000))},
    ),
    "dead_activations": (
        {"activations": activations(np.maximum(random().standard_normal(4000), 0), dead=0.7)},
        {},
        {"activations": activations(np.maximum(random().standard_normal(4000), 0), dead=0.2)},
    ),
    "saturated_activations": (
        {"activations": activations(np.tanh(2 * random().standard_normal(4000)), saturated=0.7)},
        {},
        {"activations": activations(np.tanh(2 * random().standard_normal(4000)), saturated=0.2)},
    ),
    "memory_leak": (
        {"memory": memory(lambda s: 900 + 2 * s + random().standard_normal(len(s)))},
        {},
        {"memory": memory(lambda s: 900 + 160 * (1 - np.exp(-s / 12)) + random().standard_normal(len(s)))},
    ),
    "starved_step": ({"communication": times(waited=0.015)}, {}, {"communication": times(waited=0.003)}),
    "host_bound": ({"communication": times(idle=1.0)}, {}, {"communication": times(idle=0.5)}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_alone_and_its_remedies_are_settings(name: str) -> None:
    spoilt, changes, sound = FAULTS[name]
    config = TrainConfig().override(changes)
    (found,) = diagnose(**spoilt, config=config)
    assert found.name == name and found.message.endswith(".")
    for remedy in found.remedies:
        assert config.override(remedy) != config, "a remedy changes something"
    assert diagnose(**sound, config=config) == []


def test_every_rule_has_its_fault_here_or_among_the_inspectors() -> None:
    elsewhere = {"non_finite_gradients", "non_finite_activations", "slow_rank", "slow_network", "exposed_communication"}
    assert set(RULES) == set(FAULTS) | elsewhere


def test_readings_without_the_newer_columns_are_taken_as_they_are() -> None:
    newer = ["update_ratio", "histogram", "zeros", "dead", "saturated", "idle"]
    for spoilt, changes, _ in FAULTS.values():
        tables = {
            kind: table.drop(columns=[c for c in newer if c in table and kind != "activations"]) for kind, table in spoilt.items()
        }
        tables = {kind: table.drop(columns=["dead", "saturated"], errors="ignore") for kind, table in tables.items()}
        diagnose(**tables, config=TrainConfig().override(changes))


def test_gradients_vanish_for_adam_only_below_its_epsilon() -> None:
    table = gradients(10.0 ** -np.arange(9, 0, -2))
    names = lambda config: [f.name for f in diagnose(gradients=table, config=config)]  # noqa: E731
    assert names(TrainConfig(optim={"name": "sgd"})) == ["vanishing_gradients"]
    assert names(TrainConfig(optim={"name": "adamw"})) == ["vanishing_gradients"]
    table["max"] = 1e-6
    assert names(TrainConfig(optim={"name": "adamw"})) == []


@pytest.mark.parametrize(("factor", "expected"), [(1e-10, ["gradient_underflow"]), (1.0, [])])
def test_underflow_shows_in_gradients_that_fp16_computed(factor: float, expected: list[str]) -> None:
    """A perceptron and the digits under autocast, its loss as given and scaled by 2^16; counted as by the probe."""
    import torch
    from torch import nn

    from workbench.data.config import DataConfig
    from workbench.data.splits import load_splits

    torch.manual_seed(0)
    train: Any = load_splits(DataConfig()).train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    rows = []
    for step in range(3):
        model.zero_grad()
        part = slice(64 * step, 64 * step + 64)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(train.x[part].float() / 16), train.y[part])
        (loss * factor * 2**16).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            values = weight.grad.double().numpy().ravel() / 2**16
            row = {"step": step, "rank": 0, "layer": name, "norm": np.linalg.norm(values), "max": np.abs(values).max()}
            row |= {"nonfinite": 0, "weight_norm": float(weight.detach().norm())}
            rows.append({**row, "zeros": float((values == 0).mean()), "histogram": counted(values)})
    found = diagnose(
        gradients=pd.DataFrame(rows), config=TrainConfig(precision="fp16", optim={"name": "adamw", "args": {"eps": 1e-16}})
    )
    assert [f.name for f in found if f.name == "gradient_underflow"] == expected
    assert not expected or found[-1].remedy == {"precision": "bf16"}


def test_a_warm_up_and_the_end_of_a_schedule_are_no_low_rates() -> None:
    table = history(still, 140)
    table["lr"] = np.where(table["step"] < 120, 1e-3, 1e-9)
    rates = table.set_index("step")["lr"]
    read = gradients()
    read["update_ratio"] *= read["step"].map(rates).fillna(1e-9) / 1e-3
    assert diagnose(table, read, config=TrainConfig()) == []


def test_advice_leaves_out_what_is_done() -> None:
    tables = Tables(*[pd.DataFrame()] * 5, TrainConfig(optim={"name": "adamw", "lr": 1e-3}))
    given = ({"optim.name": "adamw", "optim.lr": 1e-3}, {"optim.lr": 1e-4}, {"optim.lr": 1e-4}, {"clip.mode": "off"})
    (found,) = finding(tables, "x", "info", 1, "It is.", *given)
    assert found.remedies == ({"optim.lr": 1e-4},)


@given(st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False) | st.text() | st.booleans(), max_size=3))
def test_findings_pass_the_journal_with_their_alternatives(remedy: dict[str, Any]) -> None:
    said = Finding(name="x", severity="info", message="m", remedy=remedy, alternatives=(remedy, {"a": 1}))
    again = EVENT.validate_json(said.model_dump_json())
    assert isinstance(again, Finding) and again.remedies[-1] == {"a": 1} and again.remedy.keys() == remedy.keys()
    old = EVENT.validate_json('{"type": "finding", "name": "x", "severity": "info", "message": "m", "remedy": {"a": 1}}')
    assert isinstance(old, Finding) and old.remedies == ({"a": 1},)
