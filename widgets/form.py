"""A form for any Config: drawn from its fields, checked as it is typed into.

:class:`Form` is one widget however many settings a Config has. :attr:`Form.value` is a validated Config or raises; what is wrong
stands beside its field in words. Assigning :attr:`Form.value` fills the form in.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import traitlets
from pydantic import ValidationError

from widgets import fields, theme
from widgets.surface import Part
from workbench.config import Config, explain
from workbench.errors import ConfigError

C = TypeVar("C", bound=Config)


class Form(Part, Generic[C]):
    """A form from the fields of a Config class.

    Args:
        config_class: the class.
        value: what to start from; by default the class's defaults.
        first: dotted settings and groups to draw at the top, in this order; the others are folded below.

    Example:
        >>> form = Form(TrainConfig, first=["model.name", "optim.lr"])
        >>> form.value
        TrainConfig(...)
    """

    _esm = theme.HERE / "form.js"
    _css = theme.css("form.css")

    _schema = traitlets.Dict().tag(sync=True)
    _raw = traitlets.Dict().tag(sync=True)
    _errors = traitlets.Dict().tag(sync=True)
    _open: traitlets.List[str] = traitlets.List().tag(sync=True)
    disabled = traitlets.Bool(False).tag(sync=True)

    def __init__(self, config_class: type[C], value: C | None = None, *, first: Iterable[str] = ()) -> None:
        self._class = config_class
        self._tree = fields.read(config_class)
        self._fields = {field.path: field for field in self._tree.fields()}
        self._optional = {group.path: group for group in self._tree.groups() if group.optional}
        self._lock = threading.RLock()
        self._listeners: list[Callable[[C | None], None]] = []
        self._given: C | None = None
        self._config: C | None = None
        self._message = ""
        super().__init__(_schema={**self._tree.spec(), "first": list(first)})
        self.on_msg(self._receive)
        self.observe(lambda change: self._check(), "_raw")
        self._fill(value if value is not None else config_class())

    # -- the config ------------------------------------------------------------------------------------------------

    @property
    def value(self) -> C:
        """The config the form describes.

        Raises:
            ConfigError: a setting is wrong; the message names it.
        """
        with self._lock:
            if self._config is None:
                raise ConfigError(self._message)
            return self._config

    @value.setter
    def value(self, config: C) -> None:
        if not isinstance(config, self._class):
            raise ConfigError(f"This form is for {self._class.__name__}, not {type(config).__name__}.")
        self._fill(config)

    @property
    def message(self) -> str:
        """What is wrong, all of it; empty when the form is valid."""
        return self._message

    @property
    def errors(self) -> Mapping[str, str]:
        """What is wrong, by dotted setting; what concerns several settings stands under ``""``."""
        return dict(self._errors)

    def on_change(self, listener: Callable[[C | None], None]) -> None:
        """Call ``listener`` with the config after each change, with None while a setting is wrong."""
        self._listeners.append(listener)

    def type(self, path: str, raw: Any) -> None:
        """Do what typing ``raw`` into a field would do."""
        if path not in self._fields and path not in self._optional:
            raise ConfigError(f"This form has no field {path!r}.")
        self._raw = {**self._raw, path: raw}

    # -- between the controls and the config -----------------------------------------------------------------------

    def _fill(self, config: C) -> None:
        values = config.model_dump()
        raw: dict[str, Any] = {}
        for path, field in self._fields.items():
            found, value = _get(values, path)
            raw[path] = field.show(value if found else field.default)
        for path in self._optional:
            raw[path] = _get(values, path)[1] is not None
        with self._lock:
            self._given, self._shown = config, dict(raw)
        if raw == self._raw:
            self._check()
        else:
            self._raw = raw

    def _check(self) -> None:
        """Build the config from the controls; note what is wrong, field by field."""
        with self._lock:
            errors: dict[str, str] = {}
            values = self._values(errors)
            config: C | None = None
            message = " ".join(f"{path}: {text}" for path, text in errors.items())
            if not errors:
                try:
                    config = self._class(**values)
                except ConfigError as error:
                    message = str(error)
                    errors = self._place(error)
            # A config the user has not touched comes back as it was given, whatever its text form may round.
            self._config = self._given if config is not None and config == self._given else config
            self._message = message
        self._errors = errors
        for listener in self._listeners:
            listener(self._config)

    def _values(self, errors: dict[str, str]) -> dict[str, Any]:
        """Values by nested name: those untouched since they were filled in are taken from the config itself."""
        assert self._given is not None
        values = copy.deepcopy(self._given.model_dump())
        raw = self._raw
        absent = [path for path in self._optional if not raw.get(path)]
        for path in self._optional:
            if path in absent:
                _set(values, path, None)
            elif _get(values, path)[1] is None:
                _set(values, path, {})
        for path, field in self._fields.items():
            if (
                any(path.startswith(group + ".") for group in absent)
                or raw.get(path) == self._shown.get(path)
                and _get(values, path)[0]
            ):
                continue
            try:
                _set(values, path, field.parse(raw.get(path)))
            except ConfigError as error:
                errors[path] = str(error)
        return values

    def _place(self, error: ConfigError) -> dict[str, str]:
        """An error's sentences, each beside the field it is about."""
        cause = error.__context__
        if not isinstance(cause, ValidationError):
            return {"": str(error)}
        placed: dict[str, list[dict[str, Any]]] = {}
        for item in cause.errors(include_url=False):
            parts = [str(part) for part in item["loc"]]
            known = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            path = next((p for p in known if p in self._fields or p in self._optional), "")
            placed.setdefault(path, []).append(dict(item))
        return {path: _sentence(items) if path else explain(cause, self._class) for path, items in placed.items()}

    def _receive(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        if "suggest" in content:
            choices = str(content["suggest"])
            self.send({"choices": choices, "names": list(fields.suggestions(choices))})


def _sentence(items: list[dict[str, Any]]) -> str:
    """What one field must be. The alternatives of a union are joined."""
    own = [item for item in items if item["type"] == "value_error"]
    if own:
        return str(own[0]["msg"]).removeprefix("Value error, ")
    wanted = dict.fromkeys(item["msg"].removeprefix("Input should be ").rstrip(".") for item in items)
    return f"Must be {' or '.join(wanted)}, not {str(items[0]['input'])[:60]!r}."


def _get(values: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    node: Any = values
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False, None
        node = node[part]
    return True, node


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[last] = value
