"""The code of an action, to read and to copy with one click."""

from __future__ import annotations

import traitlets

from widgets import theme
from widgets.surface import Part


class CodeView(Part):
    """Python code with a copy button.

    Args:
        code: the text.
        title: what the code does, in a few words.
    """

    _esm = theme.HERE / "code.js"
    _css = theme.css("code.css")

    code = traitlets.Unicode("").tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)

    def __init__(self, code: str = "", title: str = "The button runs this code") -> None:
        super().__init__(code=code, title=title)
