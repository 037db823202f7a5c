"""Maps next-token probabilities of two models with different vocabularies to common outcomes, and
compares them."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.analysis.steering.generate import stop_ids
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.logit_lens import n_tokens

END = "\ue000end"
"""The outcome "end of answer", whichever token ends an answer in a model."""
_ANCHOR = "a"


class Outcomes(NamedTuple):
    """Maps one model's tokens to the outcomes common to two models."""

    tokens: Int[Tensor, " n"]
    """Tokens whose text the other model's vocabulary has too."""
    outcomes: Int[Tensor, " n"]
    """The outcome of each of these tokens, below `n_outcomes - 1`, which is the outcome of all
    other tokens."""
    n_outcomes: int
    """Number of outcomes; the same for both models."""


def common_outcomes(a: HookedModel, b: HookedModel) -> tuple[Outcomes, Outcomes]:
    """The common outcomes of A's and B's next token: each text that is a token in both
    vocabularies, the end of the answer, and the rest.

    Texts are compared without case and surrounding spaces, because spacing at the start of an
    answer depends on the template. (On the demo pair this halves the mass of the rest.) Tokens that
    are part of a character, and special tokens that do not end an answer, belong to the rest: they
    have no comparable text.
    """
    texts_a, texts_b = (
        {token: text.strip().casefold() or " " for token, text in token_texts(m).items()}
        for m in (a, b)
    )
    shared = {
        text: i for i, text in enumerate(sorted(set(texts_a.values()) & set(texts_b.values())))
    }

    def one(texts: dict[int, str]) -> Outcomes:
        known = {token: shared[text] for token, text in texts.items() if text in shared}
        tokens, outcomes = (
            torch.tensor(list(known)).long(),
            torch.tensor(list(known.values())).long(),
        )
        return Outcomes(tokens, outcomes, len(shared) + 1)

    return one(texts_a), one(texts_b)


def token_texts(model: HookedModel) -> dict[int, str]:
    """The text that each token adds, `END` for tokens that end an answer; tokens that add no text
    are omitted.

    Tokens are decoded after a letter, because some tokenizers drop the leading space of the first
    token.
    """
    tokenizer = model.tokenizer
    anchor: int = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"][-1]  # type: ignore[index]
    n = n_tokens(model)
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    start, *decoded = backend.decode_batch(
        [[anchor], *([anchor, i] for i in range(n))], skip_special_tokens=False
    )
    added = tokenizer.added_tokens_decoder
    texts = {
        i: text[len(start) :]
        for i, text in enumerate(decoded)
        if text.startswith(start) and len(text) > len(start) and "\ufffd" not in text
        if i not in added or not added[i].special
    }
    return {**texts, **dict.fromkeys(stop_ids(model), END)}


def outcome_probabilities(
    logits: Float[Tensor, "*batch d_vocab"], outcomes: Outcomes
) -> Float[Tensor, "*batch n_outcomes"]:
    """Probability of each outcome: `softmax(logits)` summed over the outcome's tokens; the last
    outcome is the rest.

    >>> two = Outcomes(torch.tensor([0, 2]), torch.tensor([1, 0]), n_outcomes=3)
    >>> outcome_probabilities(torch.tensor([0.5, 0.2, 0.1, 0.2]).log(), two)
    tensor([0.1000, 0.5000, 0.4000], dtype=torch.float64)
    """
    logits = logits.float()
    tokens, where = outcomes.tokens.to(logits.device), outcomes.outcomes.to(logits.device)
    # Of a large vocabulary, materialize only the tokens that both models have.
    total = logits.logsumexp(dim=-1, keepdim=True)
    known = (logits[..., tokens] - total).double().exp()
    empty = known.new_zeros(*logits.shape[:-1], outcomes.n_outcomes)
    probabilities = empty.index_add(-1, where, known)
    probabilities[..., -1] = (1 - known.sum(dim=-1)).clamp(min=0)
    return probabilities


def check_no_nan(m: ModelName, probabilities: Tensor, is_changed: bool) -> None:
    """Check a model's next-token probabilities.

    Raises:
        ValueError: One is NaN.
    """
    if probabilities.isnan().any():
        raise ValueError(
            f"Model {m.upper()}'s next-token probabilities are NaN{' when it is changed' if is_changed else ''}: its "
            "activations overflow. Load it in bfloat16 or float32."
        )


def jensen_shannon(
    p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence in bits: `KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`;
    from 0 to 1.

    Lin 1991, "Divergence measures based on the Shannon entropy"; 0 where both are equal, 1 where
    nothing is likely in both.

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(1.)
    """
    m = (p + q) / 2
    to_m = [(torch.special.xlogy(x, x) - torch.special.xlogy(x, m)).sum(dim=-1) for x in (p, q)]
    nats = (to_m[0] + to_m[1]) / 2
    return (nats / math.log(2)).clamp(min=0, max=1)
