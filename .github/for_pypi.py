"""Writes a checkout's addresses into it before a release is built: `python .github/for_pypi.py
OWNER/REPOSITORY TAG`.

The README's links are relative, as they work in the repository and on any copy of it, and PyPI
shows the same README elsewhere. What is written is for the build alone and is not committed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def absolute_links(markdown: str, repository: str, tag: str) -> str:
    """Relative links and pictures as those of a tag.

    Args:
        markdown: A page that lies at the top of the repository.
        repository: Owner and name on GitHub.
        tag: The tag, or a branch.

    >>> absolute_links("[a](docs/a.md#b) ![c](c.png) [d](https://e.org)", "me/mine", "v1")
    '[a](https://github.com/me/mine/blob/v1/docs/a.md#b) ![c](https://raw.githubusercontent.com/me/mine/v1/c.png) [d](https://e.org)'
    """
    page = f"https://github.com/{repository}/blob/{tag}"
    raw = f"https://raw.githubusercontent.com/{repository}/{tag}"
    return LINK.sub(lambda m: f"{m[1]}[{m[2]}]({raw if m[1] else page}/{m[3]})", markdown)


def with_urls(pyproject: str, repository: str, tag: str) -> str:
    """A pyproject.toml whose `[project.urls]` begins with the repository's.

    Raises:
        ValueError: It has no such table.
    """
    owner, name = repository.split("/")
    address = f"https://github.com/{repository}"
    urls = {
        "Homepage": address,
        "Documentation": f"https://{owner}.github.io/{name}/",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    table = "[project.urls]\n"
    if pyproject.count(table) != 1:
        raise ValueError("pyproject.toml has no [project.urls] to write the addresses to.")
    lines = "".join(f'{label} = "{url}"\n' for label, url in urls.items())
    return pyproject.replace(table, table + lines)


def main(repository: str, tag: str) -> None:
    for file, changed in (("README.md", absolute_links), ("pyproject.toml", with_urls)):
        path = ROOT / file
        path.write_text(changed(path.read_text("utf-8"), repository, tag), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
