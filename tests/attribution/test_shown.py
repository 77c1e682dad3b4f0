"""Explained samples as readers see them: the numbers behind the colours, escaped words, pages without scripts."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from workbench.attribution import AttributionConfig, Explanation, Explanations, Names, explain_samples
from workbench.attribution.drawing import scale_of
from workbench.data.text import Vocabulary
from workbench.errors import DataError

EVIL = "<script>alert(1)</script>"


def pixels(html: str, alt: str) -> np.ndarray:
    found = re.search(rf'<img src="data:image/png;base64,([^"]+)" alt="{alt}"', html)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))))


def image() -> Explanation:
    x = torch.zeros(3, 4, 6)
    x[:, :, 3:] = 1
    credits = torch.zeros(3, 4, 6)
    credits[0, 0, 0], credits[1, 0, 0], credits[2, 3, 5] = 1.5, 0.5, -1.0
    return Explanation(x, credits, target=1, prediction=1, probability=0.75, method="integrated_gradients", label=0, loss=2.0)


def text() -> Explanation:
    vocabulary = Vocabulary.of([f"good good good good bad bad bad run run ##ning {EVIL}"], 12)
    names = Names(("up", "down"), (*vocabulary.tokens[:4], "##ning", EVIL))
    return Explanation(torch.tensor([2, 3, 4, 5, 1, 0, 0]), torch.tensor([2.0, -1.0, 0.5, 0.0, 0.1, 0.0, 0.0]), names=names)


def table() -> Explanation:
    x = torch.arange(20.0)
    return Explanation(x, torch.where(x == 7, -4.0, x / 5), names=Names(columns=(EVIL, *map("column {}".format, range(1, 20)))))


def series() -> Explanation:
    steps = torch.arange(30.0)
    x = torch.stack([torch.sin(steps), steps, -steps, steps**2, torch.cos(steps)], 1)
    credits = torch.zeros(30, 5)
    credits[10:13, 2], credits[20, 0] = 1.0, -2.0
    return Explanation(x, credits)


ALL = [image, text, table, series]


def test_an_images_credits_are_colours_over_grey() -> None:
    html = image()._repr_html_()
    seen = pixels(html, "attribution")
    assert seen.shape == (4, 6, 3)
    assert np.ptp(seen[1, 0]) == 0 and np.ptp(seen[1, 4]) == 0 and seen[1, 4, 0] > seen[1, 0, 0]  # no credit: grey, as bright
    red, green, blue = seen[0, 0].astype(int)
    assert red > green > blue  # for: amber
    red, green, blue = seen[3, 5].astype(int)
    assert blue > green > red  # against, half as much: bluish
    assert abs(int(seen[0, 0, 0]) - round(255 * 0.1 * 0.25 + 0.9 * 240)) <= 1
    assert pixels(html, "input").tolist()[0][0] == [0, 0, 0]
    assert "0, taken for 1" in html and "full colour at ± 2" in html and "pixels" in html


def test_the_scale_is_the_largest_unless_few_of_many_lie_beyond() -> None:
    assert scale_of(torch.tensor([1.0, -3.0])) == 3.0
    many = torch.linspace(-1, 1, 1000)
    many[0] = -50
    assert 0.9 < scale_of(many) < 1.0
    alone = torch.zeros(1000)
    alone[3] = 2
    assert scale_of(alone) == 2.0


def test_an_images_channels_are_summed_unless_credited_as_a_whole() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(1, 3, 4, 4)
    (patches,) = explain_samples(model, x, method="occlusion", config=AttributionConfig(patches=2))
    (values,) = explain_samples(model, x, method="feature_ablation")
    quarter = values.parts[:2, :2].sum()
    torch.testing.assert_close(patches.parts[:2, :2], quarter.expand(2, 2), rtol=1e-4, atol=1e-5)


def test_a_text_is_its_words_without_padding() -> None:
    html = text()._repr_html_()
    words = re.findall(r'<span class="(for|against)" style="--o:([\d.]+)" title="([^"]+)">(.*?)</span>', html)
    assert [(side, float(share), credit) for side, share, credit, _ in words[:3]] == [
        ("for", 1.0, "+2"),
        ("against", 0.5, "−1"),
        ("for", 0.25, "+0.5"),
    ]
    assert [word for *_, word in words] == ["good", "bad", "ning", "&lt;script&gt;alert(1)&lt;/script&gt;", "[unknown]"]
    assert "bad</span><span" in html and "good</span> <span" in html  # a piece goes on with the word before it


def test_a_table_is_bars_of_its_largest_credits() -> None:
    html = table()._repr_html_()
    widths = re.findall(r'class="b (for|against)"><i style="width:([\d.]+)%"', html)
    assert widths[0] == ("against", "50.0") and widths[1] == ("for", "47.5") and len(widths) == 12
    assert "column 7" in html and "8 other columns: +5.8 in all" in html
    frame = table().table()
    assert list(frame.column[:2]) == ["column 7", "column 19"] and frame.credit[0] == -4


def test_a_series_is_lines_on_coloured_grounds() -> None:
    html = series()._repr_html_()
    assert html.count('class="lane"') == 4 and "1 other channel" in html
    assert html.count('<rect class="for"') == 3 and html.count('<rect class="against"') == 1
    assert "step 20: −2" in html
    long = Explanation(torch.randn(50_000, 1), torch.randn(50_000, 1))
    assert len(long._repr_html_()) < 60_000


@pytest.mark.parametrize("make", ALL)
def test_pages_are_small_and_have_no_scripts(make: object) -> None:
    made: Explanation = make()  # type: ignore[operator]
    page = Explanations([made, made]).to_html()
    assert "<script" not in page and "color-scheme: light dark" in page and len(page) < 40_000
    assert EVIL not in Explanations([made])._repr_html_()
    figure = made.figure()
    assert EVIL not in figure.to_json() and len(figure.data) >= 1
    assert len(made.table()) > 0 and repr(made)


def test_samples_are_explained_with_what_the_model_makes_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = explain_samples(model, x, labels, config=AttributionConfig(batch_size=2), names=Names(("a", "b", "c")))
    with torch.no_grad():
        shares = model(x).softmax(1)
    frame = found.frame()
    assert list(frame.prediction) == shares.argmax(1).tolist() and list(frame["sample"]) == [0, 1, 2, 3, 4]
    assert list(frame.label_probability) == pytest.approx(shares[range(5), labels].tolist())
    assert list(frame.loss) == pytest.approx((-shares[range(5), labels].log()).tolist(), rel=1e-5)
    assert list(frame.label_name) == ["a", "b", "c", "a", "b"]
    target = shares.argmax(1)
    torch.testing.assert_close(torch.stack([e.credits for e in found]), (model.weight[target] * x).detach())
    with pytest.raises(DataError, match="5 samples"):
        explain_samples(model, x, labels[:3])
    with pytest.raises(DataError, match="no drawing"):
        _ = Explanation(torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2)).kind


def test_grey_stays_grey_without_credits() -> None:
    flat = Explanation(torch.rand(1, 5, 5), torch.zeros(1, 5, 5))
    seen: Tensor = torch.tensor(pixels(flat._repr_html_(), "attribution"))
    assert (seen.amax(-1) == seen.amin(-1)).all()
