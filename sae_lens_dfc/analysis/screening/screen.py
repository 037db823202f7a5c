"""Runs `sae-lens-dfc screen`: screens a saved run from its models to its report, and resumes an
interrupted screening."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.analysis.autointerp.concerns import CONCERNS, read_concerns
from sae_lens_dfc.analysis.causal.activation_patching import Texts, own_part, texts_of, verify
from sae_lens_dfc.analysis.causal.shared_vocabulary import common_outcomes
from sae_lens_dfc.analysis.evaluation.evaluate_run import case_of, judge_for, stored_metrics
from sae_lens_dfc.analysis.evaluation.measure import measure
from sae_lens_dfc.analysis.latents.max_activating import (
    FiringPosition,
    MaxActivatingExamples,
    collect_max_activating,
)
from sae_lens_dfc.analysis.options import MIN_TEXTS, ScreenOptions
from sae_lens_dfc.analysis.report.build import report_data, report_settings
from sae_lens_dfc.analysis.report.findings import Finding, Screening
from sae_lens_dfc.analysis.report.results import (
    REPORT_FILENAME,
    Measured,
    drop_nonfinite,
    write_results,
)
from sae_lens_dfc.analysis.saved_run.held_out import evidence_of, opened_run, own_config
from sae_lens_dfc.analysis.screening.candidates import (
    candidates,
    control_directions,
    differences_made,
    source_of,
    split,
    windows,
)
from sae_lens_dfc.analysis.screening.describe import Asked, explained, what_it_costs
from sae_lens_dfc.analysis.screening.verdicts import (
    CausalTest,
    Explained,
    findings,
    samples,
    tested,
    verdict_stage,
)
from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.journal import Journal
from sae_lens_dfc.core.output_folder import locked_output
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.terminal import print_result, text_table
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.evaluate import Evaluation
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.stats.affine_maps import AffineMaps
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)

SCREENING_FILENAME = "screening.json"


@dataclass(frozen=True)
class Screened:
    """The models, data and measures of a screening."""

    crosscoder: Crosscoder
    cfg: CrosscoderRunnerConfig
    pair: ModelPair
    data: PairData
    evaluation: Evaluation
    gathered: MaxActivatingExamples
    affine_maps: AffineMaps | None
    """None if both models share one basis."""
    own: tuple[Tensor, Tensor]
    """Each latent's model-specific directions in A and in B; see `both_decoder_differences`."""


def screen_run(options: ScreenOptions) -> None:
    """Screen a run, write the report and print the verdicts."""
    found = screen(options)
    if options.json:
        print_result(json.dumps(asdict(found)))
        return
    rows = [
        [
            s.stage,
            str(s.intake),
            str(s.output),
            "; ".join(f"{n} {why}" for why, n in s.dropped.items()),
        ]
        for s in found.stages
    ]
    print_result(text_table(["stage", "in", "out", "left out"], rows))
    head = [
        "",
        "latent",
        "partition",
        "verdict",
        "ablated: closer by, bits",
        "patched in",
        "description",
    ]
    print_result("\n" + text_table(head, [_line(one) for one in found.findings]))
    print_result(f"\nReport: {Path(options.output) / REPORT_FILENAME}")


def _line(one: Finding) -> list[str]:
    effects = [f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in one.effects[:2]] or ["", ""]
    latent = [str(one.rank), str(one.latent), one.partition, one.verdict]
    return [*latent, *effects, one.description or ""]


def screen(options: ScreenOptions) -> Screening:
    """Run all stages of a screening, and write the output folder atomically.

    Completed tests are stored next to the output folder and are not repeated on resume.

    Raises:
        ValueError: The run, the output or the judge is not available, or no latent could be a
            difference.
    """
    with locked_output(options.output, options.overwrite, "screening", (SCREENING_FILENAME,)):
        concerns = CONCERNS if options.concerns is None else read_concerns(options.concerns)
        judge = judge_for(options)
        if judge is None and (options.concerns is not None or options.flagged_only):
            raise ValueError("--concerns and --flagged-only only apply with --judge. Give it too.")
        if judge is not None:
            logger.warning("%s", what_it_costs(options.keep, concerns))
        stored = stored_metrics(options.evidence or options.run, options.run, options)
        on = _opened(options)
        output = Path(options.output)
        progress = Journal(output.with_name(f"{output.name}.progress.jsonl"), _settings(options))
        made = differences_made(on.crosscoder, on.gathered, on.own, on.affine_maps)
        evidence = on.evaluation.evidence
        assert evidence is not None  # `measure` maps the models
        first = candidates(evidence, on.gathered, made, options.keep, on.affine_maps is None)
        if not first.latents:
            raise ValueError(
                f"No latent of {options.run} fires on held-out text and could be a difference. Check with `evaluate` that the run is trained."
            )
        said: dict[int, Explained] = {}
        if judge is not None:
            asked = Asked(judge, concerns, options.flagged_only, options.seed)
            first, said = explained(
                on.crosscoder, on.pair, on.data, on.gathered, first, asked, progress
            )
        results = _tested(on, first.latents, options, progress)
        found = findings(on.crosscoder, first.latents, results, said, evidence.is_exclusive)
        screening = Screening([*first.stages, verdict_stage(found)], found)
        _write(on, screening, stored, options)
        progress.forget()
        return screening


