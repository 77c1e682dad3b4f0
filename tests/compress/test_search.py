"""The search behind a ratio, on functions whose answers are known."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import PruneConfig, prune
from workbench.compress.coupling import Group
from workbench.compress.latency import floor_ratio_of
from workbench.compress.search import Ranking, nearest, shortest, topped_up
from workbench.models import ModelConfig, build_model


def _group(name, units, scope="s", step=1):
    return Group(name, True, [(unit,) for unit in range(units)], scope, (name,), step)


@given(steps=st.lists(st.floats(0.0001, 1), min_size=1, max_size=200), wanted=st.floats(0.001, 0.999))
def test_shortest_is_the_shortest_within_a_thousandth(steps, wanted):
    total = sum(steps) * 1.0001
    removed = [sum(steps[:length]) / total for length in range(len(steps) + 1)]
    found = shortest(removed.__getitem__, len(steps), wanted)
    exact = next((length for length, share in enumerate(removed) if share >= wanted), None)
    if exact is None:
        assert found is None
    else:
        assert found is not None and removed[found] >= wanted
        assert found == exact or removed[found] <= wanted + 1e-3


def test_shortest_tries_few():
    tried = []
    shortest(lambda k: tried.append(k) or 1 - (1 - k / 5000) ** 1.7, 5000, 0.3)
    assert len(tried) <= 8


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    steps=st.lists(st.sampled_from([1, 2, 8]), min_size=6, max_size=6),
    most=st.floats(0.1, 1),
    seed=st.integers(0, 999),
)
def test_a_prefix_removes_the_least_important_rounded_and_never_all(sizes, steps, most, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [_group(str(index), size, "ab"[index % 2], steps[index]) for index, size in enumerate(sizes)]
    scores = [torch.rand(size, generator=generator) for size in sizes]
    ranking = Ranking(groups, scores, most=most)
    before: dict[str, int] = {}
    for length in range(len(ranking) + 1):
        cuts = {name: channels for name, _, channels in ranking.cuts(length)}
        for index, group in enumerate(groups):
            gone = cuts.get(group.name, [])
            left = sizes[index] - len(gone)
            assert left >= 1 and len(gone) <= most * sizes[index] + 1e-6 and len(gone) <= length
            assert not gone or left % group.step == 0
            assert set(gone) == set(scores[index].argsort()[: len(gone)].tolist())
            assert len(gone) >= before.get(group.name, 0)
        before = {name: len(channels) for name, channels in cuts.items()}


def test_scopes_lose_the_same_share_and_within_one_the_worst_go_first():
    groups = [_group("a", 10, "x"), _group("b", 10, "x"), _group("c", 20, "y")]
    scores = [torch.arange(10.0), torch.arange(10.0) + 100, torch.rand(20)]
    cuts = {name: len(channels) for name, _, channels in Ranking(groups, scores).cuts(20)}
    assert cuts == {"a": 9, "c": 10}  # ten of scope x, of which a keeps its last


def test_weights_shift_what_each_group_loses():
    groups = [_group("dear", 100), _group("cheap", 100)]
    ranking = Ranking(groups, [torch.rand(100), torch.rand(100)], weights=[0.25, 1.0])
    cuts = {name: len(channels) for name, _, channels in ranking.cuts(100)}
    # q / 4 of the one's ranks go before q of the other's
    assert cuts["dear"] == pytest.approx(80, abs=6) and cuts["cheap"] == pytest.approx(20, abs=6)


def test_fixed_shares_stand_apart():
    groups = [_group("a", 10), _group("b", 10)]
    ranking = Ranking(groups, [torch.rand(10), torch.rand(10)], fixed={0: 0.3})
    assert len(ranking) == 10
    assert {name: len(channels) for name, _, channels in ranking.cuts(0)} == {"a": 3}
    assert {name: len(channels) for name, _, channels in ranking.cuts(10)} == {"a": 3, "b": 9}
    assert {name: len(channels) for name, _, channels in ranking.cuts(2, {1: 3})} == {"a": 3, "b": 5}


@given(
    gains=st.lists(st.floats(0.001, 0.2), min_size=1, max_size=6),
    base=st.floats(0, 0.5),
    short=st.floats(0.001, 0.3),
)
def test_topping_up_reaches_the_target_by_less_than_the_smallest_step(gains, base, short):
    def removed(steps):
        return base + sum(gains[group] * min(count, 30) for group, count in steps.items())

    wanted = base + min(short, 20 * min(gains))
    assert wanted <= removed(topped_up(removed, range(len(gains)), wanted)) <= wanted + min(gains) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.floats(0.3, 0.95),
    overhead=st.floats(0, 0.25),
    stair=st.integers(1, 60),
    noise=st.floats(0, 0.02),
    seed=st.integers(0, 999),
)
def test_nearest_lands_within_a_tenth_despite_noise_and_stairs(wanted, overhead, stair, noise, seed):
    """Time: an overhead and a stair over the channels left (16 at a time), with noise; a thousand channels."""
    chance = random.Random(seed)

    def work(k):
        return (1 - k / 1000) ** 2

    def true(k):
        return overhead + (1 - overhead) * work(stair * (k // stair))

    tried = []

    def measured(k):
        tried.append(k)
        return true(k) * (1 + chance.uniform(-noise, noise))

    found, share = nearest(measured, work, 999, wanted, 0.03, 8)
    reachable = min(abs(true(k) / wanted - 1) for k in range(1, 1000))
    assert len(tried) <= 8
    assert abs(true(found) / wanted - 1) <= max(0.1, reachable + noise)
    assert share == pytest.approx(true(found), rel=noise + 1e-9)


def test_the_fastest_rounds_decide():
    assert floor_ratio_of([2, 2, 9, 9, 9, 9, 9, 9], [4, 4, 5, 5, 90, 90, 90, 90]) == 0.5


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_pruned_to_a_latency(ratio, monkeypatch):
    """On a machine whose time is known: a fixed part, the work, and 3 % of noise. The real clock is for the bench."""
    from workbench.compress import plan
    from workbench.compress.cost import count_macs

    noise = torch.Generator().manual_seed(0)

    def times(calls, rounds, seconds):
        return {
            name: [time * (1 + 0.03 * torch.rand(1, generator=noise).item()) for _ in range(40)] for name, time in calls.items()
        }

    monkeypatch.setattr(plan, "timed_call", lambda model, x, *_: (2e6 * len(x) + count_macs(model, x), "eager"))
    monkeypatch.setattr(plan, "latency_of", times)
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1)).eval()
    x = torch.randn(1, 1, 28, 28)
    latency = {"form": "eager", "batch": 16}
    pruned = prune(model, PruneConfig(ratio=ratio, target="latency", latency=latency), x)
    left = (2e6 + count_macs(pruned, x)) / (2e6 + count_macs(model, x))
    assert left / (1 - ratio) == pytest.approx(1, abs=0.05)
    record = pruned.structure.transforms[-1]["latency"]
    assert record["form"] == "eager" and record["batch"] == 16 and record["rounds"] == 40
    assert 1 - record["removed"] == pytest.approx(left, abs=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", ["auto", "eager"])
def test_pruned_to_a_latency_on_a_gpu(form):
    model = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=3, args={"width": 256})).eval().cuda()
    latency = {"form": form, "batch": 64, "precision": "bf16"}
    x = torch.randn(1, 3, 32, 32)
    pruned = prune(model, PruneConfig(ratio=0.4, target="latency", round_to="auto", latency=latency), x)
    record = pruned.structure.transforms[-1]
    assert record["round_to"] == 8 and record["latency"]["form"] == {"auto": "captured", "eager": "eager"}[form]
    assert (1 - record["removed"]) / 0.6 == pytest.approx(1, abs=0.1)


def test_a_latency_out_of_reach_is_refused():
    from workbench.errors import ModelError

    model = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 4})).eval()
    latency = {"form": "eager", "seconds": 0.2, "trials": 2}
    with pytest.raises(ModelError, match=r"99.0% of the latency of \w+ can't be removed: at most"):
        prune(model, PruneConfig(ratio=0.99, target="latency", latency=latency), torch.randn(1, 1, 28, 28))
