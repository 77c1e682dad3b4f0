"""Registries: visible dicts from a name to a factory and its card.

A plug-in (model, data set, loss, optimizer, schedule, augmentation …) is one decorated function, or one line that
names where the function lies so that nothing heavy is imported until it is used. Wherever a name is taken,
``"package.module:function"`` and ``"path/to/file.py:function"`` are taken too.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from workbench.errors import ConfigError, WorkbenchError, unknown

if TYPE_CHECKING:
    import pandas as pd

_USER = "workbench_user_"


@dataclass(frozen=True)
class Entry:
    """A registered factory: the object itself or ``"module:attribute"``, and a card of facts about it."""

    target: Callable[..., Any] | str
    card: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        return load_object(self.target) if isinstance(self.target, str) else self.target


class Registry(Mapping[str, Entry]):
    """Names of one kind of plug-in.

    >>> LOSSES = Registry("loss")
    >>> @LOSSES.register("mse", source="least squares")
    ... def mse(): ...
    >>> LOSSES.create("mse")
    """

    def __init__(self, kind: str, entries: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries = {name: Entry(target) for name, target in (entries or {}).items()}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str, target: str | None = None, **card: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a plug-in: as a decorator, or at once when ``target`` (``"module:attribute"``) is given."""

        def add(factory: Callable[..., Any]) -> Callable[..., Any]:
            self._entries[name] = Entry(factory, card)
            return factory

        if target is not None:
            self._entries[name] = Entry(target, card)
        return add

    def known(self, name: str) -> bool:
        """Whether ``name`` is registered or is an import path (which is checked when loaded)."""
        return name in self._entries or ":" in name

    def check(self, name: str) -> str:
        """``name`` itself, or :class:`ConfigError` with the nearest match. Imports nothing."""
        if not self.known(name):
            raise unknown(self.kind, name, self._entries)
        return name

    def factory(self, name: str) -> Callable[..., Any]:
        """The callable behind a registered name or an import path."""
        self.check(name)
        return self._entries[name].load() if name in self._entries else load_object(name)

    def create(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the factory behind ``name``; wrong arguments are reported with the plug-in's name."""
        factory = self.factory(name)
        try:
            return factory(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                raise ConfigError(f"The {self.kind} {name!r} does not take these arguments: {error}.") from None
            raise

    def frame(self) -> pd.DataFrame:
        """The registry as a table: one row a name, one column a fact of its card."""
        import pandas as pd

        return pd.DataFrame([{"name": name, **entry.card} for name, entry in sorted(self._entries.items())])


def import_path(thing: Any) -> Any:
    """The import path by which other processes find a class or function; text and anything else stays as it is.

    Raises:
        ConfigError: no other process can import it: it was made in a notebook's cell, in a function, or by lambda.
    """
    if isinstance(thing, str) or not callable(thing):
        return thing
    if kept := getattr(thing, "__dict__", {}).get("__workbench_source__"):  # its own: a subclass must not pass for its base
        return kept
    module, name = getattr(thing, "__module__", "__main__"), getattr(thing, "__qualname__", "<object>")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if module == "__main__" or found is not thing:
        where = "a notebook or script" if module == "__main__" else module
        raise ConfigError(
            f"{name} cannot be found by other processes, since it is defined in {where}.",
            "In a notebook, run %load_ext workbench and start its cell with %%model; or put it into a file: 'file.py:name'.",
        )
    if module.startswith(_USER):
        return f"{sys.modules[module].__file__}:{name}"
    return f"{module}:{name}"


ImportPath = Annotated[str, BeforeValidator(import_path)]
"""Type of a setting that names a plug-in: a name, an import path, or a class or function that has one."""


def find_source(name: str, root: Path | None) -> str:
    """``name`` with its file or folder taken from the run folder ``root``, where there is a copy of it.

    A run keeps the Python files and objects it was given in ``source/``; those count, however the originals change later.
    """
    location, colon, attribute = name.partition(":")
    if root is None:
        return name
    candidates = [root / "source" / Path(location).name] if location.endswith((".py", ".pkl")) else []
    if "/" in location and not Path(location).is_absolute():
        candidates.append(root / location)
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    return f"{found}{colon}{attribute}" if found is not None else name


def load_object(path: str) -> Any:
    """Import ``"package.module:attribute"`` or ``"path/to/file.py:attribute"``.

    Raises:
        ConfigError: the module, file or attribute is missing, or the file fails to import.
    """
    module_name, colon, attribute = path.rpartition(":")
    if not colon or not attribute:
        raise ConfigError(f"{path!r} is not an import path.", "Write 'package.module:name' or 'path/to/file.py:name'.")
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name, path)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise unknown(f"name in {module_name}", attribute, [name for name in vars(module) if not name.startswith("_")])
        found = getattr(found, part)
    return found


def _load_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path!r}: the module {error.name!r} cannot be imported.", "Install it, or run from the folder that holds it."
        ) from None


def _load_file(file: Path) -> ModuleType:
    """Import a file under a name derived from its path and content, so that an edited file is imported anew."""
    try:
        source = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"The file {str(file)!r} cannot be read: {error.strerror}.", "Check the path.") from None
    digest = hashlib.sha256(str(file.resolve()).encode() + b"\0" + source).hexdigest()[:16]
    name = f"{_USER}{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except WorkbenchError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"The file {str(file)!r} fails to import: {type(error).__name__}: {error}.") from error
    return module
