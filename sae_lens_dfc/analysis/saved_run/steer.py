"""Runs `sae-lens-dfc steer`: a model's answer with and without steering by a run's latents."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.analysis.options import SteerOptions
from sae_lens_dfc.analysis.report.results import LATENTS_FILENAME, stored_maxima
from sae_lens_dfc.analysis.saved_run.held_out import held_out_text, is_own_text, opened_run
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.hooks import changed
from sae_lens_dfc.analysis.steering.latent_acts import explained_by, fitted_map, largest_activations
from sae_lens_dfc.analysis.steering.operations import (
    MAXIMUM_READ,
    READS_FEATURE_ACTS,
    LatentOperation,
    check_operations,
    latent_change,
    needing_other_model,
)
from sae_lens_dfc.analysis.steering.options import Sampling
from sae_lens_dfc.analysis.steering.positions import Positions, positions_of
from sae_lens_dfc.analysis.steering.prompts import prompt_ids, span_mask
from sae_lens_dfc.core.schema import check_seed
from sae_lens_dfc.core.terminal import print_result
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.data.contexts import Part
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.data.text.cleaning import clean
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.stats.affine_maps import AffineMaps

logger = logging.getLogger(__name__)


class SteeredAnswer(NamedTuple):
    """A model's answers to a prompt with and without steering, and the steering settings."""

    model: str
    name: str
    prompt: str
    latents: list[dict[str, Any]]
    """For each latent: `latent`, `partition`, `operation`, `strength`, `max_activation` and, if its
    activation is predicted from one model, `activation_explained`, the share of its variance that
    the prediction explains."""
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
        print_result(json.dumps(found._asdict(), ensure_ascii=False))
        return
    moved = ", moved by a map" if found.mapped else ""
    where = f"at {found.span!r} in the prompt" if found.span else f"positions: {found.positions}"
    how = "; ".join(_described(latent) for latent in found.latents)
    print_result(
        f"Model {found.model} ({found.name}), untouched:\n{found.untouched or '(nothing)'}\n"
    )
    print_result(f"Steered with {how}{moved}; {where}:\n{found.steered or '(nothing)'}")


def _described(latent: dict[str, Any]) -> str:
    strength = "" if latent["strength"] is None else f" {latent['strength']:g}"
    if latent["operation"] in ("add", "clamp"):
        strength += f" x {latent['max_activation']:.3g}"
    return f"latent {latent['latent']} ({latent['partition']}) {latent['operation']}{strength}"


def steer(options: SteerOptions) -> SteeredAnswer:
    """A model's answer to a prompt with and without steering by a run's latents.

    Raises:
        ValueError: The run cannot be opened, the prompt leaves no room for an answer, the span is
            not in the prompt, or the latents do not support the operation; see
            `operations.latent_change`.
    """
    operations = _operations(options)
    check_seed(options.seed)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    # All layers are needed for next-token predictions.
    crosscoder, _, pair = opened_run(options.run, options, drop_unused_layers=False)
    name = options.model
    model = pair.models[name]
    check_operations(crosscoder, name, operations, options.map)
    ids, positions = _prompt(model, options)
    text = held_out_text(options.run, options, pair)
    known = _known(crosscoder, *text, options, needing_other_model(crosscoder, name, operations))
    change = latent_change(
        crosscoder,
        name,
        operations,
        known.maxima,
        other=known.affine_maps,
        mapped_by=known.affine_maps if options.map else None,
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
        # Unknown for a latent that did not fire on the text.
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
            "--span selects prompt tokens, --positions generated the tokens after it. Give one of them."
        )
    return [
        LatentOperation(latent, options.operation, strength)
        for latent, strength in zip(options.latent, strengths, strict=True)
    ]


def _prompt(model: HookedModel, options: SteerOptions) -> tuple[list[int], Positions]:
    """The prompt's tokens, and the positions to steer."""
    text = clean(options.prompt)
    ids = prompt_ids(model, text, options.raw_prompt)
    if not ids or len(ids) + options.max_new_tokens > model.n_ctx:
        raise ValueError(
            f"The prompt's {len(ids)} tokens and max_new_tokens={options.max_new_tokens} do not fit model {model.name!r}, which "
            f"reads 1 to {model.n_ctx}. Give another prompt, or lower max_new_tokens."
        )
    first = options.operation not in READS_FEATURE_ACTS
    if options.span is None:
        return ids, positions_of(options.positions, [ids], first)  # type: ignore[arg-type]
    mask = torch.tensor([span_mask(model, text, options.span, options.raw_prompt)])
    mask[:, 0] &= first
    if not mask.any():
        raise ValueError(
            f"{options.operation} skips the first token, and {options.span!r} covers only that one. Give another span."
        )
    return ids, Positions(mask, generated=False)


class _Known(NamedTuple):
    """Statistics from natural text, as far as needed."""

    maxima: Float[Tensor, " d_sae"] | None = None
    affine_maps: AffineMaps | None = None
    explained: Mapping[int, float] = {}
    """For latents whose activation is predicted from one model: the share of its variance
    explained."""


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
    affine_maps, others = fitted_map(rows, crosscoder.cfg.d_a)
    name = options.model
    shares = explained_by(crosscoder, name, guessed, affine_maps, others).tolist()
    for latent, share in zip(guessed, shares, strict=True):
        known = f"{share:.1%}" if math.isfinite(share) else "an unknown part"
        logger.info(
            f"Latent {latent} is shared: its activation is predicted from model {name} through the affine map, which explains "
            f"{known} of its variance on other pairs"
        )
    return _Known(maxima, affine_maps, dict(zip(guessed, shares, strict=True)))


def _stored_maxima(crosscoder: Crosscoder, options: SteerOptions) -> Tensor | None:
    if options.evaluation is None:
        # Maxima stored for the run's text do not apply to other text.
        return stored_maxima(options.run, crosscoder) if is_own_text(options.run, options) else None
    maxima = stored_maxima(options.evaluation, crosscoder)
    if maxima is None:
        raise ValueError(
            f"--evaluation {options.evaluation} has no {LATENTS_FILENAME}. Give a folder written by `evaluate RUN --output`."
        )
    return maxima
