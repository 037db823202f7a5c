"""Collects a model pair's activations in memory: training rows, and held-out rows with their
text."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_dfc.data.activations import PairedRows, rows_in
from sae_lens_dfc.data.config import MAX_FIT_PAIRS
from sae_lens_dfc.data.contexts import Context
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluate import Deciles, alignment_metrics
from sae_lens_dfc.metrics.token_frequency import paired_tokens, token_deciles
from sae_lens_dfc.stats.affine_maps import AffineMaps, fit_affine_maps, have_one_basis
from sae_lens_dfc.stats.jackknife import N_BLOCKS
from sae_lens_dfc.stats.moments import PairMoments


@dataclass
class PairData:
    """Training and held-out rows of two models' activations, and the held-out text."""

    training: list[PairedRows]
    held_out: list[PairedRows]
    contexts: list[Context]
    """Text of the held-out rows, indexed by their `context`."""
    metrics: dict[str, float]
    """Alignment metrics over all text that was read."""

    @classmethod
    def collect(cls, text: PairedText, name: str) -> "PairData":
        """Run both models over the whole text once.

        Raises:
            ValueError: No pair is held out.
        """
        held = text.collect("held_out", f"{name}: held-out activations")
        if held.counts.pairs == 0:
            raise ValueError(
                f"No pair is held out: {held.counts.texts} documents are, of every {text.cfg.eval_every_n_documents}th. "
                "Give more documents, or lower eval_every_n_documents."
            )
        training = text.collect("training", f"{name}: activations")
        training.counts.coverage.add(held.counts.coverage)
        return cls(
            training.rows,
            regrouped(held.rows),
            held.contexts,
            alignment_metrics(training.counts),
        )

    def affine_maps(self, d_a: int) -> AffineMaps:
        """Affine maps between the two models, fitted on training pairs."""
        return fit_affine_maps(self.moments(), d_a)

    def one_basis(self, d_a: int) -> bool:
        """Whether the two models share a basis; see `have_one_basis`."""
        return have_one_basis(self.moments(), d_a)

    def moments(self) -> PairMoments:
        """Moments of training pairs, of some tens of thousands at most."""
        n_pairs = sum(len(rows.acts) for rows in self.training)
        # Evenly spaced over the text, since its beginning covers only a few documents.
        some = self.training[:: max(1, round(n_pairs / MAX_FIT_PAIRS))]
        return PairMoments.of(rows.acts for rows in some)

    def deciles(self, pair: ModelPair) -> list[Deciles]:
        """Token-frequency decile of each model's token, for each batch of held-out rows."""
        tokens = paired_tokens(context.segments for context in self.contexts)
        tables = {
            name: token_deciles(
                tokens[name], max(int(model.model.cfg.d_vocab), _above(tokens[name]))
            )
            for name, model in pair.models.items()
        }
        return [
            {name: table[self._tokens(rows, name)] for name, table in tables.items()}
            for rows in self.held_out
        ]

    def _tokens(self, rows: PairedRows, model: str) -> Int[Tensor, " n"]:
        found = torch.zeros(len(rows.context), dtype=torch.long)
        for number in rows.context.unique().tolist():
            segments, here = self.contexts[number].segments, rows.context == number
            ids, last = (
                (segments.ids_a, segments.last_a)
                if model == "a"
                else (segments.ids_b, segments.last_b)
            )
            found[here] = torch.from_numpy(ids[last])[rows.segment[here]]
        return found

    def held_out_with_text(self, n_pairs: int) -> Iterator[PairedRows]:
        """About `n_pairs` held-out rows in whole contexts, with their text, an equal share of each
        batch."""
        share = n_pairs / max(1, sum(len(rows.acts) for rows in self.held_out))
        for rows in self.held_out:
            numbers = rows.context.unique()
            chosen = numbers[: max(1, round(min(share, 1.0) * len(numbers)))]
            yield self._with_text(rows, chosen)

    def held_out_of(self, contexts: Collection[int]) -> Iterator[PairedRows]:
        """The held-out rows of these contexts, with their text."""
        wanted = torch.tensor(sorted(contexts), dtype=torch.long)
        for rows in self.held_out:
            here = rows.context.unique()
            here = here[torch.isin(here, wanted)]
            if len(here) > 0:
                yield self._with_text(rows, here)

    def _with_text(self, rows: PairedRows, numbers: Int[Tensor, " _"]) -> PairedRows:
        return rows_in(rows, [self.contexts[i] for i in numbers.tolist()])[0]


def regrouped(rows: Sequence[PairedRows]) -> list[PairedRows]:
    """Regroup rows into batches of consecutive contexts, twice as many as the standard error has
    blocks.

    As read, contexts of one document are spread over batches, and the number of batches depends on
    speed settings.
    """
    acts = torch.cat([r.acts for r in rows])
    context, segment = (torch.cat([getattr(r, n) for r in rows]) for n in ("context", "segment"))
    numbers = context.unique()
    batches = [torch.isin(context, chunk) for chunk in numbers.tensor_split(2 * N_BLOCKS)]
    return [PairedRows(acts[b], context[b], segment[b]) for b in batches if b.any()]


def _above(tokens: Int[Tensor, " n"]) -> int:
    """One more than the largest token id: some tokenizers exceed their model's `d_vocab`."""
    return int(tokens.max()) + 1 if len(tokens) > 0 else 1
