import copy

import pytest
import torch
from torch import nn

from workbench.artefact import save_model
from workbench.comparison import CompareConfig, Comparison, compare, wilson
from workbench.comparison.advice import flags_of
from workbench.comparison.forms import Score, forms_of, load
from workbench.comparison.rows import measurements
from workbench.compress import PruneConfig, QuantConfig, prune, quantize
from workbench.compress.compilation import has_compiler
from workbench.errors import ConfigError, DataError, ModelError
from workbench.models import ModelConfig, build_model

# Before 2.14, copying an exported graph meets a class that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


EAGER = CompareConfig(rounds=8, compile=False, batch_sizes=[1, 8], reload=False, attributions=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet20", num_classes=10, in_channels=1, args={"width": 8})).eval()


@pytest.fixture(scope="module")
def data(model):
    """Batches of 8, 8 and 4; labels are the model's own answers but for four samples."""
    x = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:4] = (y[:4] + 1) % 10
    return list(zip(x.split(8), y.split(8), strict=True))


class Wrong(nn.Module):
    """Always the same answer, from a large file."""

    def __init__(self, answer=0, classes=10):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100_000))
        self.answer, self.classes = answer, classes

    def forward(self, x):
        return torch.zeros(len(x), self.classes).index_fill(1, torch.tensor([self.answer]), 1.0)


def test_scores_against_a_direct_count(model, data):
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy.classifier.weight += 0.05 * torch.randn(noisy.classifier.weight.shape, generator=torch.Generator().manual_seed(2))
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        p, q = model(x).log_softmax(1), noisy(x).log_softmax(1)
    frame = compare({"baseline": model, "noisy": noisy}, iter(data), EAGER).frame()
    first, second = frame.iloc[0], frame.iloc[1]
    assert first.accuracy == pytest.approx(16 / 20) and first.agreement == 1 and first.kl == 0
    assert (first.accuracy_low, first.accuracy_high) == pytest.approx(wilson(16, 20))
    assert second.accuracy == pytest.approx((q.argmax(1) == y).double().mean())
    assert second.agreement == pytest.approx((q.argmax(1) == p.argmax(1)).double().mean())
    assert second.kl == pytest.approx(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-3)


def test_sizes_are_those_of_saved_files(model, data, tmp_path):
    save_model(model, tmp_path / "m")
    small = prune(model, PruneConfig(ratio=0.5))
    result = compare({"baseline": tmp_path / "m", "small": small}, data, EAGER)
    frame = result.frame().set_index("variant")
    assert frame.file_bytes["baseline"] == sum(file.stat().st_size for file in (tmp_path / "m").iterdir())
    assert frame.parameters["small"] == sum(p.numel() for p in small.parameters())
    assert frame.size_ratio["small"] == frame.file_bytes["baseline"] / frame.file_bytes["small"]
    assert result.conditions["samples"] == 20 and result.conditions["rounds"] == 8


def test_given_models_and_thread_count_stay(model, data):
    given_model = copy.deepcopy(model).train()
    before = {name: tensor.clone() for name, tensor in given_model.state_dict().items()}
    threads = torch.get_num_threads()
    compare({"a": given_model}, data, EAGER.override({"rounds": 3, "threads": 1}))
    assert given_model.training and torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in given_model.state_dict().items())


def test_warnings_say_what_got_worse_and_why(model, data):
    rare = torch.cat([y for _, y in data]).bincount(minlength=10).argmin().item()
    warnings = compare({"baseline": model, "wrong": Wrong(rare)}, data, EAGER).warnings
    assert any(w.startswith("wrong is worse than baseline: 0.0% of the samples against 80.0% (16 lost, 0 won") for w in warnings)
    assert any(w.startswith("wrong is no smaller than baseline") for w in warnings)


def _warnings(folder, variants, milliseconds):
    """The warnings for made-up latencies at batch 1, one list a variant, and equal answers."""
    loaded = {name: load(model, folder / name) for name, model in variants.items()}
    forms = list(forms_of(loaded, EAGER, torch.device("cpu")))
    scores = [Score(samples=4, right=[True] * 4) for _ in forms]
    latencies = [[times, [1.0] * len(times)] for times in milliseconds]
    rows = measurements(loaded, forms, scores, latencies, [None] * len(forms), dict.fromkeys(loaded, "not checked"), [], [1, 8])
    return [flag.message for flag in flags_of(loaded, forms, scores, latencies, rows) if flag.what != "frontier"]


