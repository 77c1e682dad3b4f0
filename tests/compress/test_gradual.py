from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import TrainConfig, train
from workbench.artefact import load_model, save_model
from workbench.compress import GradualConfig, gradual, plan, prune_gradually
from workbench.compress.cost import count_macs
from workbench.errors import ConfigError
from workbench.models import ModelConfig, build_model
from workbench.models.structure import count_parameters

TUNE = TrainConfig(
    data={"name": "digits", "limit": 256, "batch_size": 64}, epochs=1, optim={"name": "sgd", "lr": 0.05}, device="cpu"
)
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _model():
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 8}))


@pytest.mark.parametrize("schedule", ["linear", "cubic", "geometric"])
@given(ratio=st.floats(0.01, 0.95), steps=st.integers(1, 12))
def test_a_schedule_rises_to_the_whole(schedule, ratio, steps):
    config = GradualConfig(ratio=ratio, steps=steps, schedule=schedule)
    progress = [config.progress(step) for step in range(steps + 1)]
    assert progress == sorted(progress)
    assert progress[0] == pytest.approx(0, abs=1e-9) and progress[-1] == pytest.approx(1)
    left = [1 - ratio * done for done in progress]
    parts = {  # each schedule by its definition
        "linear": [a - b for a, b in zip(left, left[1:], strict=False)],
        "geometric": [b / a for a, b in zip(left, left[1:], strict=False)],
        "cubic": [((1 - done) ** (1 / 3) if done < 1 else 0) + step / steps for step, done in enumerate(progress)],
    }[schedule]
    assert parts == pytest.approx([parts[0]] * len(parts), abs=1e-4)


def test_steps_reach_the_ratio_train_between_and_leave_one_chain(tmp_path):
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = prune_gradually(model, GradualConfig(ratio=0.5, steps=3), TUNE, X, folder=tmp_path / "g")
    assert 0.5 <= 1 - count_parameters(result.model) / count_parameters(model) <= 0.51
    records = result.model.structure.transforms
    assert [record["kind"] for record in records] == ["prune"] * 3
    for earlier, later in zip(records, records[1:], strict=False):
        assert earlier["after"] == later["before"]
    frame = result.frame()
    assert frame["removed"].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=0.011)
    assert frame["accuracy"].notna().all() and len(result.runs) == 3
    save_model(result.model, tmp_path / "final")
    assert torch.equal(load_model(tmp_path / "final")(X), result.model(X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_steps_to_a_latency_aim_at_the_originals_each(monkeypatch):
    """On a machine whose time is known, and that shows every candidate 2.9 % too fast: that must not add up over the steps."""

    def time(model):
        return 1e5 + count_macs(model, X[:1])

    model = _model().eval()
    whole, steps = time(model), 3
    monkeypatch.setattr(plan, "timed_call", lambda model, *_: (time(model), "eager"))
    monkeypatch.setattr(plan, "latency_of", lambda calls, *_: {n: [t if t == whole else t * 0.971] for n, t in calls.items()})
    monkeypatch.setattr(gradual, "train", lambda tune, model, **_: SimpleNamespace(model=model, run=SimpleNamespace(metrics={})))
    result = prune_gradually(model, GradualConfig(ratio=0.5, steps=steps, target="latency"), TUNE, X)
    assert time(result.model) / whole == pytest.approx(0.5, rel=0.06)
    records = result.model.structure.transforms
    assert [1 - record["removed"] for record in records] == pytest.approx(
        [1 - 0.5 * k / steps for k in range(1, steps + 1)], rel=0.05
    )
    assert all(record["original"]["parameters"] == count_parameters(model) for record in records)


@pytest.mark.filterwarnings("ignore:.*what goes at once is larger:UserWarning")
def test_a_step_with_nothing_left_to_remove_still_has_its_row(monkeypatch):
    monkeypatch.setattr(gradual, "train", lambda tune, model, **_: SimpleNamespace(model=model, run=SimpleNamespace(metrics={})))
    removed = prune_gradually(_model(), GradualConfig(ratio=0.1, steps=6, round_to=8), TUNE, X).frame()["removed"]
    assert len(removed) == 6 and removed.is_monotonic_increasing and removed.iloc[-1] >= 0.1 and removed.duplicated().any()


def test_a_killed_one_goes_on_after_the_last_whole_step(tmp_path, monkeypatch):
    model, config = _model(), GradualConfig(ratio=0.4, steps=3)
    whole = prune_gradually(model, config, TUNE, X, folder=tmp_path / "whole")
    trained = []

    def dies(*arguments, **keywords):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return train(*arguments, **keywords)

    monkeypatch.setattr(gradual, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        prune_gradually(model, config, TUNE, X, folder=tmp_path / "killed")
    monkeypatch.setattr(gradual, "train", train)
    resumed = prune_gradually(model, config, TUNE, X, folder=tmp_path / "killed")
    assert torch.equal(resumed.model(X), whole.model(X))
    assert len(resumed.runs) == 3
    assert prune_gradually(model, config, TUNE, X, folder=tmp_path / "killed").frame().equals(resumed.frame())
    with pytest.raises(ConfigError, match="other settings \\(prune\\)"):
        prune_gradually(model, GradualConfig(ratio=0.3), TUNE, X, folder=tmp_path / "killed")


def test_sparse_training_fades_the_scales_that_bn_scale_prunes_by(tmp_path):
    config = TUNE.override({"epochs": 4, "penalties": {"slimming": 0.1}})
    slim, plain = (train(c, model=_model(), root=tmp_path).model for c in (config, config.override({"penalties": {}})))

    def scale(model):
        scales = [m.weight.detach().abs() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        return torch.cat(scales).mean()

    assert scale(slim) < scale(plain) - 0.05  # 16 steps of 0.05 × 0.1
    result = prune_gradually(slim, GradualConfig(ratio=0.3, steps=1, criterion="bn_scale"), TUNE, X)
    assert count_parameters(result.model) <= 0.7 * count_parameters(slim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_steps_on_a_gpu_start_from_a_model_in_main_memory(tmp_path):
    result = prune_gradually(_model(), GradualConfig(ratio=0.4, steps=2), TUNE.override({"device": "cuda"}), X, folder=tmp_path)
    assert 0.4 <= 1 - count_parameters(result.model) / count_parameters(_model()) <= 0.41
