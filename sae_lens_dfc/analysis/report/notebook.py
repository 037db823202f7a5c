"""Renders a latent card as HTML for notebooks: statistics and max-activating examples in both
models' tokens."""

from collections.abc import Sequence

from markupsafe import Markup

from sae_lens_dfc.analysis.latents.cards import ContextView, LatentCard
from sae_lens_dfc.analysis.latents.text_view import latent_line
from sae_lens_dfc.core.terminal import visible

SHADE = "236,112,20"


def latent_html(card: LatentCard, n_contexts: int = 3) -> Markup:
    """Render a card for `IPython.display.HTML`; all text is escaped.

    Each context has a line in A's tokens and one in B's. The last token of a segment, where the two
    models have read the same text, is shaded by the latent's activation relative to its maximum;
    the other tokens of a segment have no activation of their own. Hovering shows the activation,
    and the context's firing is in bold.

    Args:
        card: The latent.
        n_contexts: Number of the card's contexts to show, from the first.

    >>> from sae_lens_dfc.analysis.latents.cards import SegmentView
    >>> view = ContextView([SegmentView(["<", "b>"], ["<b>"], 2.0)], 0, 1, 1, 2.0, None)
    >>> card = LatentCard(7, "shared", 0.01, 1.5, 2.0, 0.5, {}, [view], {}, {})
    >>> "<b>" in str(latent_html(card)), "&lt;b&gt;" in str(latent_html(card))
    (False, True)
    """
    contexts = Markup("").join(_context(view, card) for view in card.contexts[:n_contexts])
    return Markup(
        '<div style="margin:0 0 1.4em"><div style="font-weight:600">{}</div>{}</div>'
    ).format(visible(latent_line(card).strip()), contexts)


def _context(view: ContextView, card: LatentCard) -> Markup:
    # The firing segment is the one whose activation equals the example's.
    fires = [segment.activation for segment in view.segments].index(view.activation)
    lines = (
        _line(
            name, [getattr(s, f"tokens_{name.lower()}") for s in view.segments], view, card, fires
        )
        for name in ("A", "B")
    )
    return Markup('<div style="margin:.6em 0 0 1em;line-height:1.6">{}</div>').format(
        Markup("").join(lines)
    )


def _line(
    name: str, tokens: Sequence[Sequence[str]], view: ContextView, card: LatentCard, fires: int
) -> Markup:
    segments = Markup("").join(
        _segment(own, segment.activation, card.max_activation, i == fires)
        for i, (own, segment) in enumerate(zip(tokens, view.segments, strict=True))
    )
    return Markup(
        '<div><span style="opacity:.6;font-size:.85em">{}&nbsp;</span>'
        '<span style="font-family:monospace;white-space:pre-wrap">{}</span></div>'
    ).format(name, segments)


def _segment(tokens: Sequence[str], activation: float, largest: float, fires: bool) -> Markup:
    *before, last = (visible(token) for token in tokens) if tokens else ("",)
    alpha = min(max(activation / largest, 0.0), 1.0) if largest > 0 else 0.0
    shade = f"background:rgba({SHADE},{alpha:.2f});" if alpha > 0 else ""
    bold = "font-weight:700;text-decoration:underline;" if fires else ""
    return Markup(
        '{}<span style="{}border-right:1px solid rgba(128,128,128,.25)" title="{}">{}</span>'
    ).format("".join(before), shade + bold, f"{activation:.3g}", last)
