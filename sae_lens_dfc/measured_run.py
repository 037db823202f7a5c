"""A training run with what it takes to believe it: a baseline, principal components, and the null pair."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME
from torch import Tensor

from sae_lens_dfc.assess import AssessOptions, known, measure, train
from sae_lens_dfc.crosscoders.base import T_CONFIG, CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.topk import TopKTrainingCrosscoderConfig
from sae_lens_dfc.evaluate import Evaluation, evaluate_pca
from sae_lens_dfc.files import read_object, read_text
from sae_lens_dfc.gathering import gather
from sae_lens_dfc.latents import LatentCard, latent_cards, strongest_latents
from sae_lens_dfc.metrics.claims import LatentEvidence, ranking, verdict
from sae_lens_dfc.metrics.exclusivity import relative_decoder_norms, relative_norm_histogram
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.nulls import Case, null_case
from sae_lens_dfc.output import all_or_nothing, claimed
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.pair_data import PairData
from sae_lens_dfc.report import ReportData, render_report
from sae_lens_dfc.training.checks import with_models
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText

LATENTS_FILENAME = "latents.csv"
METRICS_FILENAME = "metrics.json"
REPORT_FILENAME = "report.html"
BYTES_OF_A_LATENT = 2_000
"""In latents.csv: some twenty numbers take a quarter of it."""
LATENTS_PER_PARTITION = 12
"""Of the strongest in each partition, so many stand on the page with their contexts."""
LATENTS_WITH_EVIDENCE = 60
"""And so many of those with the most evidence of being exclusive."""


def measured_run(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, output: str | Path, overwrite: bool = False
) -> dict[str, float]:
    """Train a crosscoder and everything to hold beside it; write crosscoder, metrics.json and report.html.

    The baseline is a BatchTopK crosscoder with the same settings on the same pairs; the principal
    components are as many as k; the null is the same crosscoder on model A twice, where nothing is
    exclusive.

    Args:
        cfg: Settings of the run; its own `output_path` is not used.
        pair: The two models.
        output: Folder that takes the results, all of them or none.
        overwrite: Replace what the folder holds.

    Raises:
        ValueError: The folder holds a run, or the settings, models and text do not fit.
    """
    with claimed(output, overwrite):
        return _measured_run(replace(cfg, output_path=None), pair, output)


def _measured_run(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, output: str | Path
) -> dict[str, float]:
    cfg = with_models(cfg, pair.describe())
    case = Case(cfg, pair, PairData.collect(PairedText(cfg, pair), "The two models"))
    run = train_and_measure(case)
    crosscoder, metrics = run.crosscoder, dict(run.evaluation.metrics)

    changes: dict[str, Any] = {}
    if not isinstance(cfg.sae, TopKTrainingCrosscoderConfig):
        # Baselines with as many active latents as it has, and the dead-latent loss that it has not.
        changes = {"k": max(metrics["l0"], 1.0), "aux_loss_coefficient": 1 / 32}
    baseline_sae = like(cfg.sae, BatchTopKTrainingCrosscoderConfig, **changes)
    baseline = train_and_measure(case._replace(cfg=replace(cfg, sae=baseline_sae, test_at=[])))
    metrics |= prefixed("baseline/batchtopk/", baseline.evaluation.metrics)

    data = case.data
    pca = JointPCA.fit(
        [rows.acts for rows in data.training], crosscoder.partition, k=max(1, round(baseline_sae.k))
    )
    linear = evaluate_pca(pca, [rows.acts for rows in data.held_out], crosscoder) | data.metrics
    linear["pairs_trained"] = sum(len(rows.acts) for rows in data.training)
    metrics |= prefixed("baseline/pca/", linear)
    page = report_data(run, data, pair, settings(cfg))

    null = null_case("self", case)
    data.training.clear()  # half a gigabyte in the demo, and the null has its own
    metrics |= prefixed("null/self/", train_and_measure(null).evaluation.metrics)
    metrics = known(metrics)
    page = replace(page, metrics=metrics)
    with all_or_nothing(output) as folder:
        crosscoder.save_model(folder)
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict(), indent=2) + "\n")
        write_results(folder, page, run)
    return metrics


def write_results(folder: Path, page: ReportData, run: "Measured") -> None:
    """metrics.json, latents.csv and report.html."""
    (folder / METRICS_FILENAME).write_text(json.dumps(page.metrics, indent=2) + "\n")
    (folder / REPORT_FILENAME).write_text(render_report(page), encoding="utf-8")
    write_latents(folder / LATENTS_FILENAME, run)


def write_latents(path: Path, run: "Measured") -> None:
    """All that was measured of each latent, a line each."""
    crosscoder, (_, firing, evidence) = run
    columns: dict[str, Any] = {
        "latent": range(crosscoder.cfg.d_sae),
        "partition": [crosscoder.partition.name_of(i) for i in range(crosscoder.cfg.d_sae)],
        "firing_rate": firing.rates.tolist(),
        "mean_activation": firing.means.tolist(),
        "max_activation": firing.maxima.tolist(),
    }
    if evidence is not None:
        columns |= {name: values.tolist() for name, values in evidence._asdict().items()}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_latents(path: Path, d_sae: int) -> list[dict[str, str]]:
    """The lines of a file that `write_latents` wrote, each by column.

    Raises:
        ValueError: It is no such file, or not of so many latents.
    """
    text = read_text(path, BYTES_OF_A_LATENT * (d_sae + 1))
    try:
        lines = list(islice(csv.DictReader(StringIO(text, newline="")), d_sae + 1))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of latents: {error}.") from None
    # DictReader has None as the name, or as the value, of a cell too many or too few.
    if len(lines) != d_sae or any(None in line or None in line.values() for line in lines):
        raise ValueError(
            f"{path} is not of this crosscoder: it does not have one whole line for each of {d_sae} latents. Name the "
            "folder that `evaluate RUN --output` wrote for this run."
        )
    return lines


def latents_column(
    path: Path, lines: Sequence[Mapping[str, str]], name: str, kind: Callable[[str], float] = float
) -> Tensor:
    """A column of `read_latents` as a tensor.

    Raises:
        ValueError: There is no such column, or a cell of it is of another kind.
    """
    try:
        return torch.tensor([kind(line[name]) for line in lines])
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has something else than it should as {name}: {error}.") from None


def read_evidence(path: Path, d_sae: int) -> LatentEvidence | None:
    """The latents' evidence as `write_latents` wrote it; none where it was not measured.

    Raises:
        ValueError: The file is not such a table of so many latents.
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
        raise ValueError(f"{cell!r:.80} is neither True nor False")
    return cell == "True"


