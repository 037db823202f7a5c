"""Computes all metrics of a crosscoder on held-out pairs, as one flat dictionary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.core.identity import PROVENANCE
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.cross_reconstruction import CrossReconstruction
from sae_lens_dfc.metrics.exclusivity.decoders import decoder_cosines, decoder_metrics
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence, claim_metrics, latent_evidence
from sae_lens_dfc.metrics.exclusivity.known import Probes, ShareKnown
from sae_lens_dfc.metrics.exclusivity.latent_scaling import LatentScaling, directions
from sae_lens_dfc.metrics.exclusivity.target_worse import TargetWorse
from sae_lens_dfc.metrics.exclusivity.transfer import Transfer
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance, ReconstructionByRow
from sae_lens_dfc.metrics.sparsity import ActivationStats
from sae_lens_dfc.metrics.token_frequency import ExplainedVarianceByFrequency
from sae_lens_dfc.stats.affine_maps import AffineMaps, affine_map_quality
from sae_lens_dfc.stats.moments import PairMoments

ActivationBatches = Iterable[Float[Tensor, "_ d_in"]]
Deciles = Mapping[str, Int[Tensor, " _"]]
"""For each model (`a`, `b`) the token-frequency decile of each row; see
`metrics.token_frequency`."""


class Evaluation(NamedTuple):
    """Results of an evaluation."""

    metrics: dict[str, float]
    """Flat, by name; `NAME/se` is the standard error of `NAME` over the text."""
    firing: ActivationStats
    """Firing statistics of each latent."""
    evidence: LatentEvidence | None = None
    """Exclusivity evidence for each latent; none without affine maps and probes."""


@torch.no_grad()
def evaluate(
    crosscoder: Crosscoder,
    acts: ActivationBatches,
    affine_maps: AffineMaps | None = None,
    probes: Probes | None = None,
    contexts: Sequence[Int[Tensor, " _"]] | None = None,
    following: Sequence[Float[Tensor, "_ windows 2"]] | None = None,
    deciles: Sequence[Deciles] | None = None,
) -> Evaluation:
    """Evaluate a saved crosscoder on held-out raw activations.

    Args:
        crosscoder: The saved crosscoder.
        acts: At least ten batches, preferably of whole contexts, since standard errors are computed
            over batches. With `affine_maps` there are two passes over them.
        affine_maps: Affine maps between the models, fitted on other pairs; with `probes`, needed to
            measure every latent's exclusivity.
        probes: Probes of the crosscoder's latents, fitted on other pairs; see `fit_probes`.
        contexts: For each batch, the number of the context that each row comes from; none takes
            each batch as one context.
        following: For each batch, both models' losses on the text after each row; see
            `following_losses`.
        deciles: Token-frequency deciles for each batch, to evaluate rare and frequent tokens
            separately.

    Raises:
        ValueError: There are no activations, an activation of a model or latent is NaN or infinite,
            or only one of maps and probes is given.
    """
    if (affine_maps is None) != (probes is None):
        raise ValueError(
            "A latent's exclusivity is measured with affine maps and probes, and only one of them is given. Give both, or none."
        )
    acts = acts if affine_maps is None else list(acts)
    partition = crosscoder.partition
    b_dec = crosscoder.b_dec.detach()
    affine_maps = None if affine_maps is None else affine_maps.to(crosscoder.device)
    # The maps' means are the data's means; b_dec is only close to them.
    center = b_dec if affine_maps is None else torch.cat([affine_maps.mean_a, affine_maps.mean_b])
    variance = ExplainedVariance(partition)
    by_row = ReconstructionByRow(partition, center, crosscoder.input_scale)
    by_frequency = ExplainedVarianceByFrequency(partition, center)
    firing = ActivationStats(partition)
    maps = () if affine_maps is None else (affine_maps.to_b, affine_maps.to_a)
    crossed = CrossReconstruction(crosscoder, center, *maps)
    exclusivity = (
        None
        if affine_maps is None or probes is None
        else _Exclusivity(crosscoder, affine_maps, probes)
    )
    for batch, context, after, own_deciles in tqdm(
        _with(acts, contexts, following, deciles), "Evaluating", leave=False
    ):
        batch = batch.to(crosscoder.device)
        if not batch.isfinite().all():
            raise ValueError(
                "Activations to evaluate on hold NaN or infinity. Leave such rows out, as paired_activations does."
            )
        feature_acts = crosscoder.encode(batch)
        rebuilt = crosscoder.decode(feature_acts)
        # First, because it checks that latent activations are finite.
        firing.update(feature_acts)
        variance.update(batch, rebuilt)
        by_row.update(batch, rebuilt)
        if own_deciles is not None:
            by_frequency.update(batch, rebuilt, own_deciles)
        crossed.update(batch)
        if exclusivity is not None:
            exclusivity.update(batch, feature_acts, rebuilt, context)
            if after is not None:
                exclusivity.update_losses(feature_acts, after, context)
    metrics: dict[str, float] = {
        **variance.compute(),
        **by_row.compute(),
        **({} if deciles is None else by_frequency.compute()),
        **firing.compute(),
        **decoder_metrics(crosscoder),
        **crossed.compute(),
        "pairs_evaluated": firing.n,
    }
    if exclusivity is None:
        return Evaluation(metrics, firing)
    for batch in tqdm(acts, "Evaluating transfer", leave=False):
        exclusivity.transfer.update(batch.to(crosscoder.device))
    evidence = exclusivity.evidence()
    return Evaluation(metrics | exclusivity.metrics() | claim_metrics(evidence), firing, evidence)


def _with(
    acts: ActivationBatches,
    contexts: Sequence[Tensor] | None,
    following: Sequence[Tensor] | None,
    deciles: Sequence[Deciles] | None,
) -> Iterable[tuple[Tensor, Tensor | None, Tensor | None, Deciles | None]]:
    """Each batch with what is given of its rows.

    Raises:
        ValueError: Something is given for another number of batches.
    """
    if contexts is None and following is None and deciles is None:
        return ((batch, None, None, None) for batch in acts)
    batches = list(acts)
    given = ([None] * len(batches) if x is None else x for x in (contexts, following, deciles))
    return zip(batches, *given, strict=True)


class _Exclusivity:
    """The metrics that need affine maps between the two models, and probes."""

    def __init__(self, crosscoder: Crosscoder, affine_maps: AffineMaps, probes: Probes):
        self.crosscoder = crosscoder
        self.affine_maps = affine_maps
        self.directions = directions(crosscoder, affine_maps)
        self.scaling = {"latent_scaling": LatentScaling(crosscoder, self.directions)}
        if crosscoder.cfg.d_a == crosscoder.cfg.d_b:
            # A model and its fine-tune share a basis; for other pairs only the map is meaningful.
            same = directions(crosscoder, None)
            self.scaling["latent_scaling_direct"] = LatentScaling(crosscoder, same)
        self.known = ShareKnown(crosscoder, probes)
        self.target_worse: TargetWorse | None = None
        self.transfer = Transfer(crosscoder, affine_maps)
        self.held_out = PairMoments()

    def update(
        self, acts: Tensor, feature_acts: Tensor, rebuilt: Tensor, context: Tensor | None
    ) -> None:
        self.known.update(acts, feature_acts, context)
        for scaling in self.scaling.values():
            scaling.update(acts, feature_acts, rebuilt)
        self.transfer.calibrate(acts, feature_acts)
        self.held_out.update(acts)

    def update_losses(
        self, feature_acts: Tensor, following: Tensor, context: Tensor | None
    ) -> None:
        if self.target_worse is None:
            self.target_worse = TargetWorse(self.crosscoder)
        self.target_worse.update(feature_acts, following, context)

    def evidence(self) -> LatentEvidence:
        scaling = {name: s.estimates() for name, s in self.scaling.items()}
        return latent_evidence(
            self.crosscoder,
            self.directions,
            self.known.estimates(),
            scaling,
            self.transfer.compute(),
            None if self.target_worse is None else self.target_worse.estimates(),
        )

    def metrics(self) -> dict[str, float]:
        return {
            **affine_map_quality(self.affine_maps, self.held_out),
            **decoder_cosines(self.crosscoder, self.affine_maps),
        }


def evaluate_pca(
    pca: JointPCA, acts: ActivationBatches, crosscoder: Crosscoder
) -> dict[str, float]:
    """The metrics that apply to principal components, on the same activations as a crosscoder's."""
    variance = ExplainedVariance(crosscoder.partition)
    n = 0
    for batch in acts:
        variance.update(batch, pca.reconstruct(batch))
        n += len(batch)
    return {**variance.compute(), "l0": float(len(pca.components)), "pairs_evaluated": n}


