"""The Inspector: a run seen live.

* :mod:`widgets.inspector.inspector` — :class:`Inspector`, the widget, and the thread that follows the run's folder;
* :mod:`widgets.inspector.recording` — :class:`Recording`, the run's curves and heat maps, bounded, as frames for the page;
* :mod:`widgets.inspector.figures` — the same as plotly figures, and as small static drawings;
* :mod:`widgets.inspector.memory` — what holds the memory; :mod:`widgets.inspector.snapshots` — memory snapshots in the page;
* ``inspector.js``, ``inspector.css`` — the page's side, over ``widgets/plotting.js``.
"""

from __future__ import annotations

from widgets.inspector.inspector import Inspector

__all__ = ["Inspector"]
