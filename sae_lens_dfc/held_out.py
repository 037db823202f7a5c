"""Measuring a run that is there: what `sae-lens-dfc evaluate` and `report` do."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.constants import RUNNER_CFG_FILENAME
from simple_parsing import field

from sae_lens_dfc.assess import Assessment, AssessOptions, assess, known
from sae_lens_dfc.contexts import Part
from sae_lens_dfc.crosscoders.inference import Crosscoder, load_crosscoder
from sae_lens_dfc.evaluate import Evaluation, alignment_metrics, check_models, evaluate
from sae_lens_dfc.files import read_object
from sae_lens_dfc.judge import Judge, judge_of, similarity
from sae_lens_dfc.measured_run import (
    LATENTS_FILENAME,
    METRICS_FILENAME,
    REPORT_FILENAME,
    Measured,
    read_evidence,
    read_metrics,
    report_data,
    settings,
    write_results,
)
from sae_lens_dfc.measures import measures_table, spread, text_table
from sae_lens_dfc.metrics.stability import check_same_models, stability_over_pairs
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.nulls import Case, check_nulls
from sae_lens_dfc.output import all_or_nothing, check_file, claimed, is_made, replaced, say
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.pair_data import PairData, regrouped
from sae_lens_dfc.report import render_report
from sae_lens_dfc.sources import SourceConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText, open_pair

logger = logging.getLogger(__name__)


@dataclass
class HeldOutOptions:
    """What both `evaluate` and `report` need to measure a run."""

    model_a: str | None = None
    """Where model A is now; none looks where it was in training."""
    model_b: str | None = None
    """Where model B is now."""
    dataset: str | None = None
    """Other text, all of it; none takes what the run held out of its own."""
    eval_pairs: int | None = None
    """At most so many pairs; none takes the run's setting."""
    device: str | None = None
    """Device of models and crosscoder; none takes the run's."""
    json: bool = field(default=False, action="store_true")
    """Print JSON."""


@dataclass(kw_only=True)
class Judging(HeldOutOptions):
    """Who compares or explains texts, where anyone is asked."""

    judge: str | None = None
    """Who is asked about texts, of nulls too: openai:MODEL (any OpenAI-compatible endpoint) or local:FOLDER; none asks no one, and
    compares next-token probabilities alone."""
    judge_url: str | None = None
    """Address of the endpoint, where it is not OpenAI's own."""


@dataclass(kw_only=True)
class EvaluateOptions(Judging):
    """Measure a trained crosscoder on text held out from its training: alone quickly, or with --output all there is, beside its nulls."""

    runs: list[str] = field(positional=True, nargs="+", metavar="RUN")
    """Folders that `train` or `demo` wrote, one or more; of several, latents are matched between each two."""
    output: str | None = None
    """Folder for all measures of one run: metrics.json, latents.csv and report.html. Runs the models on the training's text
    again, and trains a crosscoder on each null."""
    overwrite: bool = False
    """Replace what the output folder holds."""
    null: list[str] = field(default_factory=list)
    """Pairs with nothing to find, separated by spaces: self (model A twice), shuffle (pairs shuffled), seed (model A and
    --seed-model); none for no null. Given, all is measured, as with --output, where self and shuffle are the default."""
    seed_model: str | None = None
    """For the null seed, a model that differs from model A in nothing but its initialisation."""
    null_pairs: int = 100_000
    """At most so many distinct pairs to train the nulls and fit the maps with; never more than the run had."""
    downstream_pairs: int = 2000
    """Held-out pairs at which both models' predictions are measured, with --output or --null; 0 for none."""
    behaviour_latents: int = 6
    """Latents of each group with which both models are steered, with --output or --null; 0 for none."""


@dataclass(kw_only=True)
class ReportOptions(HeldOutOptions):
    """Write the HTML page of a trained crosscoder."""

    run: str = field(positional=True, metavar="RUN")
    """Folder that `train` or `demo` wrote."""
    output: str | None = None
    """File to write; none writes report.html into the run's folder."""


