"""Distillation: each term against its formula in double precision, and runs that learn from a teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench import Run, TrainConfig, launch, save_model, train
from workbench.compress import distill
from workbench.data import load_batches
from workbench.errors import ConfigError, ModelError, RunError
from workbench.models import build_model
from workbench.training.distillation import AttentionTransfer, Distillation, Features, SoftTargets
from workbench.training.distillation_config import DistillConfig

pytestmark = pytest.mark.usefixtures("forked")
CONFIG = DistillConfig()


# -- terms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_the_divergence_of_softened_probabilities(temperature: float) -> None:
    student, teacher = torch.randn(6, 5), 3 * torch.randn(6, 5)
    found = SoftTargets(student, teacher, DistillConfig(temperature=temperature))(student, teacher)

    def softened(logits: Tensor) -> Any:
        scores = np.exp(logits.double().numpy() / temperature)
        return scores / scores.sum(1, keepdims=True)

    ours, theirs = softened(student), softened(teacher)
    expected = temperature**2 * (theirs * np.log(theirs / ours)).sum(1).mean()
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_at_a_high_temperature_is_that_of_matching_logits() -> None:
    """Hinton et al. section 2.1: T² times the gradient tends to (student - teacher) / classes for logits of mean zero."""
    student, teacher = (x - x.mean(1, keepdim=True) for x in (torch.randn(4, 5), torch.randn(4, 5)))
    student.requires_grad_()
    SoftTargets(student, teacher, DistillConfig(temperature=100.0))(student, teacher).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 5 / 4, rtol=0.05, atol=1e-3)


def test_features_are_compared_through_a_projection_where_channels_differ() -> None:
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 7, 5, 5)
    term = Features(student, teacher, CONFIG)
    assert isinstance(term.project, nn.Conv2d)
    weight, bias = (p.detach().double().numpy() for p in (term.project.weight[:, :, 0, 0], term.project.bias))  # type: ignore[index]
    projected = np.einsum("oc,bchw->bohw", weight, student.double().numpy()) + bias[None, :, None, None]
    expected = ((projected - teacher.double().numpy()) ** 2).mean()
    assert float(term(student, teacher).detach()) == pytest.approx(expected, rel=1e-5)
    same = Features(student, student, CONFIG)
    assert not list(same.parameters()) and float(same(student, student + 1)) == pytest.approx(1)
    states = torch.randn(3, 6, 4), torch.randn(3, 6, 8)
    assert isinstance(Features(*states, CONFIG).project, nn.Linear)


def test_attention_maps_are_energies_over_channels_of_unit_length() -> None:
    student, teacher = torch.randn(3, 4, 5, 6), torch.randn(3, 7, 5, 6)
    found = AttentionTransfer(student, teacher, CONFIG)(student, teacher)

    def attention(x: Tensor) -> Any:
        energy = (x.double().numpy() ** 2).sum(1).reshape(len(x), -1)
        return energy / np.linalg.norm(energy, axis=1, keepdims=True)

    assert float(found) == pytest.approx(((attention(student) - attention(teacher)) ** 2).sum(1).mean(), rel=1e-5)
    assert float(AttentionTransfer(student, student, CONFIG)(student, 2 * student)) == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ModelError, match=r"same classes; the student gives \[2, 5\], the teacher \[2, 6\]"):
        SoftTargets(torch.zeros(2, 5), torch.zeros(2, 6), CONFIG)
    for term in (Features, AttentionTransfer):
        with pytest.raises(ModelError, match=r"shape \[2, 4, 8, 8\] and \[2, 4, 4, 4\] cannot be compared"):
            term(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 4, 4), CONFIG)


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of twice the width."""
    result = train(
        config(**{"model.args": {"dropout": 0.0, "width": 16}, "optim.lr": 0.02, "epochs": 6}),
        root=tmp_path_factory.mktemp("teacher"),
    )
    return save_model(result.model, tmp_path_factory.mktemp("saved") / "teacher")


