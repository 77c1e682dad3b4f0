"""The Inspector: a run seen live.

* :mod:`widgets.inspector.inspector` — :class:`Inspector`, the widget, and the thread that follows the run's folder;
* :mod:`widgets.inspector.recording` — :class:`Recording`, the run's curves and heat maps, bounded, as frames for the page;
* :mod:`widgets.inspector.quantities`, :mod:`widgets.inspector.histograms` — what a heat map of gradients can show, and how
  distributions are binned and drawn;
* :mod:`widgets.inspector.beside` — a second run: which there are, and in which settings they differ;
* :mod:`widgets.inspector.export` — the page as one file, with the recordings inside;
* :mod:`widgets.inspector.figures` — the same as plotly figures, and as small static drawings;
* :mod:`widgets.inspector.memory` — what holds the memory; :mod:`widgets.inspector.snapshots` — memory snapshots in the page;
* ``inspector.js``, ``inspector.css`` — the page's side, over ``widgets/plotting.js``: ``charts.js``, ``memory.js`` and
  ``heat.js`` draw, ``rows.js`` groups layers by blocks, ``time.js`` chooses the step, ``compare.js`` the other run;
  ``widget.js`` starts it in a notebook, ``offline.js`` in an exported file.
"""

from __future__ import annotations

from widgets.inspector.inspector import Inspector

__all__ = ["Inspector"]
