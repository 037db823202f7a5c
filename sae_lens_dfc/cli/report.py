"""`sae-lens-dfc report`: writes a run's HTML page; its flags are in `analysis/options.py`."""

from sae_lens_dfc.analysis.options import ReportOptions

OPTIONS = ReportOptions


def run(options: ReportOptions) -> None:
    """Write a run's page."""
    # Help does without it.
    from sae_lens_dfc.analysis.evaluation.evaluate_run import write_report

    write_report(options)
