"""Runs two hooked models on the same text and concatenates their activations."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_dfc.data.alignment.align import Coverage, align
from sae_lens_dfc.data.alignment.chat import chat_segments
from sae_lens_dfc.data.alignment.segments import Segment, Segments
from sae_lens_dfc.data.alignment.tokens import tokenize
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.models.config import ModelConfig, ModelName
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model, load_model_a


@dataclass
class ModelPair:
    """Model A and model B, which may differ in architecture, width, depth and tokenizer.

    It can also be passed as one model to SAELens'
    `LanguageModelSAETrainingRunner(override_model=…)`: its "tokens" are then segments of text on
    which both tokenizers agree, numbered in order of first use, and its activation at a segment is
    both models' activations concatenated, `d_a + d_b` wide.
    """

    a: HookedModel
    """Model A."""
    b: HookedModel
    """Model B."""
    _numbers: dict[Segment, int] = field(default_factory=dict, repr=False)
    _segments: list[Segment] = field(default_factory=list, repr=False)

    @classmethod
    def load(cls, model_a: ModelConfig, model_b: ModelConfig) -> "ModelPair":
        """Load both models; if both settings are the same, the model is loaded once."""
        a = load_model_a(model_a, model_b)
        return cls(a, a if model_a == model_b else load_model(model_b))

    @property
    def models(self) -> dict[ModelName, HookedModel]:
        """Both models, by name."""
        return {"a": self.a, "b": self.b}

    @property
    def d_a(self) -> int:
        return self.a.d_model

    @property
    def d_b(self) -> int:
        return self.b.d_model

    def segments(self, text: str) -> tuple[Segments, Coverage]:
        """Cut a text into segments at the positions where both models have read the same
        characters."""
        text = clean(text)
        tokens_a = tokenize(self.a.tokenizer, text)
        tokens_b = tokens_a if self.a is self.b else tokenize(self.b.tokenizer, text)
        return self._readable(*align(tokens_a, tokens_b))

    def chat_segments(self, messages: Sequence[Mapping[str, str]]) -> tuple[Segments, Coverage]:
        """Render a chat in each model's own template and cut it into segments at shared positions
        inside messages."""
        return self._readable(*chat_segments(self.a.tokenizer, self.b.tokenizer, messages))

    def _readable(self, segments: Segments, coverage: Coverage) -> tuple[Segments, Coverage]:
        """Return the arguments after checking that both models have embeddings for all tokens."""
        self.a.check_ids(segments.ids_a)
        self.b.check_ids(segments.ids_b)
        return segments, coverage

    def activations(
        self, contexts: Sequence[Sequence[Segment]]
    ) -> list[Float[Tensor, "n_segments d_in"]]:
        """Both models' activations at the last token of each segment, one tensor per context.

        Nothing is prepended: the caller decides whether a context starts with the
        beginning-of-sequence segment (`bos_segment`). Models on different devices run in parallel.
        """
        read = [Segments.of(context) for context in contexts]
        read_a = partial(_read, self.a, [c.ids_a for c in read], [c.last_a for c in read])
        read_b = partial(_read, self.b, [c.ids_b for c in read], [c.last_b for c in read])
        if self.a is self.b:
            acts_a = acts_b = read_a()
        elif self.a.device == self.b.device:
            acts_a, acts_b = read_a(), read_b()
        else:
            with ThreadPoolExecutor(1) as other:
                later = other.submit(read_b)
                acts_a, acts_b = read_a(), later.result()
        joined = torch.cat([acts_a.float(), acts_b.to(acts_a.device).float()], dim=-1)
        return list(joined.split([len(context) for context in read]))

    @property
    def bos_segment(self) -> Segment:
        """The segment that starts a context: each model's own beginning-of-sequence token, if it
        has one."""
        return Segment(self.a.bos_ids, self.b.bos_ids)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Description of both models that is saved with a crosscoder."""
        return {"model_a": self.a.describe(), "model_b": self.b.describe()}

    # --- the interface that SAELens' runner expects of a model ---

    @property
    def tokenizer(self) -> SimpleNamespace:
        """The part of a tokenizer that SAELens uses: the number of the beginning-of-sequence
        segment."""
        bos = self._number(self.bos_segment) if self.a.bos_ids or self.b.bos_ids else None
        return SimpleNamespace(bos_token_id=bos, name_or_path=f"{self.a.name} x {self.b.name}")

    @property
    def cfg(self) -> SimpleNamespace:
        """The part of a model's configuration that SAELens uses; segment numbers are on the CPU."""
        return SimpleNamespace(device=torch.device("cpu"))

    def to_tokens(self, text: str, **_: Any) -> Int[Tensor, "1 n_segments"]:
        """The numbers of the text's segments."""
        segments, _coverage = self.segments(text)
        return torch.tensor([[self._number(segment) for segment in segments]], dtype=torch.long)

    def run_with_cache(
        self, numbers: Int[Tensor, "batch pos"], names_filter: Sequence[str], **_: Any
    ) -> tuple[None, dict[str, Float[Tensor, "batch pos d_in"]]]:
        """Both models' activations at the segments with these numbers."""
        contexts = [[self._segments[number] for number in row] for row in numbers.tolist()]
        return None, dict.fromkeys(names_filter, torch.stack(self.activations(contexts)))

    def _number(self, segment: Segment) -> int:
        if segment not in self._numbers:
            self._numbers[segment] = len(self._segments)
            self._segments.append(segment)
        return self._numbers[segment]


def _read(
    model: HookedModel,
    rows: Sequence[Int[np.ndarray, " _"]],
    positions: Sequence[Int[np.ndarray, " _"]],
) -> Float[Tensor, "n_positions d_model"]:
    """One model's activations at the given positions of each row of tokens, concatenated over
    rows."""
    ids, mask = padded(model, rows)
    acts = model.activations(ids, mask).flatten(end_dim=1)
    where = np.concatenate([i * ids.shape[1] + at for i, at in enumerate(positions)])
    return acts[torch.from_numpy(where).to(acts.device)]


def padded(
    model: HookedModel, rows: Sequence[Int[np.ndarray, " _"]]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of tokens as one batch, padded on the right, and its attention mask (1 for a token).

    Raises:
        ValueError: A row is longer than the model can read.
    """
    longest = max(map(len, rows))
    if longest > model.n_ctx:
        raise ValueError(
            f"A context of {longest} tokens is more than model {model.name!r} can read ({model.n_ctx}). "
            "Lower context_size; in SAELens' own runner it counts segments of one or more tokens."
        )
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
