from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.latents.cards import latent_cards, strongest_latents
from sae_lens_dfc.analysis.latents.max_activating import (
    LatentCollector,
    MaxActivatingExamples,
    collect_max_activating,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.config import CacheConfig
from sae_lens_dfc.data.contexts import Context, PairCounts, in_order
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from sae_lens_dfc.metrics.sparsity import ActivationStats
from tests.helpers import make_dfc, stream_of, train_steps

D_SAE = 40


class Read(NamedTuple):
    """A trained crosscoder, the rows that it reads, and what it makes of them."""

    crosscoder: Crosscoder
    rows: list[PairedRows]
    contexts: list[Context]
    acts: Tensor
    context: Tensor
    segment: Tensor

    def firings(self, latent: int) -> list[tuple[float, int, int]]:
        """Activation, context and segment, strongest first."""
        columns = (x.tolist() for x in (self.acts[:, latent], self.context, self.segment))
        fired = [f for f in zip(*columns, strict=True) if f[0] > 0]
        return sorted(fired, key=lambda f: -f[0])


@pytest.fixture(scope="module")
def read(pair: ModelPair) -> Read:
    batches = list(stream_of(pair, reference_pages()[:4]).batches(PairCounts()))
    rows = list(paired_activations(pair, batches, PairCounts()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        training = make_dfc(d_a=pair.d_a, d_b=pair.d_b, d_sae=D_SAE, k=8)
        crosscoder = train_steps(training, torch.cat([r.acts for r in rows])).to_inference()
    context, segment = (torch.cat([getattr(r, n) for r in rows]) for n in ("context", "segment"))
    # Batch by batch, as it is gathered: in one product of all the sums are rounded otherwise.
    acts = torch.cat([crosscoder.encode(r.acts) for r in rows]).detach()
    return Read(crosscoder, rows, in_order(batches), acts, context, segment)


@pytest.fixture(scope="module")
def gathered(read: Read) -> MaxActivatingExamples:
    return collect_max_activating(read.crosscoder, read.rows)


def test_strongest_latents_are_those_with_the_largest_sum_in_each_partition() -> None:
    partition = make_dfc().partition
    firing = ActivationStats(partition)
    acts = torch.zeros(10, 24)
    acts[:, 2], acts[:, 4] = 1.0, 2.0
    acts[:4, 0] = 100.0  # strong, but on fewer than 5 pairs
    acts[:, 12], acts[:5, 20] = 1.0, 9.0
    firing.update(acts)
    assert strongest_latents(firing, n_per_partition=2) == [4, 2, 20, 12]


def test_the_strongest_firings_gathered_are_those_of_sorting_all_one_from_a_context(
    read: Read, gathered: MaxActivatingExamples
) -> None:
    for latent in range(D_SAE):
        best: dict[int, tuple[float, int, int]] = {}
        for firing in read.firings(latent):
            best.setdefault(firing[1], firing)
        expected = [activation for activation, _, _ in list(best.values())[:20]]
        kept = [
            place.activation
            for place in gathered.places(latent, n_strongest=99)
            if place.quantile is None
        ]
        assert kept == expected
        places = gathered.places(latent, n_strongest=20, n_quantiles=0)
        assert all((p.activation, p.context, p.segment) in read.firings(latent) for p in places)
        assert len({p.context for p in places}) == len(places)
        assert gathered.firing.counts[latent] == len(read.firings(latent))


def test_a_quantiles_places_lie_in_it_where_all_firings_fit_the_sample(read: Read) -> None:
    collector = LatentCollector(read.crosscoder.partition, n_sampled=len(read.acts))
    for rows in read.rows:
        collector.update(rows, read.crosscoder.encode(rows.acts))
    found = collector.finish()
    for latent in range(D_SAE):
        ascending = [activation for activation, _, _ in reversed(read.firings(latent))]
        places = found.places(latent, n_strongest=2, n_quantiles=3, n_per_quantile=4)
        strongest = {(p.context, p.segment) for p in places if p.quantile is None}
        for q in range(3):
            own = [p for p in places if p.quantile == q]
            within = ascending[len(ascending) * q // 3 : len(ascending) * (q + 1) // 3]
            assert all(within[0] <= p.activation <= within[-1] for p in own)
            assert len({p.context for p in own}) == len(own) <= 4
            assert not {(p.context, p.segment) for p in own} & strongest
            if len(ascending) > 100:
                assert len(own) == 4
    assert any(len(read.firings(latent)) > 100 for latent in range(D_SAE))


def test_what_is_gathered_depends_on_the_seed_and_on_nothing_else(read: Read) -> None:
    def sampled(seed: int) -> Tensor:
        collector = LatentCollector(read.crosscoder.partition, n_sampled=4, seed=seed)
        for rows in read.rows:
            collector.update(rows, read.crosscoder.encode(rows.acts))
        return collector.finish().sampled["activation"]

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))


def test_memory_is_a_fifth_of_a_gigabyte_for_131072_latents_whatever_is_read() -> None:
    partition = make_dfc(d_sae=131_072).partition
    collector = LatentCollector(partition)

    def n_bytes() -> int:
        kept = (collector.strongest, collector.sampled)
        return sum(x.nbytes for best in kept for x in (best.keys, *best.values.values()))

    before = n_bytes()
    generator = torch.Generator().manual_seed(0)
    for batch in range(3):
        acts = torch.zeros(32, 131_072)
        where = torch.randint(0, acts.numel(), (20_000,), generator=generator)
        acts.view(-1)[where] = 1.0
        context = torch.full((32,), batch)
        collector.update(PairedRows(torch.zeros(32, 12), context, torch.arange(32)), acts)
    assert n_bytes() == before == 131_072 * (20 + 64) * 20
    assert sum(x.nbytes for x in collector.finish().strongest.values()) < before < 0.25e9


def cards_of(read: Read, gathered: MaxActivatingExamples, pair: ModelPair, n: int = 2) -> list:  # type: ignore[type-arg]
    latents = strongest_latents(gathered.firing, n)
    places = {latent: gathered.places(latent) for latent in latents}
    return latent_cards(read.crosscoder, gathered, places, read.rows, pair)


def test_cards_show_the_text_and_the_positions_of_the_firings(
    read: Read, gathered: MaxActivatingExamples, pair: ModelPair
) -> None:
    cards = cards_of(read, gathered, pair)
    assert len(cards) == 6
    for card in cards:
        assert card.max_activation == card.contexts[0].activation == read.acts[:, card.latent].max()
        assert card.partition == read.crosscoder.partition.name_of(card.latent)
        for place, view in zip(gathered.places(card.latent), card.contexts, strict=True):
            context = read.contexts[place.context]
            before = list(context.segments)[: place.segment + 1]
            assert view.position_a == sum(len(s.ids_a) for s in before) - 1
            assert view.position_b == sum(len(s.ids_b) for s in before) - 1
            assert (view.document, view.quantile) == (context.document, place.quantile)
            first = max(1, place.segment - 12)
            of_context = read.context == place.context
            shown = dict.fromkeys(range(first, first + len(view.segments)), 0.0)
            rows = zip(read.segment[of_context], read.acts[of_context, card.latent], strict=True)
            shown |= {int(s): float(x) for s, x in rows if int(s) in shown}
            activations = [s.activation for s in view.segments]
            assert activations == pytest.approx(list(shown.values()), abs=1e-5)
            assert activations[place.segment - first] == view.activation == place.activation


def test_both_models_tokens_on_a_card_spell_the_same_text(
    read: Read, gathered: MaxActivatingExamples, pair: ModelPair
) -> None:
    cards = cards_of(read, gathered, pair, n=3)
    assert cards
    for context in (c for card in cards for c in card.contexts):
        spelled = [
            "".join(t for view in context.segments for t in getattr(view, f"tokens_{m}"))
            for m in "ab"
        ]
        assert spelled[0].strip() == spelled[1].strip()


def test_a_card_has_cosines_and_logit_effects_of_the_models_that_the_latent_may_use(
    read: Read, gathered: MaxActivatingExamples, pair: ModelPair
) -> None:
    models = {"a_exclusive": {"a"}, "b_exclusive": {"b"}, "shared": {"a", "b"}}
    W_enc, W_dec = read.crosscoder.W_enc, read.crosscoder.W_dec
    for card in cards_of(read, gathered, pair):
        assert card.logit_effects.keys() == card.encoder_decoder_cosine.keys()
        assert set(card.logit_effects) == models[card.partition]
        for m, effect in card.logit_effects.items():
            inputs = read.crosscoder.partition.models[m]
            e, d = W_enc[inputs, card.latent], W_dec[card.latent, inputs]
            cosine = (e @ d / (e.norm() * d.norm())).item()
            assert card.encoder_decoder_cosine[m] == pytest.approx(cosine, abs=1e-5)
            assert len(effect.promoted) == len(effect.suppressed) == 10
            assert effect.promoted[0][1] > 0 > effect.suppressed[0][1]


def test_evidence_that_was_not_measured_of_a_latent_is_not_on_its_card(
    read: Read, gathered: MaxActivatingExamples, pair: ModelPair
) -> None:
    values = {name: torch.full((D_SAE,), 0.5) for name in LatentEvidence._fields}
    flags = {n: torch.ones(D_SAE, dtype=torch.bool) for n in ("is_a", "is_candidate")}
    firings = torch.full((D_SAE,), 3)
    values |= {**flags, "firings": firings, "q": torch.full((D_SAE,), torch.nan)}
    (latent,) = strongest_latents(gathered.firing, 1)[:1]
    places = {latent: gathered.places(latent)}
    evidence = LatentEvidence(**values)
    (card,) = latent_cards(read.crosscoder, gathered, places, read.rows, pair, evidence)
    assert "q" not in card.evidence and card.evidence["is_a"] is True
    assert card.evidence["firings"] == 3 and card.evidence["auc"] == 0.5
    assert card.verdict.startswith("not judged: it fired 3 times")


def test_a_place_whose_rows_are_not_given_is_named(
    read: Read, gathered: MaxActivatingExamples, pair: ModelPair
) -> None:
    places = {latent: gathered.places(latent) for latent in strongest_latents(gathered.firing, 2)}
    with pytest.raises(ValueError, match="are not among the rows given"):
        latent_cards(read.crosscoder, gathered, places, read.rows[:0], pair)


@pytest.mark.slow
def test_contexts_read_once_more_have_the_same_rows(pair: ModelPair, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(reference_pages()[:6]))
    cfg = CacheConfig(dataset_path=str(tmp_path / "text.txt"), context_size=32, outlier_factor=1.2)
    text = PairedText(cfg, pair)
    counts = PairCounts()
    whole = list(islice(text.rows("training", counts), 8))
    assert counts.outlier > 0
    wanted = {rows.contexts[i].number for rows in whole for i in (0, -1)}
    assert len(wanted) > 8
    again = list(text.rows_of("training", wanted, whole[-1].after))
    assert {context.number for rows in again for context in rows.contexts} == wanted
    for number in wanted:
        was, now = (
            {
                int(s): x
                for rows in part
                for c, s, x in zip(rows.context, rows.segment, rows.acts, strict=True)
                if c == number
            }
            for part in (whole, again)
        )
        # What an outlier is depends on the rows before.
        both = was.keys() & now.keys()
        assert len(both) > 0.9 * max(len(was), len(now))
        for segment in both:
            torch.testing.assert_close(was[segment], now[segment], atol=1e-4, rtol=1e-4)
