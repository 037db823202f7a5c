"""Baselines with SAEs from other libraries: one SAE on both models' concatenated activations, or
one SAE per model.

These SAEs do not distinguish two models. They are trained on activations normalized as for our
crosscoders, and then converted to a crosscoder and measured like ours.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.peers.dictionary_learning import (
    DISTRIBUTION,
    load_dictionary_learning,
    missing,
)
from sae_lens_dfc.crosscoders.architectures.batchtopk import (
    BatchTopKTrainingCrosscoder,
    BatchTopKTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.models.config import ModelName
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

BatchStream = Iterator[Float[Tensor, "batch d_in"]]


@dataclass(frozen=True)
class Normalization:
    """Normalization of raw activations, as a BatchTopK crosscoder applies it in training."""

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, "2"]
    """Scales of model A and model B."""
    d_a: int

    @classmethod
    def of(
        cls, cfg: BatchTopKTrainingCrosscoderConfig, acts: Float[Tensor, "n d_in"]
    ) -> "Normalization":
        """Fit the normalization to raw activations as a crosscoder with these settings does."""
        ours = BatchTopKTrainingCrosscoder(cfg)
        ours.fit_normalization(acts)
        return cls(ours.input_mean, ours.input_scale, cfg.d_a)

    @property
    def scales(self) -> Float[Tensor, " d_in"]:
        """Scale of each input dimension."""
        d_b = len(self.mean) - self.d_a
        return self.scale.repeat_interleave(torch.tensor([self.d_a, d_b]))

    def __call__(self, acts: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (acts - self.mean) * self.scales


def as_crosscoder(
    weights: Mapping[str, Tensor],
    normalization: Normalization,
    n_exclusive: tuple[int, int] = (0, 0),
) -> Crosscoder:
    """Convert an SAE on normalized activations to a crosscoder on raw ones, with the same latents.

    Args:
        weights: `W_enc`, `b_enc`, `W_dec`, `b_dec` and `threshold` as in SAELens' `JumpReLUSAE`.
        normalization: Normalization of its training activations.
        n_exclusive: Number of latents, from the first, exclusive to A, and of those after them
            exclusive to B.
    """
    d_in, d_sae = weights["W_enc"].shape
    d_a, scales = normalization.d_a, normalization.scales
    n_a, n_b = n_exclusive
    crosscoder = Crosscoder(
        CrosscoderConfig(
            d_in=d_in,
            d_sae=d_sae,
            d_a=d_a,
            d_b=d_in - d_a,
            n_a_exclusive=n_a,
            n_b_exclusive=n_b,
        )
    )
    folded = {
        "W_enc": weights["W_enc"] * scales[:, None],
        "b_enc": weights["b_enc"],
        "W_dec": weights["W_dec"] / scales,
        "b_dec": weights["b_dec"] / scales + normalization.mean,
        "threshold": weights["threshold"].expand(d_sae),
        "input_scale": normalization.scale,
    }
    crosscoder.load_state_dict(folded)
    return crosscoder


class Peer(NamedTuple):
    """A trainer of another library."""

    train: Callable[[CrosscoderRunnerConfig, BatchStream], Crosscoder]
    """Trains with the sizes, batches, seed and inputs of a BatchTopK crosscoder's training."""
    settings: Callable[[CrosscoderRunnerConfig], dict[str, Any]]
    """Settings that determine its results, besides the toy pair and the number of pairs."""
    packages: tuple[str, ...] = ()
    """Distributions it needs in addition to our dependencies."""
    missing: Callable[[], str | None] = lambda: None
    """Installation advice if one of them is missing; none otherwise."""


def _sizes(cfg: CrosscoderRunnerConfig) -> BatchTopKTrainingCrosscoderConfig:
    assert isinstance(cfg.sae, BatchTopKTrainingCrosscoderConfig)
    return cfg.sae


def normalized(
    cfg: CrosscoderRunnerConfig, batches: BatchStream
) -> tuple[Normalization, BatchStream]:
    """Fit the normalization to the first batches, as our crosscoders do, and apply it to the
    following ones."""
    first = torch.cat(list(islice(batches, cfg.n_batches_for_norm_estimate)))
    normalization = Normalization.of(_sizes(cfg), first)
    # Not a generator: a disabled progress bar would close it when dictionary-learning stops early.
    return normalization, map(normalization, batches)


# --- SAELens ---


def _saelens_config(cfg: CrosscoderRunnerConfig) -> BatchTopKTrainingSAEConfig:
    sizes = _sizes(cfg)
    return BatchTopKTrainingSAEConfig(d_in=sizes.d_in, d_sae=sizes.d_sae, k=sizes.k)


def train_saelens(cfg: CrosscoderRunnerConfig, batches: BatchStream) -> Crosscoder:
    """Train SAELens' BatchTopK SAE on the concatenated input with SAELens' trainer."""
    normalization, inputs = normalized(cfg, batches)
    torch.manual_seed(cfg.seed)
    sae = BatchTopKTrainingSAE(_saelens_config(cfg))
    SAETrainer(cfg=cfg.to_sae_trainer_config(), sae=sae, data_provider=inputs).fit()
    return as_crosscoder(_saved(sae), normalization)


def _saved(sae: BatchTopKTrainingSAE) -> dict[str, Tensor]:
    """The weights in the format in which SAELens saves it."""
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return JumpReLUSAE.load_from_disk(folder).state_dict()


