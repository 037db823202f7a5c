"""Defines `CrosscoderRunnerConfig`, all settings of a training run; the command line is generated
from it."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sae_lens.config import LoggingConfig, SAETrainerConfig
from simple_parsing import field as flag
from simple_parsing.utils import str2bool

from sae_lens_dfc.core.flags import switch
from sae_lens_dfc.core.schema import from_plain, require
from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.config import DataConfig
from sae_lens_dfc.models.config import AUTO
from sae_lens_dfc.models.hooked_model import check_device
from sae_lens_dfc.models.number_formats import fast_dtype

SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
"""SAELens' schedulers; case does not matter."""
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


def _bool_or_auto(said: str) -> bool | str:
    return said if said == AUTO else str2bool(said)


BOOL_OR_AUTO: dict[str, Any] = {
    "type": _bool_or_auto,
    "nargs": "?",
    "const": True,
    "metavar": "bool|auto",
}
"""Options of a command-line flag that takes a bool or `auto`; without a value it is true."""


@dataclass(kw_only=True)
class CrosscoderRunnerConfig(DataConfig):
    """Settings of `CrosscoderTrainingRunner`, under the names of SAELens' runner wherever it has
    the same setting.

    Raises:
        ValueError: Two settings contradict each other; the message names them.
    """

    sae: CrosscoderTrainingConfig
    """The crosscoder."""
    other_saes: list[CrosscoderTrainingConfig] = field(
        default_factory=list, metadata={"cmd": False}
    )
    """More crosscoders to train on the same batches, each saved in its own folder. In a --config
    file, `sae` is then a list. The i-th crosscoder is initialized with seed + i, so listing the
    same settings twice trains two seeds."""
    cache_path: str | None = None
    """Cache folder written by `sae-lens-dfc cache`: train on its activations without running the
    models (except for held-out metrics logged to W&B)."""
    cache_window_shards: int = 16
    """Cache shards whose rows are shuffled together."""
    keep_in_memory: bool = switch()
    """Keep all activations of the first pass in memory and reuse them in later passes; false runs
    the models again."""

    training_tokens: int = 2_000_000
    """Number of pairs to train on, counting repeats."""
    train_batch_size_tokens: int = 2048
    """Pairs per training step, over all ranks."""
    n_batches_in_buffer: int = 20
    """Size of the shuffle buffer, in training batches; a cache uses cache_window_shards instead."""
    activations_mixing_fraction: float = 0.5
    """Share of the buffer that is kept for mixing each time the buffer is refilled."""
    prefetch_llm_batches: int = 1
    """Batches prefetched in a background thread; 0 disables prefetching."""
    n_batches_for_norm_estimate: int = 10
    """Batches used to estimate each model's mean and scale."""

    lr: float = 1e-4
    """Adam's learning rate."""
    lr_scheduler_name: str = "constant"
    """SAELens' learning rate schedule between warm-up and decay."""
    lr_warm_up_steps: int | None = None
    """Warm-up steps, over which lr rises from 0; none uses a tenth of all steps, at most 1000."""
    lr_decay_steps: int = 0
    """Final steps over which lr decays to 0."""
    adam_beta1: float = 0.9
    """Adam's beta1."""
    adam_beta2: float = 0.999
    """Adam's beta2."""
    dead_feature_window: int | None = None
    """Steps without firing after which a latent counts as dead; none uses a tenth of all steps, at
    most 1000."""
    reassign_at: list[float] = field(default_factory=list)
    """When to test a DFC's exclusive latents, as fractions of the training, separated by spaces;
    sets reassign_steps and evidence_window."""
    feature_sampling_window: int = 2000
    """Steps over which firing rates are measured."""
    autocast: bool | Literal["auto"] = flag(default=False, **BOOL_OR_AUTO)
    """Train with torch's bfloat16 autocast; on the sparse path (training_path) it applies to the
    encoder product. auto enables it where the device is fast in bfloat16."""
    compile_sae: bool = switch()
    """Compile the crosscoder's training step with torch.compile; no speedup on the sparse path
    (training_path)."""
    sae_compilation_mode: str | None = None
    """torch.compile mode for the crosscoder."""
    device: str = "cpu"
    """Device of the crosscoder."""

    output_path: str | None = None
    """Folder for the trained crosscoder; without it, nothing is saved."""
    overwrite: bool = switch()
    """Replace the contents of the output folder."""
    resume: bool = switch()
    """Resume from the last checkpoint, exactly as if training had not been interrupted; start from
    the beginning if there is none."""
    n_checkpoints: int = 0
    """Number of checkpoints during training, evenly spaced; the last two are kept."""
    checkpoint_path: str | None = None
    """Folder for checkpoints."""
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
    """Logging to Weights & Biases; off by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, POSITIVE)
        check_device(self.device)
        if self.training_tokens < self.train_batch_size_tokens:
            raise ValueError(
                f"training_tokens={self.training_tokens} is less than one batch "
                f"(train_batch_size_tokens={self.train_batch_size_tokens})."
            )
        self._check_schedule()
        late = [step for step in self.reassign_steps if step >= self.training_steps]
        if late:
            raise ValueError(
                f"sae.reassign_steps={late} are beyond the end of training, which has {self.training_steps} steps (training_tokens / "
                "train_batch_size_tokens). Test earlier, or train longer."
            )
        if self.n_checkpoints > 0 and self.checkpoint_path is None:
            raise ValueError(f"n_checkpoints={self.n_checkpoints} needs a checkpoint_path.")
        if self.resume and self.checkpoint_path is None:
            raise ValueError("resume needs a checkpoint_path: the one of the training to resume.")

    def _check_schedule(self) -> None:
        require(self, NOT_NEGATIVE, "at least 0")
        fractions = ("adam_beta1", "adam_beta2", "activations_mixing_fraction")
        require(self, fractions, "at least 0 and below 1")
        if self.lr_scheduler_name.lower() not in SCHEDULERS:
            raise ValueError(
                f"There is no lr_scheduler_name {self.lr_scheduler_name!r}. Choose from {', '.join(SCHEDULERS)}."
            )
        warm_up = _or(self.lr_warm_up_steps, self.a_tenth_of_the_steps)
        between = self.training_steps - warm_up - self.lr_decay_steps
        is_constant = self.lr_scheduler_name.lower() == "constant"
        # A warm-up longer than a short training is harmless: it just does not end.
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
        """The settings for training that crosscoder alone."""
        sae = self.saes[name]
        tests = self.reassign_at if isinstance(sae, DFCTrainingCrosscoderConfig) else []
        return replace(self, sae=sae, other_saes=[], reassign_at=tests)

    def without_output(self) -> "CrosscoderRunnerConfig":
        """The settings for a training that writes no files and does not log to Weights & Biases."""
        logger = replace(self.logger, log_to_wandb=False)
        outputs: dict[str, Any] = {"output_path": None, "checkpoint_path": None, "n_checkpoints": 0}
        return replace(self, **outputs, resume=False, logger=logger)

    @property
    def reassign_steps(self) -> list[int]:
        """The steps at which any crosscoder's exclusive latents are tested."""
        steps = {
            step
            for sae in self.all_saes
            if isinstance(sae, DFCTrainingCrosscoderConfig)
            for step in sae.reassign_steps
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
    def is_autocast(self) -> bool:
        """Whether training uses bfloat16 autocast, with `auto` resolved for this device."""
        if self.autocast == AUTO:
            return fast_dtype(self.device) == "bfloat16"
        return self.autocast

    @property
    def counting_window(self) -> int:
        """SAELens' `feature_sampling_window`; with exclusivity tests, the step of the last one, so
        that firing rates are counted afresh once latents have moved."""
        tests = self.reassign_steps
        return tests[-1] if tests else self.feature_sampling_window

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        others = [sae.to_dict() for sae in self.other_saes]
        return {**asdict(self), "sae": self.sae.to_dict(), "other_saes": others}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CrosscoderRunnerConfig":
        """Restore settings from the output of `to_dict`.

        Raises:
            ValueError: A setting is missing, has the wrong type, or is unknown to this version.
        """
        return from_plain(cls, values, "The run")

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        """The settings of SAELens' trainer."""
        return SAETrainerConfig(
            n_checkpoints=self.n_checkpoints,
            checkpoint_path=self.checkpoint_path,
            save_final_checkpoint=False,
            total_training_samples=self.training_tokens,
            device=self.device,
            autocast=self.is_autocast,
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
