"""Advice applied: to a running job between two steps, as a run that goes on from a checkpoint, as one from scratch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from workbench import Run, TrainConfig, apply, findings_of, launch, train
from workbench.cli import main
from workbench.diagnosis import config_now
from workbench.errors import NonFiniteLoss, RunError
from workbench.events import CommandApplied, Finding
from workbench.training import carry_out

pytestmark = pytest.mark.usefixtures("forked")
SMALL = TrainConfig(data={"name": "digits", "batch_size": 64}, model={"name": "mlp"}, device="cpu", precision="fp32", log_every=2)
SLOW = SMALL.override({"optim.lr": 1e-6, "epochs": 9, "checkpoint.every_epochs": 3})


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return value


def said(**changes: Any) -> Finding:
    return Finding(
        name="test", severity="warning", message="It is.", remedy={k.replace("__", "."): v for k, v in changes.items()}
    )


def test_a_running_job_takes_rate_decay_and_clipping() -> None:
    run = launch(SMALL.override({"epochs": 1000, "optim.lr": 0.01, "schedule.name": "constant", "schedule.warmup": 0.0}))
    until(lambda: run.progress.step > 5)
    changes = {"optim.lr": 0.002, "optim.weight_decay": 0.01, "clip.mode": "fixed", "clip.max_norm": 1e-3}
    done = apply(run, said(**{key.replace(".", "__"): value for key, value in changes.items()}))
    assert done.how == "live" and done.run is run and "optim.lr=0.002" in str(done) and run.id in done.words
    (event,) = until(lambda: [e for e in run.events if isinstance(e, CommandApplied)])
    assert event.settings == {"peak": 0.002, "weight_decay": 0.01, "clip_mode": "fixed", "clip_max_norm": 1e-3}
    now = config_now(run)
    assert now == run.config.override(changes)  # advice starts from here
    until(lambda: run.progress.step > event.step + 20)
    rates = run.history["lr"]
    assert rates.iloc[event.step - 1] == 0.01 and (rates.iloc[event.step :] == 0.002).all()
    run.set(lr=0.004)
    later = until(lambda: [e for e in run.events if isinstance(e, CommandApplied) and "lr" in e.settings])[0]
    until(lambda: run.progress.step > later.step + 2)
    assert config_now(run).flat()["optim.lr"] == pytest.approx(0.004)  # a rate in words of its peak
    run.kill()


def test_what_was_set_outlives_a_restart() -> None:
    config = SMALL.override({"max_steps": 9, "optim.name": "sgd", "optim.lr": 0.5})
    changes = (2, "set", {"clip_mode": "fixed", "clip_max_norm": 1e-3, "peak": 0.1})
    whole = train(config, replay=[changes]).run
    parted = train(config, replay=[changes, (5, "stop", {})]).run
    (parted.path / "replay.json").unlink()
    carry_out(parted)
    assert parted.history["loss"].equals(whole.history["loss"]) and parted.history["lr"].equals(whole.history["lr"])


def test_clipping_can_be_set_while_training_and_repeated_from_the_record() -> None:
    short = SMALL.override({"max_steps": 6, "optim.name": "sgd", "optim.lr": 0.5})
    plain, clipped = train(short).run, train(short.override({"clip.mode": "fixed", "clip.max_norm": 1e-6})).run
    changed = train(short, replay=[(1, "set", {"clip_mode": "fixed", "clip_max_norm": 1e-6})]).run
    losses = changed.history["loss"]
    assert losses.iloc[:2].equals(plain.history["loss"].iloc[:2])
    weights = changed.readings("gradients").groupby("layer")["weight_norm"].last()
    held = clipped.readings("gradients").groupby("layer")["weight_norm"].last()
    assert len(weights) and not weights.equals(held)  # one step had been taken as before
    assert "'clip_mode': 'fixed'" in (changed.path / "repro.py").read_text()
    assert losses.iloc[2:].std() < 0.1 * plain.history["loss"].iloc[2:].std() + 0.1


def test_a_remedy_that_leaves_weights_as_they_are_goes_on_from_the_checkpoint() -> None:
    run = train(SLOW, replay=[(100, "stop", {})]).run
    assert run.status == "stopped"
    done = apply(run, said(optim__lr=1e-3, eval_every=2))
    assert done.how == "checkpoint" and "from step 100" in done.words
    new = done.run.wait(120)
    assert new.status == "finished" and new.history["step"].iloc[0] == 101
    assert new.history["lr"].iloc[0] == pytest.approx(1000 * run.history["lr"].iloc[-1], rel=0.1)
    assert [f.message for f in new.findings if f.name == "remedied"] and run.status == "stopped"


def test_a_fault_that_spoils_weights_is_cured_from_scratch_with_the_run_s_own_files(tmp_path: Any) -> None:
    source = tmp_path / "mine.py"
    source.write_text("from workbench.models.convnet import mlp\n\ndef net(num_classes=10):\n    return mlp(num_classes)\n")
    run = train(SLOW.override({"model.name": f"{source}:net", "max_steps": 6, "checkpoint.every_steps": 3})).run
    source.write_text("raise RuntimeError('edited since')")
    other = {"optim.lr": 0.1, "optim.name": "sgd"}
    finding = Finding(
        name="dead_activations", severity="warning", message="Dead.", remedy={"optim.lr": 1e-3}, alternatives=(other,)
    )
    done = apply(run, finding.alternatives[0])
    assert done.how == "scratch" and "from scratch" in str(done)
    new = done.run.wait(120)
    assert new.history["step"].iloc[0] == 1 and new.config.optim.name == "sgd" and new.config.optim.lr == 0.1


def test_what_cannot_be_applied_is_refused_in_words() -> None:
    run = train(SMALL.override({"max_steps": 2})).run
    with pytest.raises(RunError, match="No setting cures memory_leak"):
        apply(run, Finding(name="memory_leak", severity="warning", message="It leaks."))
    with pytest.raises(RunError, match="clip_mode='often' must be one of off, fixed, dynamic, agc"):
        run.set(clip_mode="often")
    with pytest.raises(RunError, match="clip_max_norm=0"):
        run.set(clip_max_norm=0)


def test_a_run_whose_weights_all_became_nan_says_so() -> None:
    """Its last readings have no rows, which must not hide why it failed."""
    probes = {f"probes.{kind}.every": 1 for kind in ("gradients", "activations")}
    with pytest.raises(NonFiniteLoss, match="The loss became"):
        train(SMALL.override({"optim.name": "sgd", "optim.lr": 100.0, "schedule.warmup": 0.0, "log_every": 20, **probes}))
    (run,) = Run.all()
    names = {f.name for f in findings_of(run)}
    assert {"non_finite_loss", "non_finite_gradients"} <= names


def test_a_plateau_is_found_cured_by_its_advice_and_told_without_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    run = train(SLOW).run
    (finding,) = [f for f in findings_of(run) if f.name == "plateau"]
    assert main(["show", run.id]) == 0
    shown = capsys.readouterr().out
    assert finding.message in shown and "try optim.lr=0.001" in shown
    assert "hardly moved" in run.report().read_text()
    cured = train(run.config.override(finding.remedy))
    assert findings_of(cured.run) == [] and cured.metrics["accuracy"] > 0.85


def test_a_fault_of_a_real_run_is_found_and_cured() -> None:
    config = SMALL.override({"epochs": 3, "optim.lr": 1.0})
    run = train(config).run
    (finding,) = [f for f in findings_of(run) if f.name == "dead_activations"]
    outcomes = {}
    for remedy in finding.remedies:
        again: Run = train(config.override(remedy)).run
        outcomes[str(remedy)] = finding.name in {f.name for f in findings_of(again)}
        if not outcomes[str(remedy)]:
            return
    raise AssertionError(f"none of its remedies cures it: {outcomes}")
