"""Whatever a panel shows is escaped, wherever it comes from."""

from __future__ import annotations

import pytest

from widgets import theme
from widgets.markup import Html, button, select, tag, text

EVIL = '<img src=x onerror="alert(1)">'


def test_text_is_escaped_and_html_is_not() -> None:
    assert tag("p", EVIL) == "<p>&lt;img src=x onerror=&quot;alert(1)&quot;&gt;</p>"
    assert tag("p", tag("b", "x"), None, ["a", Html("<i>"), "&"]) == "<p><b>x</b>a<i>&amp;</p>"
    assert tag("input", title='"><script>', disabled=True, checked=False) == '<input title="&quot;&gt;&lt;script&gt;" disabled>'
    assert text(tag("b", "x") + EVIL).count("<") == 2


@pytest.mark.parametrize(
    "made",
    [
        theme.chip(EVIL),
        theme.notice(EVIL, remedy=EVIL, details=EVIL),
        theme.empty(EVIL, EVIL),
        theme.heading(EVIL, EVIL, title=EVIL),
        theme.table([{EVIL: EVIL}], right=[EVIL]),
        theme.error_notice(ValueError(EVIL)),
        button(EVIL, EVIL, value=EVIL, title=EVIL),
        select([(EVIL, EVIL)], EVIL, EVIL, EVIL),
    ],
)
def test_nothing_evil_gets_through(made: str) -> None:
    assert EVIL not in made
    assert "<img" not in made


def test_numbers_and_durations() -> None:
    assert [theme.number(v) for v in (None, float("nan"), 0.123456, 12345, 3.0, True)] == [
        "–",
        "–",
        "0.1235",
        "12\u202f345",
        "3",
        "True",
    ]
    assert [theme.duration(v) for v in (None, 5, 65, 3700)] == ["–", "0:05", "1:05", "1:01:40"]
