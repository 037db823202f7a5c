"""All measures of a crosscoder on held-out pairs, as one flat dictionary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.claims import LatentEvidence, claim_metrics, latent_evidence
from sae_lens_dfc.metrics.cross_reconstruction import CrossReconstruction
from sae_lens_dfc.metrics.exclusivity import decoder_cosines, decoder_metrics
from sae_lens_dfc.metrics.frequency import ExplainedVarianceByFrequency
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance, ReconstructionByRow
from sae_lens_dfc.metrics.scaling import LatentScaling, directions
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.metrics.stitching import Stitching, stitching_quality
from sae_lens_dfc.metrics.transfer import Transfer
from sae_lens_dfc.pair import ModelPair

Batches = Iterable[Float[Tensor, "_ d_in"]]
Deciles = Mapping[str, Int[Tensor, " _"]]
"""For each model (`a`, `b`) the token-frequency decile of each row; see `metrics.frequency`."""


class Evaluation(NamedTuple):
    """What was measured of a crosscoder."""

    metrics: dict[str, float]
    """By name, flat; where a name with `/se` stands beside a name, it is that one's standard error over the text."""
    firing: Firing
    """Of each latent."""
    evidence: LatentEvidence | None = None
    """Of each latent, where the two models were mapped to each other."""


@torch.no_grad()
def evaluate(
    crosscoder: Crosscoder,
    acts: Batches,
    stitching: Stitching | None = None,
    deciles: Sequence[Deciles] | None = None,
) -> Evaluation:
    """Measures of a saved crosscoder on raw activations that it was not trained on.

    Args:
        crosscoder: The saved crosscoder.
        acts: Batches, of whole contexts as far as may be, and ten or more: standard errors are over batches. With
            `stitching` they are gone over twice.
        stitching: Maps between the models, fitted on other pairs; with them every latent's exclusivity is measured.
        deciles: For each batch, to measure rare and frequent tokens apart.

    Raises:
        ValueError: There is no activation to evaluate on, or one of them or of its latents is NaN or infinite.
    """
    acts = acts if stitching is None else list(acts)
    partition = crosscoder.partition
    b_dec = crosscoder.b_dec.detach()
    stitching = None if stitching is None else stitching.to(crosscoder.device)
    # The maps' means are the data's; the bias is where training left it, about there.
    centre = b_dec if stitching is None else torch.cat([stitching.mean_a, stitching.mean_b])
    variance = ExplainedVariance(partition)
    by_row = ReconstructionByRow(partition, centre, crosscoder.input_scale)
    by_frequency = ExplainedVarianceByFrequency(partition, centre)
    firing = Firing(partition)
    crossed = _crossed(crosscoder, centre, stitching)
    exclusivity = None if stitching is None else _Exclusivity(crosscoder, stitching)
    pairs = ((a, None) for a in acts) if deciles is None else zip(acts, deciles, strict=True)
    for batch, own_deciles in tqdm(pairs, "Evaluating", leave=False):
        batch = batch.to(crosscoder.device)
        if not batch.isfinite().all():
            raise ValueError(
                "Activations to evaluate on hold NaN or infinity. Leave such rows out, as paired_activations does."
            )
        feature_acts = crosscoder.encode(batch)
        rebuilt = crosscoder.decode(feature_acts)
        # Before anything is measured: it refuses activations of latents that are not finite.
        firing.update(feature_acts)
        variance.update(batch, rebuilt)
        by_row.update(batch, rebuilt)
        if own_deciles is not None:
            by_frequency.update(batch, rebuilt, own_deciles)
        crossed.update(batch)
        if exclusivity is not None:
            exclusivity.update(batch, feature_acts, rebuilt)
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
        exclusivity.update_again(batch.to(crosscoder.device))
    evidence = exclusivity.evidence()
    return Evaluation(metrics | exclusivity.metrics() | claim_metrics(evidence), firing, evidence)


def _crossed(
    crosscoder: Crosscoder, means: Tensor, stitching: Stitching | None
) -> CrossReconstruction:
    if stitching is None:
        return CrossReconstruction(crosscoder, means)
    return CrossReconstruction(crosscoder, means, stitching.to_b, stitching.to_a)


