"""Runs `sae-lens-dfc screen`: screens a saved run from its models to its report, and resumes an
interrupted screening."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sae_lens_dfc.analysis.autointerp.concerns import CONCERNS, read_concerns
from sae_lens_dfc.analysis.evaluation.evaluate_run import case_of, judge_for, stored_metrics
from sae_lens_dfc.analysis.evaluation.measure import measure
from sae_lens_dfc.analysis.options import ScreenOptions
from sae_lens_dfc.analysis.report.build import report_data
from sae_lens_dfc.analysis.report.findings import Finding, Screening
from sae_lens_dfc.analysis.report.results import (
    REPORT_FILENAME,
    Measured,
    drop_nonfinite,
    write_results,
)
from sae_lens_dfc.analysis.report.tables import divergence_table
from sae_lens_dfc.analysis.saved_run.held_out import evidence_of, opened_run, own_config
from sae_lens_dfc.analysis.screening.candidates import candidates, differences_made
from sae_lens_dfc.analysis.screening.causal_tests import Sizes, Subject, causal_tests, subject_of
from sae_lens_dfc.analysis.screening.describe import Asked, explained, what_it_costs
from sae_lens_dfc.analysis.screening.explained_divergence import explained_divergence
from sae_lens_dfc.analysis.screening.shared_tests import (
    SharedChoice,
    SharedSizes,
    shared_choice,
    tested_in_both,
)
from sae_lens_dfc.analysis.screening.shared_verdicts import (
    OF_SHARED,
    SHARED_EFFECTS,
    SharedTest,
    shared_findings,
)
from sae_lens_dfc.analysis.screening.verdicts import (
    OF_ONE_BASIS,
    OF_TWO_BASES,
    CausalTest,
    Explained,
    effect_names,
    findings,
    ranked,
    verdict_stage,
)
from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.journal import Journal
from sae_lens_dfc.core.output_folder import locked_output
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.terminal import print_result, text_table
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)

SCREENING_FILENAME = "screening.json"


@dataclass(frozen=True)
class Screened:
    """What a screening tests, with its settings and measures."""

    subject: Subject
    cfg: CrosscoderRunnerConfig
    evaluation: Evaluation


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
    one_basis = all(one.verdict in OF_ONE_BASIS for one in found.findings)
    head = ["", "latent", "partition", "verdict"]
    own = [*head, *effect_names(one_basis), "description"]
    print_result("\n" + text_table(own, [_line(one) for one in found.findings]))
    if found.shared:
        in_both = text_table([*head, *SHARED_EFFECTS], [_line(one)[:-1] for one in found.shared])
        print_result(f"\nShared latents, ablated in both models:\n\n{in_both}")
    if found.divergence:
        explained_table = text_table(*divergence_table(found.divergence))
        print_result(
            f"\nShare of the divergence between the models' predictions that is removed:\n\n{explained_table}"
        )
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
        screened = _opened(options)
        on, evidence = screened.subject, screened.evaluation.evidence
        output = Path(options.output)
        progress = Journal(output.with_name(f"{output.name}.progress.jsonl"), _settings(options))
        made = differences_made(on.crosscoder, on.gathered, on.own, on.affine_maps)
        assert evidence is not None  # `measure` maps the models
        first = candidates(evidence, on.gathered, made, options.keep, on.one_basis)
        # Between models of one basis shared latents are among the candidates.
        keep_shared = 0 if on.one_basis else options.keep_shared
        in_both = shared_choice(evidence, keep_shared, SharedSizes(seed=options.seed))
        if not first.latents and not in_both.chosen:
            raise ValueError(
                f"No latent of {options.run} fires on held-out text and could be a difference. Check with `evaluate` that the run is trained."
            )
        said: dict[int, Explained] = {}
        if judge is not None:
            asked = Asked(judge, concerns, options.flagged_only, options.seed)
            first, said = explained(on, first, asked, progress)
        results = _tested(on, first.latents, options, progress)
        found = findings(on.crosscoder, first.latents, results, said, evidence, on.one_basis)
        shared = _shared(on, evidence, in_both, options, progress)
        n_pairs = options.divergence_pairs
        divergence = progress.done(
            f"divergence on {n_pairs} pairs",
            partial(explained_divergence, on, first.order, n_pairs, options.seed),
        )
        screening = Screening(
            [*first.stages, verdict_stage(found)],
            ranked(found, OF_ONE_BASIS if on.one_basis else OF_TWO_BASES),
            ranked(shared, OF_SHARED),
            divergence,
        )
        _write(screened, screening, stored, options)
        progress.forget()
        return screening


def _opened(options: ScreenOptions) -> Screened:
    """Load the run's models and text, and measure its latents."""
    # All layers are needed for next-token predictions.
    crosscoder, cfg, pair = opened_run(options.run, options, drop_unused_layers=False)
    own = own_config(options.run, options, options.fit_pairs)
    stored = evidence_of(options.run, options.evidence, crosscoder)
    case = case_of(options.run, options, own, pair)
    data = case.data
    if stored is None:
        evaluation = measure(crosscoder, case.with_losses())
    else:
        found = evaluate(crosscoder, [rows.acts for rows in data.held_out])
        evaluation = found._replace(metrics=found.metrics | data.metrics, evidence=stored)
    return Screened(subject_of(crosscoder, pair, data), cfg, evaluation)


