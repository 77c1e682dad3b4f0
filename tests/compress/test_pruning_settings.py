"""Ratios by layer, rounding, attention heads, reasons, reload: on every kind of architecture."""

import pytest
import torch
from torch import nn

from tests.fresh import answers_elsewhere
from workbench.compress import PruneConfig, prune
from workbench.errors import ConfigError, ModelError
from workbench.models import ModelConfig, build_model


def _count(model):
    return sum(p.numel() for p in model.parameters())


def _resnet(width=32):
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": width})).eval()


X = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_ratios_by_layer_hold_and_the_rest_reaches_the_target():
    model = _resnet()
    config = PruneConfig(ratio=0.4, ratios={"stages.0.*.conv1": 0.5, "stages.2.0.conv1": 0.0})
    pruned = prune(model, config, X)
    for block in (0, 1, 2):
        assert pruned.stages[0][block].conv1.out_channels == 16
    assert pruned.stages[2][0].conv1.out_channels == model.stages[2][0].conv1.out_channels
    assert 0.4 <= 1 - _count(pruned) / _count(model) <= 0.41


def test_ratios_alone():
    model = _resnet()
    pruned = prune(model, PruneConfig(ratio=0, ratios={"stages.1.0": 0.25}), X)
    changed = {name for name, layer in pruned.structure.transforms[-1]["layers"].items() if "out" in layer}
    assert pruned.stages[1][0].conv1.out_channels == 48
    assert "stages.1.0.conv1" in changed and "stages.2.0.conv1" not in changed
    with pytest.raises(ConfigError, match="its channels are outputs of the model"):
        prune(model, PruneConfig(ratios={"classifier": 0.5}), X)
    with pytest.raises(ConfigError, match="Did you mean"):
        prune(model, PruneConfig(ratios={"clasifier": 0.5}), X)
    with pytest.raises(ConfigError, match="removes nothing"):
        PruneConfig(ratio=0)


def test_a_layer_keeps_what_the_setting_says():
    with _quiet():
        pruned = prune(_resnet(), PruneConfig(ratio=0.6, max_layer_ratio=0.5), X)
    before = dict(_resnet().named_modules())
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels >= before[name].out_channels / 2


def test_auto_rounding_says_what_it_chose_and_why():
    record = prune(_resnet(), PruneConfig(ratio=0.3, round_to="auto"), X).structure.transforms[-1]
    width = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 1)
    assert record["round_to"] == width
    assert f"round_to={width}" in record["remarks"][0] and "." in record["remarks"][0]


class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 24, 3), nn.GroupNorm(6, 24), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip


def test_grouped_layers_lose_as_much_in_each_group_or_the_reason_is_named():
    pruned = prune(Grouped(), PruneConfig(ratio=0, ratios={"0": 0.5}), X)
    assert pruned[0].out_channels == 12 and pruned[1].num_channels == 12  # 6 groups of 4, now of 2; 4 groups of 6, now of 3
    assert pruned(X).shape == (2, 3)
    with pytest.raises(ModelError, match=r"in 12 groups \(GroupNorm, grouped layers\) of 2, and round_to=16.*Set round_to=1"):
        prune(Grouped(), PruneConfig(round_to=16), X)
    with pytest.raises(ModelError, match=r"round_to=64 leaves none.*Set round_to=1"):
        prune(_resnet(width=8), PruneConfig(round_to=64), X)


def _text(name, **args):
    torch.manual_seed(0)
    ids = torch.randint(1, 300, (3, 20))
    ids[0, 12:] = 0
    return build_model(ModelConfig(name=name, num_classes=4, args={"vocab_size": 300, **args})).eval(), ids


