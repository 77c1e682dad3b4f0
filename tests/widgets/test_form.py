"""The form: any config goes in and comes out the same; what is wrong is said beside its field."""

from __future__ import annotations

import enum
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from widgets import fields
from widgets.form import Form
from workbench.compress.pruning_config import PruneConfig
from workbench.compress.quantization_config import QuantConfig
from workbench.config import Config, hint
from workbench.errors import ConfigError
from workbench.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("live")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(Config):
    """A part."""

    depth: int = Field(3, ge=1, le=9, description="Layers.")
    words: list[str] = Field([], description="Words.")


class Everything(Config):
    """Every kind of field."""

    flag: bool = Field(True, description="A switch.")
    maybe: bool | None = Field(None, description="A switch that may be left open.")
    count: int = Field(1, ge=0, le=10**9, description="How many.", json_schema_extra=hint(log=True))
    rate: float = Field(0.1, ge=0, description="A rate, per step.", json_schema_extra=hint(log=True))
    limit: float | None = Field(None, gt=0, description="At most.")
    mode: Literal["fast", "slow", 3] = Field("fast", description="How.")
    colour: Colour = Field(Colour.RED, description="Which.")
    size: int | Literal["auto"] = Field("auto", description="How large.")
    name: str = Field("", description="A name.")
    title: str | None = Field(None, min_length=1, description="A title.")
    args: dict[str, Any] = Field({}, description="Arguments.")
    pair: tuple[float, ...] | None = Field(None, description="Numbers.")
    inner: Inner = Field(Inner(), description="A part.")
    optional: Inner | None = Field(None, description="A part that may be absent.")

    @model_validator(mode="after")
    def _agree(self) -> Everything:
        if self.count == 13:
            raise ValueError("count=13 brings bad luck. Take 12")
        return self


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
values = st.none() | st.booleans() | st.integers(-9999, 9999) | st.floats(allow_nan=False, allow_infinity=False) | words
inner = st.builds(Inner, depth=st.integers(1, 9), words=st.lists(words, max_size=3))
everything = st.builds(
    Everything,
    flag=st.booleans(),
    maybe=st.none() | st.booleans(),
    count=st.integers(0, 10**9).filter(lambda n: n != 13),
    rate=st.floats(0, 1e300),
    limit=st.none() | st.floats(1e-300, 1e300),
    mode=st.sampled_from(["fast", "slow", 3]),
    colour=st.sampled_from(Colour),
    size=st.integers(-99, 99) | st.just("auto"),
    name=words,
    title=st.none() | words.filter(bool),
    args=st.dictionaries(words, values | st.lists(values, max_size=2), max_size=3),
    pair=st.none() | st.lists(st.floats(-1e9, 1e9), max_size=3).map(tuple),
    inner=inner,
    optional=st.none() | inner,
)


@settings(max_examples=60, deadline=None)
@given(config=everything)
def test_any_config_comes_back_as_it_went_in(config: Everything) -> None:
    form = Form(Everything, config)
    try:
        assert form.value == config
        assert form.errors == {}
    finally:
        form.close()


@settings(max_examples=100, deadline=None)
@given(config=everything)
@example(config=Everything(inner={"words": ["0E0"]}))  # text that reads like a number
def test_what_a_control_shows_stands_for_its_value(config: Everything) -> None:
    dumped = config.model_dump()
    for field in fields.read(Everything).fields():
        node: Any = dumped
        for part in field.path.split("."):
            node = node[part] if node is not None else None
        if field.path.startswith("optional.") and dumped["optional"] is None:
            continue
        if field.control == "text" and isinstance(node, str) and (node != node.strip() or not node):
            continue  # text is taken without the blanks around it
        expected = node.value if isinstance(node, enum.Enum) else node
        parsed = field.parse(field.show(node))
        assert parsed == expected or list(parsed or ()) == list(expected or ()), field.path


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(mesh={"devices": {"blocks.?": "cuda:0", "*.head": "cpu"}}),
        PruneConfig(ratios={"stages.*": 0.5}, round_to="auto", ignored=["stem*"]),
        QuantConfig(mode="dynamic"),
    ],
)
def test_the_workbench_s_own_configs(config: Config) -> None:
    form = Form(type(config), config)
    assert form.value == config
    for path, raw in list(form._raw.items()):  # as if every field were typed anew
        form.type(path, "?")
        form.type(path, raw)
    assert form.value == config
    form.close()


