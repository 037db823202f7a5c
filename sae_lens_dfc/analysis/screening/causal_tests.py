"""Tests latents causally, each on texts at whose end it fires."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.causal.activation_patching import Texts, own_part, texts_of, verify
from sae_lens_dfc.analysis.causal.shared_vocabulary import Outcomes, common_outcomes
from sae_lens_dfc.analysis.latents.max_activating import (
    FiringPosition,
    MaxActivatingExamples,
    collect_max_activating,
)
from sae_lens_dfc.analysis.options import MIN_TEXTS
from sae_lens_dfc.analysis.screening.candidates import (
    control_directions,
    source_of,
    split,
    windows,
)
from sae_lens_dfc.analysis.screening.samples import samples
from sae_lens_dfc.analysis.screening.verdicts import CausalTest, tested
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.alignment.segments import Segments
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.metrics.exclusivity.decoders import both_decoder_differences
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps


@dataclass(frozen=True)
class Sizes:
    """Sizes of a causal test."""

    texts: int = 8
    """Texts on which a latent is tested."""
    controls: int = 8
    """Control directions of each kind."""
    seed: int = 0
    with_samples: bool = True
    """Whether to write both models' continuations with the latent ablated and added."""


@dataclass(frozen=True)
class Subject:
    """A crosscoder with its whole models, held-out text and latents' examples."""

    crosscoder: Crosscoder
    pair: ModelPair
    data: PairData
    gathered: MaxActivatingExamples
    affine_maps: AffineMaps | None
    """None if both models share one basis."""
    own: tuple[Float[Tensor, "d_sae d_a"], Float[Tensor, "d_sae d_b"]]
    """Each latent's model-specific directions in A and in B; see `both_decoder_differences`."""

    @property
    def one_basis(self) -> bool:
        """Whether both models share one basis, as a model and its fine-tune do."""
        return self.affine_maps is None


def subject_of(crosscoder: Crosscoder, pair: ModelPair, data: PairData) -> Subject:
    """Collect what the causal tests need.

    Args:
        crosscoder: The saved crosscoder.
        pair: The two models, whole.
        data: Their training and held-out rows.
    """
    d_a = crosscoder.cfg.d_a
    affine_maps = None if data.one_basis(d_a) else data.affine_maps(d_a).to(crosscoder.device)
    gathered = collect_max_activating(crosscoder, data.held_out)
    own = both_decoder_differences(crosscoder, affine_maps)
    return Subject(crosscoder, pair, data, gathered, affine_maps, own)


def causal_tests(
    on: Subject, latents: Sequence[int], sizes: Sizes
) -> Callable[[int], CausalTest | None]:
    """Draw the controls for some latents, which are left out of them.

    Returns:
        Tests one latent: none if it fires at the end of too few of its test texts.
    """
    acts = torch.cat([rows.acts for rows in on.data.held_out])
    lives = on.gathered.firing.counts > 0
    controls = control_directions(on.crosscoder, acts, lives, latents, sizes.controls, sizes.seed)
    outcomes = common_outcomes(on.pair.a, on.pair.b)
    of_a, of_b = on.own
    on = replace(on, own=(of_a.cpu(), of_b.cpu()))
    return partial(_test, on, sizes, controls, outcomes)


def _test(
    on: Subject,
    sizes: Sizes,
    controls: Mapping[str, Mapping[ModelName, Tensor]],
    outcomes: tuple[Outcomes, Outcomes],
    latent: int,
) -> CausalTest | None:
    own = own_part(*on.own, latent, source_of(on.crosscoder, latent))
    kept = _kept_for_test(on, latent, sizes.texts)
    if len(kept) < MIN_TEXTS:
        return None
    texts = texts_of(on.crosscoder, on.pair, latent, kept)
    if len(texts.rows.contexts) < MIN_TEXTS:
        return None
    found = verify(on.pair, texts, own, controls, outcomes)
    silent = _silent(on, latent, texts, sizes)
    beside = None if silent is None else verify(on.pair, silent, own, {}, outcomes)
    shown = samples(on.pair, texts, own) if sizes.with_samples else []
    return tested(own, found, beside, shown)


def _kept_for_test(on: Subject, latent: int, n: int) -> list[Segments]:
    _, places = split(on.gathered.places(latent, n_strongest=2 * n, n_quantiles=0))
    return windows(on.pair, on.data.contexts, places)


def _silent(on: Subject, latent: int, texts: Texts, sizes: Sizes) -> Texts | None:
    """Texts at whose end the latent does not fire, given the activation it has in the other texts;
    none if there are too few."""
    generator = torch.Generator().manual_seed(sizes.seed + latent)
    contexts = on.data.contexts
    drawn = torch.randperm(len(contexts), generator=generator)[: sizes.texts].tolist()
    places = [FiringPosition(i, len(contexts[i].segments) - 1, 0.0, None) for i in drawn]
    found = texts_of(
        on.crosscoder, on.pair, latent, windows(on.pair, contexts, places), fires=False
    )
    if len(found.rows.contexts) < MIN_TEXTS:
        return None
    return found.with_activation(texts.at_end.mean().item())
