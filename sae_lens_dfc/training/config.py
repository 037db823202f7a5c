"""Everything a training run needs, in one dataclass; the command line is made from it."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import check_metadata
from sae_lens_dfc.files import check_types, from_plain
from sae_lens_dfc.models import ModelConfig
from sae_lens_dfc.sources import SourceConfig
from sae_lens_dfc.texts import first_line
from sae_lens_dfc.training.data import DataConfig, require_positive

SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
"""SAELens' schedules, in any case of letters."""
NOT_NEGATIVE = (
    *("lr_warm_up_steps", "lr_decay_steps", "dead_feature_window"),
    *("prefetch_llm_batches", "n_checkpoints"),
)
POSITIVE = (
    "train_batch_size_tokens",
    "n_batches_in_buffer",
    "n_batches_for_norm_estimate",
    "feature_sampling_window",
    "cache_window_shards",
    "lr",
)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _sae_from_dict(values: Any) -> CrosscoderTrainingConfig:
    if not isinstance(values, dict) or not isinstance(name := values.get("architecture"), str):
        raise ValueError(
            f"The run's crosscoder must be a mapping with its architecture, got {values!r:.80}."
        )
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"The run's architecture {name!r} is not registered with SAELens here. If it is your own, import the module that "
            "registers it first (tutorials/6_your_own_architecture.ipynb shows a command that does)."
        )
    config_class = SAE_TRAINING_CLASS_REGISTRY[name][1]
    if not issubclass(config_class, CrosscoderTrainingConfig):
        raise ValueError(
            f"The run's architecture {name!r} is a SAELens SAE for one model, not a crosscoder."
        )
    metadata = values.get("metadata", {})
    check_metadata(metadata)
    check_types(config_class, {**values, "metadata": SAEMetadata()}, f"The run's {name}")
    try:
        return config_class.from_dict(values)
    except TypeError as error:
        raise ValueError(f"The run's {name} lacks a setting: {error}.") from error


def _no_wandb() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


