"""The report in a real browser: what an auditor sees, with the mouse, the keyboard, a screen reader
and on paper."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_lens_dfc.analysis.latents.cards import ContextView, LatentCard, LogitEffect, SegmentView
from sae_lens_dfc.analysis.report.charts import clouds, effect_marks, histograms, share_marks
from sae_lens_dfc.analysis.report.findings import (
    EffectView,
    Finding,
    Screening,
    StageCount,
    SteeringSample,
)
from sae_lens_dfc.analysis.report.page import ReportData, render_report
from sae_lens_dfc.analysis.report.page_data import embedded, visible
from sae_lens_dfc.analysis.report.summary import lead, warnings
from sae_lens_dfc.analysis.report.tables import measures_table
from sae_lens_dfc.core.terminal import text_table

HOSTILE = "<script>document.title='pwned'</script><img src=http://example.com/x onerror=alert(1)>"
TURNED = "\u202eevil\u2066"
BROKEN = "a\x00b\ud800c</script><!--<script>"
HUGE = "x" * 10_000


def context(text: str = " cat", quantile: int | None = None) -> ContextView:
    segments = [
        SegmentView(["The"], ["The"], 0.0),
        SegmentView([text], [text[:2], text[2:]], 2.0),
        SegmentView([" sat", "\n"], [" sat\n"], 0.5),
    ]
    return ContextView(segments, 7, 31, 29, 2.0, quantile)


def card(partition: str, latent: int = 3, text: str = " cat", **overrides: Any) -> LatentCard:
    defaults: dict[str, Any] = {
        "latent": latent,
        "partition": partition,
        "firing_rate": 0.012,
        "mean_activation": 1.5,
        "max_activation": 2.0,
        "relative_decoder_norm": {"a_exclusive": 1.0, "b_exclusive": 0.0, "shared": 0.5}[partition],
        "encoder_decoder_cosine": {"a": 0.71},
        "contexts": [context(text), context(" dog", quantile=0)],
        "logit_effects": {"a": LogitEffect([(" purr", 0.9)], [(" bark", -0.8)])},
        "evidence": {
            "is_a": partition != "b_exclusive",
            "is_candidate": partition != "shared",
            "is_two_sided": partition == "shared",
            "firings": 120,
            "nu_error": 0.11,
            "nu_error_se": 0.02,
            "auc": 0.6,
            "span": float("nan"),
            "q": 0.03,
            "is_exclusive": partition == "a_exclusive",
        },
        "verdict": "not shown to be exclusive: q = 0.3",
    }
    return LatentCard(**{**defaults, **overrides})


def finding(latent: int = 1, **overrides: Any) -> Finding:
    defaults: dict[str, Any] = {
        "latent": latent,
        "partition": "a_exclusive",
        "rank": 1,
        "description": "names of cats",
        "detection": 0.9,
        "concerns": ["deception"],
        "effects": [EffectView("KL in A", 0.5, 0.4, 0.6, {"random direction": 0.2})],
        "samples": [
            SteeringSample("a", "add", 4.0, "My pet is", "a dog, and\nold.", "a cat cat."),
            SteeringSample("b", "add", 4.0, "My pet is", "a bird.", "a bird."),
        ],
        "verdict": "confirmed",
        "reasons": ["It moves A more than random directions do."],
    }
    return Finding(**{**defaults, **overrides})


SCREENING = Screening(
    [StageCount("alive", 40, 3, {"never fired": 37}), StageCount("steered", 3, 1, {})], [finding()]
)
METRICS = {
    "explained_variance/a": 0.8,
    "explained_variance/a/se": 0.01,
    "null/self/explained_variance/a": 0.9,
    "transfer/auc/shared": 0.95,
    "transfer/auc/shared/p5": 0.9,
    "transfer/auc/shared/p95": 0.99,
    "exclusive/judged/a_exclusive": 30,
    "exclusive/significant/a_exclusive": 5,
    "exclusive/judged/b_exclusive": 10,
    "exclusive/significant/b_exclusive": 0,
    "null/self/exclusive/judged/a_exclusive": 20,
    "null/self/exclusive/significant/a_exclusive": 1,
    "null/self/exclusive/judged/b_exclusive": 20,
    "null/self/exclusive/significant/b_exclusive": 0,
    "max_forbidden_weight": 0.0,
}


def data(**overrides: Any) -> ReportData:
    defaults: dict[str, Any] = {
        "name_a": "llama",
        "name_b": "gpt2",
        "settings": {"sae.k": 32, "dataset_path": "docs"},
        "metrics": METRICS,
        "histogram": {
            "a_exclusive": [0, 0, 0, 5],
            "b_exclusive": [4, 0, 0, 0],
            "shared": [0, 9, 1, 0],
        },
        "cards": [card("a_exclusive", 1), card("b_exclusive", 2), card("shared", 3)],
    }
    return ReportData(**{**defaults, **overrides})


def carried(page: str) -> dict[str, Any]:
    """The page's data, as any JSON parser reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_table_keeps_only_rows_and_columns_that_hold_a_number() -> None:
    head, rows = measures_table({"l0": 3.0, "baseline/pca/explained_variance/a": 0.25})
    assert head == ["measure", "this run", "PCA, k components"]
    assert rows == [
        ["Explained variance, A", "", "0.250"],
        ["Active latents per pair (L0)", "3.000", ""],
    ]


