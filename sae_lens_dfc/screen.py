"""What `sae-lens-dfc screen` does: a screening of a run from its models to its report."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from simple_parsing import field
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.assess import AssessOptions, known, measure
from sae_lens_dfc.concerns import CONCERNS, read_concerns
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.evaluate import Evaluation
from sae_lens_dfc.explaining import Asked, explained, what_it_costs
from sae_lens_dfc.findings import Finding, Screening
from sae_lens_dfc.gathering import Gathered, Place, gather
from sae_lens_dfc.held_out import (
    Judging,
    data_of,
    judge_for,
    opened_run,
    own_config,
    stored_metrics,
)
from sae_lens_dfc.latent_list import evidence_of
from sae_lens_dfc.measured_run import (
    REPORT_FILENAME,
    Measured,
    report_data,
    settings,
    write_results,
)
from sae_lens_dfc.measures import text_table
from sae_lens_dfc.metrics.exclusivity import both_decoder_differences
from sae_lens_dfc.metrics.outcomes import common_outcomes
from sae_lens_dfc.metrics.stitching import Stitching
from sae_lens_dfc.metrics.verification import (
    MIN_TEXTS,
    Texts,
    own_part,
    texts_of,
    verify,
)
from sae_lens_dfc.nulls import Case
from sae_lens_dfc.output import all_or_nothing, claimed, say
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.pair_data import PairData
from sae_lens_dfc.progress import Progress
from sae_lens_dfc.screening import (
    N_TOP,
    candidates,
    control_directions,
    differences_made,
    source_of,
    split,
    windows,
)
from sae_lens_dfc.segments import Segments
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.verdicts import CausalTest, Explained, findings, samples, tested, verdict_stage

logger = logging.getLogger(__name__)

SCREENING_FILENAME = "screening.json"


@dataclass(kw_only=True)
class ScreenOptions(Judging):
    """From all latents of a run to a short list of differences, each tested by its cause, in a report; goes on where it stopped.

    Raises:
        ValueError: A number is out of its range.
    """

    run: str = field(positional=True, metavar="RUN")
    """Folder that `train` or `demo` wrote."""
    output: str
    """Folder for report.html, screening.json, latents.csv and metrics.json."""
    overwrite: bool = False
    """Replace what the output folder holds."""
    evidence: str | None = None
    """Folder that `evaluate --output` wrote of this run: its nulls stand beside the measures in the report. None takes what the run's own
    folder has."""
    keep: int = 16
    """Latents that are tested by steering: those with the most evidence of being a difference."""
    texts: int = 8
    """Texts on which each is tested, by none of which a judge describes it; 3 to 10."""
    controls: int = 8
    """Control directions of each of two kinds: random ones, and what shared latents write."""
    fit_pairs: int = 20_000
    """At most so many of the run's training pairs to fit the maps between the models with."""
    seed: int = 0
    """Of what is drawn."""
    concerns: str | None = None
    """For --judge: a YAML or JSON file of types of concern, each with what it covers; none takes a list of twelve."""
    flagged_only: bool = False
    """For --judge: test only latents that are of one of these types."""

    def __post_init__(self) -> None:
        for name, least in (("keep", 1), ("texts", MIN_TEXTS), ("controls", 2), ("fit_pairs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}.")
        if self.texts > N_TOP // 2:
            raise ValueError(f"texts must be at most {N_TOP // 2}, got {self.texts}.")


@dataclass(frozen=True)
class Screened:
    """What a screening works on."""

    crosscoder: Crosscoder
    cfg: CrosscoderRunnerConfig
    pair: ModelPair
    data: PairData
    evaluation: Evaluation
    gathered: Gathered
    stitching: Stitching | None
    """None where both models have one basis."""
    own: tuple[Tensor, Tensor]
    """Each latent's own part in A and in B, see `both_decoder_differences`."""


def screen_run(options: ScreenOptions) -> None:
    """Screen a run, write the report and print the verdicts."""
    found = screen(options)
    if options.json:
        say(json.dumps(asdict(found)))
        return
    rows = [[s.stage, str(s.intake), str(s.output), _why(s.dropped)] for s in found.stages]
    say(text_table(["stage", "in", "out", "left out"], rows))
    head = ["", "latent", "partition", "verdict", "taken: closer by, bits", "given", "description"]
    say("\n" + text_table(head, [_line(one) for one in found.findings]))
    say(f"\nReport: {Path(options.output) / REPORT_FILENAME}")


def _why(dropped: Mapping[str, int]) -> str:
    return "; ".join(f"{n} {why}" for why, n in dropped.items())


def _line(one: Finding) -> list[str]:
    effects = [f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in one.effects[:2]] or ["", ""]
    latent = [str(one.rank), str(one.latent), one.partition, one.verdict]
    return [*latent, *effects, one.description or ""]


def screen(options: ScreenOptions) -> Screening:
    """All stages of a screening; writes the output folder whole or not at all.

    What was tested so far is kept beside the output folder and is not tested again.

    Raises:
        ValueError: The run, the output or the judge cannot be had, or no latent could be a difference.
    """
    with claimed(options.output, options.overwrite, "screening", (SCREENING_FILENAME,)):
        return _screened(options)


def _screened(options: ScreenOptions) -> Screening:
    concerns = CONCERNS if options.concerns is None else read_concerns(options.concerns)
    judge = judge_for(options)
    if judge is None and (options.concerns is not None or options.flagged_only):
        raise ValueError("--concerns, --flagged-only: for --judge. Give it too.")
    if judge is not None:
        logger.warning("%s", what_it_costs(options.keep, concerns))
    stored = stored_metrics(options.evidence or options.run, options)
    on = _opened(options)
    output = Path(options.output)
    progress = Progress(output.with_name(f"{output.name}.progress.jsonl"), _settings(options))
    made = differences_made(on.crosscoder, on.gathered, on.own, on.stitching)
    evidence = on.evaluation.evidence
    assert evidence is not None  # `measure` maps the models
    first = candidates(evidence, on.gathered, made, options.keep, on.stitching is None)
    if not first.latents:
        raise ValueError(
            f"No latent of {options.run} fires on held-out text and could be a difference. Evaluate it first: is it trained?"
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
    """The run's models, its text and what is measured of its latents."""
    # Whole models: they are to predict tokens.
    crosscoder, cfg, pair = opened_run(options.run, options, drop_unused_layers=False)
    own = own_config(options.run, options, options.fit_pairs)
    data = data_of(own, cfg, pair, options.dataset is not None)
    only_latents = AssessOptions(nulls=[], downstream_pairs=0, behaviour_latents=0)
    evaluation = measure(crosscoder, Case(own, pair, data), only_latents)
    stored = evidence_of(options.run, options.evidence, crosscoder)
    if stored is not None:
        evaluation = evaluation._replace(evidence=stored)
    d_a = crosscoder.cfg.d_a
    stitching = None if data.one_basis(d_a) else data.stitching(d_a).to(crosscoder.device)
    gathered = gather(crosscoder, data.held_out)
    own_parts = both_decoder_differences(crosscoder, stitching)
    return Screened(crosscoder, cfg, pair, data, evaluation, gathered, stitching, own_parts)


def _tested(
    on: Screened, latents: Sequence[int], options: ScreenOptions, progress: Progress
) -> dict[int, CausalTest | None]:
    """The causal test of each latent; none of those that fire at the end of too few of the texts kept for it."""
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
        results[latent] = None if result is None else CausalTest.from_dict(result)
    return results


def _kept_for_test(on: Screened, latent: int, n: int) -> list[Segments]:
    _, places = split(on.gathered.places(latent, n_strongest=2 * n, n_quantiles=0))
    return windows(on.pair, on.data.contexts, places)


def _silent(on: Screened, latent: int, texts: Texts, options: ScreenOptions) -> Texts | None:
    """Texts at whose end the latent does not fire, as if it fired there as it does in the others; none where there are too few."""
    generator = torch.Generator().manual_seed(options.seed + latent)
    contexts = on.data.contexts
    drawn = torch.randperm(len(contexts), generator=generator)[: options.texts].tolist()
    places = [Place(i, len(contexts[i].segments) - 1, 0.0, None) for i in drawn]
    found = texts_of(
        on.crosscoder, on.pair, latent, windows(on.pair, contexts, places), fires=False
    )
    if len(found.rows.contexts) < MIN_TEXTS:
        return None
    return found.with_activation(texts.at_end.mean().item())


def _settings(options: ScreenOptions) -> dict[str, Any]:
    """All that decides a test's result: the options but for where it goes, and the weights."""
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
    page = report_data(measured, on.data, on.pair, settings(on.cfg))
    page = replace(page, metrics=known(metrics), screening=screening)
    with all_or_nothing(options.output) as folder:
        write_results(folder, page, measured)
        text = json.dumps(asdict(screening), indent=1) + "\n"
        (folder / SCREENING_FILENAME).write_text(text, encoding="utf-8")
