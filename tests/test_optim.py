"""Clipping, schedules and optimizers against closed forms, PyTorch's own, and each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench import TrainConfig, train
from workbench.errors import ConfigError, NonFiniteLoss
from workbench.optim import AdamW, AdaptiveGradientClipper, DynamicGraphOptimizer, Schedule, make_optimizer
from workbench.optim_config import OptimConfig, ScheduleConfig


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count: int, spread: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.randn(16, 6, generator=generator) * spread, torch.randint(3, (16,), generator=generator)


def backward(model: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    (nn.functional.cross_entropy(model(x), y) * scale).backward()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "dynamic graph": lambda p: DynamicGraphOptimizer(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fixed_clipper_is_clip_grad_norm(name: str) -> None:
    mine, theirs = network(), network()
    one, two = OPTIMIZERS[name](mine.parameters()), OPTIMIZERS[name](theirs.parameters())
    clipper = AdaptiveGradientClipper(max_norm=0.3, mode="fixed")
    clipped = 0
    for x, y in batches(12, spread=3):
        for model, optimizer in ((mine, one), (theirs, two)):
            optimizer.zero_grad()
            backward(model, x, y)
            if model is mine:
                with clipper:
                    optimizer.step()
            else:
                clipped += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)) > 0.3
                optimizer.step()
        torch.testing.assert_close(weights(mine), weights(theirs), rtol=1e-6, atol=1e-7)
    assert clipped > 3


def test_the_articles_clipping_loop_runs_unchanged() -> None:
    """The whole loop within the context, the optimizer stepping as ever."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    clipper = AdaptiveGradientClipper(max_norm=1.0, mode="dynamic")
    with clipper:
        for x, y in batches(30):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
    assert clipper.state is not None and clipper.state[0] == 30
    before = gradients(model).clone()
    optimizer.step()  # outside: nothing is clipped, nothing counted
    assert clipper.state[0] == 30 and torch.equal(gradients(model), before)


def test_a_clipper_lets_go_when_its_block_fails() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    before = len(_global_optimizer_pre_hooks)
    with pytest.raises(ZeroDivisionError), AdaptiveGradientClipper():
        _ = 1 / (len(_global_optimizer_pre_hooks) - before - 1)
    assert len(_global_optimizer_pre_hooks) == before


