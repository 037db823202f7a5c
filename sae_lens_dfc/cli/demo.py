"""`sae-lens-dfc demo`: trains and evaluates a crosscoder on two small models."""

from pathlib import Path

from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.core.terminal import print_result

OPTIONS = DemoConfig


def run(options: DemoConfig) -> None:
    """Train and evaluate on two models, and print the measures and the report's path."""
    # Imported here, because `--help` does not need them.
    from sae_lens_dfc.analysis.evaluation.demo import run_demo
    from sae_lens_dfc.analysis.report.results import REPORT_FILENAME
    from sae_lens_dfc.analysis.report.tables import measures_table
    from sae_lens_dfc.core.terminal import text_table

    metrics = run_demo(options)
    print_result(text_table(*measures_table(metrics)))
    print_result(f"\nReport: {Path(options.output) / REPORT_FILENAME}")