class _Exclusivity:
    """The measures that need a map between the two models."""

    def __init__(self, crosscoder: Crosscoder, stitching: Stitching):
        self.crosscoder = crosscoder
        self.stitching = stitching
        self.directions = directions(crosscoder, stitching)
        self.scaling = {"latent_scaling": LatentScaling(crosscoder, self.directions)}
        if crosscoder.cfg.d_a == crosscoder.cfg.d_b:
            # A model and its fine-tune have one basis; of two others the map alone says something.
            same = directions(crosscoder, None)
            self.scaling["latent_scaling_direct"] = LatentScaling(crosscoder, same)
        self.transfer = Transfer(crosscoder, stitching)
        self.held_out = PairMoments()

    def update(self, acts: Tensor, feature_acts: Tensor, rebuilt: Tensor) -> None:
        for scaling in self.scaling.values():
            scaling.update(acts, feature_acts, rebuilt)
        self.transfer.calibrate(acts, feature_acts)
        self.held_out.update(acts)

    def update_again(self, acts: Tensor) -> None:
        self.transfer.update(acts)

    def evidence(self) -> LatentEvidence:
        scaling = {name: s.estimates() for name, s in self.scaling.items()}
        return latent_evidence(self.crosscoder, self.directions, scaling, self.transfer.compute())

    def metrics(self) -> dict[str, float]:
        return {
            **stitching_quality(self.stitching, self.held_out),
            **decoder_cosines(self.crosscoder, self.stitching),
        }


def evaluate_pca(pca: JointPCA, acts: Batches, crosscoder: Crosscoder) -> dict[str, float]:
    """The measures that apply to principal components, on the same activations as a crosscoder's."""
    variance = ExplainedVariance(crosscoder.partition)
    n = 0
    for batch in acts:
        variance.update(batch, pca.reconstruct(batch))
        n += len(batch)
    return {**variance.compute(), "l0": float(len(pca.components)), "pairs_evaluated": n}


def alignment_metrics(counts: PairCounts) -> dict[str, float]:
    """Share of each model's tokens that found a partner, and the pairs left out afterwards."""
    return {
        "alignment/coverage_a": counts.coverage.a,
        "alignment/coverage_b": counts.coverage.b,
        "alignment/first_position": counts.first_position,
        "alignment/outlier": counts.outlier,
        "alignment/not_finite": counts.not_finite,
    }


def check_models(crosscoder: Crosscoder, pair: ModelPair) -> None:
    """Refuse models other than those the crosscoder was trained on.

    Raises:
        ValueError: Something that matters differs; the message names the first such thing.
    """
    for which, now in pair.describe().items():
        trained = crosscoder.cfg.metadata.get(which)
        if trained is None:
            raise ValueError(
                "This crosscoder does not say which models it was trained on, so the ones given cannot be checked. "
                "Train it with CrosscoderTrainingRunner."
            )
        for key in trained:
            if key != "model_name" and trained[key] != now[key]:
                raise ValueError(
                    f"This crosscoder was trained on another {which.replace('_', ' ')}: {key} was {trained[key]!r} "
                    f"(of {trained['model_name']!r}), now it is {now[key]!r} (of {now['model_name']!r}). "
                    "Give the models it was trained on, in the same order."
                )


@dataclass
class HeldOutEvaluator:
    """SAELens' `Evaluator`: the measures on held-out pairs, whenever the trainer asks for them."""

    acts: Batches
    """Batches of raw activations that training does not see."""
    stitching: Stitching | None = None
    """Maps between the models, fitted on other pairs than these; without them no latent's exclusivity is measured."""

    def __call__(
        self,
        sae: TrainingCrosscoder[Any],
        data_provider: DataProvider,  # noqa: ARG002
        activation_scaler: ActivationScaler,  # noqa: ARG002
    ) -> dict[str, float]:
        metrics = evaluate(sae.to_inference(), self.acts, self.stitching).metrics
        return {f"held_out/{name}": value for name, value in metrics.items()}