def test_agc_holds_each_unit_to_its_weights() -> None:
    """Brock et al. 2021, equation 3, by unit in float64."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 4))
    x = torch.randn(8, 2, 6, 6) * 30
    nn.functional.cross_entropy(model(x), torch.randint(4, (8,))).backward()
    expected = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        w, g = p.detach().double().numpy(), p.grad.double().numpy()
        axes = tuple(range(1, w.ndim)) if w.ndim > 1 else None
        w_norm = np.sqrt((w**2).sum(axis=axes, keepdims=True)).clip(1e-3)
        g_norm = np.sqrt((g**2).sum(axis=axes, keepdims=True))
        expected[name] = np.where(g_norm > 0.02 * w_norm, g * 0.02 * w_norm / g_norm, g)
    AdaptiveGradientClipper(max_norm=0.02, mode="agc").clip(model.parameters())
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), expected[name], rtol=2e-5, atol=1e-9)  # type: ignore[union-attr]


def reference(norms: list[float], max_norm: float, decay: float, deviations: float, warmup: int) -> list[float]:
    """Norms after dynamic clipping, one number at a time in float64."""
    mean, square, kept = 0.0, 0.0, []
    for seen, norm in enumerate(norms):
        spread = math.sqrt(max(square - mean * mean, 0.0))
        threshold = max_norm if seen < warmup else min(max_norm, mean + deviations * spread)
        kept.append(min(norm, threshold))
        weight = max(1 / (seen + 1), 1 - decay)
        mean += weight * (kept[-1] - mean)
        square += weight * (kept[-1] ** 2 - square)
    return kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60),
    st.floats(0.01, 10),
    st.integers(0, 10),
)
def test_a_dynamic_clipper_follows_the_running_norm(norms: list[float], max_norm: float, warmup: int) -> None:
    clipper = AdaptiveGradientClipper(max_norm, "dynamic", decay=0.9, deviations=2.0, warmup=warmup + 1)
    p = nn.Parameter(torch.zeros(4))
    direction = torch.tensor([0.5, -0.5, 0.5, -0.5])
    kept = []
    for norm in norms:
        p.grad = direction * norm
        clipper.clip([p])
        kept.append(float(p.grad.norm()))
        torch.testing.assert_close(p.grad / p.grad.norm(), direction, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept, reference(norms, max_norm, 0.9, 2.0, warmup + 1), rtol=5e-3)


def test_a_spike_is_clipped_and_does_not_raise_the_threshold() -> None:
    clipper = AdaptiveGradientClipper(max_norm=10.0, mode="dynamic", warmup=20)
    p = nn.Parameter(torch.zeros(1))
    draw = np.random.default_rng(0)
    for _ in range(100):
        p.grad = torch.tensor([draw.normal(1.0, 0.1)])
        clipper.clip([p])
    p.grad = torch.tensor([1000.0])
    clipper.clip([p])
    assert 1.0 < float(p.grad) < 1.6
    p.grad = torch.tensor([1000.0])
    clipper.clip([p])
    assert float(p.grad) < 1.7


def test_a_gradient_that_is_not_finite_leaves_the_running_norm_alone() -> None:
    clipper = AdaptiveGradientClipper(max_norm=1.0, mode="dynamic")
    p = nn.Parameter(torch.zeros(1))
    for value in (0.5, 0.6, float("nan"), float("inf"), 0.5):
        p.grad = torch.tensor([value])
        clipper.clip([p])
    assert clipper.state is not None and clipper.state[0] == 3 and torch.isfinite(clipper.state).all()


@pytest.mark.parametrize("mode", ["fixed", "dynamic", "agc"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_is_clipped_as_the_unscaled_one(mode: Any, fused: bool) -> None:
    """A scaler hands its scale to a fused optimizer, and unscales the gradients itself for any other."""
    plain, scaled = network(), network()
    one, two = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=fused) for m in (plain, scaled))
    first, second = (AdaptiveGradientClipper(0.2, mode, warmup=3) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    for x, y in batches(10, spread=3):
        one.zero_grad()
        backward(plain, x, y)
        with first:
            one.step()
        two.zero_grad()
        scaler.scale(nn.functional.cross_entropy(scaled(x), y)).backward()
        with second:
            scaler.step(two)
        scaler.update()
    assert scaler.get_scale() > 1024
    torch.testing.assert_close(weights(plain), weights(scaled), rtol=1e-5, atol=1e-6)
    if mode == "dynamic":
        assert first.state is not None and second.state is not None
        torch.testing.assert_close(first.state, second.state, rtol=1e-5, atol=1e-6)


def test_a_step_that_the_scaler_skips_is_not_counted() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper, scaler = AdaptiveGradientClipper(0.2, "dynamic"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    x, y = next(batches(1))
    scaler.scale(nn.functional.cross_entropy(model(x * float("inf")), y)).backward()
    with clipper:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights(model), before) and clipper.state is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fixed", "dynamic"])
def test_a_compiled_step_is_clipped_once(mode: Any) -> None:
    """The step compiled by the user, and by the optimizer itself."""
    torch.compiler.reset()
    models = [network() for _ in range(3)]
    eager = AdamW(models[0].parameters(), lr=0.01)
    compiled = AdamW(models[1].parameters(), lr=0.01)
    own = DynamicGraphOptimizer(models[2].parameters(), lr=0.01, graph="compiled")
    steps = [eager.step, torch.compile(compiled.step), own.step]
    clippers = [AdaptiveGradientClipper(0.2, mode, warmup=3) for _ in models]
    for x, y in batches(6, spread=3):
        for model, step, clipper in zip(models, steps, clippers, strict=True):
            model.zero_grad()
            backward(model, x, y)
            with clipper:
                step()
    for model, clipper in zip(models[1:], clippers[1:], strict=True):
        torch.testing.assert_close(weights(model), weights(models[0]), rtol=1e-5, atol=1e-6)
        if mode == "dynamic":
            assert clippers[0].state is not None and clipper.state is not None
            torch.testing.assert_close(clipper.state, clippers[0].state, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_calls_its_parents_step_is_clipped_once() -> None:
    AdamW(network().parameters())  # PyTorch wraps a class's step when it first meets the class
    model = network()
    optimizer = DynamicGraphOptimizer(model.parameters(), lr=0.01)
    clipper = AdaptiveGradientClipper(0.2, "dynamic")
    with clipper:
        for x, y in batches(5):
            optimizer.zero_grad()
            backward(model, x, y)
            optimizer.step()
    assert clipper.state is not None and clipper.state[0] == 5


@pytest.mark.parametrize("arguments", [{"max_norm": 0.0}, {"max_norm": -1.0}, {"max_norm": float("nan")}, {"mode": "adaptive"}])
def test_a_clipper_refuses_what_makes_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        AdaptiveGradientClipper(**arguments)


def test_a_run_that_diverges_without_clipping_converges_with_it() -> None:
    """Four layers, momentum, a rate of 2, real data."""
    config = TrainConfig(
        data={"name": "digits", "batch_size": 64},
        model={"name": "mlp", "args": {"widths": [64] * 4}},
        optim={"name": "sgd", "lr": 2.0},
        schedule={"warmup": 0.0},
        epochs=8,
        device="cpu",
        checkpoint={"every_epochs": 0},
    )
    with pytest.raises(NonFiniteLoss, match="clipping"):
        train(config)
    found = train(config.override({"clip.mode": "dynamic", "clip.max_norm": 0.1})).metrics
    print(found)
    assert found["accuracy"] > 0.93


# -- optimizers ---------------------------------------------------------------------------------------------------


def run_steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int = 8) -> Tensor:
    for x, y in batches(count):
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
    return weights(model)


def test_a_dynamic_graph_optimizer_is_adamw() -> None:
    one, two = network(), network()
    expected = run_steps(AdamW(one.parameters(), lr=0.01, weight_decay=0.1), one)
    found = run_steps(DynamicGraphOptimizer(two.parameters(), lr=0.01, weight_decay=0.1), two)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_dynamic_graph_optimizer_compiled_is_itself_eager_and_follows_the_rate() -> None:
    torch.compiler.reset()
    eager_model, compiled_model = network(), network()
    eager = DynamicGraphOptimizer(eager_model.parameters(), lr=0.01)
    compiled = DynamicGraphOptimizer(compiled_model.parameters(), lr=0.01, graph="compiled")
    for rate in (0.01, 0.003):
        for optimizer in (eager, compiled):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        run_steps(eager, eager_model, 4)
        run_steps(compiled, compiled_model, 4)
        torch.testing.assert_close(weights(compiled_model), weights(eager_model), rtol=1e-5, atol=1e-6)


def test_the_articles_dynamic_graph_loop_runs_unchanged() -> None:
    @torch.jit.script
    def step_function(x: Tensor, w: Tensor) -> Tensor:
        if x.sum() > 0:
            return torch.tanh(x @ w)
        return torch.relu(x @ w)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3) / 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = step_function(x, self.weight)
            return found

    torch.manual_seed(0)
    model, loss_function = Model(), nn.CrossEntropyLoss()
    optimizer = DynamicGraphOptimizer(model.parameters(), lr=0.05)
    losses = []
    data = list(batches(1))
    for _ in range(30):
        for x, y in data:
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_dynamic_graph_optimizer_refuses_an_unknown_graph() -> None:
    with pytest.raises(ValueError, match="graph='static' must be"):
        DynamicGraphOptimizer(network().parameters(), graph="static")  # type: ignore[arg-type]


def test_vectors_are_spared_weight_decay_unless_asked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {p.ndim > 1: decays[id(p)] for p in model.parameters()} == {True: 0.3, False: 0.0}
    assert len(decays) == len(list(model.parameters()))
    (group,) = make_optimizer(model, OptimConfig(weight_decay=0.3, decay_vectors=True)).param_groups
    assert group["weight_decay"] == 0.3


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig(name="sgd", lr=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_wrong_arguments_name_the_optimizer() -> None:
    with pytest.raises(ConfigError, match="optimizer 'adam' does not take these arguments.*rho"):
        make_optimizer(network(), OptimConfig(name="adam", args={"rho": 1}))


# -- schedules ----------------------------------------------------------------------------------------------------

SCHEDULES = st.builds(
    ScheduleConfig,
    name=st.sampled_from(["constant", "cosine", "linear", "step"]),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
)


@settings(deadline=None)
@given(SCHEDULES, st.integers(1, 500), st.floats(1e-5, 10))
def test_a_schedule_warms_up_linearly_then_falls_to_its_end(config: ScheduleConfig, total: int, peak: float) -> None:
    schedule = Schedule(config, peak, total)
    factors = [schedule.factor(step) for step in range(total)]
    warm = round(config.warmup * total)
    assert factors[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    after = factors[warm:]
    assert all(a >= b - 1e-12 for a, b in zip(after, after[1:], strict=False))
    assert all(0 <= factor <= 1 for factor in factors)
    if after:
        assert after[0] == 1.0
    end = schedule.factor(total)
    if warm < total and config.name in ("cosine", "linear"):
        assert end == pytest.approx(config.final, abs=1e-12)
    assert [schedule.rate(step) for step in range(total)] == pytest.approx([peak * factor for factor in factors])


def test_cosine_is_pytorchs() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    mine = Schedule(ScheduleConfig(name="cosine", warmup=0, final=0.1), 0.3, 50)
    for step in range(50):
        assert mine.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_steps_fall_tenfold_at_their_milestones() -> None:
    schedule = Schedule(ScheduleConfig(name="step", warmup=0, milestones=(0.5, 0.75)), 1.0, 100)
    assert [schedule.rate(step) for step in (49, 50, 74, 75, 99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


@settings(deadline=None)
@given(SCHEDULES, st.integers(1, 300), st.data())
def test_a_rate_that_is_set_holds_now_and_goes_on_in_proportion(config: ScheduleConfig, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    rate = data.draw(st.floats(1e-6, 10))
    changed, plain = Schedule(config, 0.1, total), Schedule(config, 0.1, total)
    changed.set_rate(rate, step)
    if plain.factor(step) > 1e-9:
        assert changed.rate(step) == pytest.approx(rate)
        for later in range(step, total):
            assert changed.rate(later) * plain.rate(step) == pytest.approx(rate * plain.rate(later), abs=1e-15)


def test_a_schedule_survives_a_copy() -> None:
    schedule = Schedule(ScheduleConfig(), 0.1, 10)
    schedule.set_rate(0.5, 3)
    assert copy.deepcopy(schedule).rate(4) == schedule.rate(4)
