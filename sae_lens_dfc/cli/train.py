"""`sae-lens-dfc train`: trains a crosscoder, with other processes under torchrun."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from simple_parsing import subgroups

# Importing it registers the architectures.
from sae_lens_dfc.api import CrosscoderRunnerConfig, CrosscoderTrainingRunner
from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.terminal import print_result
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.paired_text import of_this_rank
from sae_lens_dfc.training.preflight.first_look import first_lines

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[str, Any] = {
    name: config
    for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
    if issubclass(config, CrosscoderTrainingConfig)
}


@dataclass(kw_only=True)
class TrainOptions(CrosscoderRunnerConfig):
    """Train a crosscoder on two models and save it."""

    sae: CrosscoderTrainingConfig = subgroups(ARCHITECTURES, default="dfc", alias="--architecture")
    """The crosscoder."""
    output_path: str | None = "runs/crosscoder"
    """Output folder for the trained crosscoder."""
    n_checkpoints: int = 10
    """Number of evenly spaced checkpoints; the last two are kept."""

    def __post_init__(self) -> None:
        if self.checkpoint_path is None and self.output_path is not None:
            self.checkpoint_path = f"{self.output_path.rstrip('/')}-checkpoints"
        super().__post_init__()


OPTIONS = TrainOptions


def run(options: TrainOptions) -> None:
    """Train and save, in parallel with other processes if started by torchrun."""
    output = options.output_path
    with distributed.process_group(options.device) as device:
        runner = CrosscoderTrainingRunner(of_this_rank(replace(options, device=device)))
        if not runner.is_finished:
            _log_first_look(runner)
            runner.run_all()
        if distributed.rank() == 0:
            names = list(runner.cfg.saes)
            folders = [output] if len(names) == 1 else [f"{output}/{name}" for name in names]
            note = " (it was finished already)" if runner.is_finished else ""
            print_result("\n".join(f"Crosscoder: {folder}{note}" for folder in folders))


def _log_first_look(runner: CrosscoderTrainingRunner) -> None:
    """Log a first look at the data if training starts at the beginning of a text."""
    text = runner.stream.text
    if text is None or runner.cfg.resume or distributed.rank() > 0:
        return
    for line in first_lines(runner.pair, text.sources, runner.cfg):
        logger.info("%s", line)
