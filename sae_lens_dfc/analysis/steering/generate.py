"""Generates both models' answers to the same prompts, as contrastive text to train a delta
crosscoder on."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.analysis.steering.hooks import added, changed
from sae_lens_dfc.analysis.steering.options import GenerateOptions, Sampling
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.core.atomic_write import atomic_file
from sae_lens_dfc.core.output_folder import file_lock
from sae_lens_dfc.data.alignment.chat import render_chat
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.data.text.datasets import load_texts, read_text_file
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import or_base_of
from sae_lens_dfc.models.opening.supported import (
    ONE_AT_A_TIME,
    WITHOUT_ITS_OWN_STATE,
    WITHOUT_KV_CACHE,
)

logger = logging.getLogger(__name__)


def generate(options: GenerateOptions) -> int:
    """Write one JSON line per prompt, atomically; returns the number of lines.

    Raises:
        ValueError: The output exists already, a model or the prompts cannot be read, or no prompt
            fits.
    """
    path = Path(options.output)
    if path.is_dir() or (path.exists() and not options.overwrite):
        raise ValueError(f"Output {path} is there already. Pass --overwrite or name another file.")
    prompts = read_prompts(options.prompts, options.text_column)
    # Generation needs all layers, even if a configuration shared with `cache` drops some.
    models = or_base_of(options.model_a, options.model_b), options.model_b
    whole = (replace(model, drop_unused_layers=False) for model in models)
    pair = ModelPair.load(*whole)
    n_rows = 0
    with (
        file_lock(path),
        atomic_file(path) as unfinished,
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


def read_prompts(prompts: str, text_column: str = "prompt") -> Iterable[str]:
    """The prompts of a data set; for a .txt file, its non-blank lines.

    Args:
        prompts: As `GenerateOptions.prompts`.
        text_column: Column that holds the prompts.

    Raises:
        ValueError: The file, data set or column does not exist, or the text is not UTF-8.
    """
    path = Path(prompts)
    if path.suffix != ".txt" or not path.is_file():
        return load_texts(prompts, text_column)
    # A text file read as a data set is split into long documents, not into lines.
    return [line.strip() for line in read_text_file(path).split("\n") if line.strip()]


def contrastive_rows(
    pair: ModelPair, prompts: Iterable[str], options: GenerateOptions
) -> Iterator[dict[str, str]]:
    """Yield each prompt with A's and B's answers, in order.

    Skips prompts that are empty or leave no room for an answer in one of the models, and logs how
    many. Both models sample with the same random numbers, so a model paired with itself gives
    identical answers, and answers differ only as far as the models do.
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
        seed: Sampling seed.
        vectors: Steering vectors added at every position of a prompt and its answer
            (`steering.added`), one per prompt.

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
    """Tokens that end an answer: end-of-sequence, and the token with which the chat template closes
    a turn."""
    ids = [model.tokenizer.eos_token_id, *_closing_ids(model.tokenizer)]
    # For a tokenizer without an end-of-sequence token, TransformerLens adds one that the model has
    # no embedding for.
    return [i for i in dict.fromkeys(ids) if isinstance(i, int) and i < model.n_embeddings]


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token with which the chat template closes an answer, if there is one."""
    if not tokenizer.chat_template:
        return []
    mark = "\ue000"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
    try:
        rendering = render_chat(tokenizer, chat)
    except ValueError:
        # A raw prompt needs no template, and some templates do not accept a chat that already has
        # an answer.
        return []
    closing = rendering.partition(mark)[2].strip()
    first: list[int] = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]  # type: ignore[assignment]
    # An ordinary word of the template, as in "User:", may also occur in answers.
    return [i for i in first if i in tokenizer.added_tokens_decoder]


def _takes_padding(model: HookedModel) -> bool:
    # HookedTransformer.generate guesses padding from the tokens.
    if not isinstance(model.model, TransformerBridge):
        return False
    has_its_place = model.model.cfg.architecture not in ONE_AT_A_TIME
    return has_its_place and model.model.adapter.supports_batched_generation


def _cache_settings(model: HookedModel) -> dict[str, Any]:
    """Disable the TransformerLens caches that would change the model's answers."""
    if not isinstance(model.model, TransformerBridge):
        return {}
    if model.model.cfg.architecture in WITHOUT_ITS_OWN_STATE:
        model.model.cfg.is_stateful = False
    return {"use_past_kv_cache": model.model.cfg.architecture not in WITHOUT_KV_CACHE}


def _new_tokens(
    model: HookedModel, prompts: Sequence[list[int]], options: Sampling, stops: list[int]
) -> list[list[int]]:
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    settings = _cache_settings(model)
    if _takes_padding(model):
        read = [torch.ones_like(row) for row in rows]
        settings["attention_mask"] = pad_sequence(read, batch_first=True, padding_side="left")
    output: Tensor = model.model.generate(  # type: ignore[assignment]
        ids.to(model.device),
        max_new_tokens=options.max_new_tokens,
        # Both classes pad a finished row with the tokenizer's end-of-sequence token, which needs an
        # embedding.
        stop_at_eos=model.tokenizer.eos_token_id in stops,
        eos_token_id=stops,  # type: ignore[arg-type]
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        top_p=options.top_p if options.top_p < 1 else None,
        return_type="tokens",
        verbose=False,
        **settings,
    )
    return output[:, ids.shape[1] :].tolist()


def _decoded(model: HookedModel, ids: list[int]) -> str:
    text = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return clean(str(text))
