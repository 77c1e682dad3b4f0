"""One contract per kind of plug-in, over every registered one: what is added later is held to it with no change here."""

from __future__ import annotations

import copy
import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench import TrainConfig, train
from workbench.artefact import load_model, save_model
from workbench.attribution import METHODS, AttributionConfig, explain
from workbench.cluster import CLUSTERS, launch_script
from workbench.compress import CRITERIA, PruneConfig
from workbench.compress.plan import Plan
from workbench.data.augment import Draw
from workbench.data.cards import card_names, data_folder, read_card
from workbench.data.config import AUGMENTATIONS, DataConfig
from workbench.data.splits import Arrays, Splits, load_splits
from workbench.errors import ModelError
from workbench.losses import LOSSES, LossConfig, make_loss
from workbench.models import MODELS, ModelConfig, build_model
from workbench.optim import make_optimizer
from workbench.optim_config import OPTIMIZERS, OptimConfig
from workbench.probes import PROBES, ProbeConfig, StepContext
from workbench.registry import load_object
from workbench.regularizers import PENALTIES
from workbench.training.distillation_config import DISTILLATIONS, DistillConfig

# -- losses ---------------------------------------------------------------------------------------------------------


def example(name: str) -> tuple[Tensor, Tensor]:
    """Output and target in float64 that the loss takes: labels, or numbers of the output's shape in [0, 1]."""
    torch.manual_seed(0)
    output, labels, numbers = (
        torch.randn(8, 5, dtype=torch.float64),
        torch.randint(5, (8,)),
        torch.rand(8, 5, dtype=torch.float64),
    )
    loss = make_loss(LossConfig(name=name))
    for target in (labels, numbers):
        try:
            loss(output, target)
        except (RuntimeError, ValueError, TypeError, IndexError, UserWarning):  # warnings are errors here
            continue
        return output.log_softmax(1) if name == "nll" else output, target
    raise AssertionError(f"the loss {name} takes neither labels nor numbers")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_mean_over_the_batch_and_has_its_gradient(name: str) -> None:
    output, target = example(name)
    loss = make_loss(LossConfig(name=name))
    value = loss(output, target)
    assert value.shape == () and torch.isfinite(value)
    halves = (loss(output[:4], target[:4]) + loss(output[4:], target[4:])) / 2
    torch.testing.assert_close(halves, value)  # what accumulation and ranks rely on
    assert torch.autograd.gradcheck(lambda x: loss(x, target), output.clone().requires_grad_())


# -- optimizers -----------------------------------------------------------------------------------------------------


def quadratic(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(32, 4)
    found: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_descends_and_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.01))
    start = quadratic(model).item()
    saved: Any = None
    for step in range(40):
        if step == 20:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.zero_grad()
        quadratic(model).backward()
        optimizer.step()
    assert quadratic(model).item() < start
    other = nn.Linear(4, 1)
    resumed = make_optimizer(other, OptimConfig(name=name, lr=0.01))
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(20):
        resumed.zero_grad()
        quadratic(other).backward()
        resumed.step()
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_by_its_name(name: str) -> None:
    config = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 64},
        model={"name": "mlp", "args": {"widths": [16]}},
        optim={"name": name, "lr": 0.01},
        epochs=3,
        device="cpu",
    )
    losses = train(config).run.history["loss"]
    assert losses.iloc[-1] < losses.iloc[0]


# -- augmentations --------------------------------------------------------------------------------------------------


