import gc
import time

import pytest

from workbench.compress.latency import latency_of, ratio_of
from workbench.errors import ConfigError


def test_each_call_is_timed_once_a_round_in_turns():
    seen = []
    taken = latency_of({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=4)
    assert all(len(times) == 4 and min(times) > 0 for times in taken.values())
    timed = seen[9:]  # three warm-up calls of each
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_milliseconds_of_a_known_wait_and_the_ratio():
    taken = latency_of({"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.012)}, rounds=5)
    assert min(taken["short"]) >= 4 and min(taken["long"]) >= 12
    assert ratio_of(taken["long"], taken["short"]) == pytest.approx(3, rel=0.5)


def test_a_slow_spell_and_a_hiccup_leave_the_ratio():
    assert ratio_of([2, 2, 20, 2, 900], [1, 1, 10, 1, 1]) == 2


def test_time_ends_it_after_three_rounds_at_least():
    taken = latency_of({"a": lambda: time.sleep(0.01)}, rounds=1000, seconds=0)
    assert len(taken["a"]) == 3


def test_collection_of_garbage_goes_on_afterwards_even_if_a_call_fails():
    with pytest.raises(ZeroDivisionError):
        latency_of({"a": lambda: 1 / 0})
    assert gc.isenabled()
    calls = iter([None] * 3)
    with pytest.raises(StopIteration):
        latency_of({"a": lambda: next(calls)})
    assert gc.isenabled()
    with pytest.raises(ConfigError, match="rounds=0"):
        latency_of({}, rounds=0)
