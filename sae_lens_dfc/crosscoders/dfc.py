"""The Dedicated Feature Crosscoder: some latents may use one model only."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from sae_lens_dfc.crosscoders.base import MIN_DECODER_NORM
from sae_lens_dfc.crosscoders.evidence import Evidence, OtherModelTest
from sae_lens_dfc.crosscoders.partition import (
    SHARED,
    Partition,
    decoder_norms,
)
from sae_lens_dfc.crosscoders.topk import TopKTrainingCrosscoder, TopKTrainingCrosscoderConfig

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DFCTrainingCrosscoderConfig(TopKTrainingCrosscoderConfig):
    """Settings of a DFC (arXiv 2602.11729, section 2.2), and of its tests, which are ours.

    Raises:
        ValueError: A fraction lies outside [0, 0.5), or is so small that it leaves no latent; tests
            overlap, or are asked for together with budgets by partition.

    >>> cfg = DFCTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=110, k=4)
    >>> cfg.n_a_exclusive, cfg.n_b_exclusive, cfg.partition.n_shared
    (5, 5, 100)
    """

    a_exclusive_fraction: float = 0.05
    """Share of the latents that only model A may use; the floor of share x d_sae is their number."""
    b_exclusive_fraction: float = 0.05
    """Share of the latents that only model B may use."""
    decoder_norm: Literal["sum", "l2"] = "l2"
    """Norm by which a latent's activation is multiplied to compete. l2: of its joined decoder row, fair to latents of
    one model. sum: of its two decoder norms, as in the public DFC code, which starves them (benchmarks/README.md)."""
    selection: Literal["pooled", "partition"] = "pooled"
    """How latents compete for k. pooled: all together, so that exclusive latents are used as far as they are worth it.
    partition: each partition by itself, k shared out in proportion to its latents, used whether worth it or not."""
    test_steps: list[int] = field(default_factory=list)
    """Training steps after which each exclusive latent is tested against the other model. One that the other model has
    too becomes shared, a shared one that only one model has becomes exclusive. None keeps the partitions' sizes."""
    test_window: int = 50
    """Training steps before each test over which its evidence is gathered."""
    min_own_share: float = 0.8
    """Relative norm below which a tested latent is not exclusive, and above which a shared one is: 1 is one model's
    alone, 0.5 is both models' (0.8 in arXiv 2602.11729, section 2.3, for crosscoders without partitions)."""

    @override
    def __post_init__(self) -> None:
        for name in ("a_exclusive_fraction", "b_exclusive_fraction"):
            fraction = getattr(self, name)
            if not 0 <= fraction < 0.5:
                raise ValueError(f"{name} must be in [0, 0.5), got {fraction}.")
            if fraction > 0 and math.floor(fraction * self.d_sae) == 0:
                raise ValueError(
                    f"{name}={fraction} of d_sae={self.d_sae} is less than one latent. "
                    "Raise either, or set the fraction to 0."
                )
        if not 0.5 < self.min_own_share < 1:
            raise ValueError(f"min_own_share must be in (0.5, 1), got {self.min_own_share}.")
        gaps = [after - before for before, after in zip([0, *self.test_steps], self.test_steps)]
        if self.test_steps and (self.test_window < 2 or min(gaps) < self.test_window):
            raise ValueError(
                f"Each test needs test_window={self.test_window} steps (at least 2) of its own before it; "
                f"got test_steps={self.test_steps}."
            )
        if self.test_steps and self.selection == "partition":
            raise ValueError(
                "Tests move latents from one partition to another, and budgets by partition need partitions that "
                "stay. Set selection='pooled', or leave test_steps out."
            )
        super().__post_init__()

    @property
    @override
    def n_a_exclusive(self) -> int:
        return math.floor(self.a_exclusive_fraction * self.d_sae)

    @property
    @override
    def n_b_exclusive(self) -> int:
        return math.floor(self.b_exclusive_fraction * self.d_sae)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "dfc"


