import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.artefact import load_model, read_structure, save_model
from workbench.compress import CRITERIA, ChannelPruner, PruneConfig, prune
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model


def _resnet(width=16):
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": width}))
    for module in model.modules():  # as after training: no two channels alike
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


MODEL = _resnet()
X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def _parameters(model):
    return sum(p.numel() for p in model.parameters())


def _macs(model, x):
    """Multiply-accumulates of convolutions and linear layers, counted from shapes."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        positions = output[0, 0].numel() if output.dim() > 2 else 1
        total += layer.weight.numel() * positions

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(ratio=st.floats(0.02, 0.95), criterion=st.sampled_from(["l1", "l2", "random"]))
def test_the_ratio_is_reached_and_missed_by_at_most_a_point(ratio, criterion):
    removed = 1 - _parameters(prune(MODEL, PruneConfig(ratio=ratio, criterion=criterion), X)) / _parameters(MODEL)
    assert ratio <= removed <= ratio + 0.01


def test_macs_as_the_target():
    pruned = prune(MODEL, PruneConfig(ratio=0.5, target="macs"), X)
    assert 0.5 <= 1 - _macs(pruned, X[:1]) / _macs(MODEL, X[:1]) <= 0.51


@pytest.mark.parametrize("target", ["parameters", "macs"])
def test_economy_takes_from_where_the_target_lies_and_spares_the_rest(target):
    model, x = _resnet(), torch.zeros(1, 1, 28, 28)
    count = {"parameters": lambda m: _parameters(m), "macs": lambda m: _macs(m, x)}
    other = "macs" if target == "parameters" else "parameters"
    even, saving = (prune(model, PruneConfig(ratio=0.6, target=target, economy=e), x) for e in (0.0, 0.5))
    for pruned in (even, saving):
        assert 0.6 <= 1 - count[target](pruned) / count[target](model) <= 0.61
    assert count[other](saving) > 1.1 * count[other](even)


def test_the_report_agrees_with_an_independent_count():
    report = prune(MODEL, PruneConfig(), X).structure.transforms[-1]
    pruned = prune(MODEL, PruneConfig(), X)
    assert report["before"] == {"parameters": _parameters(MODEL), "macs": _macs(MODEL, X[:1])}
    assert report["after"] == {"parameters": _parameters(pruned), "macs": _macs(pruned, X[:1])}
    for name, layer in report["layers"].items():
        module = pruned.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if "out" in layer:
            assert len(layer["out"]) == module.weight.shape[0] < MODEL.get_submodule(name).weight.shape[0]


def test_output_equals_the_original_with_the_removed_channels_silenced():
    pruned = prune(MODEL, PruneConfig(ratio=0.5), X)
    silenced = copy.deepcopy(MODEL)
    for name, layer in pruned.structure.transforms[-1]["layers"].items():
        module = silenced.get_submodule(name)
        if isinstance(module, nn.BatchNorm2d):  # scale and shift of 0: the channel is 0 after ReLU, sum and all
            gone = torch.ones(module.num_features, dtype=torch.bool)
            gone[layer["out"]] = False
            with torch.no_grad():
                module.weight[gone], module.bias[gone] = 0, 0
    with torch.no_grad():
        torch.testing.assert_close(pruned(X), silenced(X), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(pruned(X), MODEL(X), rtol=0.1)


def test_what_stays_are_the_recorded_slices():
    pruned = prune(MODEL, PruneConfig(ratio=0.4), X)
    for name, layer in pruned.structure.transforms[-1]["layers"].items():
        old, new = MODEL.get_submodule(name).weight, pruned.get_submodule(name).weight
        out = old[layer["out"]] if "out" in layer else old
        assert torch.equal(new, out[:, layer["in"]] if "in" in layer else out)


def test_l1_removes_the_smallest_channels():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    with torch.no_grad():
        for channel in range(8):
            model[0].weight[channel] = 0.01 * (channel + 1)
            model[3].weight[:, channel * 36 : (channel + 1) * 36] = 0.01 * (channel + 1)
    with pytest.warns(UserWarning, match="62.3% of the parameters went"):  # one channel of eight is an eighth of them
        pruned = prune(model, PruneConfig(ratio=0.5), torch.zeros(1, 1, 8, 8))
    layers = pruned.structure.transforms[-1]["layers"]
    assert layers["0"]["out"] == [5, 6, 7]
    assert layers["3"]["in"] == list(range(5 * 36, 8 * 36))
    assert model[3].out_features == pruned[3].out_features == 2


def test_the_given_model_stays_and_its_flags_carry_over():
    model = copy.deepcopy(MODEL).train()
    model.to(memory_format=torch.channels_last)
    model.stem[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, PruneConfig(), X)
    assert model.training and pruned.training
    assert not pruned.stem[0].weight.requires_grad and pruned.classifier.weight.requires_grad
    assert pruned.stages[1][0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.structure.transforms == []


def test_a_pruned_model_trains():
    pruned = prune(MODEL, PruneConfig(), X).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(pruned(X), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_pruned_twice_reloads_equal_and_says_what_happened(tmp_path, layout):
    pruned = prune(prune(copy.deepcopy(MODEL).to(memory_format=layout), PruneConfig(ratio=0.2), X), PruneConfig(ratio=0.2), X)
    save_model(pruned, tmp_path / "p")
    assert torch.equal(load_model(tmp_path / "p")(X), pruned(X))
    first, second = read_structure(tmp_path / "p")["transforms"]
    assert first["after"] == second["before"]


def test_channel_counts_are_multiples_of_round_to():
    pruned = prune(_resnet(width=32), PruneConfig(ratio=0.3, round_to=8), X)
    assert all(m.out_channels % 8 == 0 for m in pruned.modules() if isinstance(m, nn.Conv2d))


def test_ignored_layers_keep_their_outputs():
    pruned = prune(MODEL, PruneConfig(ignored=["stages.1.*"]), X)
    for name, module in MODEL.stages[1].named_modules():
        if isinstance(module, nn.Conv2d):
            assert pruned.stages[1].get_submodule(name).out_channels == module.out_channels
    with pytest.raises(ConfigError, match="Did you mean 'classifier'"):
        prune(MODEL, PruneConfig(ignored=["clasifier"]), X)


def test_outputs_stay_whole_without_a_classifier():
    body = nn.Sequential(*list(_resnet().children())[:2])
    with torch.no_grad():
        assert prune(body, PruneConfig(ratio=0.2), X)(X).shape == body(X).shape


@pytest.fixture
def last_channels():
    @CRITERIA.register("last_channels")
    def score(group):
        return -torch.arange(len(group[0].idxs), dtype=torch.float)

    yield "last_channels"
    del CRITERIA._entries["last_channels"]


def test_a_criterion_is_one_function(last_channels):
    layers = prune(MODEL, PruneConfig(criterion=last_channels), X).structure.transforms[-1]["layers"]
    assert all(layer["out"] == list(range(len(layer["out"]))) for layer in layers.values() if "out" in layer)


def test_the_random_criterion_repeats_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = (
        prune(MODEL, PruneConfig(criterion="random", seed=s), X).structure.transforms[-1]["layers"] for s in (0, 0, 1)
    )
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_article_class_infers_its_example():
    pruned = ChannelPruner(MODEL, pruning_ratio=0.3).compress()
    assert 0.3 <= 1 - _parameters(pruned) / _parameters(MODEL) <= 0.31
    mlp = nn.Sequential(nn.Linear(7, 256), nn.ReLU(), nn.Linear(256, 3))
    assert ChannelPruner(mlp, 0.5).compress()[0].out_features == 127  # 11 parameters each, and 3 that stay


def test_attention_heads_shrink_alike():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2).eval()
    x = torch.randn(2, 3, 32, 32)
    pruned = prune(model, PruneConfig(ratio=0.3), x)
    block = pruned.blocks[0].attn
    assert block.qkv.out_features == 3 * block.num_heads * block.head_dim == 3 * block.attn_dim
    assert pruned(x).shape == (2, 10)
    assert 0.3 <= 1 - _parameters(pruned) / _parameters(model) <= 0.31


def test_errors_name_the_remedy():
    with pytest.raises(ModelError, match=r"at most \d.*round_to=1"):
        prune(MODEL, PruneConfig(ratio=0.999), X)
    with pytest.raises(ModelError, match="quantize it instead"):
        prune(nn.Linear(4, 2), PruneConfig(), torch.zeros(1, 4))
    with pytest.raises(ModelError, match="Pass example="):
        prune(nn.Conv1d(4, 2, 3))
    with pytest.raises(ConfigError, match=r"ratio=1\.2"):
        PruneConfig(ratio=1.2)
    with pytest.raises(ConfigError, match="pruning criterion"):
        PruneConfig(criterion="l3")
    with pytest.raises(ConfigError, match=r"gave \[1\] for"):
        prune(MODEL, PruneConfig(criterion=f"{__file__}:one_score"), X)


def one_score(group):
    return torch.zeros(1)
