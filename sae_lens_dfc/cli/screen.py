"""`sae-lens-dfc screen`: tests a run's latents causally; its flags are in `analysis/options.py`."""

from sae_lens_dfc.analysis.options import ScreenOptions

OPTIONS = ScreenOptions


def run(options: ScreenOptions) -> None:
    """Screen a run, write the report and print the verdicts."""
    # Help does without it.
    from sae_lens_dfc.analysis.screening.screen import screen_run

    screen_run(options)
