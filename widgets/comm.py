"""How a page's messages reach a widget."""

from __future__ import annotations

from ipywidgets import Widget


def answer_while_busy(widget: Widget) -> None:
    """Let the page's messages to ``widget`` be handled on a thread of their own even while a cell runs.

    ipykernel 7 can do that ("subshells"), but since 7.1 it sends the answers to a widget made by a cell back to the thread that
    runs cells, where they wait for the cell's end. Where that routing is absent this does nothing.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = lambda _data, asked: asked
