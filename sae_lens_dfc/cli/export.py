"""`sae-lens-dfc export`: writes one model's part as a SAELens SAE; its flags are in `analysis/options.py`."""

from sae_lens_dfc.analysis.options import ExportOptions

OPTIONS = ExportOptions


def run(options: ExportOptions) -> None:
    """Write one model's SAE and print how far it is the crosscoder."""
    # Help does without it.
    from sae_lens_dfc.analysis.saved_run.export import export_run

    export_run(options)
