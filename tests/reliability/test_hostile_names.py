"""Names from untrusted files are shown, never interpreted, by a terminal, a page, Markdown or
JSON."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from sae_lens_dfc import CrosscoderRunnerConfig, DFCTrainingCrosscoderConfig, ModelConfig
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.build import report_settings
from sae_lens_dfc.analysis.report.model_card import render_card
from sae_lens_dfc.analysis.report.page import ReportData, render_report
from sae_lens_dfc.analysis.saved_run.held_out import run_config
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.core.terminal import printable
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from tests.helpers import make_firing_dfc
from tests.reliability.hostile import changed_json

ORDERS = {
    "clears the screen": "\x1b[2J\x1b[H",
    "names the window": "\x1b]0;mine\x07",
    "in one character": "\x9b31m",
    "goes back over the line": "fine\rerror",
    "deletes": "\x08\x08\x08",
    "turns the text around": "\u202egnp.exe",
    "ends the line": "\nsae-lens-dfc: all is well",
    "ends the line in Unicode": "\u2028\x85sae-lens-dfc: all is well",
    "a script": "</script><script>alert(1)</script>",
    "an attribute": '" onload="alert(1)',
    "an image": "<img src=http://evil/?x>",
    "Markdown": "](http://evil) | x | `y` # z",
    "a template": "{{ 7 * 7 }}{% raw %}",
    "half of a character": "\ud800",
}


class Active(HTMLParser):
    """All that a page would run or fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        runs = any(name.startswith("on") for name in values)
        fetches = any("evil" in (values.get(name) or "") for name in ("src", "href"))
        if runs or fetches or tag in ("script", "img", "iframe", "base", "meta", "link", "style"):
            self.found.append((tag, values))


def page(name: str) -> str:
    metrics: dict[str, float] = {"l0": 3.0}
    shown: dict[str, Any] = {"model_a.model_name": name, "dataset_path": name, name: "value"}
    return render_report(ReportData(name, name, shown, metrics, {}, []))


@pytest.mark.parametrize("what", ORDERS)
def test_a_report_shows_names_as_text(what: str) -> None:
    name, plain = ORDERS[what], page("plain")
    hostile = page(name)
    assert Active(hostile).found == Active(plain).found
    assert hostile.count("<script") == plain.count("<script")
    controls = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]"
    assert re.findall(controls, hostile) == re.findall(controls, plain)


def from_metadata(folder: Path, name: str) -> str:
    make_firing_dfc().save_model(folder)
    model = {"model_name": name, "hook_name": name, name: name}
    changed_json(
        folder / "cfg.json",
        metadata__model_a=model,
        metadata__model_b=model,
        metadata__dataset_path=name,
        metadata__context_size=name,
    )
    return render_card(load_crosscoder(folder), "me/pair", {"l0": 3.0, name: 1.0})


@pytest.mark.parametrize("what", ORDERS)
def test_a_card_shows_names_as_text(what: str, tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    card = from_metadata(tmp_path / "saved", ORDERS[what])
    plain = from_metadata(tmp_path / "plain", "plain")
    rendered = [
        markdown_it.MarkdownIt("commonmark").enable("table").render(text) for text in (card, plain)
    ]
    tags = [re.findall("<[a-z/][^>]*", html) for html in rendered]
    assert tags[0] == tags[1]
    assert "evil" not in re.sub(">[^<]*<", "><", rendered[0])
    assert card.count("\n") == plain.count("\n")


@pytest.mark.parametrize("what", ORDERS)
def test_an_error_is_one_printable_line(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_firing_dfc().save_model(tmp_path)
    changed_json(tmp_path / "cfg.json", architecture=f"x{ORDERS[what]}")
    assert main(["evaluate", str(tmp_path)]) == 1
    shown = capfd.readouterr().err
    assert shown.endswith("\n") and shown[:-1].isprintable()
    # Names of folders come into it without quotation marks.
    folder = tmp_path / f"run{ORDERS[what].replace('/', '-')}".encode("utf-8", "replace").decode()
    folder.mkdir()
    assert main(["evaluate", str(folder)]) == 1
    assert capfd.readouterr().err[:-1].isprintable()


@pytest.mark.parametrize("what", ORDERS)
def test_orders_to_a_terminal_are_spelled_out(what: str) -> None:
    text = ORDERS[what]
    shown = printable(f"a{text}b")
    assert not set(shown) & set("\x1b\x9b\x07\x08\r\u202e\u2028\x85")
    # JSON, in which they stand as they are, means what it meant.
    assert json.loads(printable(json.dumps({"a": text}, ensure_ascii=False))) == {"a": text}


def test_the_settings_of_a_run_come_to_the_page_as_they_are(
    tmp_path: Path, llama_folder: Path
) -> None:
    name = "".join(ORDERS.values())
    cfg = CrosscoderRunnerConfig(
        sae=DFCTrainingCrosscoderConfig(d_sae=64, k=4, d_a=5, d_b=7),
        model_a=ModelConfig(str(llama_folder), hook_name=name, chat_template=name),
        model_b=ModelConfig(name),
        dataset_path=name,
    )
    (tmp_path / "runner_cfg.json").write_text(json.dumps(cfg.to_dict()))
    found = report_settings(run_config(str(tmp_path), HeldOutOptions()))
    assert found["model_b.model_name"] == name == found["dataset_path"]
    html = render_report(ReportData(name, name, found, {"l0": 3.0}, {}, []))
    assert Active(html).found == Active(page("plain")).found