def test_whole_heads_go_and_the_rest_keep_their_width():
    model, ids = _text("bert_small", layers=2, width=64, heads=8, length=32)
    config = PruneConfig(ratio=0, ratios={"bert.encoder.layer.*.attention.self.query": 0.5}, attention="heads")
    pruned = prune(model, config, ids)
    kept = pruned.structure.transforms[-1]["layers"]["bert.encoder.layer.0.attention.self.query"]["out"]
    block, before = (m.bert.encoder.layer[0].attention.self for m in (pruned, model))
    assert block.num_attention_heads == 4 and block.attention_head_size == before.attention_head_size == 8
    assert [kept[i : i + 8] for i in range(0, 32, 8)] == [list(range(c, c + 8)) for c in kept[::8]]
    assert all(start % 8 == 0 for start in kept[::8])
    assert block.scaling == before.scaling
    assert pruned.bert.config.num_attention_heads == 4 and model.bert.config.num_attention_heads == 8
    silenced = _silence_heads(model, pruned)
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids), silenced(ids), rtol=1e-4, atol=1e-5)


def _silence_heads(model, pruned):
    """The original with what the removed heads give set to nothing."""
    import copy

    silenced = copy.deepcopy(model)
    for index, layer in enumerate(silenced.bert.encoder.layer):
        record = pruned.structure.transforms[-1]["layers"][f"bert.encoder.layer.{index}.attention.output.dense"]
        gone = sorted(set(range(64)) - set(record["in"]))
        layer.attention.output.dense.weight.data[:, gone] = 0
    return silenced


def test_a_bert_tells_its_new_sizes():
    model, ids = _text("bert_small", layers=2, width=64, heads=4, length=32)
    pruned = prune(model, PruneConfig(ratio=0.3), ids)
    width = pruned.bert.embeddings.word_embeddings.embedding_dim
    assert pruned.bert.config.hidden_size == width < 64 == model.bert.config.hidden_size
    attention = pruned.bert.encoder.layer[0].attention.self
    assert attention.all_head_size == attention.query.out_features == 4 * attention.attention_head_size
    assert attention.scaling == attention.attention_head_size**-0.5
    assert pruned.structure.transforms[-1]["sizes"]["hidden_size"] == width


SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "img_size": 32, "patch_size": 2}
CHAINS = {
    "bert_small": ({"layers": 2, "width": 64, "heads": 4, "length": 32, "vocab_size": 300}, "text"),
    "lstm": ({"embedding": 32, "width": 24, "layers": 2, "vocab_size": 300}, "text"),
    "swin_tiny_patch4_window7_224": (SWIN, "image"),
    "convnext_atto": ({}, "image"),
    "mobilenetv3_small_100": ({}, "image"),
}


@pytest.mark.slow
def test_pruned_twice_reloads_bit_equal_in_a_fresh_process(tmp_path):
    cases = []
    for name, (args, kind) in CHAINS.items():
        torch.manual_seed(0)
        x = torch.randint(1, 300, (3, 20)) if kind == "text" else torch.randn(2, 3, 32, 32)
        channels = None if kind == "text" else 3
        model = build_model(ModelConfig(name=name, num_classes=4, in_channels=channels, args=args)).eval()
        with _quiet():
            pruned = prune(prune(model, PruneConfig(ratio=0.2), x), PruneConfig(ratio=0.2), x)
        assert _count(pruned) <= 0.64 * _count(model)
        cases.append((pruned, x))
    for name, (pruned, x), found in zip(CHAINS, cases, answers_elsewhere(cases, tmp_path), strict=True):
        assert torch.equal(found, pruned(x)), name


def test_token_ids_are_guessed_for_a_model_that_begins_with_an_embedding():
    model, _ = _text("lstm", embedding=32, width=24)
    record = prune(model).structure.transforms[-1]
    assert record["example"] == [1, 16] and record["removed"] >= 0.3


def test_macs_of_a_recurrent_layer_are_counted():
    from workbench.compress.cost import count_macs

    model, ids = _text("lstm", embedding=32, width=24)
    gates = 4 * 24 * (32 + 24) * 2  # both directions
    assert count_macs(model, ids[:1]) == 20 * (gates + 48) + 48 * 4


def _quiet():
    import warnings

    return warnings.catch_warnings(action="ignore", category=UserWarning)
