"""`sae-lens-dfc export`: one model's part of a trained crosscoder as a SAELens SAE on disk, measured on held-out text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from simple_parsing import field

from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.held_out import HeldOutOptions, held_out_text, opened_run, own_config
from sae_lens_dfc.measures import text_table
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.spread import SE
from sae_lens_dfc.metrics.stitching import Stitching, fit_stitching
from sae_lens_dfc.output import all_or_nothing, claimed, is_made, say
from sae_lens_dfc.pair_data import MAX_FIT_PAIRS, regrouped
from sae_lens_dfc.stopping import interruptible
from sae_lens_dfc.training.data import PairedText

OF_BOTH = {
    "explained_variance": "explained variance of the model",
    "l0": "active latents, of those exported (L0)",
}
OF_CODE = {
    "code_explained_variance": "the crosscoder's code explained",
    "firing_precision": "firings that are the crosscoder's too",
    "firing_recall": "the crosscoder's firings that are found",
    "firing_recall_median": "the same, the median latent",
}


@dataclass(kw_only=True)
class ExportOptions(HeldOutOptions):
    """Write one model's part of a trained crosscoder as a SAELens SAE, with what it loses of the two-model code."""

    run: str = field(positional=True, metavar="RUN")
    """Folder that `train` or `demo` wrote."""
    model: Literal["a", "b"]
    """The model whose activations the SAE reads."""
    output: str
    """Folder for the SAE, which `SAE.load_from_disk` opens."""
    fit_pairs: int = MAX_FIT_PAIRS
    """At most so many of the training's pairs fit the map that stands in for the other model in shared latents; 0 takes its
    mean instead."""
    overwrite: bool = False
    """Replace the SAE that the output folder holds."""


def export_run(options: ExportOptions) -> None:
    """Export one model's SAE from a run and print how far it is the crosscoder.

    Raises:
        ValueError: The output holds something that should stay, or the run, its models and the text do not fit.
    """
    if options.fit_pairs < 0:
        raise ValueError(f"fit_pairs must be at least 0, got {options.fit_pairs}.")
    if is_made(options.output, (RUNNER_CFG_FILENAME,)):
        raise ValueError(
            f"--output {options.output} holds a run, which stays. Name another folder."
        )
    with claimed(options.output, options.overwrite, "SAE", (SAE_CFG_FILENAME,)):
        _export(options)


def _export(options: ExportOptions) -> None:
    crosscoder, _, pair = opened_run(options.run, options)
    stitching = None
    if options.fit_pairs > 0:
        own = own_config(options.run, options, options.fit_pairs)
        stitching = _stitching(PairedText(own, pair), pair.d_a)
    text, part = held_out_text(options.run, options, pair)
    held_out = text.collect(part, "Held-out activations")
    if held_out.counts.pairs == 0:
        raise ValueError(
            f"No pair is held out, of {held_out.counts.texts} documents. Give other text with --dataset."
        )
    rows = (r.acts for r in regrouped(held_out.rows))
    sae = crosscoder.export_sae(options.model, stitching, rows)
    with all_or_nothing(options.output) as folder:
        sae.save_model(folder)
    difference: dict[str, float] = sae.cfg.metadata.get("difference_to_crosscoder")
    if options.json:
        say(json.dumps({"output": options.output, **difference}))
        return
    say("\n\n".join(text_table(*table) for table in difference_tables(difference)))
    say(f"\nSAE of {pair.a.name if options.model == 'a' else pair.b.name}: {options.output}")


@torch.no_grad()
def _stitching(text: PairedText, d_a: int) -> Stitching:
    """The maps between the models, fitted to the run's training text."""
    with interruptible(text.rows("training", PairCounts())) as rows:
        return fit_stitching(PairMoments.of(r.acts for r in rows), d_a)


def difference_tables(
    difference: Mapping[str, float],
) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of two tables: the SAE beside the crosscoder, and its code by partition.

    >>> head, rows = difference_tables({"l0/exported": 8.5, "l0/crosscoder": 10.0})[0]
    >>> head, rows
    (['on held-out text', 'SAE', 'crosscoder'], [['active latents, of those exported (L0)', '8.500', '10.000']])
    """

    def rows(titles: Mapping[str, str], columns: list[str]) -> list[list[str]]:
        return [
            [title, *(_cell(difference, f"{key}/{column}") for column in columns)]
            for key, title in titles.items()
            if any(f"{key}/{column}" in difference for column in columns)
        ]

    both = ["exported", "crosscoder"]
    prefix = "firing_recall/"
    partitions = [
        key.removeprefix(prefix)
        for key in difference
        if key.startswith(prefix) and not key.endswith(SE)
    ]
    return [
        (["on held-out text", "SAE", "crosscoder"], rows(OF_BOTH, both)),
        (["the SAE's code", *partitions], rows(OF_CODE, partitions)),
    ]


def _cell(values: Mapping[str, float], key: str) -> str:
    """The number, with its standard error where that is known."""
    if key not in values:
        return ""
    error = values.get(key + SE)
    return f"{values[key]:.3f}" + ("" if error is None else f" ± {error:.3f}")
