"""One look for every panel: style sheets on JupyterLab's colours, and the pieces of HTML that panels share.

* :func:`css` — the sheets a widget loads: the theme's tokens and its own.
* :func:`chip`, :func:`notice`, :func:`table` — a status, a message, a table; whatever they show is escaped.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError

HERE = Path(__file__).parent


def css(*names: str) -> str:
    """The theme's style sheet followed by the named ones of this folder."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("theme.css", *names))


def chip(status: str) -> str:
    """A run's status as a dot and a word."""
    return f'<span class="chip {escape(status, quote=True)}">{escape(status)}</span>'


def notice(message: str, *, kind: str = "error", remedy: str = "", details: str = "") -> str:
    """A message that stands on its own; ``details`` are folded away."""
    if not message:
        return ""
    lines = [f"<p>{escape(message)}</p>"]
    if remedy:
        lines.append(f'<p class="quiet">{escape(remedy)}</p>')
    if details:
        lines.append(f'<details class="small"><summary class="quiet">Details</summary><pre>{escape(details)}</pre></details>')
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{"".join(lines)}</div>'


def error_notice(error: BaseException) -> str:
    """An error as a :func:`notice`: ours in their own words, others by class and text, both with the traceback folded."""
    details = "".join(traceback.format_exception(error)).strip()
    if isinstance(error, WorkbenchError):
        return notice(error.what, remedy=error.remedy, details=details if error.__cause__ else "")
    return notice(f"{type(error).__name__}: {error}", remedy="This is unexpected; the details say where it happened.", details=details)


def number(value: Any, digits: int = 4) -> str:
    """A number for a table: at most ``digits`` significant ones; an en dash for nothing."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or float(value).is_integer() and abs(value) >= 1000:
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; an en dash for None."""
    if seconds is None or seconds < 0:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None, right: Iterable[str] = ()) -> str:
    """Rows as an HTML table; numbers, and the columns named by ``right``, are aligned to the right."""
    aligned = set(right)
    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))

    def numeric(name: str) -> str:
        present = [row[name] for row in rows if row.get(name) is not None]
        return ' class="number"' if name in aligned or present and all(isinstance(v, (int, float)) for v in present) else ""

    head = "".join(f'<th scope="col"{numeric(name)}>{escape(name.replace("_", " "))}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td{numeric(n)}>{escape(number(row.get(n)))}</td>" for n in names) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
