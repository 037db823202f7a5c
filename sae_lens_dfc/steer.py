"""What a model answers when it is steered with a run's latents: what `sae-lens-dfc steer` does."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from simple_parsing import field
from torch import Tensor

from sae_lens_dfc.contexts import Part
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.generate import Sampling, answer
from sae_lens_dfc.held_out import HeldOutOptions, held_out_text, opened_run
from sae_lens_dfc.latent_acts import Model, explained_by
from sae_lens_dfc.latent_steering import (
    CODE_READ,
    MAXIMUM_READ,
    OPERATIONS,
    LatentOperation,
    check_operations,
    latent_change,
    untold,
)
from sae_lens_dfc.measured_run import LATENTS_FILENAME
from sae_lens_dfc.metrics.stitching import Stitching
from sae_lens_dfc.models import HookedModel
from sae_lens_dfc.natural import fitted_map, largest_activations, stored_maxima
from sae_lens_dfc.output import say
from sae_lens_dfc.positions import Positions, positions_of
from sae_lens_dfc.prompts import prompt_ids, span_mask
from sae_lens_dfc.steering import changed
from sae_lens_dfc.texts import clean
from sae_lens_dfc.training.data import PairedText

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SteerOptions(HeldOutOptions):
    """Print a model's answer to a prompt, untouched and steered with latents of a trained crosscoder."""

    run: str = field(positional=True, metavar="RUN")
    """Folder that `train` or `demo` wrote."""
    model: str = field(choices=["a", "b"])
    """The model that is steered and answers."""
    latent: list[int]
    """Numbers of one or more latents, separated by spaces."""
    prompt: str
    """What the model is asked; a user's message where its tokenizer has a chat template."""
    operation: str = field(default="add", choices=list(OPERATIONS))
    """add: the strength times the latent's largest activation is added to it. scale: its activation is multiplied by the
    strength. clamp: it is set to the strength times the largest. ablate: it is set to 0."""
    strength: list[float] = field(default_factory=list)
    """How much, in units of the latent's largest activation on natural text (for scale, a plain factor): one number, or one
    for each latent; none for ablate."""
    positions: str = field(default="all", choices=["all", "prompt", "generated"])
    """Tokens at which the model is steered. All but add leave out the first, of which the crosscoder knows nothing."""
    span: str | None = None
    """Steer only at the prompt's tokens that hold this piece of it."""
    map: bool = field(default=False, action="store_true")
    """Steer with the other model's direction, moved by a map that is fitted to held-out pairs; for add."""
    evaluation: str | None = None
    """Folder that `evaluate RUN --output` wrote, for the latents' largest activations; none takes the run's latents.csv or, where
    there is none, reads held-out text."""
    raw_prompt: bool = field(default=False, action="store_true")
    """Leave the chat template out."""
    max_new_tokens: int = 64
    """Tokens after which an answer is cut."""
    temperature: float = 0.0
    """How freely tokens are drawn; 0 takes the likeliest."""
    seed: int = 42
    """Seed of the draws, the same for both answers."""


class SteeredAnswer(NamedTuple):
    """A model's two answers to a prompt, and how it was steered."""

    model: str
    name: str
    prompt: str
    latents: list[dict[str, Any]]
    """Of each: `latent`, `partition`, `operation`, `strength`, `max_activation` and, where its activation is guessed from one
    model, `activation_explained`, the share of its variance that the guess explains."""
    positions: str
    """all, prompt, generated, or span."""
    span: str | None
    mapped: bool
    untouched: str
    steered: str


def steer_run(options: SteerOptions) -> None:
    """Print both answers."""
    found = steer(options)
    if options.json:
        say(json.dumps(found._asdict(), ensure_ascii=False))
        return
    moved = ", moved by a map" if found.mapped else ""
    where = f"at {found.span!r} in the prompt" if found.span else f"positions: {found.positions}"
    how = "; ".join(_described(latent) for latent in found.latents)
    say(f"Model {found.model} ({found.name}), untouched:\n{found.untouched or '(nothing)'}\n")
    say(f"Steered with {how}{moved}; {where}:\n{found.steered or '(nothing)'}")


def _described(latent: dict[str, Any]) -> str:
    strength = "" if latent["strength"] is None else f" {latent['strength']:g}"
    if latent["operation"] in ("add", "clamp"):
        strength += f" x {latent['max_activation']:.3g}"
    return f"latent {latent['latent']} ({latent['partition']}) {latent['operation']}{strength}"


