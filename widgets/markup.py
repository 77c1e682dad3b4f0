"""HTML that is safe by construction: :func:`tag` escapes whatever is not :class:`Html` already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

VOID = frozenset(("input",))


class Html(str):
    """Text that is HTML; any other text is escaped where it is put into a :func:`tag`."""

    def __add__(self, other: str) -> Html:
        return Html(str(self) + text(other))


Child = str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, cls: str = "", **attributes: Any) -> Html:
    """An element.

    Args:
        children: HTML, text (escaped), None (nothing), or iterables of these.
        cls: its classes.
        attributes: ``data_action`` becomes ``data-action``; None and False are left out, True stands bare.

    >>> tag("p", "a < b", cls="quiet", title='say "hi"')
    '<p class="quiet" title="say &quot;hi&quot;">a &lt; b</p>'
    """
    given = {"class": cls or None} | {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    parts = [
        f' {key}="{escape(str(v), True)}"' if v is not True else f" {key}" for key, v in given.items() if v not in (None, False)
    ]
    opening = f"<{name}{''.join(parts)}>"
    return Html(opening if name in VOID else f"{opening}{text(children)}</{name}>")


def text(child: Child) -> Html:
    """Children as HTML: text escaped, iterables joined."""
    if child is None:
        return Html()
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return Html(escape(child))
    return Html("".join(text(part) for part in child))


def button(label: str, action: str, *, value: str = "", primary: bool = False, off: bool = False, **attributes: Any) -> Html:
    """A button that sends ``action``."""
    cls = "primary" if primary else ""
    return tag("button", label, cls=cls, type="button", data_action=action, data_value=value or None, disabled=off, **attributes)


def select(options: Iterable[tuple[str, str]], chosen: str, action: str, label: str) -> Html:
    """A drop-down of (value, label) pairs that sends ``action`` with the value."""
    made = [tag("option", words, value=value, selected=value == chosen) for value, words in options]
    return tag("select", made, data_input=action, value=chosen, aria_label=label)
