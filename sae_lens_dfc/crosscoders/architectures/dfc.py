"""The Dedicated Feature Crosscoder (DFC): exclusive latents read and write one model only."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.core.schema import require
from sae_lens_dfc.crosscoders.architectures.reassignment import (
    OTHER_MODEL,
    Evidence,
    ReassignmentTest,
)
from sae_lens_dfc.crosscoders.architectures.topk import (
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.base import MIN_DECODER_NORM
from sae_lens_dfc.crosscoders.groups import A_EXCLUSIVE, B_EXCLUSIVE, SHARED
from sae_lens_dfc.crosscoders.partition import Partition, decoder_norms
from sae_lens_dfc.models.config import OTHER

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DFCTrainingCrosscoderConfig(TopKTrainingCrosscoderConfig):
    """Settings of a DFC (arXiv 2602.11729, section 2.2) and of our tests of its exclusive latents.

    Raises:
        ValueError: A fraction lies outside [0, 0.5) or is so small that it leaves no latent; tests
            overlap, or are combined with `selection="partition"`.

    >>> cfg = DFCTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=110, k=4)
    >>> cfg.n_a_exclusive, cfg.n_b_exclusive, cfg.partition.n_shared
    (5, 5, 100)
    """

    a_exclusive_fraction: float = 0.05
    """Fraction of the latents that only model A may use; there are floor(fraction x d_sae)."""
    b_exclusive_fraction: float = 0.05
    """Fraction of the latents that only model B may use."""
    decoder_norm: Literal["sum", "l2"] = "l2"
    """Norm by which a latent's activation is multiplied for selection. l2: the norm of its
    concatenated decoder row, fair to exclusive latents. sum: the sum of its two decoder norms, as
    in the public DFC code, which starves exclusive latents (benchmarks/README.md)."""
    selection: Literal["pooled", "partition"] = "pooled"
    """How latents compete for k. pooled: all together, so exclusive latents are used only as far as
    they help reconstruction. partition: each partition separately, with k divided in proportion to
    its size, so exclusive latents are used whether they help or not."""
    reassign_steps: list[int] = field(default_factory=list)
    """Training steps, separated by spaces, at which each exclusive latent is tested against the
    other model. A latent that the other model has too becomes shared; a shared latent whose decoder
    has all but vanished in one model becomes exclusive. Without tests, as in the paper, the
    partitions keep their sizes. The runner's `reassign_at` takes fractions of the training
    instead."""
    evidence_window: int = 50
    """Training steps before each test over which evidence is collected; rare latents need many."""
    min_own_share: float = 0.8
    """Relative decoder norm below which a tested exclusive latent becomes shared, and above which a
    shared one becomes exclusive: 1 is one model only, 0.5 is both equally (0.8 in arXiv 2602.11729,
    section 2.3, for crosscoders without partitions)."""

    @override
    def __post_init__(self) -> None:
        for name in ("a_exclusive_fraction", "b_exclusive_fraction"):
            require(self, (name,), "at least 0 and below 0.5")
            fraction = getattr(self, name)
            if fraction > 0 and math.floor(fraction * self.d_sae) == 0:
                raise ValueError(
                    f"{name}={fraction} of d_sae={self.d_sae} is less than one latent. "
                    "Raise either, or set the fraction to 0."
                )
        require(self, ("min_own_share",), "above 0.5 and below 1")
        gaps = [
            after - before for before, after in zip([0, *self.reassign_steps], self.reassign_steps)
        ]
        if self.reassign_steps and (self.evidence_window < 2 or min(gaps) < self.evidence_window):
            raise ValueError(
                f"Each test needs evidence_window={self.evidence_window} steps (at least 2) of its own before it; "
                f"got reassign_steps={self.reassign_steps}."
            )
        if self.reassign_steps and self.selection == "partition":
            raise ValueError(
                "Tests move latents from one partition to another, and budgets by partition need partitions that "
                "stay. Set selection='pooled', or leave reassign_steps out."
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
    """A BatchTopK crosscoder in which exclusive latents neither read nor write the other model:
    four blocks of its weights are exactly zero.

    With `reassign_steps`, the initial partitions are provisional: a latent stays exclusive only if
    the other model shows little of its feature.
    """

    n_exclusive: Int[Tensor, "2"]
    """Sizes of the A-exclusive and B-exclusive partitions; tests change them."""

    def __init__(self, cfg: DFCTrainingCrosscoderConfig, use_error_term: bool = False):
        self._partition = cfg.partition
        super().__init__(cfg, use_error_term)
        sizes = [self._partition.n_a_exclusive, self._partition.n_b_exclusive]
        self.register_buffer("n_exclusive", torch.tensor(sizes, device=self.device))
        self._test: ReassignmentTest | None = None

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
    def topk_groups(self) -> list[tuple[slice, float]]:
        cfg = self.cfg
        if cfg.selection == "pooled":
            return [(slice(0, cfg.d_sae), 1.0)]
        partition = self.partition
        return [
            (latents, partition.sizes[name] / cfg.d_sae)
            for name, latents in partition.slices.items()
            if partition.sizes[name] > 0
        ]

    @override
    def training_state(self) -> dict[str, Tensor]:
        return {} if self._test is None else self._test.state()

    @override
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        here = {name: x.to(self.device) for name, x in state.items()}
        self._test = ReassignmentTest.of(self.partition, here) if here else None

    # --- tests of exclusivity ---

    @override
    def before_step(self, step: int) -> None:
        # Run before the step that is due, so that no update lies between evidence and test.
        if step in self.cfg.reassign_steps:
            self._run_test(step)
        super().before_step(step)

    @override
    def after_step(self, step: int, output: TrainStepOutput) -> None:
        super().after_step(step, output)
        cfg = self.cfg
        if any(due - cfg.evidence_window <= step < due for due in cfg.reassign_steps):
            self._gather_evidence(output)

    def _run_test(self, step: int) -> None:
        test, self._test = self._test, None
        n_batches = 0 if test is None else test.n_batches
        if test is None or n_batches < self.cfg.evidence_window:
            logger.warning(
                "Step %d: exclusive latents are not tested, since evidence is from %d of %d steps: training was "
                "resumed in between by something other than CrosscoderTrainingRunner.",
                *(step, n_batches, self.cfg.evidence_window),
            )
            return
        self._move(test.compute(), step)

    @torch.no_grad()
    def _gather_evidence(self, output: TrainStepOutput) -> None:
        if self._test is None:
            self._test = ReassignmentTest(self.partition)
        shared, acts = self.partition.slices[SHARED], output.feature_acts
        W_dec = self.W_dec[shared] / self.selection_norms()[shared, None]
        with torch.autocast(self.device.type, enabled=False):
            rebuilt = acts.narrow_copy(1, shared.start, self.partition.n_shared).to(W_dec) @ W_dec
        exclusive = acts.narrow_copy(1, 0, shared.start).to_dense()
        self._test.update(exclusive, output.sae_in - (rebuilt + self.b_dec))

    @torch.no_grad()
    def _move(self, evidence: dict[str, Evidence], step: int) -> None:
        """Share the tested latents that the other model has too, and move every latent to its
        partition.

        An exclusive latent is moved on the test's evidence. A shared one is moved when its decoder
        has all but vanished in one model, by the rule of arXiv 2602.11729 for crosscoders without
        partitions.
        """
        partition, cfg = self.partition, self.cfg
        norms = decoder_norms(self.W_dec, partition)
        total = norms.sum(dim=0)
        share_of_a = torch.where(total > MIN_DECODER_NORM, norms[0] / total, 0.5)
        is_a, is_b = share_of_a > cfg.min_own_share, share_of_a < 1 - cfg.min_own_share
        n_exclusive = partition.slices[SHARED].start
        n_promoted = int((is_a | is_b)[n_exclusive:].sum())
        n_demoted = 0
        for name, kept in ((A_EXCLUSIVE, is_a), (B_EXCLUSIVE, is_b)):
            latents = partition.slices[name]
            demoted = evidence[name].enough & (evidence[name].own_share < cfg.min_own_share)
            is_a[latents], is_b[latents] = False, False
            kept[latents] = ~demoted
            self._share(name, demoted, evidence[name].slopes)
            n_demoted += int(demoted.sum())
        logger.info(
            "Step %d: %d exclusive latents tested, %d found in both models and now shared; %d shared latents are now exclusive",
            *(step, n_exclusive, n_demoted, n_promoted),
        )
        self._reorder(torch.where(is_a, 0, torch.where(is_b, 1, 2)))

    def _share(
        self, name: str, demoted: Bool[Tensor, " n"], slopes: Float[Tensor, "n d_other"]
    ) -> None:
        """Give these latents weights in the other model: their slopes as decoder, and an encoder
        that preserves their activations.

        Let `e` be the latent's encoder in its own model, `d` and `w` its decoders in its own and
        the other model, `g` its activation on the input `d`, and `n^2 = |d|^2 + |w|^2`. The
        encoders `e |d|^2 / n^2` and `g w / n^2` give activation `g` on both inputs together.
        """
        latents = demoted.nonzero()[:, 0] + self.partition.slices[name].start
        model = OTHER_MODEL[name]
        own, other = self.partition.models[OTHER[model]], self.partition.models[model]
        W_enc, W_dec = self.W_enc.data, self.W_dec.data
        d, e = W_dec[latents, own], W_enc[own, latents]
        w = slopes[demoted] * self.selection_norms()[latents, None]
        gain = (d * e.T).sum(dim=-1)
        squares = d.pow(2).sum(dim=-1)
        total = (squares + w.pow(2).sum(dim=-1)).clamp(min=MIN_DECODER_NORM)
        W_dec[latents, other] = w
        W_enc[own, latents] = e * (squares / total)
        W_enc[other, latents] = w.T * (gain / total)

    def _reorder(self, groups: Int[Tensor, " d_sae"]) -> None:
        """Reorder the latents: A's (group 0) first, then B's (1), then shared; latents already in
        their partition keep their place.

        SAELens' trainer is not notified: the few latents that move inherit Adam's moments and the
        steps since last firing from the latent previously in that place.
        """
        target = groups.sort().values
        misplaced = (groups != target).nonzero()[:, 0]
        order = torch.arange(len(groups), device=groups.device)
        order[misplaced] = misplaced[groups[misplaced].argsort(stable=True)]
        # In place: weights and Adam's moments must keep the same memory layout.
        self.W_enc.data.copy_(self.W_enc.data[:, order])
        self.W_dec.data.copy_(self.W_dec.data[order])
        self.b_enc.data.copy_(self.b_enc.data[order])
        self.n_exclusive.copy_(torch.stack([(groups == group).sum() for group in (0, 1)]))
        self._resize(*(int(n) for n in self.n_exclusive))


def exclusivity_tests(shares: Sequence[float], training_steps: int) -> dict[str, Any]:
    """Settings for tests after these fractions of a training, each with an evidence window of a
    tenth of all steps.

    >>> exclusivity_tests([0.8, 0.95], training_steps=1000)
    {'reassign_steps': [800, 950], 'evidence_window': 100}

    Raises:
        ValueError: A fraction lies outside (0, 1).
    """
    outside = [share for share in shares if not 0 < share < 1]
    if outside:
        raise ValueError(f"reassign_at takes fractions of the training in (0, 1), got {outside}.")
    return {
        "reassign_steps": [round(share * training_steps) for share in shares],
        "evidence_window": max(2, training_steps // 10),
    }