def test_terminal_table_lines_up() -> None:
    lines = text_table(["m", "run"], [["long name", "1"], ["x", "1000.5"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_page_without_null_says_so() -> None:
    assert "This page has no null" in render_report(data(metrics={"l0": 1.0}))
    assert "This page has no null" not in render_report(data())


def test_the_first_sentence_says_no_more_than_was_measured() -> None:
    assert "was not measured" in lead({"l0": 1.0}, None)
    assert lead(METRICS, None).startswith("5 of 40 judged candidates are exclusive with evidence")
    assert "none was tested causally" in lead(METRICS, None)
    none = METRICS | {"exclusive/significant/a_exclusive": 0}
    assert lead(none, None).startswith("No latent is exclusive with evidence")
    assert "Of 40 latents, 1 reached the end of the screening: 1 confirmed" in lead(
        METRICS, SCREENING
    )
    assert "No latent reached the end" in lead(METRICS, Screening([], []))
    in_both = [finding(latent=i, verdict=v) for i, v in ((7, "used alike"), (8, "shared"))]
    said = lead(METRICS, replace(SCREENING, shared=in_both))
    assert "Of 2 shared latents that were ablated in both models: 1 used alike, 1 shared." in said


def test_shared_latents_have_a_section_of_their_own() -> None:
    screening = replace(SCREENING, shared=[finding(latent=3, verdict="used differently")])
    page = render_report(data(screening=screening))
    before, section = page.split("Shared latents, ablated in both models")
    assert 'id="finding-3"' in section and 'id="finding-3"' not in before
    assert "ablated in both models" not in render_report(data(screening=SCREENING))


def test_the_page_says_which_model_knows_more_and_on_which_source() -> None:
    rises = {"rise/a": 0.06, "rise/b": 0.98, "b_minus_a": 0.92, "b_over_a": 0.7}
    whole = {f"mapped_loss/{name}": x for name, x in rises.items()}
    other = {f"mapped_loss/en/{name}": x for name, x in {**rises, "b_minus_a": 0.01}.items()}
    same = {f"mapped_loss/pt/{name}": x for name, x in rises.items()}
    found = METRICS | whole | other | same
    found |= {f"{name}/se": 0.03 for name in (*whole, *other, *same)}
    said = lead(found, None)
    assert lead(METRICS, None) in said and lead(METRICS, SCREENING) in lead(found, SCREENING)
    assert "given B's, A's rises by 0.060 ± 0.030, and on the same text" in said
    assert "B's untouched loss is 0.70 ± 0.03 times A's: B knows what A does not." in said
    assert "By group of text: on en, neither is shown to know more; on pt, B knows" in said
    page = render_report(data(metrics=found))
    assert "Rise of B&#39;s loss, given A&#39;s activations, on pt" in page
    rows = {row[0]: row[1] for row in measures_table(found)[1]}
    assert rows["Rise of A's loss, given B's activations, on en"] == "0.060 ± 0.030"


def test_calls_as_frequent_in_the_null_are_not_to_be_believed() -> None:
    assert warnings(METRICS) == []
    as_many = METRICS | {"null/self/exclusive/significant/a_exclusive": 5}
    assert "Do not trust the verdicts on this page." in warnings(as_many)[0]
    assert "forbidden weight is not 0" in warnings(METRICS | {"max_forbidden_weight": 0.1})[0]


def test_a_mark_stands_where_its_number_is_and_beyond_the_scale_at_the_edge() -> None:
    key = "loss_recovered_from_mean/a"
    run, null = share_marks({key: 0.25, key + "/se": 0.25, f"null/self/{key}": -3.0}, key)[::-1]
    assert (run.x, run.low, run.high, run.beyond) == (30.0, 10.0, 50.0, 0)
    assert (null.x, null.beyond, null.kind) == (2, -1, "null-self")
    assert share_marks({"l0": 0.5}, "l0") == []
    control, effect = effect_marks(EffectView("x", 2.0, 1.0, 3.0, {"random": 4.0}), scale=4.0)
    assert (control.x, effect.x, effect.low, effect.high) == (90.0, 50.0, 30.0, 70.0)


def test_histograms_of_all_partitions_stand_on_one_scale() -> None:
    rows, ticks = histograms({"shared": [0, 999], "a_exclusive": [30, 0]})
    assert [row.total for row in rows] == [999, 30]
    assert rows[0].bars[0].height == 95 and rows[0].bars[0].x == 50
    # log 31 / log 1000
    assert rows[1].bars[0].height == pytest.approx(95 * 0.4971, abs=0.01)
    assert [tick.label for tick in ticks] == ["1", "10", "100"]
    assert histograms({}) == ([], [])


def test_a_cloud_holds_each_models_candidates_and_what_is_called() -> None:
    cards = [
        card("a_exclusive", 1, firing_rate=0.1),
        card("b_exclusive", 2, firing_rate=1e-3),
        card("shared", 3),
    ]
    (a, b), ticks = clouds(cards)
    assert (a.n_candidates, a.n_called, b.n_candidates, b.n_called) == (1, 1, 1, 0)
    # 0.1 lies two thirds of the way from 0.001 to 1, an AUROC of 0.6 a third of the way from 0.4 to
    # 1.
    assert a.candidates == "M267 267h0" and b.candidates == "M0 267h0"
    assert [tick.label for tick in ticks] == ["0.1 %", "1 %", "10 %", "100 %"]
    assert clouds([card("a_exclusive", evidence={})]) == ([], [])


def test_what_cannot_be_seen_gets_a_sign_and_what_is_seen_stays() -> None:
    assert visible("a\x00\u202eb\ud800\n") == "a␀⟨U+202E⟩b⟨U+D800⟩↵"
    assert visible("a\nb\r", keep_lines=True) == "a\nb⟨U+000D⟩"
    seen = "naïve 選擇 مرحبا 👩‍👩‍👧"
    assert visible(seen) == seen


def test_embedded_json_closes_no_element_and_reads_back() -> None:
    text = embedded([BROKEN, HOSTILE, "&amp;\u2028"])
    assert not set("<>&\u2028") & set(text)
    text.encode()
    assert json.loads(text) == [BROKEN, HOSTILE, "&amp;\u2028"]


def test_everything_foreign_is_escaped() -> None:
    page = render_report(
        data(
            name_a=HOSTILE + BROKEN,
            settings={HOSTILE: BROKEN},
            cards=[card("a_exclusive", 1, HOSTILE + BROKEN, verdict=HOSTILE)],
            screening=Screening(
                [StageCount(HOSTILE, 1, 1, {HOSTILE: 1})],
                [finding(description=HOSTILE, verdict=HOSTILE, concerns=[BROKEN])],
            ),
        )
    )
    page.encode()
    # The data and the page's own script.
    assert page.count("<script") == 2 and page.count("</script") == 2
    assert "<img" not in page and "<!--" not in page
    assert carried(page)["cards"]["1"]["contexts"][0][0][1][0] == [visible(HOSTILE + BROKEN)]


def test_a_number_that_is_not_known_is_no_number_on_the_page() -> None:
    page = carried(render_report(data()))
    assert page["evidence"]["span"] == [None, None, None]
    assert page["evidence"]["auc"] == [0.6, 0.6, 0.6]
    # nothing was measured of the logits of B
    assert set(page["cards"]["1"]["logits"]) == {"a"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def opened(browser: Any, path: Path, hash_: str = "", **options: Any) -> Any:
    """The page, with what it asked for and complained of."""
    page = browser.new_page(**options)
    page.requests, page.problems = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text))
    page.goto(path.as_uri() + hash_)
    return page


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    cards = [
        card("a_exclusive", 1, firing_rate=0.3),
        card("b_exclusive", 2, HOSTILE, firing_rate=0.1),
        card("shared", 3, TURNED, firing_rate=0.2, verdict=""),
        card("shared", 4, HUGE, firing_rate=0.01),
        card("shared", 17, contexts=[], logit_effects={}, evidence={}, verdict=""),
    ]
    page = data(cards=cards, name_b=HOSTILE, screening=SCREENING)
    path.write_text(render_report(page), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Any, small: Path) -> Iterator[Any]:
    page = opened(browser, small)
    yield page
    assert page.problems == []
    page.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 latents with 10 contexts of 25 stretches each."""
    path = tmp_path_factory.mktemp("report") / "large.html"
    path.write_text(render_report(data(cards=[many(i) for i in range(2000)])), encoding="utf-8")
    return path


def random_segments(n: int) -> list[SegmentView]:
    rng = random.Random(0)
    result: list[SegmentView] = []
    for _ in range(n):
        word = rng.choice(["tion", " the", " quick", " brøwn", " 選擇", " of", "ing"])
        tokens_b = [word] if rng.random() < 0.6 else [word[:2], word[2:]]
        activation = rng.random() * 3 if rng.random() < 0.3 else 0.0
        result.append(SegmentView([word], tokens_b, activation))
    return result


SEGMENTS = random_segments(2000)


def many(latent: int) -> LatentCard:
    rng = random.Random(latent)
    own = SegmentView([f" w{latent}x"], [""], 3.0)
    contexts = [
        ContextView([*rng.choices(SEGMENTS, k=25), own], i, i, i, 3.0, None if i < 5 else i - 5)
        for i in range(10)
    ]
    tokens = [(f" t{i}", 1.0 / (i + 1)) for i in range(10)]
    effect = LogitEffect(tokens, tokens)
    partition = ("a_exclusive", "b_exclusive", "shared")[latent % 3]
    return card(
        partition,
        latent,
        firing_rate=((latent * 7919) % 2000) / 2000,
        contexts=contexts,
        logit_effects={"a": effect, "b": effect},
    )


def latents_in_view(page: Any) -> list[int]:
    """Of the rows that are drawn, from the first."""
    return [int(text) for text in page.locator("#table tbody th").all_inner_texts()]


def test_page_opens_alone_without_errors(page: Any) -> None:
    assert [url[:7] for url in page.requests] == ["file://"]


def test_a_script_that_is_not_the_pages_own_does_not_run(
    browser: Any, small: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.html"
    injected = "<script>document.title='pwned'</script>"
    broken.write_text(
        small.read_text(encoding="utf-8").replace("</main>", injected + "</main>", 1),
        encoding="utf-8",
    )
    page = opened(browser, broken)
    assert page.title() == f"llama × {HOSTILE}"
    assert any("Content Security Policy" in problem for problem in page.problems)
    page.close()


def test_verdicts_come_before_measures_and_measures_before_latents(page: Any) -> None:
    titles = page.locator("#overview h2").all_inner_texts()
    assert titles == ["Summary", "Screening", "Measures on held-out text", "Latents", "Settings"]
    assert "1 reached the end" in page.locator(".lead").first.inner_text()
    assert "37 never fired" in page.locator("#stages").inner_text()
    text = page.locator("#finding-1").inner_text()
    for part in (
        "confirmed",
        "names of cats",
        "90 %",
        "deception",
        "0.500 [0.400, 0.600]",
        "random direction 0.200",
        "It moves A",
    ):
        assert part in text


def test_measures_stand_beside_their_nulls_with_error_and_plot(page: Any) -> None:
    row = page.locator("#measures-table tr", has_text="Explained variance, A")
    assert row.locator("td").all_inner_texts()[1:] == ["0.800 ± 0.010", "0.900"]
    circle, diamond = (row.locator(f".mark.{kind}").bounding_box() for kind in ("run", "null-self"))
    assert circle["x"] < diamond["x"]
    assert row.locator(".bar.run").bounding_box()["width"] > 1
    assert page.locator("#histogram rect").count() == 4
    boxes = [page.locator("#histogram rect").nth(i).bounding_box() for i in range(4)]
    assert all(box["height"] > 0 for box in boxes)


def test_the_head_sorts_both_ways_and_says_so(page: Any) -> None:
    assert latents_in_view(page) == [1, 2, 3, 4, 17]
    fires = page.get_by_role("columnheader", name="firing rate")
    fires.get_by_role("button").click()
    assert latents_in_view(page) == [1, 3, 2, 17, 4]
    assert fires.get_attribute("aria-sort") == "descending"
    fires.get_by_role("button").click()
    assert latents_in_view(page) == [4, 17, 2, 3, 1]
    assert fires.get_attribute("aria-sort") == "ascending"
    assert page.locator("[aria-sort]").count() == 1
    page.get_by_role("columnheader", name="AUROC").get_by_role("button").click()
    assert latents_in_view(page)[-1] == 17  # not measured: last, whichever way
    page.get_by_role("columnheader", name="AUROC").get_by_role("button").click()
    assert latents_in_view(page)[-1] == 17


def test_search_and_filters_keep_what_fits_and_count_it(page: Any) -> None:
    search, count = page.get_by_role("searchbox"), page.locator("#count")
    assert count.inner_text() == "5 latents"
    search.fill("NAMES OF CATS")
    assert latents_in_view(page) == [1] and count.inner_text() == "1 of 5 latents"
    search.fill("onerror=alert")
    assert latents_in_view(page) == [2]
    search.fill(" purr")
    assert latents_in_view(page) == [1, 2, 3, 4]
    search.fill("#17")
    assert latents_in_view(page) == [17]
    search.fill("no such text")
    assert latents_in_view(page) == [] and count.inner_text() == "0 of 5 latents"
    search.fill("")
    page.get_by_label("Partition").select_option("shared")
    assert latents_in_view(page) == [3, 4, 17]
    page.get_by_label("only with contexts").check()
    assert latents_in_view(page) == [3, 4]
    page.get_by_label("Verdict").select_option("not measured")
    assert latents_in_view(page) == [3]
    options = page.get_by_label("Verdict").locator("option").all_inner_texts()
    assert options == ["all", "confirmed", "not shown to be exclusive", "not measured"]


def test_links_and_the_back_button_open_latents(page: Any) -> None:
    # A changed address is acted on a moment later, so the page is waited for.
    page.locator("#table").get_by_role("link", name="3", exact=True).click()
    page.get_by_role("heading", name="Latent 3").wait_for()
    assert page.url.endswith("#latent-3") and page.title().startswith("Latent 3 · llama")
    assert page.locator("#overview").is_hidden()
    assert page.evaluate("document.activeElement.id") == "latent"
    page.get_by_role("link", name="next").click()
    page.get_by_role("heading", name="Latent 4").wait_for()
    page.go_back()
    page.get_by_role("heading", name="Latent 3").wait_for()
    page.go_back()
    page.locator("#overview").wait_for()
    assert page.locator("#latent").is_hidden()
    assert page.title() == f"llama × {HOSTILE}"
    assert page.evaluate("document.activeElement.textContent") == "3"
    page.go_forward()
    page.get_by_role("heading", name="Latent 3").wait_for()


def test_an_address_opens_its_latent_and_a_wrong_one_says_so(browser: Any, small: Path) -> None:
    page = opened(browser, small, "#latent-17")
    assert "No contexts are stored" in page.locator("#latent").inner_text()
    assert "Nothing was measured" in page.locator("#latent").inner_text()
    page.evaluate("location.hash = '#latent-99'")
    page.get_by_role("heading", name="Latent 99").wait_for()
    assert "it never fired" in page.locator("#latent").inner_text()
    page.get_by_role("link", name="Measures").click()
    page.get_by_role("heading", name="Measures on held-out text").wait_for()
    assert page.problems == []
    page.close()


def test_each_context_stands_once_in_each_models_tokens(browser: Any, small: Path) -> None:
    page = opened(browser, small, "#latent-1")
    lines = page.locator(".context-box").first.locator(".tokens")
    tokens = [lines.nth(i).locator(".token").all_inner_texts() for i in (0, 1)]
    assert tokens == [["The", " cat", " sat", "↵"], ["The", " c", "at", " sat↵"]]
    left, right = (lines.nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] < right["x"]
    assert page.locator(".context-box h4, h4:has-text('Max-activating examples')").count() == 1
    assert page.get_by_text("Quantile 1 of 1 of its activations").count() == 1
    assert "document 7, A's token 31, B's token 29" in page.locator(".where").first.inner_text()
    page.close()


def test_activations_are_told_by_shade_by_hovering_and_in_words(browser: Any, small: Path) -> None:
    page = opened(browser, small, "#latent-1")
    shades = page.locator(".tokens").first.locator(".fires")
    color = "el => getComputedStyle(el).backgroundColor"
    assert shades.nth(0).evaluate(color) != shades.nth(1).evaluate(color)
    below = "el => getComputedStyle(el).boxShadow"  # thickness, for those who do not see the hue
    assert shades.nth(0).evaluate(below) != shades.nth(1).evaluate(below)
    assert [shades.nth(i).get_attribute("title") for i in (0, 1)] == ["2", "0.500"]
    tree = page.locator(".tokens").first.aria_snapshot()
    assert "cat" in tree and "(2)" in tree and "(0.500)" in tree
    hidden = page.locator(".tokens .value").first
    assert hidden.bounding_box()["width"] <= 1
    page.get_by_label("show values").check()
    assert hidden.bounding_box()["width"] > 5
    page.close()


def test_a_latents_page_tells_evidence_logits_findings_and_samples(
    browser: Any, small: Path
) -> None:
    page = opened(browser, small, "#latent-1")
    text = page.locator("#latent").inner_text()
    evidence = page.locator(".evidence tr", has_text="Firing predicted from B (AUROC)").inner_text()
    assert "0.600" in evidence and "0.950 (0.900 to 0.990): latents both models have" in evidence
    assert (
        "0.110 ± 0.020"
        in page.locator(".evidence tr", has_text="Latent scaling, error").inner_text()
    )
    assert (
        "not measured"
        in page.locator(".evidence tr", has_text="Direction explained by B").inner_text()
    )
    assert "{source}" not in text and "{target}" not in text
    assert page.locator(".logits").all_inner_texts()[0].split() == [
        "raises",
        "logit",
        "purr",
        "0.900",
    ]
    for part in ("confirmed", "It moves A more", "names of cats", "0.500 [0.400, 0.600]"):
        assert part in text
    sample = page.locator(".sample")
    assert sample.count() == 1 and "add, strength 4" in sample.inner_text()
    sides = sample.locator(".pair > div").all_inner_texts()
    assert "a dog, and\nold." in sides[0] and "a cat cat." in sides[0]
    assert "the same text" in sides[1] and "a bird." in sides[1]
    assert sample.locator("ins").all_inner_texts() == ["cat cat."]
    assert page.locator("#finding-1").count() == 1  # the copy has no id of its own
    page.evaluate("location.hash = '#latent-2'")
    page.get_by_role("heading", name="Latent 2").wait_for()
    assert "Firing predicted from A (AUROC)" in page.locator("#latent").inner_text()
    page.close()


def test_hostile_text_is_shown_and_not_run(browser: Any, small: Path) -> None:
    page = opened(browser, small, "#latent-2")
    assert page.title() == f"Latent 2 · llama × {HOSTILE}"
    assert HOSTILE in page.locator(".tokens .token").nth(1).inner_text()
    assert page.locator("#latent img, #latent script, #overview img").count() == 0
    assert [url[:7] for url in page.requests] == ["file://"] and page.problems == []
    page.close()


def test_text_cannot_turn_what_is_around_it(browser: Any, small: Path) -> None:
    page = opened(browser, small, "#latent-3")
    assert "⟨U+202E⟩evil⟨U+2066⟩" in page.locator(".tokens").first.inner_text()
    assert (
        page.locator(".tokens").first.evaluate("el => getComputedStyle(el).unicodeBidi")
        == "isolate"
    )
    page.close()


@pytest.mark.slow
def test_a_huge_token_leaves_the_page_as_wide_and_its_box_scrolls(
    browser: Any, small: Path
) -> None:
    for width in (1200, 390):
        page = opened(browser, small, "#latent-4", viewport={"width": width, "height": 800})
        assert page.locator(".tokens .token").nth(1).inner_text() == HUGE
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator(".tokens").first.bounding_box()["height"] < 300
        page.get_by_role("link", name="All latents").click()
        page.locator("#table").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        heights = [
            row.bounding_box()["height"] for row in page.locator("#table tbody tr:not(.gap)").all()
        ]
        assert max(heights) - min(heights) < 1
        page.close()


def test_the_keyboard_alone_finds_and_opens_a_latent(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    assert page.locator(".skip").evaluate("el => getComputedStyle(el).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.url.endswith("#summary")
    page.get_by_role("columnheader", name="firing rate").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert latents_in_view(page)[0] == 1
    assert page.evaluate("document.activeElement.textContent").startswith("firing rate")
    page.locator("#table tbody a").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "3"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "4"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Latent 4").wait_for()


def test_everything_that_is_used_has_a_name(page: Any) -> None:
    nameless = """() => [...document.querySelectorAll("a, button, input, select, [role=region], svg[role=img]")]
        .filter(el => !(el.textContent.trim() || el.ariaLabel || el.labels?.length)).map(el => el.outerHTML)"""
    assert page.evaluate(nameless) == []
    # drawings without a name are not read out
    assert (
        page.locator("svg:not([aria-hidden=true]):not([role=img])").count()
        == page.locator("svg[aria-hidden=true] svg").count()
    )
    assert page.locator("main:visible").count() == 1
    levels = [
        int(el.evaluate("el => el.tagName[1]")) for el in page.locator("h1, h2, h3, h4").all()
    ]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colors) => {  // colors from the page up to the text's own background
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const el of document.querySelectorAll("body *")) {
    const text = [...el.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
    if (!text || !el.checkVisibility() || el.closest("title, noscript, option")) continue;
    const chain = [];
    for (let at = el; at; at = at.parentElement) chain.unshift(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(el);
    const ground = over(["white", ...chain]);
    const ink = over([`rgb(${ground})`, el.closest("svg") ? style.fill : style.color]);
    const [low, high] = [light(ground), light(ink)].sort((x, y) => x - y);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("hash_", ["", "#latent-1", "#latent-2", "#latent-3"])
def test_all_text_stands_out_from_its_ground(
    browser: Any, small: Path, scheme: str, hash_: str
) -> None:
    page = opened(browser, small, hash_, color_scheme=scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 380) == (scheme == "light")
    page.close()


def test_without_javascript_verdicts_and_measures_are_there(browser: Any, small: Path) -> None:
    context_ = browser.new_context(java_script_enabled=False)
    page = context_.new_page()
    page.goto(small.as_uri())
    text = page.locator("body").inner_text()
    for part in (
        "reached the end of the screening",
        "names of cats",
        "0.800 ± 0.010",
        "need JavaScript",
    ):
        assert part in text
    assert page.locator("#controls").is_hidden() and page.locator("#rows").is_hidden()
    context_.close()


@pytest.mark.slow
def test_two_thousand_latents_fit_and_open_at_once(browser: Any, large: Path) -> None:
    assert large.stat().st_size < 20e6
    page = opened(browser, large)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        """Seconds of this page's main thread: what another program takes of the machine does not
        count."""
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    before = busy()
    page.reload()
    page.locator("#table tbody a").first.wait_for()
    assert busy() - before < 2
    assert page.locator("#table tbody tr").count() < 150
    before = busy()
    page.get_by_role("searchbox").fill("w1234x")
    assert latents_in_view(page) == [1234]
    page.get_by_role("searchbox").fill("")
    page.get_by_role("columnheader", name="firing rate").get_by_role("button").click()
    rates = sorted(((i * 7919) % 2000, -i) for i in range(2000))[::-1]
    assert latents_in_view(page)[:30] == [-i for _, i in rates][:30]
    assert busy() - before < 2
    page.close()


@pytest.mark.slow
def test_rows_come_as_one_scrolls_and_the_focus_stays(browser: Any, large: Path) -> None:
    page = opened(browser, large)
    page.locator("#rows").evaluate("el => { el.scrollTop = 34 * 1000 }")
    page.get_by_role("link", name="1005", exact=True).wait_for()
    box, row = (page.locator(s).bounding_box() for s in ("#rows", "[data-at='1005']"))
    assert box["y"] < row["y"] < box["y"] + box["height"]
    assert page.locator("[data-at='1005']").get_attribute("aria-rowindex") == "1007"
    page.get_by_role("link", name="1005", exact=True).focus()
    for _ in range(60):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "1065"
    page.locator("#rows").evaluate("el => { el.scrollTop += 200 }")
    page.wait_for_timeout(100)
    assert page.evaluate("document.activeElement.textContent") == "1065"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Latent 1065").wait_for()
    page.go_back()
    page.locator("#overview").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "1065"
    page.close()


@pytest.mark.slow
def test_paper_gets_the_first_rows_and_says_how_many_more(browser: Any, large: Path) -> None:
    page = opened(browser, large)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.set_viewport_size({"width": 720, "height": 1000})
    rows = page.locator("#table tbody tr")
    assert rows.count() == 201
    assert latents_in_view(page) == list(range(200))
    assert page.evaluate("document.documentElement.scrollWidth") == 720
    assert rows.last.inner_text() == "and 1,800 more, on the page"
    assert page.locator("#controls").is_hidden() and page.locator("header nav").is_hidden()
    box = page.locator("#rows").bounding_box()
    assert box["height"] > 200 * 15  # nothing is left inside a box that scrolls
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert rows.count() < 150
    assert page.pdf().startswith(b"%PDF")
    page.close()
