"""Trains the models of the case withheld: small models of two widths, depths and tokenizers, on
English text and a share of another language."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae_lens_dfc.organisms.from_scratch import BOS, Training, byte_bpe, new_models, train


@dataclass(frozen=True)
class SmallModel:
    """What determines a model, besides the text and the training's settings."""

    which: Literal["a", "b"]
    """Its architecture; see `new_models`."""
    share: float
    """Share of its text, in characters, that is of the other language."""
    seed: int


def train_model(
    model: SmallModel,
    common: Sequence[str],
    other: Sequence[str],
    folder: Path,
    training: Training,
) -> float:
    """Train a model and its tokenizer from scratch, and write them.

    Args:
        model: The model.
        common: Passages that it reads all of.
        other: Passages of the other language, which it reads in part.
        folder: Folder to write to.
        training: Settings, with the steps of a model that reads the common text only. With other
            text it takes more, so that it reads the common text as often.

    Returns:
        Its mean loss at the end, in nats per token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        new = dict(zip("ab", new_models(training), strict=True))[model.which]
        size = {"a": training.vocab_a, "b": training.vocab_b}[model.which]
        texts = mixed(common, other, model.share, model.seed)
        bpe = byte_bpe(texts, size)
        PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS).save_pretrained(folder)
        cfg = replace(training, steps=round(training.steps / (1 - model.share)))
        loss = train(new, AutoTokenizer.from_pretrained(folder), texts, cfg, model.seed)
    new.save_pretrained(folder)
    return loss


def mixed(common: Sequence[str], other: Sequence[str], share: float, seed: int) -> list[str]:
    """All common passages, and as many random ones of the others as make up a share of all
    characters; shuffled.

    Raises:
        ValueError: There are too few of the others.

    >>> sorted(mixed(["aaa", "a"], ["bb", "bb", "bb"], 0.5, seed=0))
    ['a', 'aaa', 'bb', 'bb']
    """
    drawn = random.Random(seed)
    wanted = sum(map(len, common)) * share / (1 - share)
    texts = list(common)
    for text in drawn.sample(other, len(other)):
        if wanted <= 0:
            break
        texts.append(text)
        wanted -= len(text)
    if wanted > 0:
        raise ValueError(
            f"A share of {share:g} needs {wanted:.0f} more characters of the other language than there are. Give a smaller share."
        )
    drawn.shuffle(texts)
    return texts
