"""Everything a training run needs, in one dataclass; the command line is made from it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class

from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.texts import first_line

POSITIVE = (
    "training_pairs",
    "eval_pairs",
    "store_batch_size_prompts",
    "outlier_factor",
    "train_batch_size_tokens",
    "n_batches_in_buffer",
    "n_batches_for_norm_estimate",
    "feature_sampling_window",
    "lr",
)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _no_wandb() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


@dataclass
class CrosscoderRunnerConfig:
    """Settings of `CrosscoderTrainingRunner`; names are those of SAELens' runner wherever it has them.

    Raises:
        ValueError: Two settings contradict each other; the message names them.
    """

    sae: CrosscoderTrainingConfig
    """The crosscoder."""
    model_a: ModelConfig = field(default_factory=ModelConfig)
    """The first model."""
    model_b: ModelConfig = field(default_factory=ModelConfig)
    """The second model."""

    dataset_path: str = "cpython-docs"
    """Hub name, file (.txt, .jsonl, .csv, .parquet), folder written by save_to_disk, or cpython-docs, which ships with Python."""
    dataset_name: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str = "train"
    """Split of a hub data set."""
    text_column: str = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read a hub data set as it downloads."""
    held_out_every: int = 10
    """Each so many-th document is kept from training, for evaluation."""
    training_pairs: int | None = None
    """At most so many distinct pairs are trained on, again and again if need be; none takes the whole text."""
    eval_pairs: int = 20_000
    """At most so many held-out pairs are evaluated."""
    context_size: int = 128
    """Tokens in one context, in either model."""
    store_batch_size_prompts: int = 16
    """Contexts in one forward pass of the models."""
    outlier_factor: float = 2.0
    """A pair is left out when one of its norms is above this many times its model's running median."""
    keep_in_memory: bool = False
    """Keep the activations of the first pass, all of them, and train further passes from those; false runs the models
    again."""

    training_tokens: int = 2_000_000
    """Pairs to train on, repeats counted."""
    train_batch_size_tokens: int = 2048
    """Pairs in one training step."""
    n_batches_in_buffer: int = 20
    """Training batches among which the shuffle draws."""
    activations_mixing_fraction: float = 0.5
    """Share of the buffer kept back at each draw."""
    prefetch_llm_batches: int = 1
    """Batches made ahead in a thread; 0 for none."""
    n_batches_for_norm_estimate: int = 10
    """Batches from which each model's mean and scale are estimated."""

    lr: float = 1e-4
    """Adam's step."""
    lr_scheduler_name: str = "constant"
    """SAELens' schedule between warm-up and decay."""
    lr_warm_up_steps: int | None = None
    """Steps over which lr rises from 0; none takes a tenth of all steps, at most 1000."""
    lr_decay_steps: int = 0
    """Last steps, over which lr falls to 0."""
    adam_beta1: float = 0.9
    """Adam's first decay rate."""
    adam_beta2: float = 0.999
    """Adam's second decay rate."""
    dead_feature_window: int | None = None
    """Steps without firing after which a latent counts as dead; none takes a tenth of all steps, at most 1000."""
    test_at: list[float] = field(default_factory=list)
    """Shares of the training, separated by spaces, after which a DFC's exclusive latents are tested; they become its
    test_steps and test_window."""
    feature_sampling_window: int = 2000
    """Steps over which firing rates are counted."""
    autocast: bool = False
    """Train in bfloat16 where torch deems it safe."""
    device: str = "cpu"
    """Device of the crosscoder."""
    seed: int = 42
    """Seed of the initial weights and of the shuffle."""

    output_path: str | None = None
    """Folder for the trained crosscoder; none saves nothing."""
    overwrite: bool = False
    """Replace what the output folder holds."""
    n_checkpoints: int = 0
    """Checkpoints during training."""
    checkpoint_path: str | None = None
    """Folder for checkpoints."""
    logger: LoggingConfig = field(default_factory=_no_wandb)
    """Logging to Weights & Biases, off unless asked for."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={self.device!r} is not here: {first_line(error)}") from error
        if self.held_out_every < 2:
            raise ValueError(
                f"held_out_every must be at least 2, got {self.held_out_every}: 1 would leave nothing to train on."
            )
        if self.context_size < 2:
            raise ValueError(f"context_size must be at least 2, got {self.context_size}.")
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch "
                f"(train_batch_size_tokens={self.train_batch_size_tokens})."
            )
        if self.test_at and not isinstance(self.sae, DFCTrainingCrosscoderConfig):
            raise ValueError(
                f"test_at={self.test_at} is for a dfc, and this is a {self.sae.architecture()}: it has no exclusive "
                "latents to test."
            )
        steps = self.training_steps
        late = [step for step in getattr(self.sae, "test_steps", []) if step >= steps]
        if late:
            raise ValueError(
                f"sae.test_steps={late} never come: training has {steps} steps (training_tokens / "
                "train_batch_size_tokens). Test earlier, or train longer."
            )
        if self.n_checkpoints > 0 and self.checkpoint_path is None:
            raise ValueError(f"n_checkpoints={self.n_checkpoints} needs a checkpoint_path.")

    @property
    def training_steps(self) -> int:
        """Number of whole batches in `training_tokens`."""
        return self.training_tokens // self.train_batch_size_tokens

    @property
    def a_tenth_of_the_steps(self) -> int:
        return min(1000, self.training_steps // 10)

    @property
    def counting_window(self) -> int:
        """SAELens' `feature_sampling_window`; firing is counted anew after the last test, which may move latents."""
        tests = getattr(self.sae, "test_steps", [])
        return tests[-1] if tests else self.feature_sampling_window

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return {**asdict(self), "sae": self.sae.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CrosscoderRunnerConfig":
        """Settings back from `to_dict`.

        Raises:
            TypeError: There is a setting that this version does not know.
        """
        sae_class = get_sae_training_class(values["sae"]["architecture"])[1]
        parsed: dict[str, Any] = {
            **values,
            "sae": sae_class.from_dict(values["sae"]),
            "model_a": ModelConfig(**values["model_a"]),
            "model_b": ModelConfig(**values["model_b"]),
            "logger": LoggingConfig(**values["logger"]),
        }
        return cls(**parsed)

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """The part that SAELens' trainer reads."""
        return SAETrainerConfig(
            n_checkpoints=self.n_checkpoints,
            checkpoint_path=self.checkpoint_path,
            save_final_checkpoint=False,
            total_training_samples=self.training_tokens,
            device=self.device,
            autocast=self.autocast,
            lr=self.lr,
            lr_end=self.lr / 10,
            lr_scheduler_name=self.lr_scheduler_name,
            lr_warm_up_steps=_or(self.lr_warm_up_steps, self.a_tenth_of_the_steps),
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            lr_decay_steps=self.lr_decay_steps,
            n_restart_cycles=1,
            train_batch_size_samples=self.train_batch_size_tokens,
            dead_feature_window=_or(self.dead_feature_window, self.a_tenth_of_the_steps),
            feature_sampling_window=self.counting_window,
            logger=self.logger,
            n_batches_for_norm_estimate=self.n_batches_for_norm_estimate,
        )
