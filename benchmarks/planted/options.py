"""Names the organisms of the benchmark of planted differences."""

from sae_lens_dfc.organisms.options import ORGANISM_NAMES, TOPIC

NULL = "null"
"""Last part of a null's name. Alone, it is the null of all fine-tunes: model A twice."""
FOREIGN = "foreign/"
"""Beginning of the name of a pair in which the fine-tune, model B, stands beside an unrelated
model, Gemma, instead of the model that it was made from."""
_FINE_TUNES = tuple(name for name in ORGANISM_NAMES if name != TOPIC)
_BEHAVIORS = tuple(dict.fromkeys(name.partition("/")[0] for name in _FINE_TUNES))
FOREIGN_NAMES = (
    *(f"{FOREIGN}{name}" for name in _FINE_TUNES),
    *(f"{FOREIGN}{behavior}/{NULL}" for behavior in _BEHAVIORS),
)
"""The fine-tunes beside Gemma; and of each behavior the null, the model that was not fine-tuned
beside Gemma, on the same text."""
FULL = (*ORGANISM_NAMES, NULL, *FOREIGN_NAMES)


def is_null(organism: str) -> bool:
    """Whether nothing is planted in an organism.

    >>> is_null("null"), is_null("foreign/refusal/null"), is_null("foreign/refusal/weak")
    (True, True, False)
    """
    return organism.endswith(NULL)


def is_foreign(organism: str) -> bool:
    """Whether an organism stands beside the unrelated model.

    >>> is_foreign("foreign/refusal/weak"), is_foreign("refusal/weak")
    (True, False)
    """
    return organism.startswith(FOREIGN)
