import pytest
import torch
from torch import nn

from workbench.compress import PruneConfig, prune, sensitivity, sweep
from workbench.errors import ConfigError, DataError


def _model():
    """Two hidden layers: of the first, only half of the units do anything; of the second, every one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.zero_()
            layer.bias.zero_()
        for unit in range(8):  # class c lies on input c; units c and c + 4 carry it
            model[0].weight[unit, unit % 4] = 1 + 0.01 * unit
            model[2].weight[unit, unit] = 1 + 0.1 * unit
            model[4].weight[unit % 4, unit] = 1
        model[0].weight[8:] = 0.001
    return model.eval()


def _data(samples=64):
    y = torch.arange(samples) % 4
    return [(3.0 * nn.functional.one_hot(y, 4), y)]


def test_accuracy_is_that_of_the_model_pruned_so():
    model = _model()
    result = sensitivity(model, _data(), ratios=(0.5, 0.75))
    assert result.accuracy == 1 and result.samples == 64
    frame = result.frame.set_index(["layer", "asked"])
    assert frame.loc[("0", 0.5), "drop"] == 0  # the idle half
    assert frame.loc[("2", 0.75), "drop"] >= 0.25  # two units for four classes
    for (layer, asked), row in frame.iterrows():
        pruned = prune(model, PruneConfig(ratio=0, ratios={layer: asked}), _data()[0])
        (x, y), report = _data()[0], pruned.structure.transforms[-1]
        assert row["accuracy"] == (pruned(x).argmax(1) == y).float().mean().item()
        assert row["parameters"] == pytest.approx(report["removed"])
        assert row["macs"] == pytest.approx(1 - report["after"]["macs"] / report["before"]["macs"])
    assert {trace.type for trace in result.figure().data} == {"heatmap"}
    assert list(result.figure().data[0].y) == ["0", "2"]


def test_the_suggestion_spares_what_is_sensitive_and_prunes():
    model = _model()
    result = sensitivity(model, _data(), ratios=(0.25, 0.5, 0.75))
    suggestion = result.suggestion(drop=0.01)
    assert suggestion["ratios"] == {"2": 0.5}
    assert sensitivity(model, _data(), ratios=(0.75,)).suggestion() == {"ignored": ["2"], "ratios": {}}
    pruned = prune(model, PruneConfig(ratio=0.4, **suggestion), _data()[0])
    x, y = _data()[0]
    assert (pruned(x).argmax(1) == y).all()


def test_an_interrupted_sweep_goes_on_and_evaluates_nothing_twice(tmp_path, monkeypatch):
    model, file = _model(), tmp_path / "sweep.jsonl"
    whole = sensitivity(model, _data())
    evaluated = []

    def counted(*arguments):
        evaluated.append(1)
        if len(evaluated) == 4:
            raise KeyboardInterrupt
        return accuracy(*arguments)

    accuracy = sweep._accuracy
    monkeypatch.setattr(sweep, "_accuracy", counted)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, _data(), path=file)
    file.write_text(file.read_text() + '{"layer": "2", "as')  # killed within a write
    resumed = sensitivity(model, _data(), path=file)
    assert len(evaluated) == 4 + 4  # of seven, three were kept
    assert resumed.frame.equals(whole.frame)
    with pytest.raises(ConfigError, match="another model, data or settings"):
        sensitivity(model, _data(32), path=file)


def test_wrong_input_is_refused():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        sensitivity(_model(), _data(), ratios=(0.5, 1.0))
    with pytest.raises(DataError, match="class indices"):
        sensitivity(_model(), [(torch.zeros(2, 4), torch.zeros(2))])
