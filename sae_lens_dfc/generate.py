"""Two models' answers to the same prompts: text in which they differ, for a delta crosscoder to train on."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_dfc.chat import render_chat
from sae_lens_dfc.models import HookedModel, ModelConfig
from sae_lens_dfc.output import replaced, sole_user
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.prompts import prompt_ids
from sae_lens_dfc.steering import added, changed
from sae_lens_dfc.texts import clean, load_texts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Sampling:
    """How a model's tokens are drawn.

    Raises:
        ValueError: A number is out of its range.
    """

    max_new_tokens: int = 128
    """Tokens after which an answer is cut."""
    temperature: float = 1.0
    """How freely tokens are drawn; 0 takes the likeliest."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest that have this much probability together; 1 takes all."""
    batch_size: int = 16
    """Prompts answered at a time; HookedTransformer answers one at a time."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")


@dataclass(kw_only=True)
class GenerateOptions(Sampling):
    """Write both models' answers to each prompt of a data set, as text to train a delta crosscoder on.

    Raises:
        ValueError: A number is out of its range, or the output is not a .jsonl file.
    """

    prompts: str
    """A file of prompts (.jsonl, .json, .csv, .parquet), a hub name or a folder written by save_to_disk."""
    output: str
    """File to write, .jsonl: one line for each prompt, with prompt, completion_a and completion_b."""
    model_a: ModelConfig = field(default_factory=ModelConfig)
    """The first model."""
    model_b: ModelConfig = field(default_factory=ModelConfig)
    """The second model."""
    text_column: str = "prompt"
    """Column that holds the prompts."""
    n_prompts: int | None = None
    """At most so many prompts; none takes all."""
    seed: int = 42
    """Seed of the draws; the same one gives the same answers in batches of the same size."""
    overwrite: bool = False
    """Replace the output file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_prompts is not None and self.n_prompts < 1:
            raise ValueError(f"n_prompts must be at least 1, got {self.n_prompts}.")
        if Path(self.output).suffix != ".jsonl":
            raise ValueError(f"output must be a .jsonl file, got {self.output!r}. Name one.")


def generate(options: GenerateOptions) -> int:
    """Write one line of JSON for each prompt, all of them or none; the number of lines.

    Raises:
        ValueError: The output is there already, a model or the prompts cannot be read, or no prompt fits.
    """
    path = Path(options.output)
    if path.is_dir() or (path.exists() and not options.overwrite):
        raise ValueError(f"Output {path} is there already. Pass --overwrite or name another file.")
    prompts = load_texts(options.prompts, options.text_column)
    # To generate takes all layers, whatever a configuration shared with `cache` says.
    whole = (replace(m, drop_unused_layers=False) for m in (options.model_a, options.model_b))
    pair = ModelPair.load(*whole)
    n_rows = 0
    with (
        sole_user(path),
        replaced(path) as unfinished,
        unfinished.open("w", encoding="utf-8") as file,
    ):
        for row in contrastive_rows(pair, prompts, options):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            n_rows += 1
        if n_rows == 0:
            raise ValueError(
                f"No prompt of {options.prompts!r} leaves room for max_new_tokens={options.max_new_tokens} in both "
                "models, or all are empty. Lower max_new_tokens, or give other prompts."
            )
    return n_rows


def contrastive_rows(
    pair: ModelPair, prompts: Iterable[str], options: GenerateOptions
) -> Iterator[dict[str, str]]:
    """Prompts -> each with A's answer and B's, in order.

    Prompts that are empty, or leave no room for an answer in one of the models, are left out and
    their number is logged. Both models draw with the same random numbers, so that one model given
    twice answers the same twice, and answers differ no more than the models do.
    """
    fitting = _fitting(pair, islice(prompts, options.n_prompts), options)
    seeds = count(options.seed)
    while batch := list(islice(fitting, options.batch_size)):
        texts, ids_a, ids_b = zip(*batch, strict=True)
        seed = next(seeds)
        answers_a = answer(pair.a, ids_a, options, seed)
        answers_b = answer(pair.b, ids_b, options, seed)
        for text, a, b in zip(texts, answers_a, answers_b, strict=True):
            yield {"prompt": text, "completion_a": a, "completion_b": b}