@pytest.fixture(scope="module")
def student(config: Callable[..., TrainConfig], teacher: Path) -> Callable[..., TrainConfig]:
    """A config with every term: the outputs, and the convolution's features and attention."""

    def make(**changes: object) -> TrainConfig:
        settings = {
            "teacher": str(teacher),
            "terms": {"soft": 0.9, "features": 0.5, "attention": 2.0},
            "layers": ("1", "3"),
        }
        return config(**({"distill": settings, "model.args": {"dropout": 0.0}, "epochs": 2} | changes))

    return make


def test_the_first_loss_is_the_weighted_sum_by_hand(student: Callable[..., TrainConfig], teacher: Path, tmp_path: Path) -> None:
    chosen = student(**{"distill.terms": {"soft": 0.7, "attention": 10.0}, "distill.task": 0.3, "data.augment": ()})
    run = train(chosen, root=tmp_path).run
    from workbench import load_model
    from workbench.data import load_splits
    from workbench.data.batches import Batches, Target
    from workbench.data.order import Shard, derive_seed
    from workbench.training.subject import fit_to_data

    splits = load_splits(chosen.data)
    torch.manual_seed(derive_seed(chosen.seed))
    ours, theirs = build_model(fit_to_data(chosen, splits)).double(), load_model(teacher).double()
    ((x, y),) = next(iter(Batches(splits, chosen.data, Shard(), Target(torch.device("cpu")), chosen.seed).epoch(0)))
    expected = 0.3 * nn.functional.cross_entropy(ours(x.double()), y)
    probabilities = [(model(x.double()) / 4).softmax(1) for model in (ours, theirs)]
    expected += 0.7 * 16 * (probabilities[1] * (probabilities[1] / probabilities[0]).log()).sum(1).mean()
    for index in (2, 4):  # the names "1" and "3"
        maps = [nn.functional.normalize(model[:index](x.double()).square().sum(1).flatten(1)) for model in (ours, theirs)]  # type: ignore[index]
        expected += 10.0 * (maps[0] - maps[1]).square().sum(1).mean()
    assert run.history["loss"].iloc[0] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_student_learns_more_from_a_teacher_than_alone(
    student: Callable[..., TrainConfig], teacher: Path, tmp_path: Path
) -> None:
    """By how far its probabilities are from the teacher's, on samples that neither trained on."""
    from workbench import load_model

    soft = student(**{"distill.terms": {"soft": 1.0}, "distill.task": 0.0, "epochs": 6, "optim.lr": 0.02})
    taught, alone = train(soft, root=tmp_path), train(soft.override({"distill": None}), root=tmp_path)
    batches, source = load_batches(soft.data), load_model(teacher)

    def divergence(model: nn.Module) -> float:
        with torch.no_grad():
            pairs = [(model(x), source(x)) for x, _ in batches]
            return float(np.mean([float(SoftTargets(*pair, DistillConfig(temperature=1))(*pair)) for pair in pairs]))

    assert divergence(taught.model) < 0.7 * divergence(alone.model)


