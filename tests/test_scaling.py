import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's code defines, after it gave what the page says."""
    code = doctest.DocTestParser().get_doctest(PAGE.read_text("utf-8"), {}, "scaling", None, None)
    runner = doctest.DocTestRunner()
    assert runner.run(code, clear_globs=False).failed == 0
    return code.globs


# Batch of each process by N, batch of one process alone, what is assumed.
ROWS: list[tuple[str, Callable[[int], float], int, dict[str, float]]] = [
    ("| 2048 in each process | bfloat16", lambda _: 2048, 2048, {}),
    ("| | the same, gradients sent in bfloat16", lambda _: 2048, 2048, {"bytes_per_gradient": 2}),
    ("| | float32", lambda _: 2048, 2048, {"coarse": False}),
    ("| 8192 in each process", lambda _: 8192, 8192, {}),
    ("| 2048 in total | bfloat16", lambda n: 2048 / n, 2048, {}),
]


@pytest.mark.parametrize(("start", "rows", "alone", "assumed"), ROWS)
def test_the_table_of_efficiencies_is_what_the_formulas_give(
    page: dict[str, Any],
    start: str,
    rows: Callable[[int], float],
    alone: int,
    assumed: dict[str, float],
) -> None:
    (line,) = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(start)]
    printed = re.findall(r"(\d+) %", line)
    computed = [
        page["efficiency"](rows(n), n, alone, gb_per_s=speed, **assumed)
        for n, speed in ((8, 350), (64, 350), (64, 50))
    ]
    assert computed == [f"{share}%" for share in printed]
