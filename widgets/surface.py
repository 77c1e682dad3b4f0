"""A surface: HTML that Python writes, and the actions that come back from it.

An element with ``data-action`` sends its name when clicked, with its ``data-value`` and the inputs that ``data-with`` names; an
input with ``data-input`` sends what is typed. Setting :attr:`Surface.html` merges the new HTML into what is shown, so focus,
half-typed text and scroll positions stay. Whoever writes the HTML escapes what it shows (:mod:`widgets.theme`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import traitlets

from widgets import theme
from widgets.comm import answer_while_busy

Handler = Callable[[Any, Mapping[str, Any]], None]
"""Takes the action's value and the values of its inputs. It must return at once: see :meth:`widgets.panel.Panel.background`."""


class Part(anywidget.AnyWidget):
    """A widget that answers while a cell runs, and whose layout is closed with it (ipywidgets would keep it)."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        answer_while_busy(self)

    def close(self) -> None:
        layout = self.layout
        super().close()
        layout.close()


class Surface(Part):
    """HTML with named actions.

    Args:
        html: what to show.
        on: handler by action.
    """

    _esm = theme.HERE / "surface.js"
    _css = theme.css("panel.css")

    html = traitlets.Unicode("").tag(sync=True)

    def __init__(self, html: str = "", on: Mapping[str, Handler] | None = None) -> None:
        super().__init__(html=html)
        self._handlers = dict(on or {})
        self.on_msg(self._receive)

    def _receive(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        handler = self._handlers.get(content.get("action", ""))
        if handler is not None:
            handler(content.get("value"), content.get("values") or {})

    def show_page(self, html: str) -> None:
        """Open a whole page of its own beside the notebook."""
        self.send({"page": html})

    def act(self, action: str, value: Any = "", **values: Any) -> None:
        """Do what a click would do."""
        self._receive(self, {"action": action, "value": value, "values": values}, None)
