import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from datasets import Dataset
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_dfc import (
    BatchTopKTrainingCrosscoder,
    BatchTopKTrainingCrosscoderConfig,
    DeltaTrainingCrosscoder,
    DeltaTrainingCrosscoderConfig,
    DFCTrainingCrosscoder,
    DFCTrainingCrosscoderConfig,
    DSFTrainingCrosscoder,
    DSFTrainingCrosscoderConfig,
    StandardTrainingCrosscoder,
    StandardTrainingCrosscoderConfig,
)
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoder
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.alignment.segments import Segment, Segments
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.contexts import Context, ContextBatch, ContextStream
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.data.text.datasets import Rows
from sae_lens_dfc.models import number_formats


def source_of(texts: Sequence[Any], weight: float = 1.0, column: str = "text") -> Source:
    rows = Rows(Dataset.from_dict({column: list(texts)}), "mine")
    return Source(SourceConfig("mine", weight, column), rows)


def stream_of(pair: ModelPair, texts: Sequence[str], **kwargs: Any) -> ContextStream:
    settings: dict[str, Any] = {"context_size": 32, **kwargs}
    return ContextStream(pair, [source_of(texts)], **settings)


def batches_of(contexts: Sequence[Sequence[Segment]], size: int = 16) -> list[ContextBatch]:
    """Contexts in their order, all of one document."""
    numbered = [Context(Segments.of(c), i, 0) for i, c in enumerate(contexts)]
    starts = range(0, len(numbered), size)
    return [ContextBatch(numbered[i : i + size], {"batches": i // size + 1}) for i in starts]


T = TypeVar("T", bound=TrainingCrosscoder[Any])


def dfc_config(**overrides: Any) -> DFCTrainingCrosscoderConfig:
    defaults: dict[str, Any] = {
        "d_a": 5,
        "d_b": 7,
        "d_sae": 24,
        "k": 6,
        "a_exclusive_fraction": 0.25,
        "b_exclusive_fraction": 0.17,
    }
    return DFCTrainingCrosscoderConfig(**{**defaults, **overrides})


def make_dfc(**overrides: Any) -> DFCTrainingCrosscoder:
    return randomized(DFCTrainingCrosscoder(dfc_config(**overrides)))


@torch.no_grad()
def make_firing_dfc(**overrides: Any) -> Crosscoder:
    """A saved one; untrained, its threshold would let no latent fire."""
    crosscoder = make_dfc(**overrides).to_inference()
    crosscoder.threshold.zero_()
    return crosscoder


def make_batchtopk(**overrides: Any) -> BatchTopKTrainingCrosscoder:
    defaults: dict[str, Any] = {"d_a": 5, "d_b": 7, "d_sae": 24, "k": 6}
    config = BatchTopKTrainingCrosscoderConfig(**{**defaults, **overrides})
    return randomized(BatchTopKTrainingCrosscoder(config))


def make_standard(**overrides: Any) -> StandardTrainingCrosscoder:
    defaults: dict[str, Any] = {"d_a": 5, "d_b": 7, "d_sae": 24, "aux_loss_coefficient": 0.1}
    return randomized(
        StandardTrainingCrosscoder(StandardTrainingCrosscoderConfig(**{**defaults, **overrides}))
    )


def make_dsf(**overrides: Any) -> DSFTrainingCrosscoder:
    """Six of 24 latents tied, by equality."""
    defaults: dict[str, Any] = {"d_a": 6, "d_b": 6, "d_sae": 24, "k": 6, "tied_fraction": 0.25}
    return randomized(
        DSFTrainingCrosscoder(DSFTrainingCrosscoderConfig(**{**defaults, **overrides}))
    )


def make_mapped_dsf(**overrides: Any) -> DSFTrainingCrosscoder:
    """Six of 24 latents tied, by a map between two widths."""
    return make_dsf(**{"d_a": 5, "d_b": 7, "tie": "linear_map", **overrides})


def make_delta(**overrides: Any) -> DeltaTrainingCrosscoder:
    """Eighteen latents of the difference, six shared."""
    defaults: dict[str, Any] = {"d_a": 6, "d_b": 6, "d_sae": 24, "k": 6, "shared_fraction": 0.25}
    return randomized(
        DeltaTrainingCrosscoder(DeltaTrainingCrosscoderConfig(**{**defaults, **overrides}))
    )


TOPK_MAKERS: dict[str, Callable[..., TopKTrainingCrosscoder[Any]]] = {
    "batchtopk": make_batchtopk,
    "dsf": make_dsf,
    "dsf by a map": make_mapped_dsf,
    "delta": make_delta,
    "dfc": make_dfc,
    "dfc by partition": partial(make_dfc, selection="partition", decoder_norm="sum"),
}


@torch.no_grad()
def randomized(crosscoder: T) -> T:
    """Every weight random, the forbidden ones too: a crosscoder must not depend on their being
    zero."""
    for parameter in crosscoder.parameters():
        parameter.copy_(torch.randn_like(parameter) / 3)
    return crosscoder


def make_acts(n: int, d_in: int) -> Tensor:
    """Raw activations with a mean and unequal sizes, as real ones have."""
    return torch.randn(n, d_in) * torch.linspace(1, 20, d_in) + torch.linspace(-30, 60, d_in)


def step_input(acts: Tensor, dead: Tensor | None = None, step: int = 0) -> TrainStepInput:
    return TrainStepInput(
        sae_in=acts,
        coefficients={"l1": 0.5},
        dead_neuron_mask=dead,
        n_training_steps=step,
        is_logging_step=True,
    )


def sae_trainer_config(batch: int, steps: int = 100, **overrides: Any) -> SAETrainerConfig:
    """Settings of SAELens' trainer, with dead latents from the sixth step on."""
    defaults: dict[str, Any] = {
        "total_training_samples": batch * steps,
        "train_batch_size_samples": batch,
        "lr": 3e-3,
        "lr_end": 3e-4,
        "lr_warm_up_steps": 3,
        "dead_feature_window": 5,
        "feature_sampling_window": 15,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SAETrainerConfig(**{**defaults, **overrides})


def train_steps(crosscoder: T, acts: Tensor, n: int = 3, **optimizer: Any) -> T:
    """Some optimizer steps, with some latents dead so that the auxiliary loss takes part."""
    adam = torch.optim.AdamW(crosscoder.parameters(), lr=1e-2, **optimizer)
    dead = torch.arange(crosscoder.cfg.d_sae) % 3 == 0
    for _ in range(n):
        crosscoder.training_forward_pass(step_input(acts, dead)).loss.backward()
        adam.step()
        adam.zero_grad()
    return crosscoder


def forget_formats() -> None:
    """Have the devices' number formats measured, and told of, once more."""
    number_formats.slowdown.cache_clear()
    number_formats.chosen_dtype.cache_clear()
    number_formats.warned.clear()


def processor(monkeypatch: pytest.MonkeyPatch, bfloat16: float) -> None:
    """From here on, one that takes so many times as long in bfloat16 as in float32."""
    forget_formats()
    seconds = {torch.float32: 0.001, torch.float16: 0.001, torch.bfloat16: 0.001 * bfloat16}
    monkeypatch.setattr(number_formats, "_seconds", lambda x, _: seconds[x.dtype])


def write_pages(path: Path, n: int | None = None) -> None:
    """Write Python's reference as a data set, a row for each page: all, or the first `n`."""
    path.write_text("\n".join(json.dumps({"text": page}) for page in reference_pages()[:n]))


def train_tiny(folder: Path, model_a: Path, model_b: Path, *flags: str, n_texts: int = 12) -> Path:
    """A small DFC on Python's reference, trained by the command line, every fourth document held
    out; its folder."""
    text = folder / "text.jsonl"
    write_pages(text, n_texts)
    args = [
        *("--model-a.model-name", str(model_a), "--model-b.model-name", str(model_b)),
        *("--dataset-path", str(text), "--eval-every-n-documents", "4", "--context-size", "48"),
        *("--training-tokens", "6400", "--train-batch-size-tokens", "64", "--lr", "3e-3"),
        *("--n-batches-in-buffer", "8", "--sae.d-sae", "64", "--sae.k", "6"),
        *("--sae.a-exclusive-fraction", "0.2", "--sae.b-exclusive-fraction", "0.2"),
    ]
    assert main(["train", *args, *flags, "--output-path", str(folder / "run")]) == 0
    return folder / "run"
