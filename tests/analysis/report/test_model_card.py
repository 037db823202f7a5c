from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from sae_lens_dfc import Crosscoder
from sae_lens_dfc.analysis.report.model_card import plain, render_card
from tests.helpers import make_acts, make_firing_dfc

HOSTILE = (
    "x\n---\nlicense: stolen\n---\n# Owned <script>alert(1)</script> [a](http://evil) ![i](http://evil/i)"
    " | `b` | **c** {{ 7 * 7 }} \u202egnp.exe $d$ &lt;e&gt;\n```\n\nf"
)
METRICS = {
    "explained_variance/a": 0.767,
    "explained_variance/a/se": 0.003,
    "null/self/explained_variance/a": 0.798,
    "exclusive/significant/a_exclusive": 3.0,
    "exclusive/significant/b_exclusive": 0.0,
}


def made(name_a: str = "org/tiny-a", name_b: str = "org/tiny-b", **model: Any) -> Crosscoder:
    crosscoder = make_firing_dfc()
    metadata = crosscoder.cfg.metadata
    metadata.model_a = {"model_name": name_a, "hook_name": "blocks.3.hook_resid_post", **model}
    metadata.model_b = {"model_name": name_b, "hook_name": "blocks.9.hook_resid_post", **model}
    metadata.dataset_path, metadata.context_size = "cpython-docs", 128
    return crosscoder


def html_of(card: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)


def test_it_carries_both_models_their_hooks_and_how_to_load_it() -> None:
    card = render_card(made(), "me/pair", METRICS)
    html = html_of(card)
    for text in (
        *("<td>org/tiny-a</td>", "<td>org/tiny-b</td>"),
        *("<td>blocks.3.hook_resid_post</td>", "<td>blocks.9.hook_resid_post</td>"),
        *("<td>5</td>", "<td>7</td>", "6 exclusive to model A", "4 exclusive to model B"),
        "cpython-docs",
        "from sae_lens_dfc.hub import from_pretrained",
        "from_pretrained(&quot;me/pair&quot;)",
        "SAE.from_pretrained(&quot;me/pair&quot;, &quot;crosscoder&quot;)",
    ):
        assert text in html, text


def test_measures_stand_beside_their_null() -> None:
    html = html_of(render_card(made(), "me/pair", METRICS))
    assert "<th>null: model A twice</th>" in html
    row = "<td>Explained variance, A</td>\n<td>0.767 ± 0.003</td>\n<td>0.798</td>"
    assert row in html
    assert "3 of A's and 0 of B's latents do" in html
    assert "Without a null" not in html


def test_without_a_null_or_measures_it_says_so() -> None:
    assert "Without a null" in html_of(render_card(made(), "me/pair", {"l0": 3.0}))
    nothing = html_of(render_card(made(), "me/pair"))
    assert "No measures came with these weights" in nothing
    assert "<td>Explained" not in nothing and "here that is" not in nothing


def test_the_hub_reads_library_license_and_the_models_it_can_have() -> None:
    data = ModelCard(render_card(made(name_b="folder"), "me/pair", license="mit")).data.to_dict()
    assert data["library_name"] == "saelens" and data["license"] == "mit"
    assert data["base_model"] == ["org/tiny-a"]
    assert "base_model" not in ModelCard(render_card(made("a", "b"), "me/pair")).data.to_dict()


def test_hostile_names_are_shown_as_text_and_leave_the_front_matter_whole() -> None:
    crosscoder = made(HOSTILE, f"org/{HOSTILE}", revision=HOSTILE)
    crosscoder.cfg.metadata.dataset_path = HOSTILE
    crosscoder.cfg.metadata.training_architecture = HOSTILE
    sae = crosscoder.export_sae("a", rows=[make_acts(40, 12)])
    card = render_card(crosscoder, "me/pair", METRICS, {"sae_a": sae})
    ordinary = render_card(made(), "me/pair", METRICS, {"sae_a": made().export_sae("a")})
    assert ModelCard(card).data.to_dict() == {
        name: value
        for name, value in ModelCard(ordinary).data.to_dict().items()
        if name != "base_model"
    }
    assert yaml.safe_load(card.split("\n---\n")[0]) == ModelCard(card).data.to_dict()
    html = html_of(card)
    for mark in ("<script", "<img", '<a href="http://evil', "<strong>c", "<h1>Owned", "<code>b"):
        assert mark not in html, mark
    assert "\u202e" not in card
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "{{ 7 * 7 }}" in html
    assert html.count("<h1>") == 1
    # No cell more than there are models.
    models = html.split("</table>")[0]
    assert models.count("<td>") == 3 * (models.count("<tr>") - 1)


def test_an_exported_sae_says_what_it_loses_or_that_nobody_looked() -> None:
    crosscoder = made()
    saes = {
        "sae_a": crosscoder.export_sae("a", rows=[make_acts(40, 12)]),
        "sae_b": crosscoder.export_sae("b"),
    }
    html = html_of(render_card(crosscoder, "me/pair", METRICS, saes))
    a, b = html.split("<h3>sae_b</h3>")
    assert "SAE.from_pretrained(&quot;me/pair&quot;, &quot;sae_a&quot;)" in a
    assert "<td>firing recall against the crosscoder</td>\n<td>1.000</td>" in a
    assert "was not measured" in b and "was not measured" not in a


def test_a_long_name_is_cut() -> None:
    assert plain("a" * 500) == "a" * 199 + "…"


def test_a_crosscoder_that_knows_no_models_has_a_card() -> None:
    html = html_of(render_card(make_firing_dfc(), "me/pair"))
    assert "Crosscoder of model A and model B" in html


def test_what_cannot_be_a_repository_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a valid Hub repository name"):
        render_card(made(), "me/pair\nlicense: x")