def _opened(options: ScreenOptions) -> Screened:
    """Load the run's models and text, and measure its latents."""
    # All layers are needed for next-token predictions.
    crosscoder, cfg, pair = opened_run(options.run, options, drop_unused_layers=False)
    own = own_config(options.run, options, options.fit_pairs)
    case = case_of(options.run, options, own, pair)
    data, evaluation = case.data, measure(crosscoder, case)
    stored = evidence_of(options.run, options.evidence, crosscoder)
    if stored is not None:
        evaluation = evaluation._replace(evidence=stored)
    d_a = crosscoder.cfg.d_a
    affine_maps = None if data.one_basis(d_a) else data.affine_maps(d_a).to(crosscoder.device)
    gathered = collect_max_activating(crosscoder, data.held_out)
    own_parts = both_decoder_differences(crosscoder, affine_maps)
    return Screened(crosscoder, cfg, pair, data, evaluation, gathered, affine_maps, own_parts)


def _tested(
    on: Screened, latents: Sequence[int], options: ScreenOptions, progress: Journal
) -> dict[int, CausalTest | None]:
    """Test each latent causally; none for a latent that fires at the end of too few of its test
    texts."""
    of_a, of_b = (x.cpu() for x in on.own)
    acts = torch.cat([rows.acts for rows in on.data.held_out])
    lives = on.gathered.firing.counts > 0
    controls = control_directions(
        on.crosscoder, acts, lives, latents, options.controls, options.seed
    )
    outcomes = common_outcomes(on.pair.a, on.pair.b)

    def test_one(latent: int) -> dict[str, Any] | None:
        own = own_part(of_a, of_b, latent, source_of(on.crosscoder, latent))
        texts = texts_of(on.crosscoder, on.pair, latent, _kept_for_test(on, latent, options.texts))
        if len(texts.rows.contexts) < MIN_TEXTS:
            return None
        found = verify(on.pair, texts, own, controls, outcomes)
        silent = _silent(on, latent, texts, options)
        beside = None if silent is None else verify(on.pair, silent, own, {}, outcomes)
        shown = samples(on.pair, texts, own)
        return asdict(tested(own, found, beside, shown))

    results: dict[int, CausalTest | None] = {}
    for latent in tqdm(latents, "Testing", unit=" latents"):
        result = progress.done(f"tested {latent}", lambda latent=latent: test_one(latent))
        results[latent] = (
            None if result is None else from_plain(CausalTest, result, "A causal test")
        )
    return results


def _kept_for_test(on: Screened, latent: int, n: int) -> list[Segments]:
    _, places = split(on.gathered.places(latent, n_strongest=2 * n, n_quantiles=0))
    return windows(on.pair, on.data.contexts, places)


def _silent(on: Screened, latent: int, texts: Texts, options: ScreenOptions) -> Texts | None:
    """Texts at whose end the latent does not fire, given the activation it has in the other texts;
    none if there are too few."""
    generator = torch.Generator().manual_seed(options.seed + latent)
    contexts = on.data.contexts
    drawn = torch.randperm(len(contexts), generator=generator)[: options.texts].tolist()
    places = [FiringPosition(i, len(contexts[i].segments) - 1, 0.0, None) for i in drawn]
    found = texts_of(
        on.crosscoder, on.pair, latent, windows(on.pair, contexts, places), fires=False
    )
    if len(found.rows.contexts) < MIN_TEXTS:
        return None
    return found.with_activation(texts.at_end.mean().item())


def _settings(options: ScreenOptions) -> dict[str, Any]:
    """Everything that determines a test's result: the options except the output, and the
    weights."""
    left_out = {"output", "overwrite", "json", "device"}
    weights = sorted(Path(options.run).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    given = {name: value for name, value in vars(options).items() if name not in left_out}
    return {**given, "weights": digest}


def _write(
    on: Screened, screening: Screening, stored: Mapping[str, float], options: ScreenOptions
) -> None:
    metrics = {**stored, **on.evaluation.metrics}
    measured = Measured(on.crosscoder, on.evaluation._replace(metrics=metrics))
    page = report_data(measured, on.data, on.pair, report_settings(on.cfg))
    page = replace(page, metrics=drop_nonfinite(metrics), screening=screening)
    with atomic_folder(options.output) as folder:
        write_results(folder, page, measured)
        text = json.dumps(asdict(screening), indent=1) + "\n"
        (folder / SCREENING_FILENAME).write_text(text, encoding="utf-8")
