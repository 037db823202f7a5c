"""Pages of the site that lie outside docs/, and links that work on the site as they do in the
repository."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files of the repository that are pages under another name. The README's reader is at the
index."""
SHOWN = ("benchmarks/README.md", "benchmarks/results/*", "tutorials/*.ipynb", "tutorials/*.png")
"""Files of the repository that have the same path on the site."""

LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)"
)
FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r'<img [^>]*src="(assets/data-flow\.svg)"[^>]*>')
FROM_ELSEWHERE = re.compile(
    r"<script(?=[^>]*src=\"https?:)[^>]*>\s*</script>|<script type=\"module\">\s*import mermaid.*?</script>",
    flags=re.DOTALL,
)


def notebooks() -> list[str]:
    return sorted(f"tutorials/{path.name}" for path in ROOT.glob("tutorials/*.ipynb"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    filled: list[Any] = []
    for item in config.nav or []:
        if item != {"Tutorials": "tutorials"}:
            filled.append(item)
        elif notebooks():
            filled.append({"Tutorials": list(notebooks())})
    config.nav = filled
    return config


# Before mkdocs-jupyter looks for notebooks.
@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for repo, site in ELSEWHERE.items():
        if site != "index.md":
            files.append(File.generated(config, site, abs_src_path=str(ROOT / repo)))
    shown = [f for pattern in SHOWN for f in sorted(ROOT.glob(pattern)) if f.is_file()]
    for file in shown:
        # Not generated: mkdocs-jupyter reads a file from its folder.
        path = file.relative_to(ROOT).as_posix()
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Links as the repository has them -> links of the site; what is not on the site stays as
    text."""
    # Code says what it says.
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    text = LINK.sub(lambda m: _on_the_site(m, page, files), FENCE.sub(keep, markdown))
    return re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], text)


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Our own pictures become part of the page, where its colors reach them; notebooks get the
    site's links.

    mkdocs-jupyter leaves links as they are, and loads two libraries from elsewhere that none of our
    notebooks uses.
    """
    html = PICTURE.sub(lambda m: (ROOT / "docs" / m[1]).read_text(encoding="utf-8"), html)
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def link(match: re.Match[str]) -> str:
        site = _site_path(page.file.src_uri, match[1])
        file = None if site is None else files.get_file_from_path(site)
        return match[0] if file is None else f'href="{file.url_relative_to(page.file)}'

    html = re.sub(r'href="(?!https?:|mailto:|#|data:)([^"#]+)', link, html)
    return FROM_ELSEWHERE.sub("", html)


def _on_the_site(match: re.Match[str], page: Page, files: Files) -> str:
    mark, text, target, anchor = match.groups()
    site = _site_path(page.file.src_uri, target)
    if site is None:
        return match[0]  # MkDocs says that there is no such file
    if files.get_file_from_path(site) is None:
        return text
    there = posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")
    return f"{mark}[{text}]({there}{anchor or ''})"


def _site_path(src_uri: str, target: str) -> str | None:
    """Where a link of a page leads on the site, if the repository has such a file."""
    repo = {site: repo for repo, site in ELSEWHERE.items() if site != "index.md"}.get(src_uri)
    if repo is None:
        repo = src_uri if (ROOT / src_uri).exists() else f"docs/{src_uri}"
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(repo), target))
    if not (ROOT / linked).exists():
        return None
    return ELSEWHERE.get(linked, linked.removeprefix("docs/"))
