"""Runs `sae-lens-dfc check`: a report on models, shared basis, text, required resources and problems
before a training."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from sae_lens_dfc.core.machine import load_per_core
from sae_lens_dfc.core.output_folder import check_output, is_made
from sae_lens_dfc.core.terminal import MOST_OF_OURS, said_by
from sae_lens_dfc.crosscoders.architectures.delta import DeltaTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.dsf import DSFTrainingCrosscoderConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText, as_asked, with_models_settled
from sae_lens_dfc.data.sources import Source
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model, load_model_a
from sae_lens_dfc.models.model_facts import Basis, ModelFacts, basis
from sae_lens_dfc.training.checks import check_checkpoints
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.preflight.estimate import duration, size
from sae_lens_dfc.training.preflight.first_look import (
    FirstLook,
    look,
    notes_on_text,
    together,
    top_reasons,
)
from sae_lens_dfc.training.preflight.needs import PROCESSOR, Needs, measured_needs
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

logger = logging.getLogger(__name__)

SECONDS_TO_READ = 4.0
LOW_COVERAGE = 0.5
MANY_PASSES = 1.5
BUSY = 1.25
"""Number of processes per core above which they wait for each other."""

T = TypeVar("T")


@dataclass
class Findings:
    """The findings of a check."""

    cfg: CrosscoderRunnerConfig
    models: dict[str, ModelFacts | None] = field(default_factory=dict)
    """Facts about A and B; none for a model that could not be opened."""
    basis: Basis | None = None
    """Whether the models share a basis; none if a model could not be opened."""
    one_tokenizer: bool | None = None
    sources: list[Source] = field(default_factory=list)
    """The data sets that could be opened."""
    looks: list[FirstLook] = field(default_factory=list)
    """First looks at the data sets that could be read."""
    needs: Needs | None = None
    seconds_to_open: float = 0.0
    problems: list[str] = field(default_factory=list)
    """Errors that would stop the training."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before training begins."""

    def attempt(self, do: Callable[[], T], of: str = "") -> T | None:
        """Return what `do` returns; if it raises, return none and add the reason to the
        problems."""
        try:
            return do()
        except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            said = said_by(error, MOST_OF_OURS)
            message = f"{of}Out of memory: {said}" if is_memory else f"{of}{said}"
            if message not in self.problems:
                self.problems.append(message)
            return None

    def to_dict(self) -> dict[str, Any]:
        """All findings as plain values, for JSON."""
        coverage = together(self.looks)
        return {
            "models": {name: one and one.to_dict() for name, one in self.models.items()},
            "basis": self.basis and self.basis._asdict(),
            "one_tokenizer": self.one_tokenizer,
            "coverage": coverage.to_dict(),
            "reasons": [
                {"reason": reason, "a": a, "b": b} for reason, a, b in top_reasons(coverage)
            ],
            "sources": [one.to_dict(self.cfg.eval_every_n_documents) for one in self.looks],
            "needs": self.needs and self.needs.to_dict(),
            "seconds_to_open": self.seconds_to_open,
            "problems": self.problems,
            "notes": self.notes,
        }


def examine(cfg: CrosscoderRunnerConfig) -> Findings:
    """Open the models and the text of a training, measure a few of its batches, and return the
    findings.

    Anything that cannot be opened, or that training would refuse, is reported as a problem, and the
    rest is still checked.

    Args:
        cfg: The training.

    Raises:
        ValueError: The training reads a cache, so it runs no model and reads no text.
    """
    if cfg.cache_path is not None:
        raise ValueError(
            f"cache_path={cfg.cache_path!r} is given, and a check looks at models and text, which a training on a cache does "
            "not open. Leave it out: a step takes as long without it."
        )
    found = Findings(cfg)
    if load_per_core() > BUSY:
        found.notes.append(
            f"Other programs keep this machine busy ({load_per_core():.1f} processes for each core): the figures above hold only while they do."
        )
    begin = time.perf_counter()
    found.cfg = found.attempt(partial(with_models_settled, cfg), "Model B: ") or cfg
    pair = _open_models(found)
    text = _open_text(found, pair)
    found.seconds_to_open = time.perf_counter() - begin
    _check_folders(found)
    if pair is not None and text is not None:
        _read(found, pair)
        _measure(found, pair)
    found.notes += _notes(found)
    return found


def _open_models(found: Findings) -> ModelPair | None:
    cfg = found.cfg
    is_one = cfg.model_a == cfg.model_b
    models: dict[str, HookedModel | None] = {}
    for name, one in (("a", cfg.model_a), ("b", cfg.model_b)):
        logger.info("Opening model %s", name.upper())
        again = models.get("a") if is_one else None
        opened = (
            partial(load_model_a, one, cfg.model_b) if name == "a" else partial(load_model, one)
        )
        model = again or found.attempt(opened, f"Model {name.upper()}: ")
        models[name] = model
        found.models[name] = None if model is None else ModelFacts.of(model)
    a, b = models["a"], models["b"]
    if a is None or b is None:
        return None
    found.basis = basis(a, b)
    found.one_tokenizer = len({m.tokenizer_sha256 for m in found.models.values() if m}) == 1
    return as_asked(ModelPair(a, b), cfg)


