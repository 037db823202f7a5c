"""Runs `sae-lens-dfc export`: saves one model's half of a trained crosscoder as a SAELens SAE, and
measures it on held-out text."""

import json

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_lens_dfc.analysis.options import ExportOptions
from sae_lens_dfc.analysis.report.tables import difference_tables
from sae_lens_dfc.analysis.saved_run.held_out import held_out_text, opened_run, own_config
from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.interrupts import interruptible
from sae_lens_dfc.core.output_folder import is_made, locked_output
from sae_lens_dfc.core.schema import require
from sae_lens_dfc.core.terminal import print_result, text_table
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import regrouped
from sae_lens_dfc.stats.affine_maps import AffineMaps, fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments


def export_run(options: ExportOptions) -> None:
    """Export one model's SAE from a run, and print how closely it matches the crosscoder.

    Raises:
        ValueError: The output folder cannot be overwritten, or the run, its models and the text do
            not match.
    """
    require(options, ("fit_pairs",), "at least 0")
    if is_made(options.output, (RUNNER_CFG_FILENAME,)):
        raise ValueError(
            f"--output {options.output} holds a run, which is never overwritten. Name another folder."
        )
    with locked_output(options.output, options.overwrite, "SAE", (SAE_CFG_FILENAME,)):
        crosscoder, _, pair = opened_run(options.run, options)
        affine_maps = None
        if options.fit_pairs > 0:
            own = own_config(options.run, options, options.fit_pairs)
            affine_maps = _affine_maps(PairedText(own, pair), pair.d_a)
        text, part = held_out_text(options.run, options, pair)
        held_out = text.collect(part, "Held-out activations")
        if held_out.counts.pairs == 0:
            raise ValueError(
                f"No pair is held out among {held_out.counts.texts} documents. Give other text with --dataset."
            )
        rows = (r.acts for r in regrouped(held_out.rows))
        sae = crosscoder.export_sae(options.model, affine_maps, rows)
        with atomic_folder(options.output) as folder:
            sae.save_model(folder)
        difference: dict[str, float] = sae.cfg.metadata.get("difference_to_crosscoder")
        if options.json:
            print_result(json.dumps({"output": options.output, **difference}))
            return
        print_result("\n\n".join(text_table(*table) for table in difference_tables(difference)))
        print_result(f"\nSAE of {pair.models[options.model].name}: {options.output}")


@torch.no_grad()
def _affine_maps(text: PairedText, d_a: int) -> AffineMaps:
    """Affine maps between the models, fitted to the run's training text."""
    with interruptible(text.rows("training", PairCounts())) as rows:
        return fit_affine_maps(PairMoments.of(r.acts for r in rows), d_a)