class DFCTrainingCrosscoder(TopKTrainingCrosscoder[DFCTrainingCrosscoderConfig]):
    """A BatchTopK crosscoder with four blocks of exact zeros: no exclusive latent reads or writes the other model.

    With `test_steps` the partitions are a start, not a verdict: a latent stays exclusive only while
    the other model shows nothing of it.
    """

    n_exclusive: Int[Tensor, "2"]
    """Sizes of the exclusive partitions, A's and B's; tests change them."""

    def __init__(self, cfg: DFCTrainingCrosscoderConfig, use_error_term: bool = False):
        self._partition = cfg.partition
        super().__init__(cfg, use_error_term)
        sizes = [self._partition.n_a_exclusive, self._partition.n_b_exclusive]
        self.register_buffer("n_exclusive", torch.tensor(sizes, device=self.device))
        self._test: OtherModelTest | None = None

    @property
    @override
    def partition(self) -> Partition:
        return self._partition

    @override
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self._resize(*(int(n) for n in self.n_exclusive))
        return result

    def _resize(self, n_a: int, n_b: int) -> None:
        cfg = self.cfg
        self._partition = Partition.of(cfg.d_a, cfg.d_b, cfg.d_sae, n_a, n_b)

    @override
    def budgets(self) -> list[tuple[slice, float]]:
        cfg = self.cfg
        if cfg.selection == "pooled":
            return [(slice(0, cfg.d_sae), 1.0)]
        partition = self.partition
        return [
            (latents, partition.sizes[name] / cfg.d_sae)
            for name, latents in partition.slices.items()
            if partition.sizes[name] > 0
        ]

    # --- tests of exclusivity ---

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses. A test comes before the step it is due at, so that no gradient is between the two."""
        step, cfg = step_input.n_training_steps, self.cfg
        if step in cfg.test_steps:
            self._run_test(step)
        output = super().training_forward_pass(step_input)
        if any(due - cfg.test_window <= step < due for due in cfg.test_steps):
            self._gather_evidence(output)
        return output

    def _run_test(self, step: int) -> None:
        test, self._test = self._test, None
        n_batches = 0 if test is None else test.n_batches
        if test is None or n_batches < self.cfg.test_window:
            logger.warning(
                "Step %d: exclusive latents are not tested, since evidence is from %d of %d steps: training was "
                "resumed in between.",
                *(step, n_batches, self.cfg.test_window),
            )
            return
        self._move(test.compute(self._own_norms()), step)

    @property
    def _n_tested(self) -> int:
        return self.partition.slices[SHARED].start

    @torch.no_grad()
    def _gather_evidence(self, output: TrainStepOutput) -> None:
        if self._test is None:
            self._test = OtherModelTest(self.partition)
        shared_only = output.feature_acts.clone()
        shared_only[:, : self._n_tested] = 0
        unshared = output.sae_in - self._decode_normalized(shared_only)
        self._test.update(output.feature_acts[:, : self._n_tested], unshared)

    def _own_norms(self) -> Float[Tensor, " n_exclusive"]:
        norms = decoder_norms(self.W_dec, self.partition).sum(dim=0) / self.competing_norms()
        return norms[: self._n_tested].detach()

    @torch.no_grad()
    def _move(self, evidence: Evidence, step: int) -> None:
        """Let the tested latents that the other model has read and write it, and put every latent where it belongs."""
        found_out = torch.zeros(self.cfg.d_sae, dtype=torch.bool, device=self.device)
        found_out[: self._n_tested] = evidence.fired & (evidence.own_share < self.cfg.min_own_share)
        self._share(found_out.nonzero()[:, 0], evidence.slopes)

        norms = decoder_norms(self.W_dec, self.partition)
        share_of_a = norms[0] / norms.sum(dim=0).clamp(min=MIN_DECODER_NORM)
        # An exclusive latent's share is 1 or 0 here, so one rule serves the two ways.
        n_a, n_tested = self.partition.n_a_exclusive, self._n_tested
        share_of_a[:n_a], share_of_a[n_a:n_tested] = 1, 0
        is_a = ~found_out & (share_of_a > self.cfg.min_own_share)
        is_b = ~found_out & (share_of_a < 1 - self.cfg.min_own_share)
        n_promoted = int((is_a | is_b)[n_tested:].sum())
        logger.info(
            "Step %d: of %d exclusive latents %d are in both models and shared now; %d shared ones are exclusive now",
            *(step, self._n_tested, int(found_out.sum()), n_promoted),
        )
        self._reorder(is_a, is_b)

    def _share(self, latents: Int[Tensor, " _"], slopes: Float[Tensor, "n_exclusive d_in"]) -> None:
        """Give exclusive latents the other model: as decoder their slope there, as encoder the same direction."""
        models, norms = self.partition.models, self.competing_norms()
        W_enc, W_dec = self.W_enc.data, self.W_dec.data
        is_a = latents < self.partition.n_a_exclusive
        for mine, own, other in (
            (latents[is_a], models["a"], models["b"]),
            (latents[~is_a], models["b"], models["a"]),
        ):
            W_dec[mine, other] = slopes[mine, other] * norms[mine, None]
            # Two models' inputs now add up to what one's gave.
            W_enc[own, mine] /= 2
            sizes = W_enc[own, mine].norm(dim=0)
            W_enc[other, mine] = normalize(slopes[mine, other], dim=-1).T * sizes

    def _reorder(self, is_a: Bool[Tensor, " d_sae"], is_b: Bool[Tensor, " d_sae"]) -> None:
        """Put A's latents first, B's next; Adam's moments stay behind, which its averages forget in some steps."""
        order = torch.cat([group.nonzero()[:, 0] for group in (is_a, is_b, ~(is_a | is_b))])
        self.W_enc.data = self.W_enc.data[:, order].contiguous()
        self.W_dec.data = self.W_dec.data[order].contiguous()
        self.b_enc.data = self.b_enc.data[order].contiguous()
        self.n_exclusive.copy_(torch.stack([is_a.sum(), is_b.sum()]))
        self._resize(*(int(n) for n in self.n_exclusive))