def _open_text(found: Findings, pair: ModelPair | None) -> PairedText | None:
    """Open the text as training does; if that fails, open the data sets that can be opened."""
    cfg = found.cfg.without_output()
    logger.info("Opening the text")
    if pair is not None:
        runner = found.attempt(partial(CrosscoderTrainingRunner, cfg, pair))
        text = runner.stream.text if runner else found.attempt(partial(PairedText, cfg, pair))
        if text is not None:
            found.sources = text.sources
            return text
    opened = [found.attempt(partial(Source.open, one)) for one in cfg.all_sources]
    found.sources = [source for source in opened if source is not None]
    return None


def _check_folders(found: Findings) -> None:
    cfg = found.cfg
    path = cfg.output_path
    if path is not None and not (cfg.resume and is_made(path)):
        found.attempt(partial(check_output, path, cfg.overwrite))
    found.attempt(partial(check_checkpoints, cfg))


def _read(found: Findings, pair: ModelPair) -> None:
    logger.info("Reading the first documents")
    seconds = SECONDS_TO_READ / len(found.sources)
    for source in found.sources:
        one = found.attempt(partial(look, pair, source, found.cfg, seconds, keep_contexts=True))
        if one is not None:
            found.looks.append(one)
            if one.counts.coverage.pairs == 0:
                found.problems.append(
                    f"The first {one.counts.texts} documents of {one.dataset_path!r} have no paired position: at no character "
                    "do both tokenizers end a token. Check the text and the tokenizers with `sae-lens-dfc align`."
                )


def _measure(found: Findings, pair: ModelPair) -> None:
    contexts = [context for one in found.looks for context in one.contexts]
    if not contexts or len(found.looks) < len(found.sources):
        return
    logger.info("Running the models, and training, on a few batches")
    found.needs = found.attempt(partial(measured_needs, pair, found.cfg, found.looks, contexts))
    for one in found.looks:
        one.contexts.clear()
    if found.needs is not None:
        found.problems += _not_enough(found.needs, found.cfg)


def _not_enough(needs: Needs, cfg: CrosscoderRunnerConfig) -> Iterator[str]:
    """Problems of insufficient memory or disk space."""
    for device, room in needs.memory.items():
        if not room.is_enough:
            where = "the machine" if device == PROCESSOR else device
            yield (
                f"Training takes {size(room.takes.total)} of memory, and {where} has {size(room.there)}. Take fewer latents "
                "(sae.d_sae), a smaller buffer (n_batches_in_buffer), models in bfloat16 or with drop_unused_layers, or cache first."
            )
    if needs.disk.total > needs.disk_there:
        yield (
            f"Training writes up to {size(needs.disk.total)}, and {cfg.output_path} has {size(needs.disk_there)} free. Make room, "
            "or lower n_checkpoints."
        )


def _notes(found: Findings) -> Iterator[str]:
    """Notes for the user that do not stop the training."""
    yield from _notes_on_models(found)
    coverage = together(found.looks)
    if 0 < min(coverage.a, coverage.b) < LOW_COVERAGE:
        yield "Less than half of one model's tokens pair: see docs/how-to/tokenizers.md."
    yield from (source.note for source in found.sources if source.note)
    yield from notes_on_text(found.looks, found.cfg)
    if found.needs is not None and found.needs.times is not None:
        yield from _notes_on_passes(found.cfg, found.needs)


def _notes_on_models(found: Findings) -> Iterator[str]:
    for name, one in found.models.items():
        yield from (f"Model {name.upper()}: {note}" for note in (one.notes if one else ()))
    saes = found.cfg.all_saes
    wants_basis = any(
        isinstance(sae, DeltaTrainingCrosscoderConfig)
        or (isinstance(sae, DSFTrainingCrosscoderConfig) and sae.tie == "identity")
        for sae in saes
    )
    shared = found.basis is not None and found.basis.is_shared
    if wants_basis and found.basis is not None and not shared:
        yield "This crosscoder assumes that both models share a basis, and they do not: use dfc or batchtopk_crosscoder."
    are_same = len({one.weights_sha256 for one in found.models.values() if one}) == 1
    if shared and not wants_basis and not are_same:
        yield "Models that share a basis, such as a model and its fine-tune: docs/how-to/fine-tune.md has the settings."
    on_cpu = all(one is None or one.device == "cpu" for one in found.models.values())
    if torch.cuda.is_available() and on_cpu:
        yield "There is a GPU and no model is on it: --model-a.device cuda --model-b.device cuda --device cuda."


def _notes_on_passes(cfg: CrosscoderRunnerConfig, needs: Needs) -> Iterator[str]:
    if needs.passes < MANY_PASSES or cfg.keep_in_memory or needs.times is None:
        return
    once = duration(needs.times.harvest / needs.passes)
    # A cache stores activations in half the bytes.
    memory, cache = size(2 * needs.disk.cache), size(needs.disk.cache)
    yield (
        f"The models read the text {needs.passes:.1f} times, {once} each time. Once is enough with --keep-in-memory "
        f"({memory} of memory) or a cache (sae-lens-dfc cache, {cache} on disk)."
    )
