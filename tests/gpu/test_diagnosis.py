"""Faults that only fp16 has, planted on CUDA: found, and cured by their own advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench import TrainConfig, findings_of, train

FAULTS = Path(__file__).parents[1] / "bench" / "faults.py"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("overflowing_activations", {"model.name": f"{FAULTS}:loud", "model.args.factor": 1e4}),
        ("gradient_underflow", {"loss.name": f"{FAULTS}:Faint", "loss.args.factor": 1e-10, "optim.args.eps": 1e-16}),
    ],
)
def test_what_only_fp16_suffers_from_is_found_and_cured(name: str, changes: dict[str, Any]) -> None:
    probes = {"gradients": {"every": 5}, "activations": {"every": 5}}
    base = TrainConfig(model={"name": "mlp"}, epochs=4, device="cuda", precision="fp16", log_every=5, probes=probes)
    config = base.override(changes)
    run = train(config).run
    (finding,) = [f for f in findings_of(run) if f.name == name]
    assert finding.remedy == {"precision": "bf16"}
    cured = train(config.override(finding.remedy)).run
    assert name not in {f.name for f in findings_of(cured)}
    assert cured.metrics["accuracy"] > 0.8
