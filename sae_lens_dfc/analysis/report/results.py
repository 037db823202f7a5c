"""Writes and reads the result files metrics.json and latents.csv."""

import csv
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.report.page import ReportData, render_report
from sae_lens_dfc.core.parsing import read_object, read_text
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluate import Evaluation
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from sae_lens_dfc.metrics.firings_by_group import firings_by_group, top_group
from sae_lens_dfc.stats.jackknife import SE

LATENTS_FILENAME = "latents.csv"
METRICS_FILENAME = "metrics.json"
REPORT_FILENAME = "report.html"
BYTES_OF_A_LATENT = 2_000
"""Size limit of latents.csv per latent, in bytes; its roughly twenty numbers take a quarter of
this."""

logger = logging.getLogger(__name__)


METRICS_NAMED = 12
"""Maximum number of unmeasured metrics to name in the log."""


def drop_nonfinite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Drop NaN and infinite metrics, which JSON cannot represent, and log their names."""
    left_out = [name for name, value in metrics.items() if not math.isfinite(value)]
    named = [name for name in left_out if not name.endswith(SE)]
    if named:
        logger.warning(
            "Left out, since they are no finite numbers: %s%s",
            ", ".join(named[:METRICS_NAMED]),
            f" and {len(named) - METRICS_NAMED} more" if len(named) > METRICS_NAMED else "",
        )
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def write_results(folder: Path, page: ReportData, run: "Measured") -> None:
    """Write metrics.json, latents.csv and report.html."""
    (folder / METRICS_FILENAME).write_text(json.dumps(page.metrics, indent=2) + "\n")
    (folder / REPORT_FILENAME).write_text(render_report(page), encoding="utf-8")
    write_latents(folder / LATENTS_FILENAME, run)


def write_latents(path: Path, run: "Measured") -> None:
    """Write all measures of each latent, one line per latent."""
    crosscoder, (_, firing, evidence), groups = run
    columns: dict[str, Any] = {
        "latent": range(crosscoder.cfg.d_sae),
        "partition": [crosscoder.partition.name_of(i) for i in range(crosscoder.cfg.d_sae)],
        "firing_rate": firing.rates.tolist(),
        "mean_activation": firing.means.tolist(),
        "max_activation": firing.maxima.tolist(),
    }
    if groups:
        names, shares = zip(*(top_group(groups, i) for i in columns["latent"]), strict=True)
        columns |= {"top_group": names, "top_group_share": shares}
    if evidence is not None:
        columns |= {name: values.tolist() for name, values in evidence._asdict().items()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_latents(path: Path, d_sae: int) -> list[dict[str, str]]:
    """Read the rows of a file written by `write_latents`, as dictionaries by column.

    Raises:
        ValueError: The file is not such a table, or has another number of latents.
    """
    text = read_text(path, BYTES_OF_A_LATENT * (d_sae + 1))
    try:
        lines = list(islice(csv.DictReader(StringIO(text, newline="")), d_sae + 1))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of latents: {said_by(error)}") from None
    # DictReader uses None as key or value for surplus or missing cells.
    if len(lines) != d_sae or any(None in line or None in line.values() for line in lines):
        raise ValueError(
            f"{path} does not belong to this crosscoder: it does not have one complete line for each of {d_sae} latents. Name the "
            "folder that `evaluate RUN --output` wrote for this run."
        )
    return lines


def latents_column(
    path: Path, lines: Sequence[Mapping[str, str]], name: str, kind: Callable[[str], float] = float
) -> Tensor:
    """A column of `read_latents` as a tensor.

    Raises:
        ValueError: The column does not exist, or a cell has another type.
    """
    try:
        return torch.tensor([kind(line[name]) for line in lines])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} has an invalid value in column {name}: {said_by(error)}"
        ) from None


def read_evidence(path: Path, d_sae: int) -> LatentEvidence | None:
    """Read the latents' evidence from a file written by `write_latents`; none if it was not
    measured.

    Raises:
        ValueError: The file is not such a table, or has another number of latents.
    """
    if not path.is_file():
        return None
    lines = read_latents(path, d_sae)
    if not set(LatentEvidence._fields) <= set(lines[0]):
        return None
    kinds: dict[str, Callable[[str], float]] = {
        name: _flag if name.startswith("is_") else float for name in LatentEvidence._fields
    }
    kinds["firings"] = int
    return LatentEvidence(*(latents_column(path, lines, n, kind) for n, kind in kinds.items()))


def _flag(cell: str) -> bool:
    if cell not in ("True", "False"):
        raise ValueError(f"{cell!r:.80} is neither True nor False.")
    return cell == "True"


def read_metrics(path: Path) -> dict[str, float]:
    """Read the measures in a metrics.json.

    Raises:
        ValueError: The file holds something else.
    """
    metrics = read_object(path)
    wrong = [n for n, v in metrics.items() if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong:
        raise ValueError(
            f"{path} is not a set of measures: {wrong[0]!r:.80} is {metrics[wrong[0]]!r:.80}. Evaluate the run again, or "
            "give another."
        )
    return metrics


class Measured(NamedTuple):
    """A saved crosscoder and its measures on held-out pairs."""

    crosscoder: Crosscoder
    evaluation: Evaluation
    groups: Mapping[str, Float[Tensor, " d_sae"]] = MappingProxyType({})
    """Share of each latent's firings on each group of text; empty if there is one."""

    @classmethod
    def on(cls, crosscoder: Crosscoder, evaluation: Evaluation, data: PairData) -> "Measured":
        """The same with the groups of its text."""
        if len({context.group for context in data.contexts}) < 2:
            return cls(crosscoder, evaluation)
        return cls(crosscoder, evaluation, firings_by_group(crosscoder, data))


def stored_maxima(folder: str | Path, crosscoder: Crosscoder) -> Float[Tensor, " d_sae"] | None:
    """Each latent's maximum activation, from a folder written by `demo` or `evaluate --output`;
    none if it has none.

    Raises:
        ValueError: The file belongs to another crosscoder.
    """
    path = Path(folder) / LATENTS_FILENAME
    if not path.is_file():
        return None
    lines = read_latents(path, crosscoder.cfg.d_sae)
    names = [crosscoder.partition.name_of(i) for i in range(crosscoder.cfg.d_sae)]
    if [line.get("partition") for line in lines] != names:
        raise ValueError(
            f"{path} does not belong to this crosscoder: it has {len(lines)} latents in other partitions than its "
            f"{len(names)}. Name the folder that `evaluate RUN --output` wrote for this run."
        )
    return latents_column(path, lines, "max_activation")
