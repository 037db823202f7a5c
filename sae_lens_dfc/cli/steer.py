"""`sae-lens-dfc steer`: steers a model with a run's latents; its flags are in `analysis/options.py`."""

from sae_lens_dfc.analysis.options import SteerOptions

OPTIONS = SteerOptions


def run(options: SteerOptions) -> None:
    """Print a model's answer, untouched and steered."""
    # Help does without it.
    from sae_lens_dfc.analysis.saved_run.steer import steer_run

    steer_run(options)
