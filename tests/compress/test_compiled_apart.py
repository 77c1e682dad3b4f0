import copy

import pytest
import torch
from torch import nn

from workbench.compress import compiled
from workbench.compress.compilation import has_compiler
from workbench.models import ModelConfig, build_model


class Text(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(4, width, batch_first=True)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(torch.relu(self.lstm(x)[0]).mean(1))


def _net(width):
    return build_model(ModelConfig(name="mlp", num_classes=3, args={"widths": [width], "size": 2}))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(("build", "shape"), [(_net, (2, 1, 2, 2)), (Text, (2, 5, 4))], ids=["graph", "recurrent"])
def test_models_of_one_class_answer_for_themselves(build, shape):
    """Of other weights, and of other sizes, as pruned models are."""
    torch.manual_seed(0)
    first = build(8).eval()
    second, third = copy.deepcopy(first), build(5).eval()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-1.5)
    models = [first, second, third]
    x = torch.randn(shape)
    fast = [compiled(model) for model in models]
    for _ in range(2):
        for model, call in zip(models, fast, strict=True):
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