def alignment_metrics(counts: PairCounts) -> dict[str, float]:
    """Share of each model's tokens that are paired, and numbers of pairs excluded afterwards."""
    return {
        "alignment/coverage_a": counts.coverage.a,
        "alignment/coverage_b": counts.coverage.b,
        "alignment/first_position": counts.first_position,
        "alignment/outlier": counts.outlier,
        "alignment/not_finite": counts.not_finite,
    }


def check_models(crosscoder: Crosscoder, pair: ModelPair) -> None:
    """Check that these are the models that the crosscoder was trained on.

    Raises:
        ValueError: A relevant property differs; the message names the first.
    """
    for which, now in pair.describe().items():
        trained = crosscoder.cfg.metadata.get(which)
        if trained is None:
            raise ValueError(
                "This crosscoder does not record which models it was trained on, so the given ones cannot be checked. "
                "Train it with CrosscoderTrainingRunner."
            )
        for key in trained:
            if key not in PROVENANCE and trained[key] != now[key]:
                raise ValueError(
                    f"This crosscoder was trained on another {which.replace('_', ' ')}: {key} was {trained[key]!r} "
                    f"(of {trained['model_name']!r}), now it is {now[key]!r} (of {now['model_name']!r}). "
                    "Give the models it was trained on, in the same order."
                )


@dataclass
class HeldOutEvaluator:
    """SAELens `Evaluator` that computes metrics on held-out pairs during training."""

    acts: ActivationBatches
    """Batches of held-out raw activations."""

    def __call__(
        self,
        sae: TrainingCrosscoder[Any],
        data_provider: DataProvider,  # noqa: ARG002
        activation_scaler: ActivationScaler,  # noqa: ARG002
    ) -> dict[str, float]:
        metrics = evaluate(sae.to_inference(), self.acts).metrics
        return {f"held_out/{name}": value for name, value in metrics.items()}
