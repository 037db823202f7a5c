"""`sae-lens-dfc check`: inspects models, text and settings before training."""

import json
from dataclasses import dataclass

from simple_parsing import field

from sae_lens_dfc.cli.train import TrainOptions
from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.core.terminal import print_result, sentence
from sae_lens_dfc.training.preflight.check import examine
from sae_lens_dfc.training.preflight.findings_text import screen_text, train_command


@dataclass(kw_only=True)
class CheckOptions(TrainOptions):
    """Check two models and a text before training: what they are, whether they are compatible, and
    the time, memory and disk space that training needs."""

    json: bool = switch()
    """Print the results as JSON."""
    given: list[str] = field(default_factory=list, cmd=False)
    """The training flags as given."""


OPTIONS = CheckOptions


def run(options: CheckOptions) -> None:
    """Print what training would find and need, and the command that starts it."""
    flags = [flag for flag in options.given if flag != "--json"]
    found = examine(options)
    if options.json:
        print_result(json.dumps({**found.to_dict(), "next": train_command(flags)}, indent=2))
    else:
        print_result(screen_text(found, flags))
    if found.problems:
        raise ValueError(f"Training would fail: {sentence(found.problems[0])}")
