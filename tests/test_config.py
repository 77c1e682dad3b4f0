"""Every face of a config says the same: YAML, code, overrides; and errors in words."""

from __future__ import annotations

import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from workbench import TrainConfig
from workbench.config import Config, load_yaml
from workbench.data.config import AUGMENTATIONS
from workbench.errors import ConfigError
from workbench.losses import LOSSES
from workbench.models.config import MODELS
from workbench.optim_config import OPTIMIZERS
from workbench.regularizers import PENALTIES
from workbench.training.distillation_config import DISTILLATIONS
from workbench.training.mesh_config import PLANS

# -- a strategy from the fields themselves: a new setting is covered as soon as it exists -------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("ModelConfig", "name"): st.sampled_from([*MODELS, "resnet18", "my.package:net", "nets.py:net"]),
    ("DataConfig", "name"): st.sampled_from(["digits", "cifar10", "my.package:splits"]),
    ("DataConfig", "augment"): st.none() | st.lists(st.sampled_from(list(AUGMENTATIONS)), max_size=4).map(tuple),
    ("LossConfig", "name"): st.sampled_from([*LOSSES, "losses.py:mine"]),
    ("OptimConfig", "name"): st.sampled_from([*OPTIMIZERS, "my.package:Optimizer"]),
    ("MeshConfig", "replicate"): st.just("all"),
    ("TrainConfig", "penalties"): st.dictionaries(st.sampled_from([*PENALTIES, "my:penalty"]), st.floats(0, 10), max_size=2),
    ("MeshConfig", "plan"): st.sampled_from([*PLANS, "plans.py:mine"]),
    ("MeshConfig", "devices"): st.dictionaries(TEXT, st.sampled_from(["cpu", "cuda:0", "cuda:12"]), max_size=3),
    ("DistillConfig", "terms"): st.dictionaries(st.sampled_from([*DISTILLATIONS]), st.floats(0, 10), max_size=3),
}


def limits(metadata: list[Any], low: float, high: float) -> dict[str, Any]:
    found: dict[str, Any] = {"min_value": low, "max_value": high}
    for bound in metadata:
        match bound:
            case Ge(ge=value):
                found["min_value"] = value
            case Gt(gt=value):
                found |= {"min_value": value, "exclude_min": True}
            case Le(le=value):
                found["max_value"] = value
            case Lt(lt=value):
                found |= {"max_value": value, "exclude_max": True}
    return found


def values_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values_of(
            arguments[0], [*metadata, *arguments[1:], *(m for a in arguments[1:] if isinstance(a, FieldInfo) for m in a.metadata)]
        )
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(argument, metadata) for argument in arguments))
    if origin is tuple:
        return st.lists(values_of(arguments[0], []), max_size=4).map(tuple)
    if origin is dict and arguments[1] is Any:
        return st.dictionaries(TEXT, PLAIN, max_size=3)
    if origin is dict:
        return st.dictionaries(st.text("abc", min_size=1, max_size=5), values_of(arguments[1], []), max_size=2)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return TEXT
    if annotation is int:
        bounds = limits(metadata, -(2**31), 2**31)
        low = bounds["min_value"] + bounds.get("exclude_min", False)
        high = bounds["max_value"] - bounds.get("exclude_max", False)
        return st.integers(int(low), int(high))
    if annotation is float:
        return st.floats(**limits(metadata, -1e30, 1e30), allow_nan=False, allow_infinity=False)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return configs(annotation)
    raise AssertionError(f"no strategy for {annotation}: extend values_of")


def configs(kind: type[Config]) -> st.SearchStrategy[Any]:
    fields = {
        name: NAMES[kind.__name__, name] if (kind.__name__, name) in NAMES else values_of(field.annotation, field.metadata)
        for name, field in kind.model_fields.items()
    }
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


@settings(max_examples=150, deadline=None)
@given(configs(TrainConfig))
def test_code_builds_the_config_again(config: TrainConfig) -> None:
    assert eval(config.to_code(), {"TrainConfig": TrainConfig}) == config


@settings(max_examples=150, deadline=None)
@given(config=configs(TrainConfig))
@example(config=TrainConfig(model={"args": {"\x85": None, "a": "\u2028b", "1e5": "1e-3", "yes": "no", "2020-01-01": "~"}}))
def test_yaml_holds_the_whole_config(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    config.to_yaml(file)
    assert TrainConfig.from_yaml(file) == config


@settings(max_examples=60, deadline=None)
@given(configs(TrainConfig), configs(TrainConfig))
def test_two_configs_differ_where_their_changes_say(one: TrainConfig, other: TrainConfig) -> None:
    mine, theirs, changes = one.flat(), other.flat(), one.changes_from(other)
    assert all(mine[path] == value for path, value in changes.items())
    assert all(theirs[path] == value for path, value in mine.items() if path not in changes)
    assert one.changes_from(one) == {}


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-12, 100), st.integers(1, 10**6))
def test_overrides_in_text_read_numbers_as_people_write_them(rate: float, batch: int) -> None:
    found = TrainConfig().override([f"optim.lr={rate!r}", f"data.batch_size={batch}", f"schedule.final={rate / 100:e}"])
    assert found.optim.lr == rate and found.data.batch_size == batch
    assert found.schedule.final == pytest.approx(rate / 100)


