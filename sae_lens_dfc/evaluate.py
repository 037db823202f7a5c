"""All measures of a crosscoder on held-out pairs, as one flat dictionary."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity import decoder_metrics
from sae_lens_dfc.metrics.pca import JointPCA
from sae_lens_dfc.metrics.reconstruction import ExplainedVariance
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.pair import ModelPair


@torch.no_grad()
def evaluate(
    crosscoder: Crosscoder, acts: Iterable[Float[Tensor, "_ d_in"]]
) -> tuple[dict[str, float], Firing]:
    """Measures of a saved crosscoder on raw activations, and each latent's firing.

    Raises:
        ValueError: There is no activation to evaluate on.
    """
    variance, firing = ExplainedVariance(crosscoder.partition), Firing(crosscoder.partition)
    for batch in tqdm(acts, "Evaluating", leave=False):
        batch = batch.to(crosscoder.device)
        feature_acts = crosscoder.encode(batch)
        variance.update(batch, crosscoder.decode(feature_acts))
        firing.update(feature_acts)
    return {
        **variance.compute(),
        **firing.compute(),
        **decoder_metrics(crosscoder),
        "pairs_evaluated": firing.n,
    }, firing


def evaluate_pca(
    pca: JointPCA, acts: Iterable[Float[Tensor, "_ d_in"]], crosscoder: Crosscoder
) -> dict[str, float]:
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

    acts: Iterable[Float[Tensor, "_ d_in"]]
    """Batches of raw activations that training does not see."""

    def __call__(
        self,
        sae: TrainingCrosscoder[Any],
        data_provider: DataProvider,  # noqa: ARG002
        activation_scaler: ActivationScaler,  # noqa: ARG002
    ) -> dict[str, float]:
        metrics, _ = evaluate(sae.to_inference(), self.acts)
        return {f"held_out/{name}": value for name, value in metrics.items()}
