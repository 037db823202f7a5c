"""What a user would pick instead: a sparse autoencoder of another library on both models' activations, joined, or one on each.

They know no two models, so they are given what our crosscoders make of the raw activations for themselves, and what
they learned is written as a crosscoder, which is then measured as ours are.
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

from sae_lens_dfc.benchmark.dictionary_learning import (
    DISTRIBUTION,
    load_dictionary_learning,
    missing,
)
from sae_lens_dfc.crosscoders.batchtopk import (
    BatchTopKTrainingCrosscoder,
    BatchTopKTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

Batches = Iterator[Float[Tensor, "batch d_in"]]


@dataclass(frozen=True)
class Normalization:
    """How raw activations become those that a BatchTopK crosscoder trains on."""

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, "2"]
    """Of model A and of model B."""
    d_a: int

    @classmethod
    def of(
        cls, cfg: BatchTopKTrainingCrosscoderConfig, acts: Float[Tensor, "n d_in"]
    ) -> "Normalization":
        """What a crosscoder of these settings fits to raw activations."""
        ours = BatchTopKTrainingCrosscoder(cfg)
        ours.fit_normalization(acts)
        return cls(ours.input_mean, ours.input_scale, cfg.d_a)

    @property
    def scales(self) -> Float[Tensor, " d_in"]:
        """The scale of each input."""
        d_b = len(self.mean) - self.d_a
        return self.scale.repeat_interleave(torch.tensor([self.d_a, d_b]))

    def __call__(self, acts: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (acts - self.mean) * self.scales


def as_crosscoder(
    weights: Mapping[str, Tensor],
    normalization: Normalization,
    n_exclusive: tuple[int, int] = (0, 0),
) -> Crosscoder:
    """A sparse autoencoder of normalised activations, written as a crosscoder of raw ones, with the same latents.

    Args:
        weights: `W_enc`, `b_enc`, `W_dec`, `b_dec` and `threshold` as in SAELens' `JumpReLUSAE`.
        normalization: Of what it was trained on.
        n_exclusive: How many latents, the first, are of model A alone, and how many after them of B alone.
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

    train: Callable[[CrosscoderRunnerConfig, Batches], Crosscoder]
    """Trains with the sizes, batches, seed and inputs of a BatchTopK crosscoder's training."""
    settings: Callable[[CrosscoderRunnerConfig], dict[str, Any]]
    """What decides its numbers, besides the toy pair and the number of pairs."""
    packages: tuple[str, ...] = ()
    """Distributions that it needs beside our own dependencies."""
    missing: Callable[[], str | None] = lambda: None
    """What to do where one of them is not installed; none where it is."""


def _sizes(cfg: CrosscoderRunnerConfig) -> BatchTopKTrainingCrosscoderConfig:
    assert isinstance(cfg.sae, BatchTopKTrainingCrosscoderConfig)
    return cfg.sae


def normalized(cfg: CrosscoderRunnerConfig, batches: Batches) -> tuple[Normalization, Batches]:
    """Fit the normalisation to the first batches, as our crosscoders do, and apply it to those that follow."""
    first = torch.cat(list(islice(batches, cfg.n_batches_for_norm_estimate)))
    normalization = Normalization.of(_sizes(cfg), first)
    # No generator: a disabled progress bar closes one that it is not let to finish, as dictionary-learning does.
    return normalization, map(normalization, batches)


# --- SAELens ---


def _saelens_config(cfg: CrosscoderRunnerConfig) -> BatchTopKTrainingSAEConfig:
    sizes = _sizes(cfg)
    return BatchTopKTrainingSAEConfig(d_in=sizes.d_in, d_sae=sizes.d_sae, k=sizes.k)


def train_saelens(cfg: CrosscoderRunnerConfig, batches: Batches) -> Crosscoder:
    """SAELens' BatchTopK on the joined input, in SAELens' trainer."""
    normalization, inputs = normalized(cfg, batches)
    torch.manual_seed(cfg.seed)
    sae = BatchTopKTrainingSAE(_saelens_config(cfg))
    SAETrainer(cfg=cfg.to_sae_trainer_config(), sae=sae, data_provider=inputs).fit()
    return as_crosscoder(_saved(sae), normalization)


def _saved(sae: BatchTopKTrainingSAE) -> dict[str, Tensor]:
    """The weights of the form in which SAELens saves it."""
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return JumpReLUSAE.load_from_disk(folder).state_dict()


def train_separate(cfg: CrosscoderRunnerConfig, batches: Batches) -> Crosscoder:
    """SAELens' BatchTopK on each model by itself, on the same pairs, as one crosscoder without a shared latent.

    Each has the number of latents and the k of a crosscoder, so that both together have its number of weights.
    """
    normalization, inputs = normalized(cfg, batches)
    torch.manual_seed(cfg.seed)
    sizes, trainer_config = _sizes(cfg), cfg.to_sae_trainer_config()
    trainers = {
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


def _separate_configs(cfg: CrosscoderRunnerConfig) -> dict[str, BatchTopKTrainingSAEConfig]:
    sizes = _sizes(cfg)
    widths = {"a": sizes.d_a, "b": sizes.d_b}
    return {
        model: BatchTopKTrainingSAEConfig(d_in=width, d_sae=sizes.d_sae, k=sizes.k)
        for model, width in widths.items()
    }


def saelens_settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """All of SAELens' configuration."""
    return {"crosscoder": _without_metadata(_saelens_config(cfg))}


def separate_settings(cfg: CrosscoderRunnerConfig) -> dict[str, Any]:
    """All of SAELens' configuration, of each model's."""
    return {"crosscoder": {m: _without_metadata(sae) for m, sae in _separate_configs(cfg).items()}}


def _without_metadata(sae: BatchTopKTrainingSAEConfig) -> dict[str, Any]:
    return {name: value for name, value in sae.to_dict().items() if name != "metadata"}


# --- dictionary-learning ---


def dictionary_learning_settings(
    cfg: CrosscoderRunnerConfig, is_adapted: bool = True
) -> dict[str, Any]:
    """What its trainer is given: our sizes, seed, learning rate and schedule, and its own loss.

    Its defaults for the length of the warm-up and for the step from which its threshold is learned, 1,000 each, are the whole of
    a training here, and by its default learning rate it finds less.

    Args:
        cfg: Of the BatchTopK crosscoder in whose place it is trained.
        is_adapted: Whether its input is brought to unit mean square, as `trainSAE` offers, and a latent counts as dead as
            early as in our trainings. As it comes, neither is so: it counts one as dead after ten million pairs.
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
            # Earlier, its slow average keeps what the threshold was early in so short a training, and too few latents fire.
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
    cfg: CrosscoderRunnerConfig, batches: Batches, is_adapted: bool = True
) -> Crosscoder:
    """dictionary-learning's BatchTopK on the joined input, by its `trainSAE`; see `dictionary_learning_settings`."""
    package = load_dictionary_learning()
    normalization, inputs = normalized(cfg, batches)
    settings = dictionary_learning_settings(cfg, is_adapted)
    config, training = settings["crosscoder"], settings["training"]

    def made(**own: Any) -> Any:
        trainer = package.trainer(**own)
        if training["dead_feature_threshold"] is not None:
            trainer.dead_feature_threshold = training["dead_feature_threshold"]
        return trainer

    # It prints the scale of its input.
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
"""By the name of their rows."""
