import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.fresh import answers_elsewhere
from workbench import TrainConfig, train
from workbench.artefact import load_model
from workbench.compress import PruneConfig, SparsityConfig, bake_masks, prune, semi_structured, sparsify
from workbench.compress.sparsity import nm_mask
from workbench.errors import ConfigError, DeviceError, ModelError
from workbench.models import ModelConfig, build_model


def _model(name="convnet"):
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, num_classes=10, in_channels=1)).eval()


X = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 7),
    groups=st.integers(1, 5),
    kernel=st.sampled_from([(), (3, 3), (1, 2)]),
    pattern=st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 8)]),
    seed=st.integers(0, 99),
)
def test_exactly_n_of_m_stay_and_they_are_the_largest(out, groups, kernel, pattern, seed):
    keep, of = pattern
    weight = torch.randn(out, groups * of, *kernel, generator=torch.Generator().manual_seed(seed))
    mask = nm_mask(weight, keep, of)
    assert mask.shape == weight.shape and mask.dtype == torch.bool
    rows, kept = (t.movedim(1, -1).reshape(-1, of) for t in (weight.abs(), mask))
    assert (kept.sum(1) == keep).all()
    for row, stays in zip(rows, kept, strict=True):
        assert row[stays].min() >= row[~stays].max()


def test_equal_weights_still_leave_exactly_two():
    assert nm_mask(torch.zeros(3, 8)).sum() == 12


def test_a_sparse_model_is_one_with_those_weights_at_zero_and_the_given_one_stays():
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = sparsify(model)
    expected = copy.deepcopy(model)
    for name in sparse.structure.transforms[-1]["layers"]:
        layer = expected.get_submodule(name)
        layer.weight.data *= nm_mask(layer.weight.data)
    with torch.no_grad():
        torch.testing.assert_close(sparse(X), expected(X), rtol=0, atol=0)
        assert not torch.allclose(sparse(X), model(X))
        torch.testing.assert_close(bake_masks(sparse)(X), sparse(X), rtol=0, atol=0)
    assert sparse.structure.transforms[-1]["masked"] == 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(type(layer).__name__.startswith("Masked") for layer in model.modules())


def test_masks_stay_through_training_and_saving_and_the_weights_learn(tmp_path):
    model = build_model(ModelConfig(name="mlp", num_classes=10, in_channels=1, args={"widths": [32], "size": 8}))
    sparse = sparsify(model)
    masks = {name: tensor.clone() for name, tensor in sparse.state_dict().items() if name.endswith("mask")}
    config = TrainConfig(
        data={"name": "digits", "limit": 256, "batch_size": 64}, epochs=2, optim={"lr": 0.05, "weight_decay": 0.1}
    )
    trained = train(config, model=sparse, root=tmp_path / "runs").model
    assert trained.structure.transforms == sparse.structure.transforms
    state = trained.state_dict()
    for name, mask in masks.items():
        assert torch.equal(state[name].cpu(), mask)
        assert not torch.equal(state[name.replace("mask", "weight")].cpu(), sparse.state_dict()[name.replace("mask", "weight")])
    baked = bake_masks(trained.cpu().eval())
    for name in baked.structure.transforms[-1]["layers"]:
        assert ((baked.get_submodule(name).weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_prune_sparsify_bake_reloads_bit_equal_in_a_fresh_process(tmp_path):
    pruned = prune(_model("resnet20"), PruneConfig(ratio=0.3, round_to=4), X)
    sparse = sparsify(pruned)
    baked = bake_masks(sparse)
    answers = answers_elsewhere([(sparse, X), (baked, X)], tmp_path)
    assert all(torch.equal(found, model(X)) for found, model in zip(answers, (sparse, baked), strict=True))
    assert [record["kind"] for record in load_model(tmp_path / "1").structure.transforms] == [
        "prune",
        "sparsify",
        "bake_masks",
    ]


def test_what_cannot_be_done_is_said():
    model = _model()
    with pytest.raises(DeviceError, match=r"model\.to\('cuda'\)"):
        semi_structured(sparsify(model))
    with pytest.raises(ModelError, match="Call sparsify first"):
        bake_masks(model)
    with pytest.raises(ModelError, match="groups of 4"):
        sparsify(nn.Linear(6, 6))
    with pytest.raises(ModelError, match="Sparsify before that"):
        sparsify(sparsify(model))
    with pytest.raises(ModelError, match="Prune first"):
        prune(sparsify(model), PruneConfig(), X)
    with pytest.raises(ConfigError, match="layer named 'nothing"):
        sparsify(model, SparsityConfig(ignored=["nothing*"]))
    with pytest.raises(ConfigError, match="removes nothing"):
        SparsityConfig(keep=4)


@pytest.mark.gpu
def test_sparse_tensor_cores_give_the_same_outputs():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no sparse tensor cores")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).cuda().eval()
    sparse = sparsify(model)
    fast = semi_structured(sparse)
    x = torch.randn(128, 256, device="cuda")
    with torch.no_grad():
        expected = sparse(x)
        found = fast(x.half()).float()
    assert type(fast[0].weight.data).__name__.startswith("SparseSemiStructured")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
