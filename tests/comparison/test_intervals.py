"""Intervals and tests against published examples, other libraries, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from workbench.comparison.intervals import Z, holm, paired_difference, sign_test, wilson


@given(trials=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_agrees_with_scipy(trials: int, share: float) -> None:
    successes = round(share * trials)
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


@given(lost=st.integers(0, 300), won=st.integers(0, 300))
def test_the_sign_test_agrees_with_scipy(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert math.isclose(sign_test(lost, won), expected, rel_tol=1e-9, abs_tol=1e-12)


def test_the_published_example() -> None:
    """Airway reactivity before and after transplantation: Fagerland, Lydersen and Laake (2014), Tango's asymptotic score."""
    assert paired_difference(won=1, lost=7, trials=21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@given(trials=st.integers(1, 5000))
def test_without_disagreements_it_is_the_closed_form(trials: int) -> None:
    bound = Z * Z / (trials + Z * Z)
    assert paired_difference(0, 0, trials) == pytest.approx((-bound, bound), abs=1e-9)


@given(trials=st.integers(2, 2000), first=st.floats(0, 1), second=st.floats(0, 1))
def test_it_contains_the_estimate_and_mirrors(trials: int, first: float, second: float) -> None:
    won = round(first * trials)
    lost = round(second * (trials - won))
    low, high = paired_difference(won, lost, trials)
    assert -1 <= low <= (won - lost) / trials <= high <= 1
    assert paired_difference(lost, won, trials) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("won", "lost", "trials"), [(3, 9, 40), (40, 20, 160), (0, 6, 5000), (12, 12, 30), (0, 5, 5)])
def test_its_ends_are_where_the_score_test_turns(won: int, lost: int, trials: int) -> None:
    """The nuisance share by maximizing the likelihood numerically, instead of by the quadratic's root."""
    for end in paired_difference(won, lost, trials):
        if abs(end) > 1 - 1e-9:
            continue

        def unlikely(share: float, d: float = end) -> float:
            parts = ((won, share + d), (lost, share), (trials - won - lost, 1 - 2 * share - d))
            return -sum(n * math.log(max(p, 1e-300)) for n, p in parts if n)

        found = minimize_scalar(unlikely, bounds=(max(0.0, -end), (1 - end) / 2), method="bounded", options={"xatol": 1e-12})
        variance = trials * (2 * found.x + end * (1 - end))
        assert abs(won - lost - trials * end) / math.sqrt(variance) == pytest.approx(Z, rel=1e-3)


@pytest.mark.parametrize(("won", "lost", "trials"), [(0.02, 0.03, 1000), (0.001, 0.006, 1000), (0.1, 0.2, 100)])
def test_it_covers_what_it_promises(won: float, lost: float, trials: int) -> None:
    draws = np.random.default_rng(0).multinomial(trials, [won, lost, 1 - won - lost], size=3000)
    unique, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
    covered = 0
    for (w, n), count in zip(unique.tolist(), counts.tolist(), strict=True):
        low, high = paired_difference(w, n, trials)
        covered += count * (low <= won - lost <= high)
    assert 0.935 <= covered / 3000 <= 0.97


def test_holm_stops_at_the_first_that_may_be_chance() -> None:
    assert holm([0.04, 0.001, 0.013, 0.5]) == [False, True, True, False]
    assert holm([0.02, 0.02, 0.02]) == [False, False, False]
    assert holm([]) == []