def evaluate_run(options: EvaluateOptions) -> None:
    """Print trained crosscoders' measures on held-out text, and of several how far they agree."""
    if len(set(options.runs)) < len(options.runs):
        raise ValueError(f"A run is given twice: {' '.join(options.runs)}. Name each once.")
    if options.output is not None or options.null:
        _say_metrics(evaluate_fully(options).metrics, options.json)
        if options.output is not None and not options.json:
            say(f"\nMeasures, latents and report: {options.output}")
        return
    given = [n for n in ("seed_model", "judge", "judge_url") if getattr(options, n) is not None]
    if given:
        raise ValueError(
            f"{', '.join('--' + n.replace('_', '-') for n in given)}: for --output or --null. Give one of them too."
        )
    check_same_models([load_crosscoder(run) for run in options.runs])
    measured = {run: _measure(run, options).measured for run in options.runs}
    metrics = {run: known(m.evaluation.metrics) for run, m in measured.items()}
    if len(measured) == 1:
        (only,) = metrics.values()
        logger.info(
            "Without its nulls. With --output FOLDER they are trained, and all else measured"
        )
        _say_metrics(only, options.json)
        return
    agreement = stability_over_pairs([m.crosscoder for m in measured.values()])
    if options.json:
        say(json.dumps({"runs": metrics, **agreement}))
        return
    columns = [{row[0]: row[1] for row in measures_table(m)[1]} for m in metrics.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    say(text_table(["measure", *metrics], rows))
    rows = [[name, spread(values, 3)] for name, values in agreement.items()]
    say("\n" + text_table(["over each two runs", "mean ± sd"], rows))


def _say_metrics(metrics: Mapping[str, float], as_json: bool) -> None:
    metrics = known(metrics)
    say(json.dumps(metrics) if as_json else text_table(*measures_table(metrics)))


def evaluate_fully(options: EvaluateOptions) -> Assessment:
    """Measure one run in every way, and its nulls alike; write metrics.json, latents.csv and report.html where an output is named.

    Raises:
        ValueError: There are several runs, the output holds something, or a null or judge cannot be had.
    """
    if len(options.runs) > 1:
        raise ValueError(
            f"All measures are taken of one run, got {' '.join(options.runs)}. Evaluate them one by one."
        )
    if options.output is not None:
        if is_made(options.output):
            raise ValueError(
                f"--output {options.output} holds a run, which stays. Name another folder."
            )
        with claimed(options.output, options.overwrite, "set of measures", (METRICS_FILENAME,)):
            return _evaluated(options)
    return _evaluated(options)


def _evaluated(options: EvaluateOptions) -> Assessment:
    [run] = options.runs
    nulls = ["self", "shuffle"] if not options.null else [n for n in options.null if n != "none"]
    check_nulls(nulls, options.seed_model)
    judge = judge_for(options)
    # Whole models: they are to predict tokens.
    crosscoder, cfg, pair = opened_run(run, options, drop_unused_layers=False)
    seed_model = None
    if options.seed_model is not None:
        seed_model = replace(cfg.model_a, model_name=options.seed_model)
    to_measure = AssessOptions(
        nulls, seed_model, options.downstream_pairs, options.behaviour_latents, judge
    )
    own = own_config(run, options, options.null_pairs)
    data = data_of(own, cfg, pair, options.dataset is not None)
    assessment = assess(crosscoder, Case(own, pair, data), to_measure)
    if options.output is not None:
        measured = Measured(crosscoder, assessment.run)
        page = report_data(measured, data, pair, settings(cfg))
        with all_or_nothing(options.output) as folder:
            write_results(folder, replace(page, metrics=assessment.metrics), measured)
    return assessment


def judge_for(options: Judging) -> Judge | None:
    """Who is asked, having answered once: that it cannot should not show after all else is measured."""
    if options.judge is None:
        if options.judge_url is not None:
            raise ValueError("--judge-url: for --judge openai:MODEL. Give it too.")
        return None
    judge = judge_of(options.judge, options.judge_url, device=options.device or "cpu")
    similarity(judge, "The sea is calm today.", "Today the sea is calm.")
    return judge


def data_of(
    own: CrosscoderRunnerConfig, cfg: CrosscoderRunnerConfig, pair: ModelPair, has_other_text: bool
) -> PairData:
    """The run's training rows, as many as the nulls take, and those held out, of other text if that is asked for."""
    if not has_other_text:
        return PairData.collect(PairedText(own, pair), "The two models")
    training = PairedText(own, pair).collect("training", "The run's own text: activations")
    other = PairedText(cfg, pair).collect("all", "Held-out activations")
    alignment = alignment_metrics(other.counts)
    return PairData(training.rows, regrouped(other.rows), other.contexts, alignment)


def write_report(options: ReportOptions) -> None:
    """Write a trained crosscoder's page."""
    target = Path(options.output or Path(options.run) / REPORT_FILENAME)
    check_file(target)
    # Before the work: what cannot be read should not show after it.
    stored = stored_metrics(options.run, options)
    d_sae = load_crosscoder(options.run).cfg.d_sae
    evidence = read_evidence(Path(options.run) / LATENTS_FILENAME, d_sae) if stored else None
    (crosscoder, evaluation), data, pair, cfg = _measure(options.run, options)
    if stored:
        metrics = {**stored, **evaluation.metrics}
        evaluation = evaluation._replace(metrics=metrics, evidence=evidence)
    evaluation = evaluation._replace(metrics=known(evaluation.metrics))
    page = report_data(Measured(crosscoder, evaluation), data, pair, settings(cfg))
    target.parent.mkdir(parents=True, exist_ok=True)
    # In place of what has that name, be it a link to somewhere else.
    with replaced(target) as temporary:
        temporary.write_text(render_report(page), encoding="utf-8")
    say(json.dumps({"report": str(target)}) if options.json else f"Report: {target}")


def stored_metrics(folder: str, options: HeldOutOptions) -> dict[str, float]:
    """What a folder's metrics.json says, baselines and nulls among it, to stand beside fresh measures; nothing where these are of another text."""
    path = Path(folder) / METRICS_FILENAME
    same_text = options.dataset is None and options.eval_pairs is None
    return read_metrics(path) if same_text and path.is_file() else {}


class _OnHeldOutText(NamedTuple):
    measured: Measured
    data: PairData
    """Without training rows."""
    pair: ModelPair
    cfg: CrosscoderRunnerConfig


def _measure(run: str, options: HeldOutOptions) -> _OnHeldOutText:
    crosscoder, cfg, pair = opened_run(run, options)
    all_text, part = held_out_text(run, options, pair)
    text = all_text.collect(part, "Held-out activations")
    alignment = alignment_metrics(text.counts)
    found = evaluate(crosscoder, [r.acts for r in text.rows])
    measured = Measured(crosscoder, Evaluation(found.metrics | alignment, found.firing))
    return _OnHeldOutText(measured, PairData([], text.rows, text.contexts, alignment), pair, cfg)


def opened_run(
    run: str, options: HeldOutOptions, **of_models: Any
) -> tuple[Crosscoder, CrosscoderRunnerConfig, ModelPair]:
    """A run's crosscoder, its settings with what the options change, and its two models.

    Args:
        run: Folder that `train` or `demo` wrote.
        options: Where things are now.
        of_models: Settings of both models to change.

    Raises:
        ValueError: The folder holds no run, or a model cannot be opened or is another than the run's.
    """
    crosscoder = load_crosscoder(run)
    cfg = run_config(run, options)
    if cfg.sae.d_sae != crosscoder.cfg.d_sae:
        raise ValueError(
            f"{run} is of two trainings: its crosscoder has {crosscoder.cfg.d_sae} latents, its {RUNNER_CFG_FILENAME} says "
            f"{cfg.sae.d_sae}. Give a folder that training wrote."
        )
    cfg = replace(
        cfg, model_a=replace(cfg.model_a, **of_models), model_b=replace(cfg.model_b, **of_models)
    )
    crosscoder.to(cfg.device)
    pair = open_pair(cfg)
    check_models(crosscoder, pair)
    return crosscoder, cfg, pair


def run_config(run: str, options: HeldOutOptions) -> CrosscoderRunnerConfig:
    """A run's settings with what the options change of them.

    Raises:
        ValueError: The folder has none, or they are another version's.
    """
    path = Path(run) / RUNNER_CFG_FILENAME
    if not path.is_file():
        raise ValueError(
            f"{run} has no {RUNNER_CFG_FILENAME}. Give the folder that training wrote."
        )
    values = read_object(path)
    try:
        cfg = CrosscoderRunnerConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a configuration of this version's CrosscoderTrainingRunner: {error} "
            "Train it with that runner, or use the version that did."
        ) from error
    if options.dataset is not None:
        # All of another text, by itself: nothing that the run says of its own applies.
        text = {f.name: f.default for f in fields(SourceConfig) if hasattr(cfg, f.name)}
        cfg = replace(cfg, **{**text, "dataset_path": options.dataset}, sources=[], n_ranks=1)
    changes: dict[str, Any] = {
        "device": options.device,
        "eval_pairs": options.eval_pairs,
        "model_a": _moved(cfg.model_a, options.model_a, options.device),
        "model_b": _moved(cfg.model_b, options.model_b, options.device),
    }
    return replace(cfg, **{name: value for name, value in changes.items() if value is not None})


def own_config(run: str, options: HeldOutOptions, n_pairs: int) -> CrosscoderRunnerConfig:
    """A run's settings with its own text, whatever is measured, and at most so many pairs of it to train on or fit maps to."""
    own = run_config(run, replace(options, dataset=None))
    return replace(own, training_pairs=min(own.training_pairs or n_pairs, n_pairs))


def held_out_text(run: str, options: HeldOutOptions, pair: ModelPair) -> tuple[PairedText, Part]:
    """The text that a run is measured on, and which part of it: what the run held out of its own, or all of another.

    Raises:
        ValueError: The folder holds no run, or the text cannot be read.
    """
    part: Part = "held_out" if options.dataset is None else "all"
    return PairedText(run_config(run, options), pair), part


def _moved(model: ModelConfig, name: str | None, device: str | None) -> ModelConfig:
    return replace(model, model_name=name or model.model_name, device=device or model.device)
