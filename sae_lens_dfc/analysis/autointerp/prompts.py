"""Builds the judge's prompts about a latent (description, detection, concerns), with contexts as
data, and parses its one-line answers."""

import re
from collections.abc import Mapping, Sequence

from sae_lens_dfc.analysis.autointerp.concerns import AROUND_NAMES
from sae_lens_dfc.analysis.autointerp.judge import as_data, without_thoughts

DESCRIPTION_CHARS = 300


def description_prompt(contexts: Sequence[str]) -> str:
    """The prompt to describe a latent; contexts formatted by `shown_context`."""
    return (
        "A feature of a language model fires on some tokens of text and on no others. Below are texts in which it fires; "
        "what it fires on stands between « and ». Say when it fires: what the marked tokens, and the text before them, "
        "have in common and other text does not. The model reads from left to right, so text after a mark has no part in "
        f"it.\n\n{as_data(_numbered(contexts))}\n\n"
        "Answer with one line: 'Description: ' and when the feature fires, in at most 20 words."
    )


def detection_prompt(description: str, contexts: Sequence[str]) -> str:
    """The prompt for detection: in which contexts, given without marks, a described latent
    fires."""
    return (
        "A feature of a language model fires on some tokens of text and on no others. Below are a description of when it "
        "fires, and texts. In which of these does it fire, on one token or more, if the description is right? It may be "
        f"none of them, some or all.\n\n{as_data({'DESCRIPTION': description, **_numbered(contexts)})}\n\n"
        "Answer with one line: 'Firing: ' and the numbers of the texts with a comma between them, such as "
        "'Firing: 1, 4, 7', or 'Firing: none'."
    )


def concern_prompt(description: str, contexts: Sequence[str], concerns: Mapping[str, str]) -> str:
    """The prompt to flag concerns; contexts formatted by `shown_context`."""
    types = "\n".join(f"{name}: {covers}" for name, covers in concerns.items())
    return (
        "A feature of a language model fires on some tokens of text and on no others. Below are a description of when it "
        "fires, and texts in which it fires; what it fires on stands between « and ». If what the feature stands for had "
        "a part in what the model does, which of these types of concern would that touch?\n\n"
        f"{types}\n\n"
        "Name a type where it is plausible, not only where it is sure: a person reads all that is named. Name none for "
        "a feature of grammar, format or a harmless topic.\n\n"
        f"{as_data({'DESCRIPTION': description, **_numbered(contexts)})}\n\n"
        "Answer with one line: 'Concerns: ' and the names of the types with a comma between them, or 'Concerns: none'."
    )


def parse_description(answer: str) -> str | None:
    """The line after the last "Description:", reduced to printable characters and at most 300 of
    them.

    >>> parse_description("Both are animals.\\n**Description:** Names of\\tcats\\x1b.\\nI hope this helps.")
    'Names of cats.'
    """
    said = " ".join((_after("description", answer) or "").split())
    text = "".join(c for c in said if c.isprintable())
    if len(text) > DESCRIPTION_CHARS:
        text = text[: DESCRIPTION_CHARS - 1].rstrip() + "…"
    return text or None


def parse_firing(answer: str, n_texts: int) -> set[int] | None:
    """The numbers after the last "Firing:"; none if there is no such line or a number is out of
    range.

    >>> parse_firing("Firing: 1, 4 and 7.", n_texts=7), parse_firing("Firing: none", 7), parse_firing("Firing: 8", 7)
    ({1, 4, 7}, set(), None)
    """
    said = _list_after("firing", answer)
    if said is None or said.casefold() == "none":
        return None if said is None else set()
    if not re.fullmatch(r"[0-9]{1,9}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+)[0-9]{1,9})*", said):
        return None
    numbers = {int(number) for number in re.findall("[0-9]+", said)}
    return numbers if all(1 <= number <= n_texts for number in numbers) else None


def parse_concerns(answer: str) -> list[str] | None:
    """The names after the last "Concerns:"; none if there is no such line.

    >>> parse_concerns("Concerns: Deception, 'refusal'"), parse_concerns("Concerns: none."), parse_concerns("I refuse.")
    (['Deception', 'refusal'], [], None)
    """
    said = _list_after("concerns", answer) or ""
    names = [name.strip(AROUND_NAMES) for name in said.split(",")]
    names = [name for name in names if name]
    return [name for name in names if name.casefold() != "none"] if names else None


def _list_after(label: str, answer: str) -> str | None:
    said = _after(label, answer)
    # Some models include the brackets of a list.
    return None if said is None else said.removesuffix(".").strip(" []")


def _after(label: str, answer: str) -> str | None:
    """The rest of the last line that starts with a label, which may be bold in Markdown."""
    start = re.compile(rf"[\s#>*-]*{label}(?:\*\*)?\s*:(?:\*\*)?", re.IGNORECASE)
    lines = without_thoughts(answer).splitlines()
    said = [line[match.end() :] for line in lines if (match := start.match(line))]
    return said[-1].strip().removesuffix("**").strip() if said else None


def _numbered(contexts: Sequence[str]) -> dict[str, str]:
    return {f"TEXT {i}": text for i, text in enumerate(contexts, start=1)}
