"""The closed set of events: each survives its line, and a newer workbench's events do not break an older reader."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import events

KINDS = typing.get_args(typing.get_args(events.Event)[0])
NUMBERS = st.floats(allow_nan=False)
SPECIAL: dict[str, Any] = {
    "loss": st.lists(st.none() | NUMBERS, max_size=4),
    "metrics": st.dictionaries(st.text(max_size=5), NUMBERS, max_size=3),
    "settings": st.dictionaries(st.text(max_size=5), NUMBERS, max_size=3),
    "remedy": st.dictionaries(st.text(max_size=5), st.floats(-1e9, 1e9) | st.text(max_size=5), max_size=3),
    "time": st.floats(0, 1e10),
    "lr": st.lists(NUMBERS, max_size=4),
    "samples_per_s": st.none() | NUMBERS,
    "cost": st.floats(0, 1e9),
    "overhead": st.floats(0, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_event_is_what_its_line_says(kind: Any, data: st.DataObject) -> None:
    made = data.draw(st.builds(kind, **{name: made for name, made in SPECIAL.items() if name in kind.model_fields}))
    line = made.model_dump_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert events.EVENT.validate_json(line) == made


def test_every_kind_has_a_name_of_its_own() -> None:
    names = [kind.model_fields["type"].default for kind in KINDS]
    assert len(set(names)) == len(names) == len(KINDS) > 10


def test_a_setting_that_only_a_newer_workbench_knows_is_passed_over() -> None:
    line = '{"type": "paused", "time": 1.0, "attempt": 1, "step": 4, "reason": "lunch"}'
    assert events.EVENT.validate_json(line) == events.Paused(time=1.0, attempt=1, step=4)
