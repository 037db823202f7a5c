"""`sae-lens-dfc evaluate`: computes a run's metrics; its flags are in `analysis/options.py`."""

from sae_lens_dfc.analysis.options import EvaluateOptions

OPTIONS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Print trained crosscoders' measures on held-out text."""
    # Help does without it.
    from sae_lens_dfc.analysis.evaluation.evaluate_run import evaluate_run

    evaluate_run(options)