def train_separate(cfg: CrosscoderRunnerConfig, batches: BatchStream) -> Crosscoder:
    """Train a SAELens BatchTopK SAE on each model separately on the same pairs, combined into one
    crosscoder without shared latents.

    Each has the number of latents and the k of a crosscoder, so that together they have its number
    of weights.
    """
    normalization, inputs = normalized(cfg, batches)
    torch.manual_seed(cfg.seed)
    sizes, trainer_config = _sizes(cfg), cfg.to_sae_trainer_config()
    trainers: dict[ModelName, SAETrainer[Any, Any]] = {
        model: SAETrainer(trainer_config, BatchTopKTrainingSAE(sae), iter(()))
        for model, sae in _separate_configs(cfg).items()
    }
    for batch in islice(inputs, trainer_config.total_training_steps):
        for model, trainer in trainers.items():
            trainer.step(batch[:, sizes.partition.models[model]])
            trainer.n_training_steps += 1
    a, b = (_saved(trainer.sae) for trainer in trainers.values())
    weights = {
        "W_enc": torch.block_diag(a["W_enc"], b["W_enc"]),
        "W_dec": torch.block_diag(a["W_dec"], b["W_dec"]),
        **{name: torch.cat([a[name], b[name]]) for name in ("b_enc", "b_dec", "threshold")},
    }
    return as_crosscoder(weights, normalization, (sizes.d_sae, sizes.d_sae))


def _separate_configs(cfg: CrosscoderRunnerConfig) -> dict[ModelName, BatchTopKTrainingSAEConfig]:
    sizes = _sizes(cfg)
    widths: dict[ModelName, int] = {"a": sizes.d_a, "b": sizes.d_b}
    return {
        model: BatchTopKTrainingSAEConfig(d_in=width, d_sae=sizes.d_sae, k=sizes.k)
        for model, width in widths.items()
    }


def saelens_settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """The full SAELens configuration."""
    return {"crosscoder": _without_metadata(_saelens_config(cfg))}


def separate_settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """The full SAELens configuration of each model's SAE."""
    return {"crosscoder": {m: _without_metadata(sae) for m, sae in _separate_configs(cfg).items()}}


def _without_metadata(sae: BatchTopKTrainingSAEConfig) -> dict[str, Any]:
    return {name: value for name, value in sae.to_dict().items() if name != "metadata"}


# --- dictionary-learning ---


def dictionary_learning_settings(
    cfg: CrosscoderRunnerConfig, is_adapted: bool = True
) -> dict[str, Any]:
    """Settings for dictionary-learning's trainer: our sizes, seed, learning rate and schedule, with
    its own loss.

    Its defaults of 1,000 steps for warm-up and threshold start would span a whole training here,
    and with its default learning rate it recovers less.

    Args:
        cfg: Settings of the BatchTopK crosscoder that it replaces.
        is_adapted: Whether to normalize the input to unit mean square, an option of `trainSAE`, and
            to count latents as dead as early as in our trainings. By default it does neither, and
            counts a latent as dead after ten million pairs.
    """
    sizes, trainer = _sizes(cfg), cfg.to_sae_trainer_config()
    steps = trainer.total_training_steps
    decay_start = steps - trainer.lr_decay_steps
    dead_after = trainer.dead_feature_window * trainer.train_batch_size_samples
    return {
        "crosscoder": {
            "steps": steps,
            "activation_dim": sizes.d_in,
            "dict_size": sizes.d_sae,
            "k": int(sizes.k),
            "layer": 0,
            "lm_name": "none",
            "lr": trainer.lr,
            "warmup_steps": trainer.lr_warm_up_steps,
            "decay_start": decay_start,
            # Starting earlier, its slow moving average would retain early thresholds in so short a
            # training, and too few latents would fire.
            "threshold_start_step": decay_start,
            "seed": cfg.seed,
            "device": "cpu",
        },
        "training": {
            "total_training_samples": trainer.total_training_samples,
            "train_batch_size_samples": trainer.train_batch_size_samples,
            "normalize_activations": is_adapted,
            "dead_feature_threshold": dead_after if is_adapted else None,
        },
    }


def train_dictionary_learning(
    cfg: CrosscoderRunnerConfig, batches: BatchStream, is_adapted: bool = True
) -> Crosscoder:
    """Train dictionary-learning's BatchTopK SAE on the concatenated input with its `trainSAE`; see
    `dictionary_learning_settings`."""
    package = load_dictionary_learning()
    normalization, inputs = normalized(cfg, batches)
    settings = dictionary_learning_settings(cfg, is_adapted)
    config, training = settings["crosscoder"], settings["training"]

    def made(**own: Any) -> Any:
        trainer = package.trainer(**own)
        if training["dead_feature_threshold"] is not None:
            trainer.dead_feature_threshold = training["dead_feature_threshold"]
        return trainer

    # Suppress its print of the input scale.
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        package.train(
            inputs,
            [{"trainer": made, **config}],
            config["steps"],
            save_dir=folder,
            normalize_activations=training["normalize_activations"],
            device="cpu",
        )
        saved = torch.load(Path(folder) / "trainer_0" / "ae.pt")
    weights = {
        "W_enc": saved["encoder.weight"].T,
        "b_enc": saved["encoder.bias"],
        "W_dec": saved["decoder.weight"].T,
        "b_dec": saved["b_dec"],
        "threshold": saved["threshold"],
    }
    return as_crosscoder(weights, normalization)


def _dictionary_learning(is_adapted: bool) -> Peer:
    return Peer(
        partial(train_dictionary_learning, is_adapted=is_adapted),
        partial(dictionary_learning_settings, is_adapted=is_adapted),
        (DISTRIBUTION,),
        missing,
    )


SEPARATE = "two-saelens-batchtopk"
PEERS = {
    "saelens-batchtopk": Peer(train_saelens, saelens_settings),
    "dictionary-learning-batchtopk": _dictionary_learning(is_adapted=True),
    "dictionary-learning-as-it-comes": _dictionary_learning(is_adapted=False),
    SEPARATE: Peer(train_separate, separate_settings),
}
"""Peers by name of their rows."""
