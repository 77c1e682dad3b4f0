import copy
import json
from importlib.metadata import version

import pytest
import torch
from torch import nn

from tests.fresh import answers_elsewhere
from workbench.artefact import STRUCTURE, WEIGHTS, load_model, read_structure, save_model
from workbench.compress import PruneConfig, QuantConfig, prune, quantize
from workbench.errors import ArtefactError, DeviceError
from workbench.models import ModelConfig, build_model
from workbench.models.structure import Structure, structure_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 4})).eval()


@pytest.fixture
def x():
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_a_model_comes_back_equal_in_a_fresh_process(model, x, tmp_path):
    (found,) = answers_elsewhere([(model, x)], tmp_path)
    assert torch.equal(found, model(x))


def test_files_hold_no_pickle_and_tell_what_is_in_them(model, tmp_path):
    save_model(model, tmp_path / "m")
    assert {file.name for file in (tmp_path / "m").iterdir()} == {WEIGHTS, STRUCTURE}
    description = read_structure(tmp_path / "m")
    assert description["model"]["name"] == "resnet20"
    assert description["parameters"] == sum(p.numel() for p in model.parameters())
    assert description["versions"]["torch"] == version("torch")


def test_structure_survives_deepcopy_and_then_makes_a_new_one(model):
    before = structure_of(model)
    after = before.then({"kind": "prune"})
    assert structure_of(copy.deepcopy(model)) == before
    assert before.transforms == [] and after.transforms == [{"kind": "prune"}]


def test_saving_again_replaces_the_model_and_keeps_other_files(model, x, tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    save_model(model, tmp_path)
    with torch.no_grad():
        model.classifier.bias += 1
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), model(x))
    assert (tmp_path / "config.yaml").exists()


def test_channels_last_models_come_back_bit_equal(model, x, tmp_path):
    model = model.to(memory_format=torch.channels_last)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded(x), model(x))


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = Tied()
    save_model(model, tmp_path / "m", weights_only=True)
    assert read_structure(tmp_path / "m")["tied"] == {"head.weight": "embed.weight"}
    loaded = load_model(tmp_path / "m", model=Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_a_module_from_elsewhere_is_refused_unless_weights_only(tmp_path):
    with pytest.raises(ArtefactError, match=r"carries no structure.*weights_only=True"):
        save_model(nn.Linear(2, 2), tmp_path / "m")
    save_model(nn.Linear(2, 2), tmp_path / "m", weights_only=True)
    with pytest.raises(ArtefactError, match="load_model\\(path, model=module\\)"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_weights_are_reported(model, tmp_path, keep):
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match=r"damaged.*copy it again"):
        load_model(tmp_path / "m")


def test_one_flipped_bit_is_reported(model, tmp_path):
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"isn't the file that structure\.json describes"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", [WEIGHTS, STRUCTURE])
def test_a_missing_file_is_named(model, tmp_path, name):
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name}.*save_model"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}'])
def test_a_description_of_something_else_is_refused(model, tmp_path, text):
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / STRUCTURE).write_text(text)
    with pytest.raises(ArtefactError):
        load_model(tmp_path / "m")


def _edited(folder, change):
    description = read_structure(folder)
    change(description)
    (folder / STRUCTURE).write_text(json.dumps(description))


def test_weights_of_another_shape_or_name_are_reported(model, tmp_path):
    save_model(model, tmp_path / "m")
    _edited(tmp_path / "m", lambda d: d["model"]["args"].update(width=8))
    with pytest.raises(ArtefactError, match=r"is \[\d.*the model has \["):
        load_model(tmp_path / "m")
    _edited(tmp_path / "m", lambda d: d["model"].update(name="resnet32"))
    with pytest.raises(ArtefactError, match="don't fit the model: missing"):
        load_model(tmp_path / "m")


def test_a_newer_format_and_an_unknown_change_ask_for_an_update(model, tmp_path):
    save_model(model, tmp_path / "m")
    _edited(tmp_path / "m", lambda d: d.update(transforms=[{"kind": "os:system"}]))
    with pytest.raises(ArtefactError, match="unknown change 'os:system'"):
        load_model(tmp_path / "m")
    _edited(tmp_path / "m", lambda d: d.update(format=2))
    with pytest.raises(ArtefactError, match="Update the workbench"):
        load_model(tmp_path / "m")


def test_a_failed_save_leaves_the_old_model(model, x, tmp_path, monkeypatch):
    save_model(model, tmp_path / "m")
    expected = model(x)
    model.structure = Structure({"name": "resnet20"}, [{"kind": "prune", "bad": float("nan")}])
    with pytest.raises(ValueError, match="JSON"):
        save_model(model, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")(x), expected)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {WEIGHTS, STRUCTURE}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(transforms="prune"), "doesn't describe a model"),
        (lambda d: d.update(transforms=[{"layers": {}}]), "doesn't describe a model"),
        (lambda d: d["transforms"][0].pop("layers"), "'prune' can't be replayed: KeyError: 'layers'"),
        (
            lambda d: d["transforms"][0]["layers"].update(nope={"attributes": {}, "shapes": {}}),
            "can't be replayed: AttributeError",
        ),
    ],
)
def test_a_damaged_record_is_reported(model, tmp_path, change, words):
    save_model(prune(model, PruneConfig(ratio=0.3), torch.zeros(1, 1, 28, 28)), tmp_path / "m")
    _edited(tmp_path / "m", change)
    with pytest.raises(ArtefactError, match=words):
        load_model(tmp_path / "m")


def test_settings_of_a_newer_version_are_reported_with_their_folder(model, tmp_path):
    save_model(quantize(model, QuantConfig(), torch.randn(4, 1, 8, 8)), tmp_path / "m")
    _edited(tmp_path / "m", lambda d: d["transforms"][0]["config"].update(shiny=1))
    with pytest.raises(ArtefactError, match=r"/m: the change 'quantize' can't be replayed: shiny is not a setting"):
        load_model(tmp_path / "m")


def test_a_place_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"file/m' can't be written: Not a directory"):
        save_model(model, tmp_path / "file" / "m")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(model, tmp_path):
    with pytest.raises(DeviceError, match="device='cpu'"):
        load_model(save_model(model, tmp_path / "m"), device="cuda")