@dataclass(kw_only=True)
class CrosscoderRunnerConfig(DataConfig):
    """Settings of `CrosscoderTrainingRunner`; names are those of SAELens' runner wherever it has them.

    Raises:
        ValueError: Two settings contradict each other; the message names them.
    """

    sae: CrosscoderTrainingConfig
    """The crosscoder."""
    other_saes: list[CrosscoderTrainingConfig] = field(
        default_factory=list, metadata={"cmd": False}
    )
    """More crosscoders to train on the same batches, each saved in a folder of its own; in a --config file `sae` is then
    a list. The i-th is initialised with seed + i, so the same settings twice are two seeds."""
    cache_path: str | None = None
    """Folder that `sae-lens-dfc cache` wrote: train on its rows, and run no model (but for measures sent to W&B)."""
    cache_window_shards: int = 16
    """Shards of a cache among which rows are shuffled."""
    keep_in_memory: bool = False
    """Keep the activations of the first pass, all of them, and train further passes from those; false runs the models
    again."""

    training_tokens: int = 2_000_000
    """Pairs to train on, repeats counted."""
    train_batch_size_tokens: int = 2048
    """Pairs in one training step."""
    n_batches_in_buffer: int = 20
    """Training batches among which the shuffle draws; not of a cache, which has its window."""
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
    """Train in bfloat16 where torch deems it safe; on the sparse path (training_path) that is the encoder's product."""
    compile_sae: bool = False
    """Compile the crosscoder's training step with torch.compile; on the sparse path (training_path) it gains nothing."""
    sae_compilation_mode: str | None = None
    """Mode of torch.compile for the crosscoder."""
    device: str = "cpu"
    """Device of the crosscoder."""

    output_path: str | None = None
    """Folder for the trained crosscoder; none saves nothing."""
    overwrite: bool = False
    """Replace what the output folder holds."""
    resume: bool = False
    """Go on from the last checkpoint, exactly as if training had not been stopped; from the beginning if there is none."""
    n_checkpoints: int = 0
    """Checkpoints during training, evenly spaced; the last two are kept."""
    checkpoint_path: str | None = None
    """Folder for checkpoints."""
    logger: LoggingConfig = field(default_factory=_no_wandb)
    """Logging to Weights & Biases, off unless asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, POSITIVE)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={self.device!r} is not here: {first_line(error)}") from error
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch "
                f"(train_batch_size_tokens={self.train_batch_size_tokens})."
            )
        self._check_schedule()
        late = [step for step in self.test_steps if step >= self.training_steps]
        if late:
            raise ValueError(
                f"sae.test_steps={late} never come: training has {self.training_steps} steps (training_tokens / "
                "train_batch_size_tokens). Test earlier, or train longer."
            )
        if self.n_checkpoints > 0 and self.checkpoint_path is None:
            raise ValueError(f"n_checkpoints={self.n_checkpoints} needs a checkpoint_path.")
        if self.resume and self.checkpoint_path is None:
            raise ValueError(
                "resume needs a checkpoint_path: the one of the training to go on with."
            )

    def _check_schedule(self) -> None:
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        for name in ("adam_beta1", "adam_beta2", "activations_mixing_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}."
                )
        if self.lr_scheduler_name.lower() not in SCHEDULERS:
            raise ValueError(
                f"There is no lr_scheduler_name {self.lr_scheduler_name!r}. Choose from {', '.join(SCHEDULERS)}."
            )
        warm_up = _or(self.lr_warm_up_steps, self.a_tenth_of_the_steps)
        between = self.training_steps - warm_up - self.lr_decay_steps
        is_constant = self.lr_scheduler_name.lower() == "constant"
        # A warm-up that is longer than a short training is no harm: it only is not over.
        if (self.lr_decay_steps > 0 and between < 0) or (not is_constant and between < 1):
            raise ValueError(
                f"{warm_up} steps of warm-up (lr_warm_up_steps) and {self.lr_decay_steps} of decay (lr_decay_steps) leave "
                f"{between} of {self.training_steps} steps to the schedule {self.lr_scheduler_name!r}. Shorten them, or train "
                "longer."
            )

    @property
    def all_saes(self) -> list[CrosscoderTrainingConfig]:
        return [self.sae, *self.other_saes]

    @property
    def saes(self) -> dict[str, CrosscoderTrainingConfig]:
        """The crosscoders by name: "crosscoder" when there is one, else number and architecture."""
        if not self.other_saes:
            return {"crosscoder": self.sae}
        return {f"{i}_{sae.architecture()}": sae for i, sae in enumerate(self.all_saes)}

    def of_one(self, name: str) -> "CrosscoderRunnerConfig":
        """The settings of a training of that crosscoder alone."""
        sae = self.saes[name]
        tests = self.test_at if isinstance(sae, DFCTrainingCrosscoderConfig) else []
        return replace(self, sae=sae, other_saes=[], test_at=tests)

    @property
    def test_steps(self) -> list[int]:
        """The steps at which any of the crosscoders is tested."""
        steps = {
            step
            for sae in self.all_saes
            if isinstance(sae, DFCTrainingCrosscoderConfig)
            for step in sae.test_steps
        }
        return sorted(steps)

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
        tests = self.test_steps
        return tests[-1] if tests else self.feature_sampling_window

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        others = [sae.to_dict() for sae in self.other_saes]
        return {**asdict(self), "sae": self.sae.to_dict(), "other_saes": others}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CrosscoderRunnerConfig":
        """Settings back from `to_dict`.

        Raises:
            ValueError: One is missing, of another type, or not known to this version.
        """
        lists = {name: values.get(name) for name in ("other_saes", "sources")}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise ValueError(f"{name} must be a list, got {value!r:.80}.")
        parsed: dict[str, Any] = {
            **values,
            "sae": _sae_from_dict(values.get("sae")),
            "other_saes": [_sae_from_dict(sae) for sae in values["other_saes"]],
            "model_a": from_plain(ModelConfig, values.get("model_a"), "model_a"),
            "model_b": from_plain(ModelConfig, values.get("model_b"), "model_b"),
            "logger": from_plain(LoggingConfig, values.get("logger"), "logger"),
            "sources": [from_plain(SourceConfig, one, "A source") for one in values["sources"]],
        }
        return from_plain(cls, parsed, "The run")

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
