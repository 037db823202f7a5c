"""`sae-lens-dfc latents`: lists a run's latents; its flags are in `analysis/options.py`."""

from sae_lens_dfc.analysis.options import LatentsOptions

OPTIONS = LatentsOptions


def run(options: LatentsOptions) -> None:
    """Print a run's latents."""
    # Help does without it.
    from sae_lens_dfc.analysis.saved_run.latent_list import list_latents

    list_latents(options)