def _tested(
    on: Subject, latents: Sequence[int], options: ScreenOptions, progress: Journal
) -> dict[int, CausalTest | None]:
    """Test each latent causally; none for a latent that fires at the end of too few of its test
    texts."""
    sizes = Sizes(options.texts, options.controls, options.seed, not options.no_samples)
    test = causal_tests(on, latents, sizes)

    def stored(latent: int) -> dict[str, Any] | None:
        found = test(latent)
        return None if found is None else asdict(found)

    results: dict[int, CausalTest | None] = {}
    for latent in tqdm(latents, "Testing", unit=" latents"):
        result = progress.done(f"tested {latent}", partial(stored, latent))
        results[latent] = (
            None if result is None else from_plain(CausalTest, result, "A causal test")
        )
    return results


def _shared(
    on: Subject,
    evidence: LatentEvidence,
    choice: SharedChoice,
    options: ScreenOptions,
    progress: Journal,
) -> list[Finding]:
    """Ablate shared latents in both models, and give a verdict on each."""
    sizes = SharedSizes(seed=options.seed)

    def stored(latent: int) -> dict[str, Any] | None:
        is_a = bool(evidence.is_a[latent])
        found = tested_in_both(on, is_a, latent, choice.controls, sizes)
        return None if found is None else asdict(found)

    results: dict[int, SharedTest | None] = {}
    latents = [*choice.chosen, *choice.others]
    for latent in tqdm(latents, "Ablating shared latents", unit=" latents"):
        result = progress.done(f"ablated in both {latent}", partial(stored, latent))
        results[latent] = (
            None if result is None else from_plain(SharedTest, result, "A test of a shared latent")
        )
    return shared_findings(results, evidence)


def _settings(options: ScreenOptions) -> dict[str, Any]:
    """Everything that determines a test's result: the options except the output and the pairs for
    the divergence, whose result has their number in its name, and the weights."""
    left_out = {"output", "overwrite", "json", "device", "divergence_pairs"}
    weights = sorted(Path(options.run).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    given = {name: value for name, value in vars(options).items() if name not in left_out}
    return {**given, "weights": digest}


def _write(
    screened: Screened, screening: Screening, stored: Mapping[str, float], options: ScreenOptions
) -> None:
    on, evaluation = screened.subject, screened.evaluation
    metrics = {**stored, **evaluation.metrics, **screening.divergence}
    measured = Measured.on(on.crosscoder, evaluation._replace(metrics=metrics), on.data)
    page = report_data(measured, on.data, on.pair, screened.cfg)
    page = replace(page, metrics=drop_nonfinite(metrics), screening=screening)
    with atomic_folder(options.output) as folder:
        write_results(folder, page, measured)
        text = json.dumps(asdict(screening), indent=1) + "\n"
        (folder / SCREENING_FILENAME).write_text(text, encoding="utf-8")
