"""Criteria against their formulas by hand, in float64, and against torch-pruning's own where they are the same."""

import pytest
import torch
import torch_pruning
from torch import nn

from workbench.compress import CRITERIA, PruneConfig, prune
from workbench.compress.coupling import Couplings
from workbench.compress.criteria import Evidence, batches_of, channel_rows, scored_by
from workbench.errors import ConfigError, DataError
from workbench.registry import load_object


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.out(torch.relu(self.b(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double().eval()
    nn.init.uniform_(model.norm.weight, -1, 2)
    return model


X = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 4


def _group(net, layer="a"):
    couplings = Couplings(net.requires_grad_(True), X[:1])
    group = next(group for group in couplings.groups if group.layers[0] == layer)
    return group.members, couplings.model


def _score(name, net, layer="a"):
    members, model = _group(net, layer)
    return scored_by(name, Evidence(model, [(X[:3], Y[:3]), (X[3:], Y[3:])]))(members)


def _by_hand(net, of_rows, norm=True):
    """Mean over the layers of a group, relative to the mean over its channels: outputs of a, scales, inputs of b."""
    layers = [net.a.weight.flatten(1), net.b.weight.transpose(0, 1).flatten(1)]
    if norm:
        layers.append(net.norm.weight[:, None])
    total = sum(of_rows(rows.detach()) for rows in layers) / len(layers)
    return (total / total.mean()).float()


def test_l1_and_l2(net):
    torch.testing.assert_close(_score("l1", net), _by_hand(net, lambda rows: rows.abs().sum(1)))
    torch.testing.assert_close(_score("l2", net), _by_hand(net, lambda rows: (rows**2).sum(1)))


def test_bn_scale_is_the_scale(net):
    torch.testing.assert_close(_score("bn_scale", net), net.norm.weight.detach().abs().float())
    assert _score("bn_scale", net, "b") is None  # no normalization follows it
    pruned = prune(net, PruneConfig(ratio=0, ratios={"a": 0.25}, criterion="bn_scale"), X)
    record = pruned.structure.transforms[-1]
    assert "b" in record["whole"] and "bn_scale" in record["whole"]["b"]
    gone = set(range(8)) - set(record["layers"]["a"]["out"])
    assert gone == set(net.norm.weight.abs().argsort()[:2].tolist())


def test_fpgm_is_the_sum_of_distances(net):
    def distances(rows):
        return torch.stack([torch.stack([(one - other).norm() for other in rows]).sum() for one in rows])

    torch.testing.assert_close(_score("fpgm", net), _by_hand(net, distances, norm=False))


def test_lamp_is_the_share_of_what_is_left(net):
    squares = _by_hand(net, lambda rows: (rows**2).sum(1))
    expected = torch.stack([value / squares[squares >= value].sum() for value in squares])
    torch.testing.assert_close(_score("lamp", net), expected)


def test_taylor_is_weight_times_gradient(net):
    loss = sum(nn.functional.cross_entropy(net(X[part]), Y[part]) for part in (slice(3), slice(3, 6))) / 2
    weights = (net.a.weight, net.b.weight, net.norm.weight)
    a, b, scale = (w.detach() * g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True))
    expected = (a.flatten(1).abs().sum(1) + b.transpose(0, 1).flatten(1).abs().sum(1) + scale.abs()) / 3
    torch.testing.assert_close(_score("taylor", net), expected.float())


def test_attribution_is_integrated_conductance(net):
    """Riemann sums of Captum's conductance approach ∫ ∂F/∂y ∂y/∂x (x - x') of each channel (Dhamdhere et al., equation 2)."""
    found = _score("attribution", net)
    steps = 256
    total = torch.zeros(8, dtype=torch.float64)
    for x, y in zip(X, Y, strict=True):
        conductance = torch.zeros(8, 8, 8, dtype=torch.float64)
        for step in range(steps):
            low, high = ((step + end) / steps * x[None] for end in (0, 1))
            middle = net.a((low + high) / 2).detach().requires_grad_(True)
            output = net.out(torch.relu(net.b(torch.relu(net.norm(middle)))).mean((2, 3)))[0, y]
            conductance += torch.autograd.grad(output, middle)[0][0] * (net.a(high) - net.a(low))[0].detach()
        total += conductance.abs().sum((1, 2)) / len(X)
    torch.testing.assert_close(found, (total / total.mean()).float(), rtol=0.05, atol=0.02)
    assert torch.corrcoef(torch.stack([found.double(), total]))[0, 1] > 0.999


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("l1", torch_pruning.importance.MagnitudeImportance(p=1)),
        ("l2", torch_pruning.importance.MagnitudeImportance(p=2)),
        ("bn_scale", torch_pruning.importance.BNScaleImportance(normalizer=None)),
        ("lamp", torch_pruning.importance.LAMPImportance(p=2)),
    ],
)
def test_what_torch_pruning_has_too_is_the_same(net, name, theirs):
    members, _ = _group(net)
    torch.testing.assert_close(_score(name, net), theirs(members).float(), rtol=1e-5, atol=1e-6)


