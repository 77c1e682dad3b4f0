"""One configuration class, many faces: form, YAML, command line, notebook parameters, code.

:class:`Config` is a frozen pydantic model that rejects unknown settings. Subclasses stand beside what they
configure and describe every field with its unit; the faces are all derived from those fields:

* ``config.override(["optim.lr=1e-3"])`` — dotted overrides, as on the command line;
* ``config.to_yaml()`` / ``Config.from_yaml(path)`` — files;
* ``config.to_code()`` — Python, with ``eval(config.to_code()) == config``;
* ``widgets.form`` — a form, from the fields' types, bounds and hints (:func:`hint`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from workbench.errors import ConfigError, nearest

_depth: ContextVar[int] = ContextVar("config_depth", default=0)


def hint(*, log: bool = False, choices: str = "", advanced: bool = False, step: float | None = None) -> dict[str, Any]:
    """Presentation hints for a field (``json_schema_extra``): how a form should draw it.

    Args:
        log: draw on a logarithmic scale (rates, decays).
        choices: name of the registry whose names the field takes, e.g. ``"models"``.
        advanced: keep folded away until asked for.
        step: increment of the input control.
    """
    pairs = {"log": log, "choices": choices, "advanced": advanced, "step": step}
    return {key: value for key, value in pairs.items() if value}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"the name {name!r} is not text")
        return {name: _plain(item) for name, item in value.items()}
    raise ValueError(f"{value!r} cannot be written to a file: take numbers, text, lists and groups of them")


Arguments = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Keyword arguments of a plug-in: what YAML holds, so that every face of a config says the same. Tuples become lists."""


class Config(BaseModel):
    """Base of all configurations: frozen, unknown settings forbidden, errors in plain words."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    kind: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        # A nested config is built by the same __init__; only the outermost turns pydantic's errors into ours,
        # so that the message carries the whole dotted path.
        token = _depth.set(_depth.get() + 1)
        try:
            super().__init__(**values)
        except ValidationError as error:
            if token.old_value not in (token.MISSING, 0):
                raise
            raise ConfigError(explain(error, type(self))) from None
        finally:
            _depth.reset(token)

    @classmethod
    def checked(cls, config: Self | None) -> Self:
        """``config`` itself, or the defaults for None.

        Raises:
            ConfigError: it is anything else, settings of another kind included.
        """
        if config is None:
            return cls()
        if not isinstance(config, cls) or config.kind != cls.kind:
            settings = "**settings" if isinstance(config, Mapping) else "…"
            raise ConfigError(
                f"The config is a {type(config).__name__}, not a {cls.__name__}.", f"Build one: {cls.__name__}({settings})."
            )
        return config

    def override(self, changes: Mapping[str, Any] | Iterable[str]) -> Self:
        """A copy with dotted settings changed.

        Args:
            changes: ``{"optim.lr": 1e-3}`` or ``["optim.lr=1e-3"]``; values in text are read as YAML.

        Raises:
            ConfigError: an unknown setting, a value out of range, or text without ``=``.
        """
        values = self.model_dump()
        for path, value in _pairs(changes):
            target, *rest = _split(path)
            _assign(values, [target, *rest], value, path)
        return type(self)(**values)

    def flat(self) -> dict[str, Any]:
        """All settings by dotted path, e.g. ``{"optim.lr": 0.1, ...}``."""
        return dict(_flatten(self.model_dump(mode="json")))

    def changes_from(self, other: Config) -> dict[str, Any]:
        """Dotted settings in which this config differs from ``other``, with this config's values."""
        before = other.flat()
        return {path: value for path, value in self.flat().items() if path not in before or before[path] != value}

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Every setting as YAML; written to ``path`` too when given."""
        text = dump_yaml(self.model_dump(mode="json"))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Self:
        """Read a config from a YAML file.

        Raises:
            ConfigError: the file is missing, is not YAML, or its settings do not validate.
        """
        path = Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"The configuration file {str(path)!r} cannot be read: {error.strerror}.", "Check the path."
            ) from None
        values = load_yaml(text, str(path))
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}, not settings.", "Write one 'name: value' per line.")
        if "kind" not in cls.model_fields and (kind := values.pop("kind", cls.kind)) != cls.kind:  # a run's config.yaml has one
            raise ConfigError(f"{path} is of kind {kind!r}, not {cls.kind!r}.", f"It holds no {cls.__name__}.")
        return cls(**values)

    def to_code(self) -> str:
        """Python that builds this config, defaults left out: ``eval(c.to_code()) == c``."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        one_line = f"{type(self).__name__}({arguments})"
        if len(one_line) <= 88:
            return one_line
        lines = "".join(f"    {name}={value!r},\n" for name, value in values.items())
        return f"{type(self).__name__}(\n{lines})"


