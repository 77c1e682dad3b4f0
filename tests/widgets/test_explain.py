"""The explanation panel without a page: its code run alone gives the same, samples are chosen, mistakes are said in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widgets import Explain
from widgets.job import execute
from workbench.artefact import save_model
from workbench.attribution import AttributionConfig
from workbench.data.loading import LoadedBatches
from workbench.errors import ConfigError, RunError
from workbench.models import ModelConfig, build_model
from workbench.run import Run
from workbench.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("live")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


@pytest.fixture
def data() -> LoadedBatches:
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, 6, 6, generator=chance), torch.randint(0, 3, (40,), generator=chance)
    return LoadedBatches(zip(x.split(16), y.split(16), strict=True), ("zero", EVIL, "two"))


def test_the_most_wrong_are_listed_and_one_is_shown(model: nn.Module, data: LoadedBatches, until: Any) -> None:
    panel = Explain(model, data)
    _ = panel.view
    assert "appears here" in panel._result.html
    panel._button.act("act")
    until(lambda: panel.explained)
    assert panel.explained is not None
    until(lambda: "attribution" in panel._result.html)
    assert panel._list.html.count("<tr") == 13 and 'class="choice current"' in panel._list.html
    worst = panel.explained[0]
    assert f"sample {worst.sample}" in panel._result.html
    panel._list.act("pick", "3")
    assert f"sample {panel.explained[3].sample}" in panel._result.html and panel.chosen == 3
    panel._list.act("pick", "99")
    assert panel.chosen == 3
    assert EVIL not in panel._result.html + panel._list.html
    again = execute(panel.code, given={"model": model, "data": data})["explained"]
    assert [e.sample for e in again] == [e.sample for e in panel.explained]
    assert all(torch.equal(a.credits, b.credits) for a, b in zip(again, panel.explained, strict=True))
    panel.close()


def test_a_sample_is_chosen_by_its_number_and_a_method_by_its_name(model: nn.Module, data: LoadedBatches) -> None:
    panel = Explain(model, data)
    panel.form.type("patches", "3")
    panel._source.act("method", "occlusion")
    panel._source.act("place", " 17 ")
    assert "pick_samples(data, [17])" in panel.code and "AttributionConfig(patches=3)" in panel.code
    (found,) = panel.act()
    assert found.sample == 17 and torch.equal(found.x, data[1][0][1]) and found.method == "occlusion"
    credits: Tensor = found.credits
    assert len(credits.unique()) <= 9
    panel._source.act("place", "one")
    assert "must be a whole number" in panel._button.html and panel.place == "17"
    panel._source.act("place", "40")
    with pytest.raises(Exception, match="no sample 40"):
        panel.act()
    assert "Take 0 … 39" in panel._button.html
    panel.form.type("patches", "none")
    assert "disabled" in panel._button.html and panel.code.startswith("#")
    panel.close()


def test_a_run_is_explained_on_its_held_out_data(runs: Any) -> None:
    torch.manual_seed(0)
    made = Run.create(TrainConfig(model={"name": "mlp"}), label="explained")
    save_model(build_model(ModelConfig(name="mlp", num_classes=10, in_channels=1)), made.path)
    panel = Explain(config=AttributionConfig(steps=4))
    assert panel.run is not None and panel.run.path == made.path
    found = panel.act()
    assert len(found) == 12 and found[0].names.classes == tuple("0123456789")
    assert found[0].loss == max(e.loss or 0 for e in found)
    assert "run.load_model()" in panel.code
    data, _ = panel._repr_mimebundle_()
    assert data["text/html"].count('alt="attribution"') == 3  # for a notebook that is a file
    panel.close()


def test_what_is_missing_is_said(runs: Any, model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no data"):
        Explain(model)
    with pytest.raises(ConfigError, match="Did you mean 'saliency'"):
        Explain(model, [], "salience")
    panel = Explain()
    assert "Train a model first" in panel.code
    with pytest.raises(RunError, match="no trained run"):
        panel.act()
