"""A pair's activations in memory: those to train on or fit maps to, and those held out, with their text."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.contexts import Context
from sae_lens_dfc.evaluate import Deciles, alignment_metrics
from sae_lens_dfc.metrics.frequency import paired_tokens, token_deciles
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.spread import N_BLOCKS
from sae_lens_dfc.metrics.stitching import Stitching, fit_stitching, have_one_basis
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.training.data import PairedText

MAX_FIT_PAIRS = 50_000
"""Pairs that the maps between the models are fitted to; twice as many explain no more on the demo's pair."""


@dataclass
class PairData:
    """Rows of two models' activations, and the text of those held out."""

    training: list[PairedRows]
    held_out: list[PairedRows]
    contexts: list[Context]
    """Text of the held-out rows, by the number that they name."""
    metrics: dict[str, float]
    """Alignment coverage over all text that was read."""

    @classmethod
    def collect(cls, text: PairedText, name: str) -> "PairData":
        """Run both models over the whole text, once.

        Raises:
            ValueError: No pair is held out.
        """
        held = text.collect("held_out", f"{name}: held-out activations")
        if held.counts.pairs == 0:
            raise ValueError(
                f"No pair is held out: {held.counts.texts} documents are, of every {text.cfg.held_out_every}th. "
                "Give more documents, or lower held_out_every."
            )
        training = text.collect("training", f"{name}: activations")
        training.counts.coverage.add(held.counts.coverage)
        return cls(
            training.rows,
            regrouped(held.rows),
            held.contexts,
            alignment_metrics(training.counts),
        )

    def stitching(self, d_a: int) -> Stitching:
        """Maps between the two models, fitted to pairs that are not held out."""
        return fit_stitching(PairMoments.of(r.acts for r in self._to_fit()), d_a)

    def one_basis(self, d_a: int) -> bool:
        """Whether a direction of one model is the same direction of the other; see `have_one_basis`."""
        return have_one_basis(PairMoments.of(r.acts for r in self._to_fit()), d_a)

    def _to_fit(self) -> Sequence[PairedRows]:
        n_pairs = sum(len(rows.acts) for rows in self.training)
        # Evenly over the text: its beginning is of a few documents.
        return self.training[:: max(1, round(n_pairs / MAX_FIT_PAIRS))]

    def deciles(self, pair: ModelPair) -> list[Deciles]:
        """For each batch of held-out rows, in which decile of frequency each model's token is."""
        tokens = paired_tokens(context.segments for context in self.contexts)
        tables = {
            name: token_deciles(
                tokens[name], max(int(model.model.cfg.d_vocab), _above(tokens[name]))
            )
            for name, model in (("a", pair.a), ("b", pair.b))
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
        """About so many held-out rows, with their contexts: whole contexts, as many of each batch."""
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
        here = torch.isin(rows.context, numbers)
        texts = [self.contexts[i] for i in numbers.tolist()]
        return PairedRows(rows.acts[here], rows.context[here], rows.segment[here], texts)


def regrouped(rows: Sequence[PairedRows]) -> list[PairedRows]:
    """The rows in twice as many batches as a standard error has blocks, each of contexts that follow one another.

    As they were read, contexts of one document are in several batches, and how many batches there are is a matter of speed.
    """
    acts = torch.cat([r.acts for r in rows])
    context, segment = (torch.cat([getattr(r, n) for r in rows]) for n in ("context", "segment"))
    numbers = context.unique()
    batches = [torch.isin(context, chunk) for chunk in numbers.tensor_split(2 * N_BLOCKS)]
    return [PairedRows(acts[b], context[b], segment[b]) for b in batches if b.any()]


def _above(tokens: Int[Tensor, " n"]) -> int:
    """One more than the largest token: some tokenizers have more than their model says."""
    return int(tokens.max()) + 1 if len(tokens) > 0 else 1
