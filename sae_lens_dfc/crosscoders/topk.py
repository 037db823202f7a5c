"""What crosscoders that keep the largest scores of a batch share: groups, annealing, thresholds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc import ranks
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig, TrainingCrosscoder
from sae_lens_dfc.crosscoders.selection import keep_largest


@dataclass(kw_only=True)
class TopKTrainingCrosscoderConfig(CrosscoderTrainingConfig, ABC):
    """What all crosscoders that select by BatchTopK share.

    Raises:
        ValueError: `k` does not fit the number of latents.
    """

    k: float = 100.0
    """Latents active for each pair, on average over the batch, which is that of all ranks together."""
    k_initial: float | None = None
    """Latents active at the first step; none starts with k (1000 in arXiv 2602.11729, appendix B.1)."""
    k_anneal_steps: int = 0
    """Steps over which k_initial falls to k, on a line (5000 there)."""
    topk_threshold_lr: float = 0.01
    """Step of the moving average of the smallest selected score, the threshold of the saved crosscoder."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "k_initial"):
            k = getattr(self, name)
            if k is not None and not 0 < k <= self.d_sae:
                raise ValueError(
                    f"{name} must be above 0 and at most d_sae, got {name}={k:g} and d_sae={self.d_sae}."
                )
        if self.k_anneal_steps < 0 or (self.k_initial is None) != (self.k_anneal_steps == 0):
            raise ValueError(
                "Annealing needs both k_initial and k_anneal_steps (above 0), or neither; "
                f"got {self.k_initial} and {self.k_anneal_steps}."
            )

    def k_at(self, step: int) -> float:
        """`k` at a training step.

        >>> from sae_lens_dfc import BatchTopKTrainingCrosscoderConfig
        >>> cfg = BatchTopKTrainingCrosscoderConfig(d_sae=64, k=4, k_initial=20, k_anneal_steps=8)
        >>> [cfg.k_at(step) for step in (0, 4, 8, 100)]
        [20.0, 12.0, 4.0, 4.0]
        """
        if self.k_initial is None:
            return self.k
        remaining = max(0.0, 1 - step / self.k_anneal_steps)
        return self.k + (self.k_initial - self.k) * remaining


T_TOPK_CONFIG = TypeVar("T_TOPK_CONFIG", bound=TopKTrainingCrosscoderConfig)


class TopKTrainingCrosscoder(TrainingCrosscoder[T_TOPK_CONFIG], Generic[T_TOPK_CONFIG], ABC):
    """Keeps the largest scores of a batch in each group of latents (BatchTopK), and learns each group's threshold."""

    topk_threshold: Float[Tensor, " groups"]

    def __init__(self, cfg: T_TOPK_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.n_training_steps = 0
        n_groups = len(self.budgets())
        threshold = torch.zeros(n_groups, dtype=torch.double, device=self.W_dec.device)
        self.register_buffer("topk_threshold", threshold)

    @abstractmethod
    def budgets(self) -> list[tuple[slice, float]]:
        """The groups of latents that compete among themselves, in latent order, each with its share of `k`."""

    @override
    def select(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        k = self.cfg.k_at(self.n_training_steps)
        kept: list[Tensor] = []
        for latents, share in self.budgets():
            size = latents.stop - latents.start
            kept.append(keep_largest(scores[..., latents], min(share * k, size)))
        return torch.cat(kept, dim=-1)

    @override
    def latent_thresholds(self) -> Float[Tensor, " d_sae"]:
        # A group that never kept a latent must not fire on every positive score.
        unset = self.topk_threshold == 0
        thresholds = self.topk_threshold.masked_fill(unset, torch.inf).to(self.W_dec.dtype)
        return torch.cat(
            [
                thresholds[i].expand(latents.stop - latents.start)
                for i, (latents, _) in enumerate(self.budgets())
            ]
        )

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses; `k` is that of the step."""
        self.n_training_steps = step_input.n_training_steps
        output = super().training_forward_pass(step_input)
        self._update_thresholds(output.feature_acts)
        return output

    @torch.no_grad()
    def _update_thresholds(self, feature_acts: Tensor) -> None:
        lr = self.cfg.topk_threshold_lr
        own = [smallest_positive(feature_acts[..., latents]) for latents, _ in self.budgets()]
        everyones = ranks.smallest(torch.stack(own).to(self.topk_threshold.dtype))
        for i, smallest in enumerate(everyones):
            if smallest.isinf():
                continue
            # The first value replaces the unset 0: an average from 0 would let too many latents pass in a short run.
            step = lr if self.topk_threshold[i] > 0 else 1.0
            self.topk_threshold[i] += step * (smallest - self.topk_threshold[i])


def smallest_positive(x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The smallest value above 0; infinity if there is none.

    >>> smallest_positive(torch.tensor([3.0, 0.0, 2.0])), smallest_positive(torch.zeros(2))
    (tensor(2.), tensor(inf))
    """
    positive = x[x > 0]
    return positive.min() if positive.numel() > 0 else x.new_tensor(torch.inf)
