"""`python -m benchmarks NAME`, from a checkout: see `benchmarks.command`."""

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_dfc.cli.main import Program

SAE_LENS_DFC_IS_PUT_OFF = True
"""Lets help be answered before `sae_lens_dfc` imports torch and SAELens."""
COMMAND = "benchmarks"
SUMMARY = "Run benchmarks of recovery, training and data costs, and evaluation, or compare two sets of results."


def program() -> "Program":
    """The command line, whose one command is the package itself."""
    from sae_lens_dfc.cli.main import Program

    return Program({COMMAND: ("benchmarks.command", SUMMARY)}, "python -m", f"python -m {COMMAND}")


def main(args: Sequence[str] | None = None) -> int:
    """Run one benchmark, all, or compare results; returns the exit status."""
    from sae_lens_dfc.cli.main import main as run_command

    logging.getLogger("benchmarks").setLevel(logging.INFO)
    return run_command([COMMAND, *(sys.argv[1:] if args is None else args)], program())


if __name__ == "__main__":
    sys.exit(main())
