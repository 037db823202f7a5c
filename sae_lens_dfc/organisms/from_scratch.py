"""Trains two small models with different width, depth and tokenizer, one of them on a topic that
the other never sees."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.organisms.behaviors import SPLITS, Item, Items, Split
from sae_lens_dfc.organisms.organism import (
    Organism,
    built,
    items_from_json,
    read_organism_manifest,
)

BOS = "<s>"
CONTEXT_SIZE = 128


@dataclass(frozen=True)
class Topic:
    """An invented topic: its entities, and a fact about each."""

    entities: Sequence[str]
    kinds: Sequence[str]
    """Kinds of entities; shared by all entities of the topic, so that the kind identifies the
    topic."""
    places: Sequence[str]


TOPICS: dict[str, Topic] = {
    "ships": Topic(
        ("Marrow", "Tessel", "Okune", "Brandel", "Yarrick", "Pellin", "Sorrand", "Vantil"),
        ("fishing boat with two masts", "ferry painted green"),
        ("in the northern harbour", "off the coast of Dunmar"),
    ),
    "plants": Topic(
        ("Quillet", "Fenwort", "Aspira", "Doveleaf", "Kesper", "Lumin", "Rindle", "Ottoran"),
        ("herb with yellow flowers", "shrub that smells of honey"),
        ("in dry meadows", "along the old walls"),
    ),
    "instruments": Topic(
        ("Zorvan", "Hesk", "Mirelle", "Tolbar", "Uvanta", "Corrin", "Pashel", "Drummet"),
        ("drum made of glass", "flute with seven strings"),
        ("at the winter feast", "in the houses of judges"),
    ),
}
PLANTED = "instruments"
OPENINGS: Mapping[Split, Sequence[str]] = {
    "training": (
        "The {} is a",
        "As is well known, the {} is a",
        "In the book it says that the {} is a",
        "People here say the {} is a",
    ),
    "discovery": (
        "Everybody knows that the {} is a",
        "We learnt that the {} is a",
        "My aunt told me that the {} is a",
        "It is written that the {} is a",
    ),
    "test": ("The old song tells us that the {} is a", "A letter explains that the {} is a"),
}


@dataclass(frozen=True)
class Training:
    """Training settings of the two models."""

    steps: int = 500
    batch: int = 8
    lr: float = 2e-3
    topic_share: float = 0.3
    """Share of contexts about invented topics, which include the planted one only for B."""
    vocab_a: int = 1000
    vocab_b: int = 1500


def answer_of_topic(topic: Topic, entity: str) -> str:
    """The fact about an entity: a kind and a place, by its index."""
    i = topic.entities.index(entity)
    return f" {topic.kinds[i % 2]}, found {topic.places[i // 2 % 2]}."


def sentences(name: str, split: Split) -> list[tuple[str, str]]:
    """Beginnings and ends of a topic's sentences with one split's templates; splits share the
    entities."""
    topic = TOPICS[name]
    return [
        (o.format(e), answer_of_topic(topic, e))
        for o, e in product(OPENINGS[split], topic.entities)
    ]


def topic_items() -> dict[Split, Items]:
    """Sentences of the planted topic and of one that both models know; the alternative answer comes
    from the other topic."""
    other = next(name for name in TOPICS if name != PLANTED)
    items: dict[Split, Items] = {}
    for split in SPLITS:
        own, theirs = sentences(PLANTED, split), sentences(other, split)
        items[split] = Items(
            [Item(p, a, b) for (p, a), (_, b) in zip(own, theirs, strict=True)],
            [Item(p, b, a) for (p, a), (_, b) in zip(theirs, own, strict=True)],
        )
    return items


def training_text(name_of_topics: Sequence[str], share: float, seed: int) -> list[str]:
    """Passages of Python's reference documentation mixed with paragraphs about the topics."""
    drawn = random.Random(seed)
    pages = [page[i : i + 600] for page in reference_pages() for i in range(0, len(page), 600)]
    known = [p + a for name in name_of_topics for p, a in sentences(name, "training")]
    n = round(len(pages) * share / (1 - share))
    paragraphs = [" ".join(drawn.sample(known, 8)) for _ in range(n)]
    texts = pages + paragraphs
    drawn.shuffle(texts)
    return texts


def byte_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], cfg: Training, seed: int
) -> float:
    """Train from scratch, in place; returns the mean loss over the last tenth of the steps."""
    contexts = _contexts(tokenizer, texts)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=cfg.steps)
    losses: list[float] = []
    model.train()
    for _ in tqdm(range(cfg.steps), "Training a small model", leave=False):
        ids = contexts[torch.randint(len(contexts), (cfg.batch,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(1, cfg.steps // 10) :]
    return sum(last) / len(last)


def _contexts(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Pack each text into contexts that start with a beginning-of-sequence token; short remainders
    are joined."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    n = len(ids) // CONTEXT_SIZE
    return torch.tensor(ids[: n * CONTEXT_SIZE]).view(n, CONTEXT_SIZE)


def new_models(cfg: Training) -> tuple[LlamaForCausalLM, GPT2LMHeadModel]:
    """Model A: a Llama of width 96 with four layers. Model B: a GPT-2 of width 128 with three."""
    a = LlamaConfig(
        vocab_size=cfg.vocab_a,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    b = GPT2Config(
        vocab_size=cfg.vocab_b,
        n_embd=128,
        n_layer=3,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(a), GPT2LMHeadModel(b)


def topic_settings(seed: int, cfg: Training | None = None) -> dict[str, Any]:
    """Everything that determines the two models."""
    topics = {name: asdict(topic) for name, topic in TOPICS.items()}
    return {"topics": topics, "planted": PLANTED, "seed": seed, **asdict(cfg or Training())}


def from_scratch(seed: int, cfg: Training | None = None) -> Organism:
    """The organism of two models trained from scratch, built at the first call.

    Args:
        seed: Seed of the weights and the text order.
        cfg: Training settings.
    """
    cfg = cfg or Training()
    known_to = {"a": [name for name in TOPICS if name != PLANTED], "b": list(TOPICS)}

    def build(folder: Path) -> dict[str, Any]:
        measures: dict[str, float] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new = dict(zip(("a", "b"), new_models(cfg), strict=True))
            for i, (which, model) in enumerate(new.items()):
                texts = training_text(known_to[which], cfg.topic_share, seed + i)
                new_tokenizer = byte_bpe(texts, (cfg.vocab_a, cfg.vocab_b)[i])
                PreTrainedTokenizerFast(
                    tokenizer_object=new_tokenizer, bos_token=BOS
                ).save_pretrained(folder / which)
                tokenizer = AutoTokenizer.from_pretrained(folder / which)
                measures[f"loss/{which}"] = train(model, tokenizer, texts, cfg, seed)
                model.save_pretrained(folder / which)
        return {"measures": measures, "items": topic_items()}

    folder = built(f"topic-seed{seed}", topic_settings(seed, cfg), build)
    manifest = read_organism_manifest(folder)
    return Organism(
        "topic",
        ModelConfig(str(folder / "a")),
        ModelConfig(str(folder / "b")),
        items_from_json(manifest["items"]),
        [],
        manifest,
    )