def augmented(name: str, x: Tensor, part: slice, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = AUGMENTATIONS.factory(name)(x[part].clone(), Draw(generator, len(x), part))
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 10, 14)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_draws_per_sample_the_same_however_the_batch_is_split(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randint(1, 255, (24, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = augmented(name, x, slice(0, 24))
    assert whole.shape == x.shape and whole.dtype == x.dtype
    for parts in (2, 3, 8):
        size = 24 // parts
        split = [augmented(name, x, slice(start, start + size)) for start in range(0, 24, size)]
        assert torch.equal(torch.cat(split), whole)
    assert torch.equal(augmented(name, x, slice(0, 24)), whole)
    assert not torch.equal(augmented(name, x, slice(0, 24), seed=4), whole)
    same = x[:1].expand(24, *shape).contiguous()
    assert len({sample.numpy().tobytes() for sample in augmented(name, same, slice(0, 24))}) > 1  # each sample its own draw
    assert whole.min() >= 0 and whole.max() <= 255


# -- probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_reads_tables_and_leaves_no_trace(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(5, 1, 8, 8)
    before = model(x)
    probe = PROBES.create(name, ProbeConfig(every=1))
    detach = probe.attach(model)
    tables = []
    for step in (1, 2):
        model.zero_grad(set_to_none=True)
        probe.arm()
        output = model(x)
        assert torch.equal(output, before)
        output.square().mean().backward()
        read = probe.read(StepContext(step))
        value = read if read is not None else probe.updated(StepContext(step))
        assert isinstance(value, Tensor)
        tables.append(probe.table(step, value.numpy()))
    for step, table in zip((1, 2), tables, strict=True):
        lengths = {len(column) for column in table.values()}
        assert len(lengths) == 1 and lengths != {0}
        assert set(table["step"]) == {step}
    if name != "memory":  # the same step read twice is the same reading: nothing is left over from the first
        assert all(str(tables[0][column]) == str(tables[1][column]) for column in tables[0] if column != "step")
    detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    assert torch.equal(model(x), before)


def test_every_probe_is_read_from_the_run() -> None:
    config = TrainConfig(
        data={"name": "digits", "limit": 128, "batch_size": 64},
        model={"name": "mlp", "args": {"widths": [8]}},
        device="cpu",
        epochs=1,
    )
    run = train(config).run
    for name in config.probes.by_name():
        frame = run.readings(name)
        assert len(frame) and {"step", "rank"} <= set(frame.columns)


# -- models ---------------------------------------------------------------------------------------------------------


def takes_ids(name: str) -> bool:
    return MODELS[name].card.get("input") == "token ids"


def inputs(name: str, count: int, channels: int = 1) -> Tensor:
    """What a model takes: token ids [N, 6], padded, or images [N, channels, 8, 8]."""
    if not takes_ids(name):
        return torch.randn(count, channels, 8, 8)
    ids = torch.randint(1, 50, (count, 6))
    ids[:, 4:] *= torch.arange(count)[:, None] % 2
    return ids


def sentences() -> Splits:
    """Token ids whose first word is the label."""
    ids = torch.randint(1, 50, (96, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1 + torch.arange(96) % 10
    part = Arrays(ids, torch.arange(96) % 10)
    return Splits(part, part)


def narrow(name: str) -> dict[str, Any]:
    """Arguments that make a model of the workbench's own small enough for a test."""
    declared = inspect.signature(MODELS.factory(name)).parameters
    if takes_ids(name):
        return {"vocab_size": 50, "width": 8, "layers": 1, **({"heads": 2} if "heads" in declared else {})}
    if "width" in declared:
        return {"width": 4}
    return {"widths": [8, 8], **({"groups": 4} if "groups" in declared else {}), **({"size": 8} if "size" in declared else {})}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_builds_trains_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    config = TrainConfig(
        data={"name": "digits", "limit": 64, "batch_size": 32},
        model={"name": name, "args": narrow(name)},
        max_steps=2,
        device="cpu",
        checkpoint={"every_epochs": 0},
    )
    result = train(config, data=sentences() if takes_ids(name) else None)
    assert result.metrics["val_loss"] > 0
    gradients = result.run.readings("gradients")
    named = {n for n, p in result.model.named_parameters() if p.requires_grad}
    assert set(gradients["layer"]) == named and (gradients["norm"] > 0).any()
    x = inputs(name, 3)
    expected = result.model(x)
    assert expected.shape == (3, 10)
    assert torch.equal(result.run.load_model()(x), expected)
    save_model(result.model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_classes_and_channels_and_does_not_mix_samples(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name=name, num_classes=7, in_channels=None if takes_ids(name) else 2, args=narrow(name))
    model = build_model(config).eval()
    x = inputs(name, 4, channels=2)
    whole = model(x)
    assert whole.shape == (4, 7) and torch.isfinite(whole).all()
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), whole, rtol=1e-4, atol=1e-5)
    assert build_model(config).training


# -- attributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_attribution_leaves_the_model_alone_and_does_not_mix_samples(method: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="convnet", num_classes=4, in_channels=2, args={"widths": [8, 16]}))
    x = torch.randn(5, 2, 12, 12)
    before = copy.deepcopy(model.state_dict())
    whole = explain(model, x, method=method, config=AttributionConfig(batch_size=64))
    assert whole.broadcast_to(x.shape).isfinite().all() and whole.abs().sum() > 0 and not whole.requires_grad
    for size in (1, 2):
        split = explain(model, x, method=method, config=AttributionConfig(batch_size=size))
        torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-5)
    assert model.training and not x.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


# -- pruning criteria -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_ranks_channels_and_leaves_the_model_alone(name: str) -> None:
    torch.manual_seed(0)
    blocks = [part for width in (2, 8) for part in (nn.Conv2d(width, 8, 3), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
    data = [(torch.randn(6, 2, 8, 8), torch.arange(6) % 4)]
    before = copy.deepcopy(model.state_dict())
    plan = Plan(model, PruneConfig(criterion=name, seed=3), data[0], data)
    assert plan.groups
    for group, scores in zip(plan.groups, plan.scores, strict=True):
        assert scores.shape == (len(group.units),) and scores.isfinite().all()
    assert max(scores.std() for scores in plan.scores) > 0
    again = Plan(model, PruneConfig(criterion=name, seed=3), data[0], data)
    assert all(torch.equal(one, other) for one, other in zip(plan.scores, again.scores, strict=True))
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in plan.couplings.model.modules())


# -- distillation terms, penalties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_a_distillation_term_is_a_mean_over_the_batch_that_teaches_the_student_only(name: str) -> None:
    torch.manual_seed(0)
    kind = DISTILLATIONS.factory(name)
    shape = (8, 5) if kind.compares == "outputs" else (8, 4, 6, 6)
    student, teacher = torch.randn(shape), torch.randn(shape)
    term = kind(student, teacher, DistillConfig())
    value = term(student.requires_grad_(), teacher)
    assert value.shape == () and torch.isfinite(value) and value > 0
    halves = (term(student[:4], teacher[:4]) + term(student[4:], teacher[4:])) / 2
    torch.testing.assert_close(halves, value)  # what accumulation and ranks rely on
    value.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    torch.testing.assert_close(term(student, student).detach(), torch.tensor(0.0))
    half = term(student.detach().bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32  # autocast's outputs are compared in full precision
    torch.testing.assert_close(half, value.detach(), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_a_number_with_the_gradient_that_lowers_it(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    penalty = PENALTIES.factory(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    value = penalty(model)
    assert value.shape == () and value > 0
    assert torch.equal(penalty(model.eval()), penalty(model.train()))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    value.backward()
    touched = [p for p in model.parameters() if p.grad is not None]
    for parameter in touched:  # along its gradient it changes by the gradient's squared length
        assert parameter.grad is not None
        step = 1e-6
        with torch.no_grad():
            parameter -= step * parameter.grad
            lower = penalty(model)
            parameter += step * parameter.grad
        assert float(value.detach() - lower) == pytest.approx(step * float(parameter.grad.square().sum()), rel=1e-2)
    assert touched
    with pytest.raises(ModelError):  # nothing to act upon
        penalty(nn.ReLU())


# -- data cards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", card_names())
def test_a_card_tells_where_its_data_comes_from(name: str) -> None:
    card = read_card(name)
    for text in (card.title, card.source, card.licence, card.task):
        assert text.strip()
    assert callable(load_object(card.loader))
    assert len(set(card.classes)) == len(card.classes)
    assert set(card.augment) <= set(AUGMENTATIONS)
    assert len(card.mean) == len(card.std) and (not card.mean or len(card.mean) == card.shape[0])
    assert all(len(facts["sha256"]) == 64 for facts in card.files.values())


@pytest.mark.parametrize("name", card_names())
def test_data_is_as_its_card_says(name: str) -> None:
    card = read_card(name)
    missing = [path for path in card.files if not (data_folder() / path).is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not below {data_folder()} (WORKBENCH_DATA)")
    for path, facts in card.files.items():
        with (data_folder() / path).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"], path
    splits = load_splits(DataConfig(name=name))
    for split, part in (("train", splits.train), ("eval", splits.eval)):
        assert len(part) == card.samples[split]  # type: ignore[arg-type]
        if isinstance(part, Arrays) and card.classes:
            assert set(part.y.unique().tolist()) == set(range(len(card.classes)))
            assert tuple(part.x.shape[1:]) == card.shape
    if isinstance(splits.train, Arrays) and splits.train.x.dtype == torch.uint8:
        x = splits.train.x.double() / 255
        assert x.mean((0, 2, 3)).tolist() == pytest.approx(card.mean, abs=2e-3)
        assert x.std((0, 2, 3)).tolist() == pytest.approx(card.std, abs=2e-3)
    if isinstance(splits.train, Arrays) and isinstance(splits.eval, Arrays):
        seen = {sample.numpy().tobytes() for sample in splits.train.x}
        shared = sum(sample.numpy().tobytes() in seen for sample in splits.eval.x)
        assert shared <= len(splits.eval) // 100  # held-out samples are held out


# -- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_starts_the_worker_in_the_run_folder_with_what_it_was_told(name: str) -> None:
    kind = CLUSTERS.factory(name)
    cluster = kind(nproc=4, hosts=2, restarts=7, port=23456, environment={"NCCL_DEBUG": "INFO"})
    assert eval(cluster.to_code(), {kind.__name__: kind}) == cluster
    assert all(field.description for field in kind.model_fields.values())
    script = launch_script(TrainConfig(data={"name": "digits", "batch_size": 64}), cluster)
    for words in ("torchrun", "workbench.worker", script.folder, "7", "23456", "c10d", "NCCL_DEBUG"):
        assert words in script.text
