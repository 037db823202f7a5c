"""A latent as HTML for a notebook."""

import re
from html.parser import HTMLParser
from typing import Any

from typing_extensions import override

from sae_lens_dfc.analysis.latents.cards import ContextView, LatentCard, SegmentView
from sae_lens_dfc.analysis.report.notebook import latent_html

HOSTILE = "</span><script>alert(1)</script>\u202e"


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    @override
    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    @override
    def handle_data(self, data: str) -> None:
        self.text.append(data)


def card(segments: list[SegmentView], activation: float, n: int = 1) -> LatentCard:
    view = ContextView(segments, 0, 1, 1, activation, None)
    return LatentCard(7, "shared", 0.01, 1.0, 4.0, 0.5, {}, [view] * n, {}, {})


def test_each_context_is_a_line_in_either_models_tokens() -> None:
    segments = [SegmentView([" na", "ive"], [" naive"], 1.0), SegmentView(["!"], ["", "!"], 0.0)]
    text = "".join(Reader(str(latent_html(card(segments, 1.0, n=3), n_contexts=2))).text)
    assert text.count("A\xa0 naive!") == text.count("B\xa0 naive!") == 2


def test_shading_is_the_share_of_the_latents_largest_activation() -> None:
    segments = [SegmentView([t], [t], x) for t, x in (("a", 1.0), ("b", 4.0), ("c", 0.0))]
    page = str(latent_html(card(segments, 4.0)))
    assert re.findall(r"rgba\(236,112,20,([\d.]+)\)", page) == ["0.25", "1.00"] * 2


def test_the_firing_of_the_context_is_the_one_in_bold() -> None:
    segments = [SegmentView([t], [t], x) for t, x in (("a", 4.0), ("b", 2.0))]
    page = str(latent_html(card(segments, 2.0)))
    assert re.findall(r"font-weight:700[^>]*>([^<]*)", page) == ["b", "b"]


def test_no_text_breaks_out_of_the_page() -> None:
    page = Reader(str(latent_html(card([SegmentView([HOSTILE], [HOSTILE, "x"], 1.0)], 1.0))))
    assert set(page.tags) == {"div", "span"}
    assert "<script>" in "".join(page.text) and "\u202e" not in "".join(page.text)
