"""Share known: how much of a latent's activation a small neural network predicts from the other
model's activations, relative to its own model's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.exclusivity.decoders import candidate_latents, two_sided_latents
from sae_lens_dfc.metrics.exclusivity.latent_scaling import owned_by_a
from sae_lens_dfc.stats.jackknife import Estimate, Jackknife, Sums
from sae_lens_dfc.stats.probe import Probe, ProbeOptions, Rows, fit_probe

MIN_FIRINGS_TO_FIT = 50
"""Minimum firings on the rows that the probes are fitted to, to measure a latent."""
N_REFERENCE = 64
"""Maximum number of two-sided latents that are measured for comparison."""


class Probes(NamedTuple):
    """Probes that predict latents' activations from one model's activations each."""

    a: Probe
    b: Probe
    latents: Int[Tensor, " n"]
    """The latents that they predict."""


def fit_probes(
    crosscoder: Crosscoder,
    training: Sequence[Float[Tensor, "_ d_in"]],
    options: ProbeOptions | None = None,
) -> Probes:
    """Fit a probe of each model's activations to the activations of the candidates, and of up to
    64 two-sided latents for comparison, of those that fire often enough; without candidates there
    is nothing to compare and no latent is measured.

    Args:
        crosscoder: The saved crosscoder.
        training: Batches of raw activations; others than those that the latents are judged on.
        options: Sizes of the probes.
    """
    encoded = [_encoded(crosscoder, acts) for acts in training]
    latents = _to_measure(crosscoder, encoded)
    targets = [
        _Targets.of(crosscoder, acts, feature_acts, latents)
        for acts, feature_acts in zip(training, encoded, strict=True)
    ]
    probes: list[Probe] = []
    for inputs in crosscoder.partition.models.values():
        generator = torch.Generator().manual_seed(0)

        def sample(n: int, inputs: slice = inputs, drawn: torch.Generator = generator) -> Rows:
            rows = _drawn(training, targets, n, inputs, drawn)
            return Rows(*(x.to(crosscoder.device).float() for x in rows))

        probes.append(fit_probe(sample, options))
    of_a, of_b = probes
    return Probes(of_a, of_b, latents)


@torch.no_grad()
def _encoded(crosscoder: Crosscoder, acts: Tensor) -> Tensor:
    """Sparse latent activations, kept for all rows at once; a probe's error is far above the
    rounding."""
    return crosscoder.encode(acts.to(crosscoder.device)).bfloat16().to_sparse()


def _to_measure(crosscoder: Crosscoder, encoded: Sequence[Tensor]) -> Int[Tensor, " n"]:
    firings = torch.zeros(crosscoder.cfg.d_sae, dtype=torch.long, device=crosscoder.device)
    for feature_acts in encoded:
        firings += feature_acts.indices()[1].bincount(minlength=len(firings))
    fires = firings >= MIN_FIRINGS_TO_FIT
    reference = (two_sided_latents(crosscoder) & fires).nonzero()[:, 0]
    # Evenly spaced over the dictionary, so that no measure selects them.
    some = torch.linspace(0, max(0, len(reference) - 1), min(N_REFERENCE, len(reference))).long()
    candidates = (candidate_latents(crosscoder) & fires).nonzero()[:, 0]
    if len(candidates) == 0:
        return candidates
    return torch.cat([candidates, reference[some.to(reference.device)]])


class _Targets(NamedTuple):
    """What the probes predict of a batch."""

    scores: Float[Tensor, "n latents"]
    feature_acts: Float[Tensor, "n latents"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, crosscoder: Crosscoder, acts: Tensor, feature_acts: Tensor, latents: Tensor
    ) -> "_Targets":
        acts = acts.to(crosscoder.device)
        scores = (acts - crosscoder.b_dec).float() @ crosscoder.W_enc[:, latents].float()
        return cls(scores.bfloat16().cpu(), feature_acts.to_dense()[:, latents].cpu())


def _drawn(
    training: Sequence[Tensor],
    targets: Sequence[_Targets],
    n: int,
    inputs: slice,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """About `n` random rows, an equal share of each batch: one model's activations, scores and
    latent activations."""
    total = sum(map(len, training))
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    for acts, wanted in zip(training, targets, strict=True):
        # Rounded up or down at random, so that no batch is always left out.
        size = int(n * len(acts) / total + torch.rand(1, generator=generator).item())
        rows = torch.randint(len(acts), (size,), generator=generator)
        drawn.append((acts[rows, inputs], wanted.scores[rows], wanted.feature_acts[rows]))
    acts, scores, feature_acts = zip(*drawn, strict=True)
    return torch.cat(acts), torch.cat(scores), torch.cat(feature_acts)


@dataclass
class ShareKnown:
    """Measures the share of a latent that its target *knows*.

    With `R2(m)` the variance of the latent's activation, within contexts, that a probe of model m's
    activations explains,

        known = R2(target) / R2(source)

    1 if the target's activations predict the latent as well as its own model's do, 0 if they do not
    predict it. Deviations are taken from each context's mean, of the activation and of the
    prediction, so that it does not count to recognize what kind of text a latent fires in.
    """

    crosscoder: Crosscoder
    probes: Probes
    _r2: Jackknife = field(init=False)

    def __post_init__(self) -> None:
        is_a = owned_by_a(self.crosscoder)[self.probes.latents]

        def r2(sums: Sums) -> dict[str, Tensor]:
            total = sums["total"].where(sums["total"] > 0, torch.nan)
            of_a, of_b = (1 - sums[m] / total for m in "ab")
            own, other = torch.where(is_a, of_a, of_b), torch.where(is_a, of_b, of_a)
            return {"known": other / own, "own_r2": own}

        self._r2 = Jackknife(r2)

    @torch.no_grad()
    def update(
        self,
        acts: Float[Tensor, "batch d_in"],
        feature_acts: Float[Tensor, "batch d_sae"],
        context: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Add a batch of raw activations, their latent activations and the number of each row's
        context; without numbers the batch is one context."""
        if len(acts) == 0:
            return
        y = feature_acts[:, self.probes.latents].float()
        if context is None:
            context = torch.zeros(len(acts), dtype=torch.long)
        group = context.to(acts.device).unique(return_inverse=True)[1]
        sums = {"total": _within(self.probes.a.standardized(y), group)}
        for m, inputs in self.crosscoder.partition.models.items():
            probe = self.probes.a if m == "a" else self.probes.b
            sums[m] = _within(probe.standardized(y) - probe(acts[:, inputs]), group)
        self._r2.update(sums)

    def estimates(self) -> dict[str, Estimate]:
        """`known` and `own_r2`, which is `R2(source)`, of each latent; NaN of those without a probe
        and of those that do not vary.

        Raises:
            ValueError: No batch was added.
        """
        return {name: self._of_all(found) for name, found in self._r2.estimates().items()}

    def _of_all(self, found: Estimate) -> Estimate:
        value, se = (found.value.new_full((self.crosscoder.cfg.d_sae,), torch.nan) for _ in "vs")
        value[self.probes.latents], se[self.probes.latents] = found.value, found.se
        return Estimate(value, se, found.degrees)


def _within(
    values: Float[Tensor, "n latents"], group: Int[Tensor, " n"]
) -> Float[Tensor, " latents"]:
    """Sum of squared deviations from each group's mean."""
    n = group.bincount().double()[:, None]
    sums = torch.zeros(len(n), values.shape[1], dtype=torch.double, device=values.device)
    sums.index_add_(0, group, values.double())
    return values.double().pow(2).sum(dim=0) - (sums.pow(2) / n).sum(dim=0)
