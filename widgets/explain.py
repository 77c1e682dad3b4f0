"""The explanation panel: the samples a model is most wrong about, or any of them, and what the model looks at in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets

from widgets import theme
from widgets.action import trained
from widgets.form import Form
from widgets.job import execute
from widgets.markup import Html, button, select, tag
from widgets.panel import Panel, box, open_code
from widgets.surface import Surface
from workbench.attribution_config import METHODS, AttributionConfig
from workbench.errors import ConfigError, RunError
from workbench.run import Run

if TYPE_CHECKING:
    from workbench.attribution.explanation import Explanation, Explanations

COUNT = 12
"""Samples that are looked for, when the most wrong are asked for."""
SHOWN = 3
"""Samples in the summary of a notebook that is a file."""
EMPTY = "What the model looks at appears here."


class Explain(Panel):
    """See what a model looks at: in the samples that it is most wrong about, or in one by its number.

    Args:
        source: a run with a model, which is explained on the run's held-out data; or a module, or any function from inputs to
            outputs (N, classes). By default the newest run that has a model.
        data: batches (x, y) for a model.
        method: a name of :data:`~workbench.attribution.METHODS`.
        config: what the form starts from.

    Raises:
        ConfigError: a model without data, or an unknown method.

    Example:
        >>> Explain(run)
        >>> Explain(model, batches, "occlusion")
    """

    title = "Explain"

    def __init__(
        self,
        source: Any = None,
        data: Any = None,
        method: str = "integrated_gradients",
        config: AttributionConfig | None = None,
    ) -> None:
        super().__init__()
        of_run = source is None or isinstance(source, Run)
        if not of_run and data is None:
            raise ConfigError("There is no data to explain the model on.", "Pass batches (x, y): Explain(model, batches).")
        self.run: Run | None = (source if source is not None else next(iter(trained()), None)) if of_run else None
        self._given = None if of_run else {"model": source, "data": data}
        self.method = METHODS.check(method)
        self.place = ""
        """Number of the sample to explain; empty: those that the model is most wrong about."""
        self.explained: Explanations | None = None
        """What the last click found."""
        self.chosen = 0
        """Which of them is shown."""
        self._initial = config or AttributionConfig()
        self._form: Form[AttributionConfig] | None = None
        self._busy = False
        self._error = Html()

    # -- what a user meets -----------------------------------------------------------------------------------------

    @property
    def form(self) -> Form[AttributionConfig]:
        """The method's settings."""
        _ = self.view
        assert self._form is not None
        return self._form

    @property
    def config(self) -> AttributionConfig:
        """The settings of the next click.

        Raises:
            ConfigError: a setting of the form is wrong.
        """
        return self._initial if self._form is None else self._form.value

    @property
    def code(self) -> str:
        if self.run is None and self._given is None:
            return "# Train a model first.\n"
        try:
            return self._code_for(self.config)
        except ConfigError as error:
            return f"# {error}\n"

    def act(self) -> Explanations:
        """Do what the button does, here and now; what it found, which the panel shows.

        Raises:
            RunError: there is no trained run.
            ConfigError, ModelError, DataError: as by :func:`~workbench.attribution.most_wrong`.
        """
        self._busy, self._error = True, Html()
        self._refresh()
        try:
            if self.run is None and self._given is None:
                raise RunError("There is no trained run to explain.", "Train one first.")
            _ = self.config
            found: Explanations = execute(self.code, given=self._given)["explained"]
            self.explained, self.chosen = found, 0
            return found
        except Exception as error:
            self._error = theme.error_notice(error)
            raise
        finally:
            self._busy = False
            self._refresh()

    def attach(self, run: Run) -> None:
        """Explain another run's model."""
        self.run, self._given, self.explained, self._error = run, None, None, Html()
        self._refresh()
        self._turned(run)

    # -- the code --------------------------------------------------------------------------------------------------

    def _code_for(self, config: AttributionConfig) -> str:
        settings = [repr(self.method)]
        if config != AttributionConfig():
            settings.append(config.to_code())
        imported = {"AttributionConfig"} if len(settings) > 1 else set()
        data = "data"
        if self._given is None:
            assert self.run is not None
            data = "held_out"
            opening = (
                f"run = {open_code(self.run)}\nmodel = run.load_model()\n"
                "held_out = load_batches(run.config.data, root=run.path)\n"
            )
        else:
            opening = "# model and data are those given to the panel\n"
        if self.place:
            imported |= {"Names", "explain_samples", "pick_samples"}
            verb = (
                f"x, labels = pick_samples({data}, [{self.place}])\n"
                f"explained = explain_samples(\n    model, x, labels, method={', config='.join(settings)},"
                f" names=Names.of({data}), samples=[{self.place}]\n)\n"
            )
        else:
            imported.add("most_wrong")
            verb = f"explained = most_wrong(model, {data}, {COUNT}, {', '.join(settings)})\n"
        head = f"from workbench.attribution import {', '.join(sorted(imported))}\n"
        if self._given is None:
            head = f"from workbench import Run\n{head}from workbench.data import load_batches\n"
        return f"{head}\n{opening}{verb}"

    # -- widgets ---------------------------------------------------------------------------------------------------

    def _build(self) -> ipywidgets.Widget:
        on = {"run": self._choose, "method": self._set_method, "place": self._set_place, "act": self._clicked, "pick": self._pick}
        self._source, self._button, self._list, self._result = (Surface(on=on) for _ in range(4))
        self._form = Form(AttributionConfig, self._initial, first=["baseline", "steps", "patches"])
        left = box("wb-column", [self._source, self._form, self._button, self._list])
        frame = self._frame(box("wb-split", [left, box("wb-column", [self._result])]), self._code("Explain runs this code"))
        self._refresh()
        self._form.on_change(lambda config: self._refresh())
        return frame

    def _summary(self) -> Html:
        if self.explained is None:
            return tag("p", EMPTY) + tag("pre", self.code)
        return Html(type(self.explained)(self.explained[:SHOWN])._repr_html_())

    def _refresh(self) -> None:
        with self._lock:
            form = self._form
            if form is None or self._closed.is_set():
                return
            self._source.html = tag("div", self._runs(), self._methods(), self._places(), cls="stack")
            off = self._busy or bool(form.message) or self.run is None and self._given is None
            act = button("Explain", "act", primary=True, off=off)
            self._button.html = tag("div", tag("div", tag("span", cls="grow"), act, cls="row"), self._error, cls="stack")
            self._list.html = self._samples() if self.explained is not None else Html()
            self._result.html = self._shown()
            self._show_code(title="Explain runs this code")

    def _runs(self) -> Html | None:
        if self._given is not None:
            return None
        runs = trained()
        if self.run is not None and all(run.path != self.run.path for run in runs):
            runs = [self.run, *runs]
        options = [(str(run.path), run.id) for run in runs]
        return _labelled("model, and its held-out data", select(options, str(self.run.path) if self.run else "", "run", "Run"))

    def _methods(self) -> Html:
        return _labelled("method", select([(n, n.replace("_", " ")) for n in METHODS], self.method, "method", "Method"))

    def _places(self) -> Html:
        words = {"data_input": "place", "value": self.place, "inputmode": "numeric", "placeholder": f"the {COUNT} most wrong"}
        return _labelled("sample", tag("input", type="text", name="place", aria_label="Number of the sample", **words))

    def _samples(self) -> Html:
        """The explained samples, to choose from."""
        assert self.explained is not None
        names = ("sample", "true", "answer", "loss")
        head = [tag("th", name, scope="col", cls="number" if name in ("sample", "loss") else "") for name in names]
        lines = [self._line(i, one) for i, one in enumerate(self.explained)]
        return tag("div", tag("table", tag("thead", tag("tr", head)), tag("tbody", lines)), cls="scroll wb-samples")

    def _line(self, index: int, one: Explanation) -> Html:
        label = one.names.label
        cells = [
            tag("td", str(one.sample), cls="number"),
            *(tag("td", "–" if i is None else label(i), cls="nowrap") for i in (one.label, one.prediction)),
            tag("td", "–" if one.loss is None else f"{one.loss:.2f}", cls="number"),
        ]
        cls = "choice current" if index == self.chosen else "choice"
        does = {"data_action": "pick", "data_value": str(index), "tabindex": 0, "aria_label": f"Show sample {one.sample}"}
        return tag("tr", cells, cls=cls, data_key=f"{one.sample}", **does)

    def _shown(self) -> Html:
        if self._busy:
            return tag("progress", aria_label="Working")
        if not self.explained:
            return theme.empty(EMPTY)
        # What the template writes is escaped there, for notebooks and pages alike.
        return tag("div", Html(self.explained[self.chosen]._repr_html_()), data_key=f"{id(self.explained)}-{self.chosen}")

    # -- actions ---------------------------------------------------------------------------------------------------

    def _clicked(self, _value: Any, _values: Mapping[str, Any]) -> None:
        if not self._busy:
            self._busy = True
            self._do(self.act, lambda error: None)  # act has noted it

    def _choose(self, value: Any, _values: Mapping[str, Any]) -> None:
        def fail(error: BaseException) -> None:
            self._error = theme.error_notice(error)
            self._refresh()

        self._do(lambda: self.attach(Run.open(str(value))), fail)

    def _set_method(self, value: Any, _values: Mapping[str, Any]) -> None:
        if value in METHODS:
            self.method = str(value)
            self._refresh()

    def _set_place(self, value: Any, _values: Mapping[str, Any]) -> None:
        words = str(value).strip()
        right = not words or words.isdecimal()
        self._error = Html() if right else theme.notice(f"sample={words!r} must be a whole number, from 0, or empty.")
        if right:
            self.place = str(int(words)) if words else ""
        self._refresh()

    def _pick(self, value: Any, _values: Mapping[str, Any]) -> None:
        if self.explained is not None and str(value).isdecimal() and int(value) < len(self.explained):
            self.chosen = int(value)
            self._refresh()


def _labelled(words: str, control: Html) -> Html:
    return tag("label", tag("span", words, cls="quiet small"), control, cls="wb-source")