def test_overrides_reach_groups_arguments_and_lists() -> None:
    found = TrainConfig().override(
        ["model.args.width=8", "data.augment=[crop, flip]", "compile=true", "optim={name: sgd, lr: 1e-1}", "label=a = b"]
    )
    assert found.model.args == {"width": 8}
    assert found.data.augment == ("crop", "flip")
    assert found.compile == "default"
    assert found.optim.name == "sgd" and found.optim.lr == 0.1
    assert found.label == "a = b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs", ["'epochs' has no '='", "name=value"]),
        ("=3", ["is not a dotted name"]),
        ("optim..lr=3", ["'optim..lr' is not a dotted name", "optim.lr"]),
        ("epochs.lr=3", ["epochs is a value (3), not a group"]),
        ("epochs=three", ["epochs='three' must be a valid integer", "Passes over"]),
        ("optim=fast", ["optim='fast' must be"]),
        ("data.args=[1", ["The value of 'data.args' is not valid YAML"]),
        ("lr=0.1", ["lr is not a setting of TrainConfig"]),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().override([override])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_several_errors_are_all_told_in_one() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(epochs=0, optim={"lr": -1}, data={"batch_size": 0})
    for word in ("epochs=0", "optim.lr=-1", "data.batch_size=0"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epochs: [1", ["config.yaml is not valid YAML at line"]),
        ("- 1\n- 2", ["holds list, not settings"]),
        ("", ["holds NoneType, not settings"]),
        ("epochs: 0", ["epochs=0 must be"]),
        ("kind: other\nepochs: 1", ["is of kind 'other', not 'train'"]),
    ],
)
def test_a_file_that_is_no_config_says_so(content: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(tmp_path / "config.yaml")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory. Check the path"):
        TrainConfig.from_yaml(tmp_path / "missing.yaml")


def test_numbers_in_yaml_are_those_of_yaml_1_2() -> None:
    assert load_yaml("[1e-3, 1.5E+4, -2e3, .5e1, 1, '1e-3', 0x10]") == [1e-3, 1.5e4, -2e3, 5.0, 1, "1e-3", 16]


def test_a_config_does_not_change() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 5.0  # type: ignore[misc]
    changed = config.override({"optim.lr": 0.5})
    assert config.optim.lr == 1e-3 and changed.optim.lr == 0.5


def test_what_an_override_was_given_is_not_shared() -> None:
    arguments = {"width": [4]}
    config = TrainConfig(model={"args": arguments})
    arguments["width"].append(8)
    assert config.model.args == {"width": [4]}
    assert TrainConfig().optim.args == {}


def fields(kind: type[Config], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    found = []
    for name, field in kind.model_fields.items():
        found.append((prefix + name, field))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            found += fields(field.annotation, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize(("path", "field"), fields(TrainConfig))
def test_every_setting_is_described_and_hints_name_registries_that_are(path: str, field: FieldInfo) -> None:
    assert field.description and field.description[0].isupper() or field.description and field.description[0].islower()
    assert field.description.rstrip().endswith((".", "…"))  # type: ignore[union-attr]
    hints = field.json_schema_extra or {}
    assert set(hints) <= {"log", "choices", "advanced", "step"}  # type: ignore[arg-type]


# -- what is imported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import workbench", ["torch", "pandas", "numpy", "pydantic", "pyarrow", "psutil"]),
        (
            "from workbench import TrainConfig; TrainConfig(data={'name': 'digits'}, model={'name': 'resnet18'})",
            ["torch", "pandas", "timm", "pyarrow"],
        ),
        ("from workbench import TrainConfig, train, launch, Run", ["torch", "pandas", "timm", "pyarrow", "matplotlib"]),
        ("from workbench import Run; print(Run.all())", ["torch", "timm", "pyarrow"]),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str, absent: list[str]) -> None:
    code = (
        f"import sys, time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)\n"
        f"print([name for name in {absent} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, seconds, loaded = done.stdout.splitlines()
    print(f"{statement}: {float(seconds):.2f} s")
    assert loaded == "[]"


def test_overriding_leaves_what_it_is_given_alone() -> None:
    group = {"name": "sgd"}
    config = TrainConfig().override({"optim": group, "optim.lr": 0.5})
    assert config.optim.lr == 0.5 and group == {"name": "sgd"}
