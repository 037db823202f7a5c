"""`sae-lens-dfc generate`: writes both models' answers to prompts."""

from sae_lens_dfc.analysis.steering.options import GenerateOptions
from sae_lens_dfc.core.terminal import print_result

OPTIONS = GenerateOptions


def run(options: GenerateOptions) -> None:
    """Write both models' answers to the prompts, and print the output path."""
    # Imported here, because `--help` does not need it.
    from sae_lens_dfc.analysis.steering.generate import generate

    n_rows = generate(options)
    print_result(f"Answers to {n_rows} prompts: {options.output}")
