"""Base of the BatchTopK crosscoders: groups of competing latents, annealing of k, and firing
thresholds."""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.base import DEAD, WHOLE, Step, StepActs, TrainingCrosscoder
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.partition import zero_forbidden_
from sae_lens_dfc.crosscoders.selection import keep_largest, largest, topk_candidates, would_wait
from sae_lens_dfc.crosscoders.sparse_path import (
    DenseBlock,
    PreActivations,
    SparseActs,
    Weights,
    reconstruct,
)

logger = logging.getLogger(__name__)

# Dense products are as fast below this many scores, or above this kept share: measured on 2 CPU
# cores and estimated for GPUs, whose compute is much faster than their memory.
MIN_SPARSE_SIZE = 2**16
MAX_SPARSE_SHARE = {"cpu": 1 / 4, "cuda": 1 / 64}
# Up to this many latents per kept one, all are multiplied: measured and estimated likewise.
MAX_BLOCK = {"cpu": 5, "cuda": 16}
# Candidates per kept latent from a lower-precision product; their exact values decide.
COARSE_MARGIN = 1.1


@dataclass(kw_only=True)
class TopKTrainingCrosscoderConfig(CrosscoderTrainingConfig, ABC):
    """Settings that all BatchTopK crosscoders share.

    Raises:
        ValueError: `k` does not fit the number of latents.
    """

    k: float = 100.0
    """Active latents per pair, on average over the batch of all ranks."""
    k_initial: float | None = None
    """Active latents per pair at the first step; none starts at k (1000 in arXiv 2602.11729,
    appendix B.1)."""
    k_anneal_steps: int = 0
    """Steps over which k falls linearly from k_initial to k (5000 there)."""
    topk_threshold_lr: float = 0.01
    """Update rate of the moving average of the smallest selected score, which becomes the saved
    crosscoder's threshold."""
    training_path: Literal["auto", "sparse", "dense"] = "auto"
    """How a training step is computed, with the same result. sparse: only the encoder product is
    dense, and everything else uses the active latents alone; with hooks on the latents, the dense
    path is taken instead. dense: as defined. auto: whichever is faster."""
    encoder_product: Literal["exact", "bfloat16"] = "exact"
    """dtype of the sparse path's dense encoder product. bfloat16: it only selects candidates, a
    tenth more than are kept, whose activations are then recomputed in the weights' dtype; for dead
    latents it also decides which are strongest."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_product == "bfloat16" and self.training_path == "dense":
            raise ValueError(
                "encoder_product='bfloat16' is for the sparse path, which recomputes the activations of the latents that it selects. "
                "Set training_path to 'auto' or 'sparse', or leave encoder_product at 'exact'."
            )
        for name in ("k", "k_initial"):
            k = getattr(self, name)
            if k is not None and not 0 < k <= self.d_sae:
                raise ValueError(
                    f"{name} must be above 0 and at most d_sae, got {name}={k:g} and d_sae={self.d_sae}."
                )
        require(self, ("topk_threshold_lr",), "above 0 and at most 1")
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
    """Keeps the largest scores of a batch in each group of latents (BatchTopK) and learns each
    group's threshold.

    Architectures define `topk_groups` and `partial_losses`. One that also overrides `select` or
    `calculate_aux_loss` trains on the dense path, which calls them.
    """

    topk_threshold: Float[Tensor, " groups"]

    def __init__(self, cfg: T_TOPK_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.n_training_steps = 0
        self._said = False
        n_groups = len(self.topk_groups())
        threshold = torch.zeros(n_groups, dtype=torch.double, device=self.W_dec.device)
        self.register_buffer("topk_threshold", threshold)

    @abstractmethod
    def topk_groups(self) -> list[tuple[slice, float]]:
        """The groups of latents that compete with each other, in latent order, each with its share
        of `k`."""

    @override
    def select(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        kept = [keep_largest(scores[..., latents], k) for latents, k in self._k_of_groups()]
        return torch.cat(kept, dim=-1)

    def _k_of_groups(self) -> list[tuple[slice, float]]:
        """Each group with its active latents per row at this step, at most the group's size."""
        k = self.cfg.k_at(self.n_training_steps)
        return [(s, min(share * k, s.stop - s.start)) for s, share in self.topk_groups()]

    @override
    def latent_thresholds(self) -> Float[Tensor, " d_sae"]:
        # A group in which no latent was ever kept must not fire on every positive score.
        unset = self.topk_threshold == 0
        thresholds = self.topk_threshold.masked_fill(unset, torch.inf).to(self.W_dec.dtype)
        return torch.cat(
            [
                thresholds[i].expand(latents.stop - latents.start)
                for i, (latents, _) in enumerate(self.topk_groups())
            ]
        )

    @override
    def before_step(self, step: int) -> None:
        self.n_training_steps = step

    @override
    def after_step(self, step: int, output: TrainStepOutput) -> None:
        self._update_thresholds(output.feature_acts)

    @override
    def check_batch(self, n_rows: int) -> None:
        k = self.cfg.k
        for latents, share in self.topk_groups():
            if share * k * n_rows < 1:
                raise ValueError(
                    f"With a batch of {n_rows} pairs and k={k:g}, latents {latents.start} to {latents.stop - 1} get {share * k:.3g} a "
                    "pair: less than one in all, so they would never fire. Raise k or the batch (train_batch_size_tokens)."
                )

    # --- the sparse path ---

    @override
    def _step_for(self, acts: Tensor) -> Step:
        if self._goes_sparse(acts):
            return self._sparse_step  # type: ignore[return-value]
        self._say_if_not_as_asked()
        return self._dense_step

    def _goes_sparse(self, acts: Tensor) -> bool:
        cfg = self.cfg
        hooks = self.hook_sae_acts_pre, self.hook_sae_acts_post
        own, base = type(self), TopKTrainingCrosscoder
        is_known = own.select is base.select and own.calculate_aux_loss is base.calculate_aux_loss
        is_plain = acts.ndim == 2 and not any(h._forward_hooks or h._backward_hooks for h in hooks)
        if not (self.training and is_known and is_plain):
            return False
        if cfg.training_path != "auto":
            return cfg.training_path == "sparse"
        share = cfg.k_at(self.n_training_steps) / cfg.d_sae
        limit = MAX_SPARSE_SHARE.get(acts.device.type, 0)
        return len(acts) * cfg.d_sae >= MIN_SPARSE_SIZE and share <= limit

    def _say_if_not_as_asked(self) -> None:
        asked = self.cfg.training_path == "sparse" or self.cfg.encoder_product == "bfloat16"
        if asked and not self._said:
            logger.warning(
                "training_path=%r and encoder_product=%r are ignored: the step is dense because of its size, hooks on the "
                "latents, evaluation mode or a subclass with a selection or loss of its own.",
                *(self.cfg.training_path, self.cfg.encoder_product),
            )
            self._said = True

    # When compiled, its sums of unequal lengths are 50 % slower.
    @torch.compiler.disable
    def _sparse_step(self, acts: Tensor, dead: Tensor | None, n_dead: int) -> StepActs:
        """The dense step's values and gradients, computed on the selected latents alone.

        Decoder norms affect the selection and cancel in the decoded values, so no gradient goes
        through them.
        """
        device, partition = self.device.type, self.partition
        is_coarse = torch.is_autocast_enabled(device) or self.cfg.encoder_product == "bfloat16"
        dtype = torch.bfloat16 if is_coarse else self.dtype
        zero_forbidden_(self.W_enc.data, self.W_dec.data, partition)
        # Only the product gains from a lower-precision dtype.
        with torch.autocast(device, enabled=False):
            with torch.no_grad():
                pre = PreActivations.of(acts - self.b_dec, self.W_enc, self.b_enc, partition, dtype)
                chosen, feature_acts = self._choose(pre, dead, n_dead)
            del pre  # a batch of d_sae numbers for each row, before the gradients need the memory
            weights = Weights(self.W_enc, self.b_enc, self.decoder(), self.b_dec)
            decoded = reconstruct(acts, weights, chosen, partition)
        # Only the selected scores are stored.
        return StepActs(feature_acts, feature_acts, decoded)

    def _choose(
        self, pre: PreActivations, dead: Tensor | None, n_dead: int
    ) -> tuple[dict[str, SparseActs | DenseBlock], Tensor]:
        """The latents of each reconstruction (all, each partial loss, the dead ones), and the
        feature activations."""
        norms = self.selection_norms()
        whole = self._firing(pre, norms)
        chosen: dict[str, SparseActs | DenseBlock] = {WHOLE: whole}
        chosen |= {name: whole.among(part.latents) for name, part in self.partial_losses().items()}
        if dead is not None:
            # Their number is known, so the GPU need not be synchronized to count them.
            which = dead.to(torch.uint8).argsort(descending=True, stable=True)[:n_dead]
            chosen[DEAD] = _strongest_in_each_row(pre, norms, which, self.k_aux)
        values = whole.pre.relu() * norms[whole.latents]
        return chosen, whole.matrix(values, (len(pre.product), self.cfg.d_sae))

    def _firing(self, pre: PreActivations, norms: Tensor) -> SparseActs:
        groups: list[SparseActs] = []
        n_rows = len(pre.product)
        for latents, k in self._k_of_groups():
            n_kept = int(k * (n_rows * distributed.world_size()))
            n = -(-n_kept // distributed.world_size())
            n = n if pre.is_exact else math.ceil(COARSE_MARGIN * n)
            n = min(n, n_rows * (latents.stop - latents.start))
            rows, columns = topk_candidates(pre.product[:, latents], norms[latents], n)
            found = pre.at(rows, columns + latents.start)
            groups.append(found.where(largest(found.pre.relu() * norms[found.latents], n_kept)))
        return groups[0] if len(groups) == 1 else SparseActs.joined(groups, self.cfg.d_sae)

    # --- thresholds ---

    @torch.no_grad()
    def _update_thresholds(self, feature_acts: Tensor) -> None:
        own = [smallest_positive(feature_acts, latents) for latents, _ in self.topk_groups()]
        smallest = distributed.all_reduce_min(torch.stack(own).to(self.topk_threshold.dtype))
        # The first value replaces the unset 0: averaging from 0 would let too many latents fire
        # after a short run.
        step = torch.full_like(self.topk_threshold, self.cfg.topk_threshold_lr)
        step.masked_fill_(self.topk_threshold == 0, 1.0)
        moved = self.topk_threshold + step * (smallest - self.topk_threshold)
        self.topk_threshold.copy_(torch.where(smallest.isinf(), self.topk_threshold, moved))


def smallest_positive(
    feature_acts: Float[Tensor, "*batch d_sae"], latents: slice
) -> Float[Tensor, ""]:
    """The smallest positive activation of these latents; infinity if there is none. The activations
    may be sparse.

    >>> acts = torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    >>> smallest_positive(acts, slice(0, 3)), smallest_positive(acts.to_sparse(), slice(1, 2))
    (tensor(2.), tensor(inf))
    """
    if feature_acts.is_sparse:
        feature_acts = feature_acts.coalesce()
        latent, values = feature_acts.indices()[-1], feature_acts.values()
        counts = (values > 0) & (latent >= latents.start) & (latent < latents.stop)
    else:
        values = feature_acts[..., latents]
        counts = values > 0
    smallest = torch.where(counts, values, torch.inf)
    return smallest.min() if smallest.numel() > 0 else smallest.new_tensor(torch.inf)


def _strongest_in_each_row(
    pre: PreActivations, norms: Tensor, latents: Tensor, k: int
) -> SparseActs | DenseBlock:
    """Each row's `k` largest positive scores among these latents."""
    k = min(k, len(latents))
    scores = pre.product[:, latents] * norms[latents]
    top = scores.topk(k, dim=-1, sorted=False)
    if len(latents) <= MAX_BLOCK.get(scores.device.type, 1) * k:
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top.indices, True)
        return DenseBlock(latents, pre.of_latents(latents) * kept)
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    flat = rows * len(norms) + latents[top.indices]
    flat = (flat.flatten() if would_wait(flat) else flat[top.values > 0]).sort().values
    return pre.at(flat // len(norms), flat % len(norms))
