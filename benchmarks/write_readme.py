"""Writes the tables between the marks of benchmarks/README.md, and the tables and pictures in
results/, from results/*.json.

    .venv/bin/python -m benchmarks.write_readme

A block begins with `<!-- NAME -->` and ends with `<!-- end -->`; all else is written by hand.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.planted.options import is_foreign
from benchmarks.suite import SUITE, present, results_in
from benchmarks.tables.certain_tables import in_both_table
from benchmarks.tables.planted_tables import foreign_table
from benchmarks.tables.tables import TOGETHER, Rows, Table, case_of
from sae_lens_dfc.analysis.report.tables import spread

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BLOCK = re.compile(r"(<!-- ([\w:-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def overview(name: str) -> str:
    """The first table of a benchmark and its picture."""
    rows = results_in(RESULTS).get(name)
    if rows is None:
        command = f"python -m benchmarks {name} --preset full --output benchmarks/results"
        return f"(No results are kept yet. `{command}` gives them.)"
    table = next(SUITE[name].tables(rows))
    return f"{table.markdown()}\n\n![{table.title}](results/{name}.svg)"


def foreign() -> str:
    """The planted differences beside an unrelated model."""
    rows = [r for r in results_in(RESULTS)["planted"] if is_foreign(r["organism"])]
    return foreign_table(rows).markdown() if rows else "(No results are kept yet.)"


def in_both() -> str:
    """Shared latents of pairs whose difference is certain, ablated in both models."""
    return in_both_table(results_in(RESULTS)["certain"]).markdown()


EVIDENCE_COLUMNS = {
    "exclusive_learned": "learned anywhere",
    "exclusive_recall": "recall of the partition",
    "exclusive_precision": "precision of the partition",
    "evidence_recall": "recall of the calls",
    "evidence_precision": "precision of the calls",
}
NULL_COLUMNS = {
    "exclusive_called": "exclusive latents alive",
    "evidence_called": "called with evidence",
}


def evidence(case: str) -> str:
    """What the calls with evidence find, on one kind of toy pair."""
    rows = [r for r in json.loads((RESULTS / "evidence.json").read_text()) if case_of(r) == case]
    columns = NULL_COLUMNS if case == "null" else EVIDENCE_COLUMNS
    title = "Null, where no feature is exclusive" if case == "null" else case
    return Table(title, _over_seeds(rows, "architecture", columns)).markdown()


SELECTION_COLUMNS = {
    "explained_variance/a": "explained variance A",
    "explained_variance/b": "explained variance B",
    "l0/a_exclusive": "L0 A-exclusive",
    "l0/b_exclusive": "L0 B-exclusive",
    "alive/a_exclusive": "alive A-exclusive",
    "alive/b_exclusive": "alive B-exclusive",
}


def selection() -> str:
    """What each way of selection leaves, on two models and on the null."""
    rows = json.loads((RESULTS / "selection.json").read_text())["rows"]
    for row in rows:
        row["variant"] = ("null: " if row["pair"] == "null" else "") + row["selection"]
        for model in ("a", "b"):
            dead = row.get(f"dead_fraction/{model}_exclusive")
            row[f"alive/{model}_exclusive"] = None if dead is None else 1 - dead
    rows.sort(key=lambda row: row["pair"] == "null")
    cells = _over_seeds(rows, "variant", SELECTION_COLUMNS, digits=3)
    return Table("Selection methods", cells).markdown()


def _over_seeds(
    rows: Rows, group: str, columns: dict[str, str], digits: int = 2
) -> list[list[str]]:
    names = dict.fromkeys(row[group] for row in rows)
    body = [
        [name, *(spread(_known(rows, group, name, column), digits) for column in columns)]
        for name in names
    ]
    return [["", *columns.values()], *body]


def _known(rows: Rows, group: str, name: str, column: str) -> list[Any]:
    return [r[column] for r in rows if r[group] == name and r.get(column) is not None]


BLOCKS: dict[str, Callable[[], str]] = {
    **{f"{name}:overview": partial(overview, name) for name in SUITE},
    "evidence:1": lambda: evidence("1 latent per feature"),
    "evidence:2": lambda: evidence("2 latents per feature"),
    "evidence:together": lambda: evidence(TOGETHER),
    "evidence:null": lambda: evidence("null"),
    "certain:in-both": in_both,
    "planted:foreign": foreign,
    "selection": selection,
}


def filled(text: str) -> str:
    """The page with every block as the results give it.

    Raises:
        KeyError: There is no block of a name.
    """
    return BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]]()}\n\n{m[3]}", text)


def main() -> None:
    for name in results_in(RESULTS):
        present(RESULTS, name)
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
