"""What a form needs to know of a Config class, read from its pydantic fields.

* :class:`Field` — one setting: its control, bounds, choices, words; :meth:`Field.show` turns its value into the text a control
  holds, :meth:`Field.parse` back.
* :class:`Group` — a nested Config: its fields and groups.
* :func:`read` — the :class:`Group` of a Config class.
* :func:`suggestions` — names a registry offers for a field with ``hint(choices=...)``.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from workbench.config import Config, dump_yaml, load_yaml
from workbench.errors import ConfigError
from workbench.registry import load_object

REGISTRIES: dict[str, tuple[str, ...]] = {
    "models": ("workbench.models.config:MODELS", "workbench.models.config:timm_names"),
    "datasets": ("workbench.data.cards:card_names",),
    "augmentations": ("workbench.data.config:AUGMENTATIONS",),
    "attributions": ("workbench.attribution_config:METHODS",),
    "criteria": ("workbench.compress.pruning_config:CRITERIA",),
    "observers": ("workbench.compress.quantization_config:OBSERVERS",),
    "distillations": ("workbench.training.distillation_config:DISTILLATIONS",),
    "losses": ("workbench.losses:LOSSES",),
    "optimizers": ("workbench.optim_config:OPTIMIZERS",),
    "penalties": ("workbench.regularizers:PENALTIES",),
    "plans": ("workbench.training.mesh_config:PLANS",),
}
"""Where the names behind ``hint(choices=...)`` come from: registries, or functions that return names; loaded when asked for."""


@dataclass(frozen=True)
class Field:
    """One setting of a form. ``path`` is dotted from the outermost config."""

    path: str
    control: Literal["number", "switch", "select", "text", "combobox", "yaml"]
    help: str
    default: Any
    optional: bool = False
    integer: bool = False
    log: bool = False
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    step: float | None = None
    options: tuple[Any, ...] = ()
    choices: str = ""
    sequence: bool = False
    advanced: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def show(self, value: Any) -> Any:
        """The control's content for a value: a bool for a switch, else text."""
        if self.control == "switch":
            return bool(value)
        if isinstance(value, enum.Enum):
            value = value.value
        if value is None:
            return ""
        if self.control in ("text", "combobox", "select"):
            return str(value)
        if self.control == "number":
            return repr(value)
        if self.sequence and value and all(_plain(item) for item in value) and _is_text(", ".join(value)):
            return ", ".join(value)
        if isinstance(value, (dict, list, tuple)) and not value and not self.optional:
            return ""
        plain = list(value) if isinstance(value, tuple) else value
        return dump_yaml(plain, flow=True).removesuffix("...\n").strip()

    def parse(self, raw: Any) -> Any:
        """The value a control's content stands for; its type and bounds are the Config's to check.

        Raises:
            ConfigError: text that is no number, or no YAML.
        """
        if self.control == "switch":
            return bool(raw)
        text = str(raw).strip()
        if self.control == "select":
            return next((option for option in self.options if self.show(option) == text), text)
        if not text and self.optional:
            return None
        if self.control in ("text", "combobox"):
            return text
        if self.control == "number":
            return _number(text, self.integer)
        if not text:
            return [] if self.sequence else {} if isinstance(self.default, dict) else None
        value = load_yaml(text, self.label)
        if self.sequence and isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    def spec(self) -> dict[str, Any]:
        """What the page draws the control from."""
        spec: dict[str, Any] = {"path": self.path, "label": self.label, "control": self.control, "help": self.help}
        spec |= {"default": self.show(self.default), "placeholder": "default" if self.optional else ""}
        if self.options:
            spec["options"] = [self.show(option) for option in self.options]
        for name in ("integer", "log", "low", "high", "low_open", "step", "choices", "advanced"):
            if (value := getattr(self, name)) not in (None, False, ""):
                spec[name] = value
        return spec


@dataclass(frozen=True)
class Group:
    """A Config class as a tree of fields. An optional group may be absent (None)."""

    path: str
    help: str
    config: type[Config]
    members: tuple[Field | Group, ...]
    optional: bool = False
    advanced: bool = False

    @property
    def label(self) -> str:
        return self.path.rpartition(".")[2].replace("_", " ")

    def fields(self) -> Iterator[Field]:
        for member in self.members:
            yield from member.fields() if isinstance(member, Group) else (member,)

    def groups(self) -> Iterator[Group]:
        for member in self.members:
            if isinstance(member, Group):
                yield member
                yield from member.groups()

    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"path": self.path, "label": self.label, "control": "group", "help": self.help}
        spec["members"] = [member.spec() for member in self.members]
        return spec | {name: True for name in ("optional", "advanced") if getattr(self, name)}