def _fitting(
    pair: ModelPair, prompts: Iterable[str], options: GenerateOptions
) -> Iterator[tuple[str, list[int], list[int]]]:
    n_left_out = 0
    for prompt in tqdm(prompts, "Answers", options.n_prompts, unit=" prompts"):
        text = clean(prompt)
        ids = [prompt_ids(model, text) for model in (pair.a, pair.b)]
        room = [model.n_ctx - options.max_new_tokens for model in (pair.a, pair.b)]
        if text and all(0 < len(i) <= n for i, n in zip(ids, room, strict=True)):
            yield text, ids[0], ids[1]
        else:
            n_left_out += 1
    if n_left_out:
        logger.warning(
            f"Left out {n_left_out} prompts that are empty or leave no room for an answer of "
            f"{options.max_new_tokens} tokens."
        )


@torch.no_grad()
def answer(
    model: HookedModel,
    prompts: Sequence[list[int]],
    options: Sampling,
    seed: int,
    vectors: Float[Tensor, "_ d_model"] | None = None,
) -> list[str]:
    """The model's answer to each prompt, as text without special tokens.

    Args:
        model: The model.
        prompts: Token ids of each prompt, see `prompt_ids`.
        options: Length, temperature and batch size.
        seed: Seed of the draws.
        vectors: Added at every position of a prompt and its answer (`steering.added`), one for each prompt.

    Raises:
        ValueError: A HookedTransformer's tokenizer has no padding token.
    """
    is_bridge = isinstance(model.model, TransformerBridge)
    if not is_bridge and model.tokenizer.pad_token_id is None:
        raise ValueError(
            f"HookedTransformer {model.name!r} cannot generate: its tokenizer has no padding token. "
            "Use model_class_name='TransformerBridge'."
        )
    size = options.batch_size if _takes_padding(model) else 1
    stops = stop_ids(model)
    answers: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for i in range(0, len(prompts), size):
            steered = nullcontext()
            if vectors is not None:
                steered = changed(model, added(vectors[i : i + size]))
            with steered:
                new = _new_tokens(model, prompts[i : i + size], options, stops)
            for ids in new:
                end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
                answers.append(_decoded(model, ids[:end]))
    return answers


def stop_ids(model: HookedModel) -> list[int]:
    """Tokens that end an answer: the end of the sequence, and what the chat template closes an answer with."""
    tokenizer = model.tokenizer
    ids = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        mark = "\ue000"
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
        closing = render_chat(tokenizer, chat).partition(mark)[2].strip()
        first: list[int] = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]  # type: ignore[index]
        # A word of the template, as in "User:", is a word that answers may hold.
        ids += [i for i in first if i in tokenizer.added_tokens_decoder]
    # TransformerLens gives a tokenizer without an end of sequence one that the model has no embedding for.
    return [i for i in dict.fromkeys(ids) if isinstance(i, int) and i < model.model.cfg.d_vocab]


def _takes_padding(model: HookedModel) -> bool:
    # HookedTransformer.generate guesses padding from the tokens.
    if not isinstance(model.model, TransformerBridge):
        return False
    return model.model.adapter.supports_batched_generation


def _new_tokens(
    model: HookedModel, prompts: Sequence[list[int]], options: Sampling, stops: list[int]
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    padding: dict[str, Any] = {"attention_mask": mask} if _takes_padding(model) else {}
    output: Tensor = model.model.generate(  # type: ignore[assignment]
        ids.to(model.device),
        max_new_tokens=options.max_new_tokens,
        # Both classes fill a finished row with the tokenizer's end of sequence, which must be embedded.
        stop_at_eos=model.tokenizer.eos_token_id in stops,
        eos_token_id=stops,  # type: ignore[arg-type]
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        top_p=options.top_p if options.top_p < 1 else None,
        return_type="tokens",
        verbose=False,
        **padding,
    )
    return output[:, longest:].tolist()


def _decoded(model: HookedModel, ids: list[int]) -> str:
    text = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return clean(str(text))