def test_rows_of_a_recurrent_layer_hold_each_units_gates():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 5, batch_first=True, bidirectional=True)
            self.out = nn.Linear(10, 2)

        def forward(self, x):
            return self.out(self.lstm(x)[0].mean(1))

    torch.manual_seed(0)
    couplings = Couplings(Text().requires_grad_(True), torch.randn(1, 4, 3))
    (group,) = couplings.groups
    assert group.units == [(unit, unit + 5) for unit in range(5)]
    rows = next(rows for rows in channel_rows(group.members) if isinstance(rows.layer, nn.LSTM))
    layer = couplings.model.lstm
    for channel in (1, 7):
        end, unit = ("", channel) if channel < 5 else ("_reverse", channel - 5)
        gates = [unit + 5 * gate for gate in range(4)]
        mine = torch.cat([getattr(layer, f"weight_{kind}_l0{end}")[gates].flatten() for kind in ("ih", "hh")])
        assert sorted(rows.values[channel].tolist()) == sorted(mine.tolist())


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_prunes_and_those_that_need_data_say_so(net, name):
    batches = [(X, Y)]
    pruned = prune(net, PruneConfig(ratio=0, ratios={"a": 0.5}, criterion=name), X, data=batches)
    assert pruned.a.out_channels == 4
    if name in ("taylor", "attribution"):
        with pytest.raises(ConfigError, match="Pass data="):
            prune(net, PruneConfig(criterion=name), X)


@pytest.mark.parametrize("name", ["taylor", "attribution"])
def test_criteria_that_look_at_data_take_token_ids(name):
    lstm = load_object("workbench.models.text:lstm")
    torch.manual_seed(0)
    model = lstm(num_classes=3, vocab_size=50, embedding=32, width=24).eval()
    ids = torch.randint(1, 50, (4, 7))
    pruned = prune(model, PruneConfig(ratio=0.3, criterion=name), ids, data=[(ids, torch.arange(4) % 3)])
    assert sum(p.numel() for p in pruned.parameters()) <= 0.7 * sum(p.numel() for p in model.parameters())


def test_batches_are_cut_to_the_samples_asked_for():
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    assert [len(x) for x, _ in batches_of(data, 5, torch.device("cpu"))] == [4, 1]
    assert [len(x) for x, _ in batches_of((X, Y), 100, torch.device("cpu"))] == [6]
    for wrong in ([], X, [X], 3):
        with pytest.raises(DataError, match=r"\(x, y\)"):
            batches_of(wrong, 5, torch.device("cpu"))


def test_scores_that_are_not_numbers_are_refused(net):
    net.a.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="aren't finite"):
        prune(net, PruneConfig(), X)


def test_a_criterion_that_fails_is_named(net, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def broken(group):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"mine\.py:broken' failed: ZeroDivisionError"):
        prune(net, PruneConfig(criterion=f"{file}:broken"), X)
    with pytest.raises(ConfigError, match="'taylor' failed.*that the data fits the model"):
        prune(net, PruneConfig(criterion="taylor"), X, data=[(X, torch.arange(6))])


def test_a_users_own_file(net, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef last(group):\n    return -torch.arange(len(group[0].idxs)).float()\n")
    pruned = prune(net, PruneConfig(ratio=0, ratios={"a": 0.5}, criterion=f"{file}:last"), X)
    assert pruned.structure.transforms[-1]["layers"]["a"]["out"] == [0, 1, 2, 3]
