import torch

from sae_lens_dfc.activations import paired_activations
from sae_lens_dfc.contexts import PairCounts, in_order
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.evaluate import evaluate
from sae_lens_dfc.latents import latent_cards, strongest_latents
from sae_lens_dfc.metrics.sparsity import Firing
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.texts import reference_pages
from tests.helpers import make_dfc, stream_of, train_steps


def crosscoder_on(pair: ModelPair) -> tuple[Crosscoder, list, list]:  # type: ignore[type-arg]
    batches = list(stream_of(pair, reference_pages()[:4]).batches(PairCounts()))
    rows, contexts = list(paired_activations(pair, batches, PairCounts())), in_order(batches)
    crosscoder = make_dfc(d_a=pair.d_a, d_b=pair.d_b, d_sae=40, k=8)
    return train_steps(crosscoder, torch.cat([r.acts for r in rows])).to_inference(), rows, contexts


def test_strongest_latents_are_those_with_the_largest_sum_in_each_partition() -> None:
    partition = make_dfc().partition
    firing = Firing(partition)
    acts = torch.zeros(10, 24)
    acts[:, 2], acts[:, 4] = 1.0, 2.0
    acts[:4, 0] = 100.0  # strong, but on fewer than 5 pairs
    acts[:, 12], acts[:5, 20] = 1.0, 9.0
    firing.update(acts)
    assert strongest_latents(firing, n_per_partition=2) == [4, 2, 20, 12]


def test_cards_show_the_text_of_the_largest_activations(pair: ModelPair) -> None:
    crosscoder, rows, contexts = crosscoder_on(pair)
    _, firing, _ = evaluate(crosscoder, [r.acts for r in rows])
    latents = strongest_latents(firing, n_per_partition=2)
    acts = crosscoder.encode(torch.cat([r.acts for r in rows]))
    for card in latent_cards(crosscoder, firing, latents, rows, contexts, pair):
        best = acts[:, card.latent].max().item()
        assert card.max_activation == best
        peaks = [max(view.activation for view in context.segments) for context in card.contexts]
        assert peaks[0] == best
        assert peaks == sorted(peaks, reverse=True)
        assert card.partition == crosscoder.partition.name_of(card.latent)


def test_both_models_tokens_on_a_card_spell_the_same_text(pair: ModelPair) -> None:
    crosscoder, rows, contexts = crosscoder_on(pair)
    _, firing, _ = evaluate(crosscoder, [r.acts for r in rows])
    cards = latent_cards(crosscoder, firing, strongest_latents(firing, 3), rows, contexts, pair)
    assert cards
    for context in (c for card in cards for c in card.contexts):
        spelled = [
            "".join(t for view in context.segments for t in getattr(view, f"tokens_{m}"))
            for m in "ab"
        ]
        assert spelled[0].strip() == spelled[1].strip()
