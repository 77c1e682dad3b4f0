"""Plug-ins by name, by import path, by file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from workbench.errors import ConfigError, MissingDependency, nearest, unknown
from workbench.registry import Registry, find_source, load_object


@pytest.fixture
def shapes() -> Registry:
    registry = Registry("shape", {"circle": "math:hypot"})

    @registry.register("square", sides=4)
    def square(size: float = 1.0) -> float:
        return size * size

    return registry


def test_a_registry_is_a_visible_dict(shapes: Registry) -> None:
    assert list(shapes) == ["circle", "square"] and len(shapes) == 2 and "square" in shapes
    assert shapes["square"].card == {"sides": 4}
    assert shapes.create("square", size=3) == 9 and shapes.create("circle", 3, 4) == 5
    frame = shapes.frame()
    assert frame["name"].tolist() == ["circle", "square"] and frame["sides"].tolist()[1] == 4


def test_an_import_path_is_a_name_too(shapes: Registry, tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text("class Shapes:\n    @staticmethod\n    def line(length=1): return length\n")
    assert shapes.create("math:floor", 1.5) == 1
    assert shapes.create(f"{tmp_path}/shapes.py:Shapes.line", length=7) == 7


def test_a_file_that_is_edited_is_imported_anew(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("value = 1")
    first = load_object(f"{source}:value")
    source.write_text("value = 2")
    assert (first, load_object(f"{source}:value")) == (1, 2)
    before = len(sys.modules)
    assert load_object(f"{source}:value") == 2 and len(sys.modules) == before


def test_a_file_that_fails_to_import_is_not_left_half_imported(tmp_path: Path) -> None:
    source = tmp_path / "halfway.py"
    source.write_text("value = 1\nraise OSError('no')")
    for _ in range(2):
        with pytest.raises(ConfigError, match="fails to import: OSError: no"):
            load_object(f"{source}:value")
    assert not any("halfway" in name for name in sys.modules)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing", "not an import path.*package.module:name"),
        ("math:", "not an import path"),
        ("no_such_module_here:f", "module 'no_such_module_here' cannot be imported.*Install it"),
        ("math:flor", "no name in math named 'flor'.*Did you mean 'floor'"),
        ("missing.py:f", "The file 'missing.py' cannot be read: No such file"),
    ],
)
def test_a_wrong_import_path_says_what_is_wrong(path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_object(path)


def test_an_unknown_name_is_answered_with_the_nearest(shapes: Registry) -> None:
    with pytest.raises(ConfigError, match="no shape named 'sqare'. Did you mean 'square'"):
        shapes.check("sqare")
    with pytest.raises(ConfigError, match="Known: circle, square"):
        shapes.create("zzz")
    assert nearest("ResNet-18", ["resnet18", "resnet34"])[0] == "resnet18"
    assert "There are 40 known names, from 'n10' to 'n49'" in str(unknown("thing", "zzz", [f"n{i}" for i in range(10, 50)]))


def test_wrong_arguments_are_told_from_errors_within(shapes: Registry) -> None:
    with pytest.raises(ConfigError, match="shape 'square' does not take these arguments.*side"):
        shapes.create("square", side=3)

    @shapes.register("faulty")
    def faulty() -> None:
        len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        shapes.create("faulty")


def test_a_runs_copy_of_a_file_counts(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "net.py").write_text("")
    assert find_source("/elsewhere/net.py:build", tmp_path) == f"{tmp_path}/source/net.py:build"
    assert find_source("/elsewhere/other.py:build", tmp_path) == "/elsewhere/other.py:build"
    assert find_source("resnet20", tmp_path) == "resnet20" and find_source("a/b.py:c", None) == "a/b.py:c"


def test_a_missing_library_names_the_command_that_installs_it() -> None:
    import pickle

    error = MissingDependency("openvino", "Export to OpenVINO", "openvino")
    assert "pip install 'workbench[openvino]'" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