def read_metrics(path: Path) -> dict[str, float]:
    """The measures that a metrics.json holds.

    Raises:
        ValueError: It holds something else.
    """
    metrics = read_object(path)
    wrong = [n for n, v in metrics.items() if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong:
        raise ValueError(
            f"{path} is not a set of measures: {wrong[0]!r:.80} is {metrics[wrong[0]]!r:.80}. Evaluate the run again, or "
            "give another."
        )
    return metrics


def like(sae: CrosscoderTrainingConfig, config_class: type[T_CONFIG], **changes: Any) -> T_CONFIG:
    """The same settings for another architecture, as far as it has them, with some changed."""
    names = {f.name for f in fields(config_class)} & {f.name for f in fields(sae)}
    values = {name: getattr(sae, name) for name in names - {"metadata"}}
    return config_class(**{**values, **changes})


class Measured(NamedTuple):
    """A saved crosscoder and what was measured of it on held-out pairs."""

    crosscoder: Crosscoder
    evaluation: Evaluation


def train_and_measure(case: Case) -> Measured:
    """Train a crosscoder on a case's activations and measure it on those held out."""
    crosscoder = train(case)
    options = AssessOptions(nulls=[], downstream_pairs=0, behaviour_latents=0)
    evaluation = measure(crosscoder, case, options)
    metadata = crosscoder.cfg.metadata
    counts = {"pairs_trained": metadata.pairs_trained, "samples_trained": metadata.samples_trained}
    return Measured(crosscoder, evaluation._replace(metrics=evaluation.metrics | counts))


def report_data(
    measured: Measured, data: PairData, pair: ModelPair, shown_settings: Mapping[str, Any]
) -> ReportData:
    """What the page shows of a saved crosscoder."""
    crosscoder, (metrics, firing, evidence) = measured
    gathered = gather(crosscoder, data.held_out)
    latents = strongest_latents(firing, LATENTS_PER_PARTITION)
    if evidence is not None:
        most = ranking(evidence)[:LATENTS_WITH_EVIDENCE].tolist()
        latents = list(dict.fromkeys([*most, *latents]))
    places = {latent: gathered.places(latent) for latent in latents}
    shown = {place.context for of_latent in places.values() for place in of_latent}
    rows = data.held_out_of(shown)
    cards = latent_cards(crosscoder, gathered, places, rows, pair, evidence)
    return ReportData(
        name_a=pair.a.name,
        name_b=pair.b.name,
        settings=shown_settings,
        metrics=metrics,
        histogram=relative_norm_histogram(crosscoder),
        cards=all_cards(measured, cards),
    )


def all_cards(measured: Measured, cards: Sequence[LatentCard]) -> list[LatentCard]:
    """A card of every latent that fires, without contexts where none is given, the most evidence of being exclusive first."""
    crosscoder, (_, firing, evidence) = measured
    given = {card.latent: card for card in cards}
    relative = relative_decoder_norms(crosscoder).tolist()
    rates, means, maxima = firing.rates.tolist(), firing.means.tolist(), firing.maxima.tolist()
    columns = {} if evidence is None else {k: v.tolist() for k, v in evidence._asdict().items()}
    order = firing.sums.argsort(descending=True).tolist()
    if evidence is not None:
        order = [*ranking(evidence).tolist(), *order]
    return [
        given.get(i)
        or LatentCard(
            latent=i,
            partition=crosscoder.partition.name_of(i),
            firing_rate=rates[i],
            mean_activation=means[i],
            max_activation=maxima[i],
            relative_decoder_norm=relative[i],
            encoder_decoder_cosine={},
            contexts=[],
            logit_effects={},
            evidence={name: values[i] for name, values in columns.items()},
            verdict="" if evidence is None else verdict(evidence, i),
        )
        for i in dict.fromkeys(order)
        if rates[i] > 0
    ]


def settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """The settings worth showing, by dotted name."""
    values = cfg.to_dict()
    shown: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in ("sae", "model_a", "model_b"):
            shown |= {f"{name}.{key}": v for key, v in value.items() if key != "metadata"}
        elif name != "logger":
            shown[name] = value
    return shown


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The measures under longer names."""
    return {prefix + name: value for name, value in metrics.items()}
