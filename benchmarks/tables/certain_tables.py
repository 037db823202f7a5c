"""Formats the tables of the benchmark of certain differences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.tables.tables import Rows, Table
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE

SIDES = {A_EXCLUSIVE: "A", B_EXCLUSIVE: "B"}
NULLS = {
    "language-tiny": "one model twice",
    "withheld": "two models of the same text",
    "language-real": "SmolLM2 twice",
}

NOTHING = {"language-real": "not certain"}
"""What is said of a side whose model alone knows nothing for certain: SmolLM2 may represent
spellings that Gemma does not."""


def case_name(row: Mapping[str, Any]) -> str:
    """A row's case in words.

    >>> case_name({"certain_case": "withheld", "share": 0.05, "is_null": False})
    'withheld, 5 %'
    >>> case_name({"certain_case": "withheld", "share": 0.2, "is_null": True})
    'null: two models of the same text'
    >>> case_name({"certain_case": "language-tiny", "share": 0.0, "is_null": True})
    'null: one model twice'
    """
    case = row["certain_case"]
    if row["is_null"]:
        return f"null: {NULLS[case]}"
    return f"{case}, {100 * row['share']:g} %" if row["share"] > 0 else case


def rows_by_case(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each case."""
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(case_name(row), []).append(row)
    return cases


def certain_tables(rows: Rows) -> Iterator[Table]:
    """What is called in each case, and the model that the loss with the other's map names."""
    head = [
        "",
        "runs",
        "judged",
        "called, by run",
        "of them on what only this model knows",
        "exclusive latents that fire 100 times: called",
        "called and tested causally: exclusive and used",
    ]
    cells = [head]
    for case, own in rows_by_case(rows).items():
        for side, model in SIDES.items():
            scores = [row["score"][side] for row in own]
            called = _sum(scores, "called")
            right = f"{_sum(scores, 'right')} of {called}"
            if side not in own[0]["known_to"]:
                right = NOTHING.get(case, "nothing to find")
            often = f"{_sum(scores, 'often_called')} of {_sum(scores, 'often')}"
            name = f"{case}: {model}"
            calls = ", ".join(str(score["called"]) for score in scores)
            tests = [row["used"][side] for row in own]
            used = f"{_sum(tests, 'used')} of {_sum(tests, 'tested')}"
            judged = str(_sum(scores, "judged"))
            cells.append([name, str(len(own)), judged, calls, right, often, used])
    yield Table("Latents called exclusive, with evidence", cells)
    yield in_both_table(rows)
    yield Table("Model that knows more, by the loss with the other's map in place", _named(rows))


def in_both_table(rows: Rows) -> Table:
    """The verdicts on shared latents that were ablated in both models."""
    head = ["", "runs", "tested because the other model predicts worse", "used differently, by run"]
    cells = [[*head, "of them on what only this model knows", "for comparison: used alike"]]
    measured = [row for row in rows if "in_both" in row]
    for case, own in rows_by_case(measured).items():
        for side, model in SIDES.items():
            tests = [row["in_both"][side] for row in own]
            by_run = ", ".join(str(counts["different"]) for counts in tests)
            right = f"{_sum(tests, 'different_right')} of {_sum(tests, 'different')}"
            worse = f"{_sum(tests, 'worse')}, {_sum(tests, 'worse_right')} on what only this model knows"
            if side not in own[0]["known_to"]:
                right = NOTHING.get(case, "nothing to find")
                worse = str(_sum(tests, "worse"))
            alike = f"{_sum(tests, 'alike')} of {_sum(tests, 'others')}"
            cells.append([f"{case}: {model}", str(len(own)), worse, by_run, right, alike])
    return Table("Shared latents, ablated in both models", cells)


def _named(rows: Rows) -> list[list[str]]:
    cells = [["", "text", "A named", "B named", "neither", "certain"]]
    for case, own in rows_by_case(rows).items():
        for language in own[0]["knows_more"]:
            named = [row["knows_more"][language] for row in own]
            known_to = own[0]["known_to"]
            certain = [m for side, m in SIDES.items() if language in known_to.get(side, ())]
            counts = [str(named.count(model)) for model in ("a", "b", None)]
            cells.append([case, language, *counts, *(certain or ["neither"])])
    return cells


def _sum(scores: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(score[name] for score in scores)
