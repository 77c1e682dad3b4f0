"""One look for every panel: style sheets on JupyterLab's colours, and the pieces of HTML that panels share.

* :func:`css` — the sheets a widget loads: the theme's tokens and its own.
* :func:`chip`, :func:`heading`, :func:`notice`, :func:`empty`, :func:`table` — a status, a title, a message, a blank, a table.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from widgets.markup import Child, Html, tag
from workbench.errors import WorkbenchError

HERE = Path(__file__).parent
UNEXPECTED = "This is unexpected; the details say where it happened."


def css(*names: str) -> str:
    """The theme's style sheet followed by the named ones of this folder."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("theme.css", *names))


def chip(status: str) -> Html:
    """A run's status as a dot and a word."""
    return tag("span", status, cls=f"chip {status}")


def notice(message: str, *, kind: str = "error", remedy: str = "", details: str = "") -> Html:
    """A message that stands on its own; ``details`` are folded away."""
    if not message:
        return Html()
    more = tag("details", tag("summary", "Details", cls="quiet"), tag("pre", details), cls="small") if details else None
    lines = (tag("p", message), tag("p", remedy, cls="quiet") if remedy else None, more)
    return tag("div", lines, cls=f"notice {kind}", role="alert" if kind == "error" else "status")


def error_notice(error: BaseException) -> Html:
    """An error as a :func:`notice`: ours in their own words, others by class and text, both with the traceback folded."""
    details = "".join(traceback.format_exception(error)).strip()
    if isinstance(error, WorkbenchError):
        return notice(error.what, remedy=error.remedy, details=details if error.__cause__ else "")
    return notice(f"{type(error).__name__}: {error}", remedy=UNEXPECTED, details=details)


def empty(line: str, more: str = "") -> Html:
    """What stands where nothing is yet."""
    return tag("div", tag("p", line) if more else None, tag("p", more or line, cls="quiet"), cls="wb-empty")


def heading(status: str, name: str, *rest: Child, title: str = "") -> Html:
    """The line above a run or a result: its status, its name, and what can be done with it."""
    return tag("div", chip(status), tag("span", name, cls="mono grow nowrap", title=title or None), rest, cls="row wb-head")


def number(value: Any, digits: int = 4) -> str:
    """A number for a table: at most ``digits`` significant ones; an en dash for nothing."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or float(value).is_integer() and abs(value) >= 1000:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; an en dash for None."""
    if seconds is None or seconds < 0:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(rows: Sequence[Mapping[str, Any]], right: Iterable[str] = ()) -> Html:
    """Rows as an HTML table; numbers, and the columns named by ``right``, are aligned to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    aligned = set(right) | {name for name in names if values[name] and all(isinstance(v, (int, float)) for v in values[name])}
    cls = {name: "number" if name in aligned else "" for name in names}
    head = [tag("th", name.replace("_", " "), scope="col", cls=cls[name]) for name in names]
    body = [tag("tr", [tag("td", number(row.get(name)), cls=cls[name]) for name in names]) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", head)), tag("tbody", body)), cls="scroll")