def steer(options: SteerOptions) -> SteeredAnswer:
    """A model's answer to a prompt, and its answer with latents of a run steered.

    Raises:
        ValueError: The run cannot be opened, the prompt leaves no room for an answer, its span is not there, or the latents
            cannot be steered with in this way; see `latent_steering.latent_change`.
    """
    operations = _operations(options)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    # Whole models: they are to predict tokens.
    crosscoder, _, pair = opened_run(options.run, options, drop_unused_layers=False)
    name = _model(options)
    model = pair.a if name == "a" else pair.b
    check_operations(crosscoder, name, operations, options.map)
    ids, positions = _prompt(model, options)
    text = held_out_text(options.run, options, pair)
    known = _known(crosscoder, *text, options, untold(crosscoder, name, operations))
    change = latent_change(
        crosscoder,
        name,
        operations,
        known.maxima,
        other=known.stitching,
        mapped_by=known.stitching if options.map else None,
    )

    def said() -> str:
        return answer(model, [ids], sampling, options.seed)[0]

    untouched = said()
    with changed(model, change, positions):
        steered = said()
    return SteeredAnswer(
        model=name,
        name=model.name,
        prompt=options.prompt,
        latents=[_entry(crosscoder, o, known) for o in operations],
        positions=options.positions if options.span is None else "span",
        span=options.span,
        mapped=options.map,
        untouched=untouched,
        steered=steered,
    )


def _entry(crosscoder: Crosscoder, operation: LatentOperation, known: "_Known") -> dict[str, Any]:
    latent = operation.latent
    entry: dict[str, Any] = {
        "latent": latent,
        "partition": crosscoder.partition.name_of(latent),
        "operation": operation.operation,
        "strength": operation.strength,
        "max_activation": None if known.maxima is None else known.maxima[latent].item(),
    }
    if latent in known.explained:
        share = known.explained[latent]
        # Of a latent that did not fire there it is not known.
        entry["activation_explained"] = share if math.isfinite(share) else None
    return entry


def _operations(options: SteerOptions) -> list[LatentOperation]:
    strengths: list[float | None] = [*options.strength] or [None]
    if len(strengths) == 1:
        strengths *= len(options.latent)
    if len(strengths) != len(options.latent):
        raise ValueError(
            f"--strength takes one number or one for each of {len(options.latent)} latents, got {len(strengths)}."
        )
    if options.span is not None and options.positions == "generated":
        raise ValueError(
            "--span is of the prompt, --positions generated of what comes after. Give one of them."
        )
    return [
        LatentOperation(latent, options.operation, strength)
        for latent, strength in zip(options.latent, strengths, strict=True)
    ]


def _prompt(model: HookedModel, options: SteerOptions) -> tuple[list[int], Positions]:
    """The prompt's tokens, and where the model is steered."""
    text = clean(options.prompt)
    ids = prompt_ids(model, text, options.raw_prompt)
    if not ids or len(ids) + options.max_new_tokens > model.n_ctx:
        raise ValueError(
            f"The prompt's {len(ids)} tokens and max_new_tokens={options.max_new_tokens} do not fit model {model.name!r}, which "
            f"reads 1 to {model.n_ctx}. Give another prompt, or lower max_new_tokens."
        )
    first = options.operation not in CODE_READ
    if options.span is None:
        return ids, positions_of(options.positions, [ids], first)  # type: ignore[arg-type]
    mask = torch.tensor([span_mask(model, text, options.span, options.raw_prompt)])
    mask[:, 0] &= first
    if not mask.any():
        raise ValueError(
            f"{options.operation} leaves out the first token, and {options.span!r} is there alone. Give another span."
        )
    return ids, Positions(mask, generated=False)


class _Known(NamedTuple):
    """What natural text says, as far as it is needed."""

    maxima: Float[Tensor, " d_sae"] | None = None
    stitching: Stitching | None = None
    explained: Mapping[int, float] = {}
    """Of the latents whose activation is guessed from one model, the share of its variance that the guess explains."""


def _known(
    crosscoder: Crosscoder,
    text: PairedText,
    part: Part,
    options: SteerOptions,
    guessed: Sequence[int],
) -> _Known:
    maxima = _stored_maxima(crosscoder, options)
    needs_map = options.map or len(guessed) > 0
    if not needs_map and (maxima is not None or options.operation not in MAXIMUM_READ):
        return _Known(maxima)
    rows = text.collect(part, "Held-out activations").rows
    if sum(len(r.acts) for r in rows) == 0:
        raise ValueError("No pair of the run's text is held out. Give other text (--dataset).")
    maxima = largest_activations(crosscoder, rows) if maxima is None else maxima
    if not needs_map:
        return _Known(maxima)
    stitching, others = fitted_map(rows, crosscoder.cfg.d_a)
    name = _model(options)
    shares = explained_by(crosscoder, name, guessed, stitching, others).tolist()
    for latent, share in zip(guessed, shares, strict=True):
        known = f"{share:.1%}" if math.isfinite(share) else "an unknown part"
        logger.info(
            f"Latent {latent} is shared: its activation is guessed from model {name} through the map, which explains "
            f"{known} of its variance on other pairs"
        )
    return _Known(maxima, stitching, dict(zip(guessed, shares, strict=True)))


def _stored_maxima(crosscoder: Crosscoder, options: SteerOptions) -> Tensor | None:
    if options.evaluation is None:
        # Other text has other maxima.
        return stored_maxima(options.run, crosscoder) if options.dataset is None else None
    maxima = stored_maxima(options.evaluation, crosscoder)
    if maxima is None:
        raise ValueError(
            f"--evaluation {options.evaluation} has no {LATENTS_FILENAME}. Name a folder that `evaluate RUN --output` wrote."
        )
    return maxima


def _model(options: SteerOptions) -> Model:
    return "a" if options.model == "a" else "b"