def test_a_variant_is_judged_by_what_it_came_from(model, data, tmp_path):
    pruned = prune(model, PruneConfig(ratio=0.6))
    int8 = quantize(pruned, QuantConfig(), data)
    warnings = _warnings(
        tmp_path, {"baseline": model, "raw": pruned, "pruned": pruned, "int8": int8}, [[9.0] * 8, [7.0] * 8, [5.0] * 8, [6.0] * 8]
    )
    assert warnings == [
        "int8 is slower than pruned at batch 1: 6.00 ms against 5.00 ms. "
        "It ran uncompiled, as a simulation: INT8 kernels need a C++ compiler."
    ]


def test_one_busy_moment_makes_no_warning(model, tmp_path):
    twin = copy.deepcopy(model)
    assert _warnings(tmp_path, {"a": model, "b": twin}, [[5.0] * 8, [5.1] * 7 + [90.0]]) != []  # no smaller
    assert not any("slower" in w for w in _warnings(tmp_path, {"a": model, "b": twin}, [[5.0] * 8, [4.0] * 3 + [6.0] * 5]))
    assert any("slower" in w for w in _warnings(tmp_path, {"a": model, "b": twin}, [[5.0] * 8, [6.0] * 8]))


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_quantized_variants_are_measured_as_deployed(data):
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="convnet", num_classes=10, in_channels=1)).eval()
    int8 = quantize(model, QuantConfig(), data)
    result = compare({"baseline": model, "int8": int8}, data, CompareConfig(rounds=3, batch_sizes=[1]))
    frame = result.frame()
    assert frame.form.tolist() == ["eager fp32", "compiled fp32", "compiled bf16", "compiled int8"]
    assert frame.kl.max() < 0.05 and (frame.latency_p50_ms <= frame.latency_p95_ms).all()
    assert frame.speed_ratio[3] == frame.latency_p50_ms[1] / frame.latency_p50_ms[3]
    assert frame.parameters.nunique() == 1


@pytest.fixture(scope="module")
def result(model, data):
    return compare({"<script>alert(1)</script>": model, "b & c": Wrong()}, data, EAGER)


def test_the_page_escapes_names_and_needs_no_network(result, tmp_path):
    html = result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html
    assert "<script>alert" not in html and "<script>alert" not in result._repr_html_()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in result._repr_html_() and "b &amp; c" in result._repr_html_()
    assert "<script src=" not in html and "<link" not in html
    assert not any("<script>" in trace.name for trace in result.figure().data)
    assert len(html) < 100_000


def test_text_and_figure_show_every_row(result):
    lines = str(result).splitlines()
    assert lines[0].split()[:2] == ["variant", "form"]
    assert sum("eager fp32" in line for line in lines) == 2
    assert sum(line.startswith("! ") for line in lines) == len(result.warnings) > 0
    assert {trace.marker.symbol for trace in result.figure().data if trace.mode == "markers"} == {"circle-open"}
    assert isinstance(result, Comparison)


def test_errors_name_the_remedy(model, data):
    with pytest.raises(ConfigError, match="at least one variant"):
        compare({}, data)
    with pytest.raises(DataError, match="no data"):
        compare({"a": model}, [])
    with pytest.raises(DataError, match=r"not \(x, y\)"):
        compare({"a": model}, [torch.zeros(1, 1, 28, 28)])
    with pytest.raises(DataError, match="one class index a sample"):
        compare({"a": model}, [(torch.zeros(2, 1, 28, 28), torch.zeros(2))])
    with pytest.raises(ModelError, match=r"'body' gives \[8, 1, 28, 28\]"):
        compare({"body": nn.Identity()}, data, EAGER)
    with pytest.raises(ModelError, match="has 3 classes, the first variant 10"):
        compare({"a": model, "b": Wrong(classes=3)}, data, EAGER)