@cache
def read(config: type[Config]) -> Group:
    """The fields of a Config class."""
    return Group("", _first_line(config.__doc__), config, tuple(_members(config, "")))


@cache
def suggestions(choices: str) -> tuple[str, ...]:
    """Names to offer, the registry's own first; empty when its package is missing."""
    names: list[str] = []
    for target in REGISTRIES.get(choices, ()):
        try:
            found = load_object(target)
        except (ConfigError, ImportError):
            continue
        names += sorted(found() if callable(found) else found)
    return tuple(dict.fromkeys(names))


def _members(config: type[Config], prefix: str) -> Iterator[Field | Group]:
    for name, info in config.model_fields.items():
        path = prefix + name
        kinds, optional = _kinds(info.annotation)
        hints = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Config):
            members = tuple(_members(kinds[0], path + "."))
            yield Group(path, _description(info), kinds[0], members, optional, bool(hints.get("advanced")))
        else:
            yield _field(path, info, kinds, optional, hints)


def _field(path: str, info: FieldInfo, kinds: list[Any], optional: bool, hints: dict[str, Any]) -> Field:
    only = kinds[0] if len(kinds) == 1 else None
    origin = typing.get_origin(only) or only
    more: dict[str, Any] = {}
    if only is bool and not optional:
        control = "switch"
    elif only is bool:
        control, more["options"] = "select", (None, True, False)
    elif only in (int, float) or kinds and set(kinds) <= {int, float}:
        control, more = (
            "number",
            {"integer": only is int, **_bounds(info), "log": bool(hints.get("log")), "step": hints.get("step")},
        )
    elif origin is Literal:
        control, more["options"] = "select", (*((None,) if optional else ()), *typing.get_args(only))
    elif isinstance(only, type) and issubclass(only, enum.Enum):
        control, more["options"] = "select", (*((None,) if optional else ()), *(member.value for member in only))
    elif only is str:
        control = "combobox" if hints.get("choices") else "text"
    elif isinstance(only, type) and issubclass(only, PurePath):
        control = "text"
    else:
        control, more["sequence"] = "yaml", origin in (list, tuple, set, frozenset)
        # Of a union such as int | Literal["auto"], the words are offered as suggestions.
        more["options"] = tuple(word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind))
    common = {
        "help": _description(info),
        "default": _default(info),
        "optional": optional,
        "choices": str(hints.get("choices", "")),
    }
    return Field(path, control, advanced=bool(hints.get("advanced")), **common, **more)  # type: ignore[arg-type]


def _kinds(annotation: Any) -> tuple[list[Any], bool]:
    """The alternatives of an annotation without None, and whether None was one."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return [annotation], False
    alternatives = [_kinds(a)[0][0] if typing.get_origin(a) is typing.Annotated else a for a in typing.get_args(annotation)]
    return [a for a in alternatives if a is not types.NoneType], types.NoneType in alternatives


def _bounds(info: FieldInfo) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in info.metadata:
        for attribute, bound in (("ge", "low"), ("gt", "low"), ("le", "high"), ("lt", "high")):
            if (value := getattr(item, attribute, None)) is not None:
                found[bound] = value
                if attribute == "gt":
                    found["low_open"] = True
    return found


def _default(info: FieldInfo) -> Any:
    if info.is_required():
        return None
    value = info.get_default(call_default_factory=True, validated_data={})
    return value.model_dump() if isinstance(value, BaseModel) else value


def _description(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _plain(item: Any) -> bool:
    """A string that survives being listed between commas."""
    return isinstance(item, str) and item == item.strip() and bool(item) and not set(item) & set(",[]{}#&*!|>'\"%@`:\n")


def _is_text(words: str) -> bool:
    """Whether YAML reads them as text, and not as a number, a truth value or nothing."""
    try:
        return isinstance(load_yaml(words), str)
    except ConfigError:
        return False


def _number(text: str, integer: bool) -> int | float:
    try:
        value = float(text)
        return int(text) if integer and "." not in text and "e" not in text.lower() else value
    except ValueError:
        wanted = "a whole number" if integer else "a number"
        raise ConfigError(f"{text!r} is not {wanted}." if text else f"Give {wanted}.") from None
