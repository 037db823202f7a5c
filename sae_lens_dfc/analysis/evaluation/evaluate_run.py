"""Evaluates saved runs on held-out text for `evaluate`, and writes their reports."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sae_lens_dfc.analysis.autointerp.judge import Judge, judge_of, similarity
from sae_lens_dfc.analysis.causal.mapped_loss import who_knows_more
from sae_lens_dfc.analysis.evaluation.measure import CausalOptions
from sae_lens_dfc.analysis.evaluation.nulls import PairTask
from sae_lens_dfc.analysis.evaluation.with_nulls import (
    Comparisons,
    FullEvaluation,
    evaluate_with_nulls,
    write_evaluation,
)
from sae_lens_dfc.analysis.options import EvaluateOptions, HeldOutOptions, Judging, ReportOptions
from sae_lens_dfc.analysis.report.build import report_data
from sae_lens_dfc.analysis.report.page import render_report
from sae_lens_dfc.analysis.report.results import (
    LATENTS_FILENAME,
    METRICS_FILENAME,
    REPORT_FILENAME,
    Measured,
    drop_nonfinite,
    read_evidence,
    read_metrics,
)
from sae_lens_dfc.analysis.report.tables import measures_table, spread
from sae_lens_dfc.analysis.saved_run.held_out import (
    held_out_text,
    is_own_text,
    opened_run,
    own_config,
)
from sae_lens_dfc.core.atomic_write import atomic_file, atomic_folder, check_file
from sae_lens_dfc.core.output_folder import is_made, locked_output
from sae_lens_dfc.core.terminal import print_result, text_table
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluate import Evaluation, alignment_metrics, evaluate
from sae_lens_dfc.metrics.evaluation_data import PairData, regrouped
from sae_lens_dfc.metrics.exclusivity.beyond_null import check_nulls
from sae_lens_dfc.metrics.stability import check_same_models, stability_over_pairs
from sae_lens_dfc.models.config import NO_ADAPTER
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)


def evaluate_run(options: EvaluateOptions) -> None:
    """Print trained crosscoders' measures on held-out text, and for several runs their
    agreement."""
    if len(set(options.runs)) < len(options.runs):
        raise ValueError(f"A run is given twice: {' '.join(options.runs)}. Name each once.")
    if options.output is not None or options.null:
        _say_metrics(evaluate_fully(options).metrics, options.json)
        if options.output is not None and not options.json:
            print_result(f"\nMeasures, latents and report: {options.output}")
        return
    given = [
        n for n in ("by", "seed_model", "judge", "judge_url") if getattr(options, n) is not None
    ]
    if given:
        raise ValueError(
            f"{', '.join('--' + n.replace('_', '-') for n in given)} only applies with --output or --null. Give one of them too."
        )
    check_same_models([load_crosscoder(run) for run in options.runs])
    measured = {run: _measure(run, options).measured for run in options.runs}
    metrics = {run: drop_nonfinite(m.evaluation.metrics) for run, m in measured.items()}
    if len(measured) == 1:
        (only,) = metrics.values()
        logger.info("Nulls and causal measures are skipped. Pass --output FOLDER to compute them.")
        _say_metrics(only, options.json)
        return
    agreement = stability_over_pairs([m.crosscoder for m in measured.values()])
    if options.json:
        print_result(json.dumps({"runs": metrics, **agreement}))
        return
    columns = [{row[0]: row[1] for row in measures_table(m)[1]} for m in metrics.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    print_result(text_table(["measure", *metrics], rows))
    rows = [[name, spread(values, 3)] for name, values in agreement.items()]
    print_result("\n" + text_table(["over each two runs", "mean ± sd"], rows))


def _say_metrics(metrics: Mapping[str, float], as_json: bool) -> None:
    metrics = drop_nonfinite(metrics)
    print_result(json.dumps(metrics) if as_json else text_table(*measures_table(metrics)))
    said = who_knows_more(metrics)
    if said and not as_json:
        print_result(f"\n{said}")


def evaluate_fully(options: EvaluateOptions) -> FullEvaluation:
    """Compute all measures of one run and its nulls; write metrics.json, latents.csv and
    report.html if `output` is given.

    Raises:
        ValueError: There are several runs, the output exists, or a null or judge is not available.
    """
    if len(options.runs) > 1:
        raise ValueError(
            f"--output and --null evaluate one run at a time, got {' '.join(options.runs)}. Evaluate them one by one."
        )
    if options.output is not None:
        if is_made(options.output):
            raise ValueError(
                f"--output {options.output} holds a run, which is never overwritten. Name another folder."
            )
        with locked_output(
            options.output, options.overwrite, "set of measures", (METRICS_FILENAME,)
        ):
            return _evaluated(options)
    return _evaluated(options)


def _evaluated(options: EvaluateOptions) -> FullEvaluation:
    [run] = options.runs
    nulls = ["self", "shuffle"] if not options.null else [n for n in options.null if n != "none"]
    check_nulls(nulls, options.seed_model)
    judge = judge_for(options)
    # All layers are needed for next-token predictions.
    crosscoder, cfg, pair = opened_run(run, options, drop_unused_layers=False)
    seed_model = None
    if options.seed_model is not None:
        seed_model = replace(cfg.model_a, model_name=options.seed_model, **NO_ADAPTER)
    causal = CausalOptions(options.downstream_pairs, options.behavior_latents, judge)
    own = own_config(run, options, options.null_pairs)
    case = case_of(run, options, own, pair, options.by).with_losses()
    compared = Comparisons(nulls, seed_model, options.baselines)
    found = evaluate_with_nulls(crosscoder, case, compared, causal)
    if options.output is not None:
        with atomic_folder(options.output) as folder:
            write_evaluation(folder, crosscoder, found, case, cfg)
    return found


def judge_for(options: Judging) -> Judge | None:
    """The judge, after one test question, so that a judge that cannot answer fails before the long
    work."""
    if options.judge is None:
        if options.judge_url is not None:
            raise ValueError("--judge-url only applies with --judge openai:MODEL. Give it too.")
        return None
    judge = judge_of(options.judge, options.judge_url, device=options.device or "cpu")
    similarity(judge, "The sea is calm today.", "Today the sea is calm.")
    return judge


def case_of(
    run: str,
    options: HeldOutOptions,
    own: CrosscoderRunnerConfig,
    pair: ModelPair,
    by: str | None = None,
) -> PairTask:
    """A run's models with its training rows, as many as `own` has, and its held-out rows, or those
    of other text if given, grouped by a column."""
    text, part = held_out_text(run, options, pair, by)
    if part == "held_out" and text.cfg.all_sources == own.all_sources:
        text = PairedText(own, pair, by=by)
        return PairTask(own, pair, PairData.collect(text, "The two models"))
    training = PairedText(own, pair).collect("training", "The run's own text: activations")
    other = text.collect(part, "Held-out activations")
    alignment = alignment_metrics(other.counts)
    data = PairData(training.rows, regrouped(other.rows), other.contexts, alignment)
    return PairTask(own, pair, data)


def write_report(options: ReportOptions) -> None:
    """Write a trained crosscoder's HTML report."""
    target = Path(options.output or Path(options.run) / REPORT_FILENAME)
    check_file(target)
    # Read these first, so that unreadable files fail before the long work.
    stored = stored_metrics(options.run, options.run, options)
    d_sae = load_crosscoder(options.run).cfg.d_sae
    evidence = read_evidence(Path(options.run) / LATENTS_FILENAME, d_sae) if stored else None
    (crosscoder, evaluation, _), data, pair, cfg = _measure(options.run, options)
    if stored:
        metrics = {**stored, **evaluation.metrics}
        evaluation = evaluation._replace(metrics=metrics, evidence=evidence)
    evaluation = evaluation._replace(metrics=drop_nonfinite(evaluation.metrics))
    page = report_data(Measured.on(crosscoder, evaluation, data), data, pair, cfg)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Replaces an existing file or link of that name.
    with atomic_file(target) as temporary:
        temporary.write_text(render_report(page), encoding="utf-8")
    print_result(json.dumps({"report": str(target)}) if options.json else f"Report: {target}")


def stored_metrics(folder: str, run: str, options: HeldOutOptions) -> dict[str, float]:
    """The metrics.json of a folder, including baselines and nulls, to show next to fresh measures;
    empty if the fresh measures are on other text."""
    path = Path(folder) / METRICS_FILENAME
    if options.eval_pairs is not None or not path.is_file() or not is_own_text(run, options):
        return {}
    return read_metrics(path)


class _OnHeldOutText(NamedTuple):
    measured: Measured
    data: PairData
    """Evaluation on held-out text only, without training rows."""
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