class _Yaml12(yaml.SafeLoader):
    """SafeLoader that reads ``1e-3`` as a number, as YAML 1.2 does (1.1 wants ``1.0e-3``)."""


class _Yaml12Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text ``"1e-3"``, which :class:`_Yaml12` would else read as a number, and odd line breaks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    breaks = "\x85\u2028\u2029"  # read back as line breaks unless they are escaped
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if set(value) & set(breaks) else None)


_Yaml12Dumper.add_representer(str, _text)


for _class in (_Yaml12, _Yaml12Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
    )


def dump_yaml(value: Any, *, flow: bool = False) -> str:
    """YAML that :func:`load_yaml` reads back as ``value``: in lines, or with ``flow`` in a single one with brackets."""
    layout: dict[str, Any] = {"default_flow_style": True, "width": math.inf} if flow else {}
    text: str = yaml.dump(value, Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True, **layout)
    return text


def load_yaml(text: str, origin: str = "text") -> Any:
    """Parse YAML, scientific notation included; :class:`ConfigError` names the line on bad syntax."""
    try:
        return yaml.load(text, Loader=_Yaml12)  # noqa: S506 - _Yaml12 is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin} is not valid YAML{where}: {getattr(error, 'problem', error)}.") from None


def _pairs(changes: Mapping[str, Any] | Iterable[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(changes, Mapping):
        yield from changes.items()
        return
    for text in [changes] if isinstance(changes, str) else changes:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"The override {text!r} has no '='.", "Write it as name=value, e.g. optim.lr=0.01.")
        yield path.strip(), load_yaml(value, f"The value of {path.strip()!r}")


def _split(path: str) -> list[str]:
    parts = path.split(".")
    if not all(parts):
        raise ConfigError(f"The setting {path!r} is not a dotted name.", "Write it like optim.lr.")
    return parts


def _assign(values: dict[str, Any], parts: list[str], value: Any, path: str) -> None:
    *parents, last = parts
    for depth, part in enumerate(parents):
        child = values.get(part)
        if child is None:
            child = values[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{path!r}: {'.'.join(parts[: depth + 1])} is a value ({child!r}), not a group of settings.")
        values = child
    values[last] = _own(value)


def _own(value: Any) -> Any:
    """Groups of settings as dicts that another setting may write into."""
    return {name: _own(member) for name, member in value.items()} if isinstance(value, dict) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def explain(error: ValidationError, owner: type[BaseModel]) -> str:
    """Pydantic's errors as sentences: the setting, its value, what is allowed, what it means."""
    items: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in error.errors(include_url=False):
        place = _without_tag(item["loc"], owner)
        key = (*place, len(items)) if place == item["loc"] else place
        if key in items:  # another member of the same union
            items[key]["msg"] += f", or {item['msg'].removeprefix('Input should be ')}"
        else:
            items[key] = {**item, "loc": place}
    return " ".join(_sentence(item, owner) for item in items.values())


def _without_tag(location: tuple[int | str, ...], owner: type[BaseModel]) -> tuple[int | str, ...]:
    """Where a setting is, without pydantic's name for the member of a union that it was tried as."""
    if len(location) < 2:
        return location
    model, _ = _field(owner, [str(part) for part in location[:-1]])
    field = model.model_fields.get(str(location[-2]))
    return location[:-1] if field is not None and get_origin(field.annotation) in (Union, UnionType) else location


def _sentence(item: dict[str, Any], owner: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    path = ".".join(location) or owner.__name__
    model, description = _field(owner, location)
    if item["type"] == "extra_forbidden":
        known = list(model.model_fields)
        close = nearest(location[-1], known)
        remedy = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"it has: {', '.join(known)}."
        return f"{path} is not a setting of {model.__name__}; {remedy}"
    if item["type"] == "missing":
        return f"{path} is required: {description or 'give it a value'}."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
    if item["type"] == "value_error":
        return f"{path}: {message if message.endswith('?') else message + '.'}"
    given = repr(item["input"])
    return f"{path}={given[:80]} must be {message}. {description}".rstrip()


def _field(owner: type[BaseModel], location: list[str]) -> tuple[type[BaseModel], str]:
    """The config class that holds the setting at ``location``, and the setting's description."""
    model, description = owner, ""
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            break
        description = field.description or ""
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return model, description.strip().replace("\n", " ")
