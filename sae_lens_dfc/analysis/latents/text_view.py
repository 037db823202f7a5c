"""Formats a latent for the terminal: one line of statistics, and its top max-activating example."""

from sae_lens_dfc.analysis.latents.cards import LatentCard
from sae_lens_dfc.analysis.latents.contrast import Contrast
from sae_lens_dfc.core.terminal import visible
from sae_lens_dfc.crosscoders.groups import B_EXCLUSIVE

N_PROMOTED = 3


def latent_line(card: LatentCard, compared: Contrast | None = None) -> str:
    """A latent's statistics on one line.

    >>> card = LatentCard(7, "shared", 0.01, 1.5, 2.0, 0.5, {}, [], {}, {}, "not shown to be exclusive: q = 0.3")
    >>> latent_line(card)
    '     7 shared · fires on 1.00% · mean 1.5, max 2 · decoder norm 0.50 · not shown to be exclusive'
    """
    cells = [
        f"{card.latent:>6} {card.partition}",
        f"fires on {card.firing_rate:.2%}",
        f"mean {card.mean_activation:.3g}, max {card.max_activation:.3g}",
        f"decoder norm {card.relative_decoder_norm:.2f}",
    ]
    if compared is not None:
        values = contrast_of(compared, card.latent)
        cells.append(f"AUROC {values['auroc']:.3f}, d {values['cohens_d']:+.2f}")
    for m, effect in card.logit_effects.items():
        quoted = " ".join(f"'{visible(text)}'" for text, _ in effect.promoted[:N_PROMOTED])
        cells.append(f"promotes in {m.upper()} {quoted}")
    if card.verdict:
        cells.append(card.verdict.partition(":")[0])
    return " · ".join(cells)


def contrast_of(compared: Contrast, latent: int) -> dict[str, float]:
    """One latent's Cohen's d and AUROC by name."""
    return {name: x[latent].item() for name, x in compared._asdict().items()}


def marked_text(card: LatentCard) -> str:
    """The text around the strongest firing in tokens of the latent's model, with the firing segment
    between two marks."""
    best = card.contexts[0]
    texts = [
        "".join(view.tokens_b if card.partition == B_EXCLUSIVE else view.tokens_a)
        for view in best.segments
    ]
    # The firing segment is the one whose activation equals the example's.
    fires = [view.activation for view in best.segments].index(best.activation)
    texts[fires] = f"«{texts[fires]}»"
    return f"[document {best.document}] {visible(''.join(texts))}"
