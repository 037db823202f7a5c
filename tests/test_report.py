import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_lens_dfc.latents import ContextView, LatentCard, SegmentView
from sae_lens_dfc.report import ReportData, measures_table, render_report, text_table

HOSTILE = "<script>document.title='pwned'</script><img src=http://example.com/x onerror=alert(1)>"


def card(partition: str, latent: int = 3, text: str = " cat") -> LatentCard:
    return LatentCard(
        latent=latent,
        partition=partition,
        firing_rate=0.012,
        mean_activation=1.5,
        max_activation=2.0,
        relative_decoder_norm=1.0,
        encoder_decoder_cosine={"a": 0.5},
        contexts=[
            ContextView(
                segments=[
                    SegmentView(["The"], ["The"], 0.0),
                    SegmentView([text], [text[:2], text[2:]], 2.0),
                    SegmentView([" sat", "\n"], [" sat\n"], 0.5),
                ],
                document=0,
                position_a=2,
                position_b=3,
                activation=2.0,
                quantile=None,
            )
        ],
        logit_effects={},
        evidence={},
    )


def data(**overrides: Any) -> ReportData:
    defaults: dict[str, Any] = {
        "name_a": "llama",
        "name_b": "gpt2",
        "settings": {"sae.k": 32, "dataset_path": "docs"},
        "metrics": {
            "explained_variance/a": 0.8,
            "null/self/explained_variance/a": 0.9,
            "leak": 0.0,
        },
        "histogram": {
            "a_exclusive": [0, 0, 0, 5],
            "b_exclusive": [4, 0, 0, 0],
            "shared": [0, 9, 1, 0],
        },
        "cards": [card("a_exclusive", 1), card("b_exclusive", 2), card("shared", 3)],
    }
    return ReportData(**{**defaults, **overrides})


def test_table_keeps_only_rows_and_columns_that_hold_a_number() -> None:
    head, rows = measures_table({"l0": 3.0, "baseline/pca/explained_variance/a": 0.25})
    assert head == ["measure", "this run", "PCA, k components"]
    assert rows == [
        ["Explained variance, A", "", "0.250"],
        ["Active latents on a pair (L0)", "3.000", ""],
    ]


def test_terminal_table_lines_up() -> None:
    lines = text_table(["m", "run"], [["long name", "1"], ["x", "1000.5"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_page_without_null_says_so() -> None:
    assert "This page has no null" in render_report(data(metrics={"l0": 1.0}))
    assert "same pipeline on pairs that have nothing to find" in render_report(data())


def test_everything_foreign_is_escaped() -> None:
    page = render_report(
        data(
            name_a=HOSTILE,
            settings={HOSTILE: HOSTILE},
            cards=[card("a_exclusive", text=HOSTILE)],
        )
    )
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;" in page


@pytest.fixture(scope="module")
def page_in_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    cards = [card("a_exclusive", 1, HOSTILE), card("b_exclusive", 2), card("shared", 3)]
    path.write_text(render_report(data(cards=cards, name_b=HOSTILE)), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page()
        page.requests, page.problems = [], []  # type: ignore[attr-defined]
        page.on("request", lambda request: page.requests.append(request.url))  # type: ignore[attr-defined]
        page.on("pageerror", lambda error: page.problems.append(str(error)))  # type: ignore[attr-defined]
        page.on("console", lambda message: page.problems.append(message.text))  # type: ignore[attr-defined]
        page.goto(path.as_uri())
        yield page
        browser.close()


def test_page_opens_alone_without_errors(page_in_browser: Any) -> None:
    assert [url[:7] for url in page_in_browser.requests] == ["file://"]
    assert page_in_browser.problems == []


def test_hostile_text_is_shown_and_not_run(page_in_browser: Any) -> None:
    assert page_in_browser.title() == f"llama × {HOSTILE}"
    assert HOSTILE in page_in_browser.locator(".context").first.inner_text()
    assert page_in_browser.locator("article img, article script").count() == 0


def test_page_shows_measures_histogram_and_latents_of_each_partition(page_in_browser: Any) -> None:
    assert page_in_browser.locator("#measures tr").count() == 3
    assert "0.800" in page_in_browser.locator("#measures").inner_text()
    bars = page_in_browser.locator("#histogram rect")
    assert bars.count() == 4
    assert all(bars.nth(i).bounding_box()["height"] > 0 for i in range(4))
    assert page_in_browser.locator("article.latent").count() == 3
    assert page_in_browser.locator("section.b_exclusive article").count() == 1


def test_each_context_stands_once_in_each_models_tokens(page_in_browser: Any) -> None:
    lines = page_in_browser.locator("section.shared .context > div")
    assert [lines.nth(i).inner_text() for i in (0, 1)] == ["AThe cat sat↵", "BThe cat sat↵"]
    tokens = [lines.nth(i).locator(".token").all_inner_texts() for i in (0, 1)]
    assert tokens == [["The", " cat", " sat", "↵"], ["The", " c", "at", " sat↵"]]


def test_the_strongest_token_is_shaded_most(page_in_browser: Any) -> None:
    shades = page_in_browser.locator("section.shared .context > div").first.locator(".fires")
    assert [shades.nth(i).get_attribute("style") for i in range(2)] == ["--p: 100%", "--p: 25%"]
    colour = "el => getComputedStyle(el).backgroundColor"
    assert shades.nth(0).evaluate(colour) != shades.nth(1).evaluate(colour)
