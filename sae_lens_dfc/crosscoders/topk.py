"""What crosscoders that keep the largest scores of a batch share: groups, annealing, thresholds."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc import ranks
from sae_lens_dfc.crosscoders.base import DEAD, CrosscoderTrainingConfig, TrainingCrosscoder
from sae_lens_dfc.crosscoders.partition import zero_forbidden_
from sae_lens_dfc.crosscoders.selection import candidates, keep_largest, largest, would_wait
from sae_lens_dfc.crosscoders.sparse import Block, Chosen, PreActivations, Weights, rebuild

logger = logging.getLogger(__name__)

# Below so many scores, or above such a share that is kept, dense products are as fast: measured on 2 CPU cores, and
# reckoned for a GPU, whose products are so much faster than its memory.
MIN_SPARSE_SIZE = 2**16
MAX_SPARSE_SHARE = {"cpu": 1 / 4, "cuda": 1 / 64}
# Latents for each that is kept up to which all of them are multiplied: measured and reckoned likewise.
MAX_BLOCK = {"cpu": 5, "cuda": 16}
# Candidates of a coarser product for each latent that is kept: the exact values of all of them decide.
COARSE_MARGIN = 1.1

WHOLE = "whole"


class Part(NamedTuple):
    """Latents whose reconstruction alone, decoder bias and all, has a loss."""

    latents: slice
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of normalised activations and that reconstruction of them."""


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
    training_path: Literal["auto", "sparse", "dense"] = "auto"
    """How a training step is computed, with the same result. sparse: only the encoder's product is dense, and all else
    touches the active latents alone; hooks on the latents, which it does not compute densely, take the other path. dense: as
    it is defined. auto: the faster."""
    encoder_product: Literal["exact", "bfloat16"] = "exact"
    """Format of the sparse path's dense product. bfloat16: it only finds candidates, a tenth more than are kept,
    whose activations are then computed in the format of the weights; of dead latents it also says which are strongest."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_product == "bfloat16" and self.training_path == "dense":
            raise ValueError(
                "encoder_product='bfloat16' is for the sparse path, which computes the latents found by it once more. "
                "Set training_path to 'auto' or 'sparse', or leave encoder_product at 'exact'."
            )
        for name in ("k", "k_initial"):
            k = getattr(self, name)
            if k is not None and not 0 < k <= self.d_sae:
                raise ValueError(
                    f"{name} must be above 0 and at most d_sae, got {name}={k:g} and d_sae={self.d_sae}."
                )
        if not 0 < self.topk_threshold_lr <= 1:
            raise ValueError(
                f"topk_threshold_lr must be above 0 and at most 1, got {self.topk_threshold_lr}."
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
    """Keeps the largest scores of a batch in each group of latents (BatchTopK), and learns each group's threshold.

    An architecture says what is its own by `budgets` and `parts`. One that overrides
    `select` or `calculate_aux_loss` besides trains on the dense path, which calls them.
    """

    topk_threshold: Float[Tensor, " groups"]

    def __init__(self, cfg: T_TOPK_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.n_training_steps = 0
        self._said = False
        n_groups = len(self.budgets())
        threshold = torch.zeros(n_groups, dtype=torch.double, device=self.W_dec.device)
        self.register_buffer("topk_threshold", threshold)

    @abstractmethod
    def budgets(self) -> list[tuple[slice, float]]:
        """The groups of latents that compete among themselves, in latent order, each with its share of `k`."""

    @override
    def select(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        kept = [keep_largest(scores[..., latents], k) for latents, k in self._k_of_groups()]
        return torch.cat(kept, dim=-1)

    def _k_of_groups(self) -> list[tuple[slice, float]]:
        """The groups, and how many latents of each are active on a row at this step, no more than there are."""
        k = self.cfg.k_at(self.n_training_steps)
        return [(s, min(share * k, s.stop - s.start)) for s, share in self.budgets()]

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

    @override
    def check_batch(self, n_rows: int) -> None:
        k = self.cfg.k
        for latents, share in self.budgets():
            if share * k * n_rows < 1:
                raise ValueError(
                    f"Of a batch of {n_rows} pairs and k={k:g}, latents {latents.start} to {latents.stop - 1} get {share * k:.3g} a "
                    "pair: less than one in all, so they would never fire. Raise k or the batch (train_batch_size_tokens)."
                )

    @override
    def _step(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self._goes_sparse(step_input.sae_in):
            self._say_if_not_as_asked()
            return super()._step(step_input)
        is_autocast = torch.is_autocast_enabled(self.device.type)
        coarse = is_autocast or self.cfg.encoder_product == "bfloat16"
        # The product is all that is worth another format.
        with torch.autocast(self.device.type, enabled=False):
            dtype = torch.bfloat16 if coarse else self.dtype
            return self._sparse_step(step_input, dtype)  # type: ignore[call-arg]

    # --- parts of the dictionary that rebuild something alone ---

    def parts(self) -> dict[str, Part]:
        """The parts that have a loss of their own, by the name of the loss."""
        return {}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The dead-latent loss and those of parts of the dictionary."""
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        for name, part in self.parts().items():
            acts = (feature_acts / self.competing_norms())[:, part.latents]
            rebuilt = acts @ self.decoder()[part.latents] + self.b_dec
            losses[name] = part.loss(step_input.sae_in, rebuilt)
        return losses

    # --- the sparse path ---

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
                "training_path=%r and encoder_product=%r are not taken: the step is dense, for its size, hooks on the "
                "latents, evaluation mode or a subclass with a selection or loss of its own.",
                *(self.cfg.training_path, self.cfg.encoder_product),
            )
            self._said = True

    # Compiled, its sums of unequal lengths are slower by half.
    @torch.compiler.disable
    def _sparse_step(
        self, step_input: TrainStepInput, product_dtype: torch.dtype
    ) -> TrainStepOutput:
        """The step of `TrainingCrosscoder`, with the same losses and gradients.

        Decoder norms choose the latents, and cancel in whatever is decoded: no gradient goes through them.
        """
        acts, partition = step_input.sae_in, self.partition
        zero_forbidden_(self.W_enc.data, self.W_dec.data, partition)
        n_dead = self._n_dead(step_input)
        encoder = self.W_enc, self.b_enc, partition, product_dtype
        with torch.no_grad():
            pre = PreActivations.of(acts - self.b_dec, *encoder)
            chosen, feature_acts = self._choose(pre, step_input.dead_neuron_mask, n_dead)
        del pre  # a batch of d_sae numbers for each row, before the gradients need the memory
        weights = Weights(self.W_enc, self.b_enc, self.decoder(), self.b_dec)
        rebuilt = rebuild(acts, weights, chosen, partition)
        reconstruction = rebuilt[WHOLE] + self.b_dec
        losses: dict[str, Tensor] = {}
        if n_dead is not None:
            losses[DEAD] = acts.new_zeros(())
        if n_dead:
            losses[DEAD] = self._dead_loss(acts - reconstruction, rebuilt[DEAD], n_dead)
        for name, part in self.parts().items():
            losses[name] = part.loss(acts, rebuilt[name] + self.b_dec)
        # Of the scores only those that were kept are kept.
        return self._step_output(step_input, feature_acts, feature_acts, reconstruction, losses)

    def _choose(
        self, pre: PreActivations, dead: Tensor | None, n_dead: int | None
    ) -> tuple[dict[str, Chosen | Block], Tensor]:
        """What the whole dictionary, each part of it and the dead latents rebuild with; and the feature activations."""
        norms = self.competing_norms()
        whole = self._firing(pre, norms)
        chosen: dict[str, Chosen | Block] = {WHOLE: whole}
        chosen |= {name: whole.among(part.latents) for name, part in self.parts().items()}
        if dead is not None and n_dead:
            # Of a known number, nobody has to wait for a GPU to count them.
            which = dead.to(torch.uint8).argsort(descending=True, stable=True)[:n_dead]
            chosen[DEAD] = _strongest_in_each_row(pre, norms, which, self.k_aux)
        values = whole.pre.relu() * norms[whole.latents]
        return chosen, whole.matrix(values, (len(pre.product), self.cfg.d_sae))

    def _firing(self, pre: PreActivations, norms: Tensor) -> Chosen:
        groups: list[Chosen] = []
        n_rows = len(pre.product)
        for latents, k in self._k_of_groups():
            n_kept = int(k * (n_rows * ranks.world_size()))
            n = -(-n_kept // ranks.world_size())
            n = n if pre.is_exact else math.ceil(COARSE_MARGIN * n)
            n = min(n, n_rows * (latents.stop - latents.start))
            rows, columns = candidates(pre.product[:, latents], norms[latents], n)
            found = pre.at(rows, columns + latents.start)
            groups.append(found.where(largest(found.pre.relu() * norms[found.latents], n_kept)))
        return groups[0] if len(groups) == 1 else Chosen.joined(groups, self.cfg.d_sae)

    # --- thresholds ---

    @torch.no_grad()
    def _update_thresholds(self, feature_acts: Tensor) -> None:
        own = [smallest_positive(feature_acts, latents) for latents, _ in self.budgets()]
        smallest = ranks.smallest(torch.stack(own).to(self.topk_threshold.dtype))
        # The first value replaces the unset 0: an average from 0 would let too many latents pass in a short run.
        step = torch.full_like(self.topk_threshold, self.cfg.topk_threshold_lr)
        step.masked_fill_(self.topk_threshold == 0, 1.0)
        moved = self.topk_threshold + step * (smallest - self.topk_threshold)
        self.topk_threshold.copy_(torch.where(smallest.isinf(), self.topk_threshold, moved))


def smallest_positive(
    feature_acts: Float[Tensor, "*batch d_sae"], latents: slice
) -> Float[Tensor, ""]:
    """The smallest activation above 0 of some latents; infinity if there is none. The activations may be sparse.

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
) -> Chosen | Block:
    """Each row's at most `k` largest positive scores among some latents."""
    k = min(k, len(latents))
    scores = pre.product[:, latents] * norms[latents]
    top = scores.topk(k, dim=-1, sorted=False)
    if len(latents) <= MAX_BLOCK.get(scores.device.type, 1) * k:
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top.indices, True)
        return Block(latents, pre.of_latents(latents) * kept)
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    flat = rows * len(norms) + latents[top.indices]
    flat = (flat.flatten() if would_wait(flat) else flat[top.values > 0]).sort().values
    return pre.at(flat // len(norms), flat % len(norms))
