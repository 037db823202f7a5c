"""`sae-lens-dfc model-organism`: builds a pair of models with a planted difference."""

from sae_lens_dfc.organisms.options import OrganismOptions

OPTIONS = OrganismOptions


def run(options: OrganismOptions) -> None:
    """Build the organism and print its behavior measures."""
    # Imported here, because `--help` does not need it.
    from sae_lens_dfc.organisms.folder import write_organism

    write_organism(options)
