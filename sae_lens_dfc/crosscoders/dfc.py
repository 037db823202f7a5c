"""The Dedicated Feature Crosscoder: some latents may use one model only."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_dfc.crosscoders.base import MIN_DECODER_NORM
from sae_lens_dfc.crosscoders.evidence import OTHER_MODEL, Evidence, OtherModelTest
from sae_lens_dfc.crosscoders.partition import (
    A_EXCLUSIVE,
    B_EXCLUSIVE,
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
    """Training steps, separated by spaces, after which each exclusive latent is tested against the other model. One that
    the other model has too becomes shared; a shared one whose decoder has left one model becomes exclusive. Without any,
    as in the paper, the partitions keep their sizes. `test_at` of the runner takes shares of the training instead."""
    test_window: int = 50
    """Training steps before each test over which its evidence is gathered; rare latents need many to be judged."""
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
    the other model shows little enough of it.
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

    @override
    def training_state(self) -> dict[str, Tensor]:
        return {} if self._test is None else self._test.state()

    @override
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        here = {name: x.to(self.device) for name, x in state.items()}
        self._test = OtherModelTest.of(self.partition, here) if here else None

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
                "resumed in between by something other than CrosscoderTrainingRunner.",
                *(step, n_batches, self.cfg.test_window),
            )
            return
        self._move(test.compute(), step)

    @torch.no_grad()
    def _gather_evidence(self, output: TrainStepOutput) -> None:
        if self._test is None:
            self._test = OtherModelTest(self.partition)
        shared, acts = self.partition.slices[SHARED], output.feature_acts
        W_dec = self.W_dec[shared] / self.competing_norms()[shared, None]
        with torch.autocast(self.device.type, enabled=False):
            rebuilt = acts.narrow_copy(1, shared.start, self.partition.n_shared).to(W_dec) @ W_dec
        exclusive = acts.narrow_copy(1, 0, shared.start).to_dense()
        self._test.update(exclusive, output.sae_in - (rebuilt + self.b_dec))

    @torch.no_grad()
    def _move(self, evidence: dict[str, Evidence], step: int) -> None:
        """Let the tested latents that the other model has read and write it, and put every latent where it belongs.

        An exclusive latent is moved on the evidence. A shared one is moved when its decoder has all
        but left one model, by the rule of arXiv 2602.11729 for crosscoders without partitions.
        """
        partition, cfg = self.partition, self.cfg
        norms = decoder_norms(self.W_dec, partition)
        total = norms.sum(dim=0)
        share_of_a = torch.where(total > MIN_DECODER_NORM, norms[0] / total, 0.5)
        is_a, is_b = share_of_a > cfg.min_own_share, share_of_a < 1 - cfg.min_own_share
        n_exclusive = partition.slices[SHARED].start
        n_promoted = int((is_a | is_b)[n_exclusive:].sum())
        n_found_out = 0
        for name, kept in ((A_EXCLUSIVE, is_a), (B_EXCLUSIVE, is_b)):
            latents = partition.slices[name]
            found_out = evidence[name].enough & (evidence[name].own_share < cfg.min_own_share)
            is_a[latents], is_b[latents] = False, False
            kept[latents] = ~found_out
            self._share(name, found_out, evidence[name].slopes)
            n_found_out += int(found_out.sum())
        logger.info(
            "Step %d: of %d exclusive latents %d are in both models and shared now; %d shared ones are exclusive now",
            *(step, n_exclusive, n_found_out, n_promoted),
        )
        self._reorder(torch.where(is_a, 0, torch.where(is_b, 1, 2)))

    def _share(
        self, name: str, found_out: Bool[Tensor, " n"], slopes: Float[Tensor, "n d_other"]
    ) -> None:
        """Give exclusive latents the other model: as decoder their slopes, as encoder what keeps their activations.

        With `g` the activation that a latent gives to its own decoder, and decoders `d` and `w` in its
        own and the other model, encoders `e |d|^2 / n^2` and `g w / n^2`, `n^2 = |d|^2 + |w|^2`, give
        the two together `g` again.
        """
        latents = found_out.nonzero()[:, 0] + self.partition.slices[name].start
        other = self.partition.models[OTHER_MODEL[name]]
        own = self.partition.models["a" if OTHER_MODEL[name] == "b" else "b"]
        W_enc, W_dec = self.W_enc.data, self.W_dec.data
        d, e = W_dec[latents, own], W_enc[own, latents]
        w = slopes[found_out] * self.competing_norms()[latents, None]
        gain = (d * e.T).sum(dim=-1)
        squares = d.pow(2).sum(dim=-1)
        total = (squares + w.pow(2).sum(dim=-1)).clamp(min=MIN_DECODER_NORM)
        W_dec[latents, other] = w
        W_enc[own, latents] = e * (squares / total)
        W_enc[other, latents] = w.T * (gain / total)

    def _reorder(self, groups: Int[Tensor, " d_sae"]) -> None:
        """Put A's latents (group 0) first, B's (1) next; those that lie right already keep their place.

        SAELens' trainer has no way to be told: for the few that move, Adam's moments and the steps since
        they last fired are those of the latent that was there before.
        """
        target = groups.sort().values
        misplaced = (groups != target).nonzero()[:, 0]
        order = torch.arange(len(groups), device=groups.device)
        order[misplaced] = misplaced[groups[misplaced].argsort(stable=True)]
        # In place: Adam's moments and the weights must go on lying in memory in the same way.
        self.W_enc.data.copy_(self.W_enc.data[:, order])
        self.W_dec.data.copy_(self.W_dec.data[order])
        self.b_enc.data.copy_(self.b_enc.data[order])
        self.n_exclusive.copy_(torch.stack([(groups == group).sum() for group in (0, 1)]))
        self._resize(*(int(n) for n in self.n_exclusive))


def exclusivity_tests(shares: Sequence[float], training_steps: int) -> dict[str, Any]:
    """Settings of tests after these shares of a training, each with the tenth of it before as its window.

    >>> exclusivity_tests([0.8, 0.95], training_steps=1000)
    {'test_steps': [800, 950], 'test_window': 100}

    Raises:
        ValueError: A share lies outside (0, 1).
    """
    outside = [share for share in shares if not 0 < share < 1]
    if outside:
        raise ValueError(f"Tests come after shares of the training in (0, 1), got {outside}.")
    return {
        "test_steps": [round(share * training_steps) for share in shares],
        "test_window": max(2, training_steps // 10),
    }
