"""Generates a model's answers, and computes log-probabilities of given answers."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_lens_dfc.models.number_formats import fast_dtype
from sae_lens_dfc.organisms.behaviors import Item, Items


class AnswerTexts(NamedTuple):
    """Tokenized prompts with answers, right-padded, and the answer tokens to predict."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    rows: Int[Tensor, " n"]
    """Row of each answer token."""
    positions: Int[Tensor, " n"]
    """Position of the token before it."""

    @property
    def is_first(self) -> Bool[Tensor, " n"]:
        """Whether a token is the first predicted token of its answer."""
        before = torch.cat([self.rows.new_full((1,), -1), self.rows[:-1]])
        return self.rows != before


def encoded(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    n_answer_tokens: int = sys.maxsize,
) -> AnswerTexts:
    """Tokenize prompts and answers separately and join them; the first `n_answer_tokens` tokens of each
    answer are predicted."""
    parts = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in both]
        for both in zip(prompts, answers, strict=True)
    ]
    texts = [torch.tensor(p + a) for p, a in parts]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    where = [
        (i, len(p) - 1 + j)
        for i, (p, a) in enumerate(parts)
        for j in range(min(n_answer_tokens, len(a)))
    ]
    rows, positions = torch.tensor(where).T
    return AnswerTexts(ids, mask, rows, positions)


def _fast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 if the device is fast in it."""
    is_fast = fast_dtype(str(device)) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_fast)


def log_probs(model: Any, texts: AnswerTexts) -> Float[Tensor, "n d_vocab"]:
    """Next-token log-probabilities before each answer token."""
    device = next(model.parameters()).device
    with _fast(device):
        output = model.base_model(texts.ids.to(device), attention_mask=texts.mask.to(device))
        logits = model.get_output_embeddings()(output[0][texts.rows, texts.positions])
    return logits.float().log_softmax(dim=-1)


def answer_log_probs(model: Any, texts: AnswerTexts) -> Float[Tensor, " n"]:
    """Log-probability of each answer token."""
    values = log_probs(model, texts)
    return values.gather(1, texts.ids[texts.rows, texts.positions + 1].to(values.device)[:, None])[
        :, 0
    ]


def kl_to(base: Tensor, model: Tensor) -> Float[Tensor, ""]:
    """Mean of KL(base || model) over rows of log-probabilities, in nats."""
    return (base.exp() * (base - model)).sum(dim=-1).mean()


@torch.no_grad()
def own_answers(model: Any, tokenizer: Any, prompts: Sequence[str], n_tokens: int) -> list[str]:
    """The model's greedy answers, without the end-of-message token."""
    answers: list[str] = []
    for i in range(0, len(prompts), 32):
        batch = tokenizer(
            list(prompts[i : i + 32]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        with _fast(model.device):
            output = model.generate(**batch, max_new_tokens=n_tokens, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return answers


@torch.no_grad()
def measures(model: Any, base: Any, tokenizer: Any, items: Items) -> dict[str, float]:
    """How strongly a model shows the behavior on triggering prompts, and how much it changed on
    controls.

    Returns:
        `preference/behavior`, `preference/control`: mean log-probability of the first tokens of
            the behavior's answer minus that of the ordinary answer; `share/behavior`,
            `share/control`: share of prompts on which it is positive; `base/...`: the same for the
            base model; `kl/control`: KL to the base model on ordinary answers, in nats per token.
    """
    result: dict[str, float] = {}
    for kind in ("behavior", "control"):
        own: list[Item] = getattr(items, kind)
        for name, one in (("", model), ("base/", base)):
            means = [
                _mean_by_text(
                    one,
                    encoded(tokenizer, [i.prompt for i in own], [getattr(i, way) for i in own], 1),
                )
                for way in ("answer", "ordinary")
            ]
            result[f"{name}preference/{kind}"] = float((means[0] - means[1]).mean())
            result[f"{name}share/{kind}"] = float((means[0] > means[1]).float().mean())
    texts = encoded(
        tokenizer,
        [i.prompt for i in items.control],
        [i.ordinary for i in items.control],
    )
    result["kl/control"] = float(kl_to(log_probs(base, texts), log_probs(model, texts)))
    return result


def _mean_by_text(model: Any, texts: AnswerTexts) -> Float[Tensor, " batch"]:
    values = answer_log_probs(model, texts).cpu()
    sums = torch.zeros(len(texts.ids)).index_add_(0, texts.rows, values)
    return sums / torch.bincount(texts.rows, minlength=len(texts.ids))