@pytest.fixture
def form() -> Any:
    form = Form(TrainConfig)
    yield form
    form.close()


def test_typing_makes_a_config(form: Form[TrainConfig]) -> None:
    form.type("optim.lr", "3e-2")
    form.type("data.augment", "crop, flip")
    form.type("loss.args", "{label_smoothing: 0.1}")
    form.type("max_steps", "1e3")
    config = form.value
    assert config.optim.lr == 0.03
    assert config.data.augment == ("crop", "flip")
    assert config.loss.args == {"label_smoothing": 0.1}
    assert config.max_steps == 1000
    form.type("max_steps", "")
    assert form.value.max_steps is None


def test_layers_and_their_devices_are_typed_as_pairs(form: Form[TrainConfig]) -> None:
    (field,) = (field for field in form._tree.fields() if field.path == "mesh.devices")
    assert (field.control, field.show({}), field.advanced) == ("yaml", "", True)
    for text in ("{blocks.6: cuda:1, '*.head': cpu}", "{'blocks.6': 'cuda:1', '*.head': 'cpu'}"):
        form.type("mesh.devices", text)
        assert form.value.mesh.devices == {"blocks.6": "cuda:1", "*.head": "cpu"}
    form.type("mesh.devices", "blocks.6: cuda:1")
    assert form.value.mesh.devices == {"blocks.6": "cuda:1"}
    form.value = TrainConfig(mesh={"devices": {"*": "cpu", "blocks.6": "cuda:1"}})
    assert form._raw["mesh.devices"] == "{'*': cpu, blocks.6: 'cuda:1'}"
    form.type("mesh.devices", "")
    assert form.value.mesh.devices == {}


@pytest.mark.parametrize(
    ("path", "raw", "says"),
    [
        ("optim.lr", "fast", "'fast' is not a number"),
        ("optim.lr", "-1", "greater than 0"),
        ("epochs", "2.5", "integer"),
        ("model.name", "resnet2O", "Did you mean"),
        ("loss.args", "{a: ", "not valid YAML"),
        ("data.augment", "crop, flop", "no augmentation named 'flop'"),
        ("mesh.devices", "{blocks.6: gpu}", "'blocks.6' has 'gpu'; a device is cpu, or a kind and a number"),
        ("mesh.devices", "{*: cpu}", "not valid YAML"),
    ],
)
def test_what_is_wrong_stands_beside_its_field(form: Form[TrainConfig], path: str, raw: str, says: str) -> None:
    form.type(path, raw)
    assert list(form.errors) == [path]
    assert says in form.errors[path]
    with pytest.raises(ConfigError):
        _ = form.value
    form.value = TrainConfig(epochs=7)
    assert form.errors == {}
    assert form.value.epochs == 7


def test_what_several_fields_get_wrong_together_stands_apart() -> None:
    form = Form(Everything)
    form.type("count", "13")
    assert "bad luck" in form.errors[""]
    form.close()


def test_an_absent_part_can_be_switched_on() -> None:
    form = Form(Everything)
    form.type("optional", True)
    assert form.value.optional == Inner()
    form.type("optional.depth", "10")
    assert "optional.depth" in form.errors
    form.type("optional", False)
    assert form.value.optional is None
    form.close()


def test_listeners_hear_of_every_change(form: Form[TrainConfig]) -> None:
    heard: list[Any] = []
    form.on_change(heard.append)
    form.type("epochs", "9")
    form.type("epochs", "-9")
    assert [config and config.epochs for config in heard] == [9, None]


def test_names_are_offered_when_asked_for(form: Form[TrainConfig]) -> None:
    sent: list[Any] = []
    form.send = lambda content, buffers=None: sent.append(content)  # type: ignore[method-assign]
    form._receive(form, {"suggest": "models"}, None)
    assert sent[0]["choices"] == "models"
    assert "resnet20" in sent[0]["names"]
    assert len(sent[0]["names"]) > 500
    assert fields.suggestions("no such list") == ()


def test_the_state_is_small(form: Form[TrainConfig]) -> None:
    import json

    assert len(json.dumps([form._schema, form._raw])) < 30_000