def test_a_run_resumes_with_its_projections_bit_for_bit_though_the_teacher_is_gone(
    student: Callable[..., TrainConfig], teacher: Path, assert_same: Callable[..., None], tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    chosen = student(**{"distill.teacher": str(tmp_path / "teacher"), "model.args": {}, "ema": 0.9})
    whole = train(chosen, root=tmp_path).run
    stopped = train(chosen, root=tmp_path, replay=[(5, "stop", {})]).run
    shutil.rmtree(tmp_path / "teacher")
    moved = Run.open(shutil.move(stopped.path, tmp_path / "moved"))
    assert moved.config.distill.teacher == "source/teacher"
    assert_same(moved.resume().wait(timeout=120), whole)
    scope: dict[str, Any] = {"__file__": str(whole.path / "repro.py")}
    exec((whole.path / "repro.py").read_text(), scope)
    assert_same(scope["result"].run, whole)


def test_ranks_and_micro_steps_have_the_losses_of_one(student: Callable[..., TrainConfig], tmp_path: Path) -> None:
    alone = train(student(), root=tmp_path).run
    for run in (train(student(accumulate=2), root=tmp_path).run, launch(student(), nproc=2, root=tmp_path).wait(timeout=120)):
        np.testing.assert_allclose(run.history["loss"], alone.history["loss"], atol=3e-4)
        np.testing.assert_allclose(run.history["val_loss"].dropna(), alone.history["val_loss"].dropna(), atol=1e-4)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_eager_one(student: Callable[..., TrainConfig], tmp_path: Path) -> None:
    eager, compiled = (
        train(student(compile=mode, max_steps=6, penalties={"slimming": 0.0, "group_lasso": 1e-3}), root=tmp_path).run
        for mode in ("off", "default")
    )
    np.testing.assert_allclose(compiled.history["loss"], eager.history["loss"], rtol=1e-3, atol=1e-4)


def test_the_student_comes_back_without_teacher_hooks_or_projections(student: Callable[..., TrainConfig], tmp_path: Path) -> None:
    result = train(student(), root=tmp_path)
    assert not any(module._forward_hooks for module in result.model.modules())
    plain = train(student(distill=None, max_steps=1), root=tmp_path).model
    assert set(result.model.state_dict()) == set(plain.state_dict())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(result.run.load_model()(x), result.model(x))


def test_the_verb_takes_modules_and_leaves_them_as_they_are(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    class Odd(nn.Sequential):
        """A module that nothing says how to build: it is kept pickled."""

    torch.manual_seed(0)
    source = Odd(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(True)
    pupil = build_model(config(**{"model.args": {}}).model.override({"num_classes": 10, "in_channels": 1}))
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (source, pupil)]
    result = distill(pupil, source, config(epochs=1), root=tmp_path)
    assert result.run.config.distill.terms == {"soft": 0.9}
    for model, state in zip((source, pupil), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not torch.equal(result.model[1].weight, pupil[1].weight)  # type: ignore[index, union-attr]
    stopped = distill(pupil, source, config(epochs=1), root=tmp_path).run
    assert (stopped.path / "source" / "teacher.pkl").is_file()


def test_a_layer_that_gives_no_tensor_is_named() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.two = nn.Linear(4, 3), nn.Linear(4, 3), nn.LSTM(3, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(self.used(x)[:, None])[0].squeeze(1)
            return found

    def made(layer: str) -> Distillation:
        return Distillation(DistillConfig(terms={"features": 1.0}, layers=(layer,)), Forks(), Forks(), torch.randn(2, 4))

    with pytest.raises(ModelError, match="'unused' gives nothing: the model does not call it"):
        made("unused")
    assert len(made("two").layers) == 1  # the first of several outputs


def test_the_teacher_computes_without_gradient_in_evaluation_mode() -> None:
    teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9), nn.BatchNorm1d(3))
    student = nn.Sequential(nn.Linear(4, 3)).train()
    x = torch.randn(8, 4)
    part = Distillation(DistillConfig(), student, teacher, x)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    output = student(x)
    part(x, output, output.sum()).backward()
    assert student[0].weight.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert student.training


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"distill.teacher": ""}, RunError, "distill.teacher='' is not there"),
        ({"distill.teacher": "/nowhere"}, RunError, "distill.teacher='/nowhere' is not there"),
        ({"distill.layers": ()}, ConfigError, "compare layers, but none is named.*Set distill.layers, e.g. some of 0, 1"),
        ({"distill.layers": ("9",)}, ConfigError, "The student has no layer '9'"),
        ({"distill.layers": ("1", "2"), "distill.teacher_layers": ("1",)}, ConfigError, r"are 2 \(1, 2\).*1 \(1\)"),
        ({"distill.layers": ("1",), "distill.teacher_layers": ("5",)}, ModelError, "1 against the teacher's 5: Outputs of shape"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    changes: dict[str, Any], error: type[Exception], words: str, student: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        train(student(**changes), root=tmp_path)
