"""Couplings hold what they promise: a channel that carries nothing can be cut without a change to the outputs."""

import copy

import pytest
import torch
from torch import nn

from workbench.compress import PruneConfig
from workbench.compress.plan import Plan
from workbench.models import ModelConfig, build_model


def _timm(name, size=64, **arguments):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **arguments), torch.randn(2, 3, size, size)


def _own(name, **args):
    torch.manual_seed(0)
    x = torch.randint(1, 90, (2, 12))
    x[0, 9:] = 0
    return build_model(ModelConfig(name=name, num_classes=7, args={"vocab_size": 90, **args})), x


def _resnet20():
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet20", num_classes=7, in_channels=3)), torch.randn(2, 3, 28, 28)


SWIN = {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "patch_size": 2}
MODELS = {
    "resnet20": _resnet20,
    "resnet18": lambda: _timm("resnet18"),
    "mobilenetv3": lambda: _timm("mobilenetv3_small_100"),
    "efficientnet": lambda: _timm("efficientnet_b0"),
    "convnext": lambda: _timm("convnext_atto"),
    "densenet": lambda: _timm("densenet121", block_config=(3, 3, 2, 2)),
    "vit": lambda: _timm("vit_tiny_patch16_224", img_size=64, depth=2),
    "deit": lambda: _timm("deit_tiny_patch16_224", img_size=64, depth=2),
    "swin": lambda: _timm("swin_tiny_patch4_window7_224", 32, **SWIN),
    "bert": lambda: _own("bert_small", layers=2, width=32, length=32),
    "lstm": lambda: _own("lstm", embedding=16, width=12),
    "stacked lstm": lambda: _own("lstm", embedding=16, width=12, layers=2),
}


def _linear_norms(model):
    """Layer norms that don't look across channels: the mean over fewer channels is another mean, and rightly so."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = lambda x, norm=module: _affine(x, norm)


def _affine(x, norm):
    channels = (-1, 1, 1) if type(norm).__name__ == "LayerNorm2d" else (-1,)
    return x * norm.weight.view(channels) + norm.bias.view(channels)


def _silence(plan, group, channels):
    """Make every layer of the group give 0 in these channels; ReLU, GELU, SiLU and tanh leave them 0."""
    gone = set(channels)
    for item in group.members.items:
        if "out" not in item.dep.handler.__name__ and "batchnorm" not in item.dep.handler.__name__:
            continue
        hit = [c for c, root in zip(item.idxs, item.root_idxs, strict=True) if root in gone]
        layer = item.dep.target.module
        if isinstance(layer, nn.Parameter):
            name = next(name for name, parameter in plan.couplings.model.named_parameters() if parameter is layer)
            parameter = plan.model.get_parameter(name).data
            parameter[(..., hit) if parameter.shape[-1] > 1 else (slice(None), hit)] = 0
        elif layer in plan.couplings.names:
            layer = plan.model.get_submodule(plan.couplings.names[layer])
            if isinstance(layer, nn.Embedding):
                layer.weight.data[:, hit] = 0
            elif isinstance(layer, nn.LSTM):
                for value in layer.parameters(recurse=False):
                    rows = value.data.view(4, layer.hidden_size, -1)
                    rows[:, [c % layer.hidden_size for c in hit]] = 0
            elif getattr(layer, "weight", None) is not None:
                layer.weight.data[hit] = 0
                if layer.bias is not None:
                    layer.bias.data[hit] = 0


@pytest.mark.parametrize("name", MODELS)
def test_silent_channels_can_be_cut_without_a_change(name):
    model, x = MODELS[name]()
    model = model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)
    _linear_norms(model)
    plan = Plan(model, PruneConfig(), x)
    generator = torch.Generator().manual_seed(0)
    cuts = []
    for group in plan.groups:
        count = max(1, len(group.units) // 4)
        chosen = torch.randperm(len(group.units), generator=generator)[:count].tolist()
        channels = sorted(c for unit in chosen for c in group.units[unit])
        _silence(plan, group, channels)
        cuts.append((group.name, group.is_out, channels))
    before = copy.deepcopy(plan.model)
    _linear_norms(before)
    pruned = plan.apply(cuts, {})
    _linear_norms(pruned)
    _keep_logits(model, pruned)
    with torch.no_grad():
        expected, found = before.double()(_double(x)), pruned.double()(_double(x))
    assert sum(p.numel() for p in pruned.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert expected.std() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def _double(x):
    return x.double() if x.is_floating_point() else x


def _keep_logits(model, pruned):
    """Attention divides by the root of a head's width: undo that this is another one now."""
    for name, block in model.named_modules():
        cut = pruned.get_submodule(name)
        if isinstance(getattr(block, "qkv", None), nn.Linear):
            width, factor = cut.qkv.out_features // 3, (cut.qkv.out_features / block.qkv.out_features) ** 0.5
            cut.qkv.weight.data[:width] *= factor
            cut.qkv.bias.data[:width] *= factor
        elif isinstance(getattr(block, "query", None), nn.Linear):
            factor = (cut.query.out_features / block.query.out_features) ** 0.5
            cut.query.weight.data *= factor
            cut.query.bias.data *= factor
