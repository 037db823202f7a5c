"""Reference that is made when the site is built: the command line from its dataclasses, and the
public names."""

import dataclasses
import re
from typing import Any, get_type_hints

from mkdocs.structure.pages import Page
from simple_parsing.docstring import get_attribute_docstring

import sae_lens_dfc
from sae_lens_dfc.cli.arguments import SHORT
from sae_lens_dfc.cli.main import options_class
from sae_lens_dfc.cli.train import ARCHITECTURES
from sae_lens_dfc.training.recipes.named import RECIPES

MARK = re.compile(r"<!-- (command|architecture|recipes|short|names)(?: ([\w-]+))? -->")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if not page.file.src_uri.startswith("reference/"):
        return markdown
    # Who looks for a word wants a guide first.
    page.meta["search"] = {"boost": 0.3}
    makers = {
        "command": lambda name: options_table(options_class(name)),
        "architecture": lambda name: options_table(ARCHITECTURES[name], "sae."),
        "recipes": lambda _: recipes_table(),
        "short": lambda _: short_table(),
        "names": lambda _: names_table(),
    }
    return MARK.sub(lambda m: makers[m[1]](m[2]), markdown)


def options_table(options: type, prefix: str = "") -> str:
    """What a command does, and a table of its flags with their defaults."""
    rows = [
        f"| {_flag(name, default)} | {_default(default)} | {_cell(text)} |"
        for name, default, text in flags(options, prefix)
    ]
    head = _prose(options) if not prefix else ""
    return "\n".join([head, "", "| flag | default | what it is |", "|---|---|---|", *rows])


def flags(options: type, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Each flag of a dataclass by name, with its default and what its field says; parts by their
    dotted names.

    An argument without a name (RUN) has no dashes. A crosscoder's own flags are in tables of their
    own.
    """
    found: list[tuple[str, Any, str]] = []
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.metadata.get("cmd") is False or not field.init:
            continue
        part, doc = hints[field.name], get_attribute_docstring(options, field.name).docstring_below
        if field.name == "sae":
            found.append(("--architecture", "dfc", f"{doc} Its own flags are below."))
        elif dataclasses.is_dataclass(part) and isinstance(part, type):
            found += flags(part, f"{prefix}{field.name}.")
        elif field.metadata.get("positional"):
            found.append((_metavar(field), dataclasses.MISSING, doc))
        else:
            name = f"--{prefix}{field.name}".replace("_", "-")
            found.append((name, _value(field), doc))
    return found


def recipes_table() -> str:
    rows = [
        f"| `{name}` | {r.summary} | {'; '.join(f'`{k}`: {why}' for k, why in r.required.items())} |"
        for name, r in RECIPES.items()
    ]
    return "\n".join(["| recipe | what it is | what it asks for |", "|---|---|---|", *rows])


def short_table() -> str:
    """The short names of flags in `train` and its like."""
    rows = [
        f"| `{flag}` | {', '.join(f'`{name}`' for name in names)} | {text} |"
        for flag, (names, text) in SHORT["train"].items()
    ]
    return "\n".join(["| short | flag | what it is |", "|---|---|---|", *rows])


def names_table() -> str:
    """The names that `sae_lens_dfc` itself exports, with their first line."""
    rows = ["| `from sae_lens_dfc import …` | what it is |", "|---|---|"]
    for name in sae_lens_dfc.__all__:
        value = getattr(sae_lens_dfc, name)
        rows.append(f"| [`{name}`][{value.__module__}.{name}] | {_prose(value)} |")
    return "\n".join(rows)


def _prose(value: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((value.__doc__ or "").split("\n\n")[0].split())


def _metavar(field: "dataclasses.Field[Any]") -> str:
    return field.metadata.get("custom_args", {}).get("metavar") or field.name


def _value(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _flag(name: str, default: Any) -> str:
    return f"`{name}`" + (" *" if default is dataclasses.MISSING and name.startswith("--") else "")


def _default(default: Any) -> str:
    if default is dataclasses.MISSING or default is None or default in ("", []):
        return ""
    return f"`{default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
