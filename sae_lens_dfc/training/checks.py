"""Validates a run as its runner starts: models, activations, output folder and existing checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from sae_lens_dfc.core.identity import deciding, first_difference, same_wherever
from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.architectures.dfc import DFCTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import check_metadata
from sae_lens_dfc.data.activations import PairedRows
from sae_lens_dfc.models.number_formats import warn_where_slow
from sae_lens_dfc.training.checkpoint import checkpoints
from sae_lens_dfc.training.config import CrosscoderRunnerConfig


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference between two trainings that affects the result, with both values; none if
    there is none.

    Args:
        was: A training's settings (`cfg`), facts about its models, and fingerprints of its cache
            and text.
        now: The same of the other training.

    Raises:
        ValueError: The settings are not those of a training.
    """
    return first_difference(_decisive(was), _decisive(now))


def _decisive(training: Mapping[str, Any]) -> dict[str, Any]:
    cfg = training["cfg"]
    parts = [cfg.get("sae"), cfg.get("model_a"), cfg.get("model_b")]
    others = cfg.get("other_saes")
    if not isinstance(others, list) or not all(isinstance(x, dict) for x in (*parts, *others)):
        raise ValueError(
            "These are not settings of a training: a crosscoder or a model is missing."
        )
    return {
        **deciding(cfg),
        "models": same_wherever(training["models"]),
        "cache": training["cache"],
        "text": training["text"],
    }


def is_run_of(cfg: CrosscoderRunnerConfig, training: Mapping[str, Any]) -> bool:
    """Whether the output folder already holds the result of this training.

    Args:
        cfg: Settings of the training.
        training: The same as plain values, with models, cache and text, as `difference` takes them.

    Raises:
        ValueError: The folder holds another run and may not be overwritten.
    """
    path = Path(cfg.output_path or "") / RUNNER_CFG_FILENAME
    other: str | None = f"{RUNNER_CFG_FILENAME} is missing"
    if path.is_file():
        try:
            other = difference(_of_run(path, cfg.device), training)
        except (OSError, ValueError) as error:
            other = f"{RUNNER_CFG_FILENAME} was not written by this version: {said_by(error).rstrip('.')}"
    if other is not None and not cfg.overwrite:
        raise ValueError(
            f"Output folder {cfg.output_path} holds another run: {other}. Name another, or pass --overwrite "
            "besides --resume."
        )
    return other is None


def _of_run(path: Path, device: str) -> dict[str, Any]:
    """A run's training, read from its files, as `difference` takes it."""
    # The run's own device need not exist here.
    cfg = CrosscoderRunnerConfig.from_dict({**read_object(path), "device": device})
    (name, *_), several = cfg.saes, len(cfg.saes) > 1
    folder = path.parent / name if several else path.parent
    metadata: Any = read_object(folder / SAE_CFG_FILENAME).get("metadata")
    check_metadata(metadata)
    made_of = metadata.get("made_of")
    made_of = made_of if isinstance(made_of, dict) else {}
    models = {model: metadata.get(model) for model in ("model_a", "model_b")}
    read = {name: made_of.get(name) for name in ("cache", "text")}
    return {"cfg": cfg.to_dict(), "models": models, **read}


def warn_of_slow_formats(cfg: CrosscoderRunnerConfig) -> None:
    """Warn once for each device that would use bfloat16 and is slow in it."""
    in_training = cfg.is_autocast or any(
        getattr(sae, "encoder_product", "exact") == "bfloat16" for sae in cfg.all_saes
    )
    devices = [cfg.device] * in_training
    devices += [cfg.model_a.device, cfg.model_b.device] * cfg.autocast_lm
    for device in devices:
        warn_where_slow("bfloat16", device)


def check_tests(cfg: CrosscoderRunnerConfig) -> None:
    """Check that `reassign_at` is used only with a DFC.

    Raises:
        ValueError: `reassign_at` is set and no crosscoder is a DFC.
    """
    if cfg.reassign_at and not any(
        isinstance(s, DFCTrainingCrosscoderConfig) for s in cfg.all_saes
    ):
        raise ValueError(
            f"reassign_at={cfg.reassign_at} is for a dfc, and this is a {cfg.sae.architecture()}: it has no exclusive "
            "latents to test."
        )


def check_rows(rows: Sequence[PairedRows]) -> None:
    """Check that activations are finite, as those of `paired_activations` are.

    Raises:
        ValueError: Some are NaN or infinite.
    """
    broken = [i for i, of_batch in enumerate(rows) if not of_batch.acts.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(rows)} batches of activations hold NaN or infinity; the first is number {broken[0]}. Leave "
            "such rows out."
        )


def check_checkpoints(cfg: CrosscoderRunnerConfig) -> None:
    """Check that the folder holds no checkpoints of another training, which would be mistaken for
    this one's.

    Raises:
        ValueError: It is a file, or holds checkpoints and neither `resume` nor `overwrite` is set.
    """
    if cfg.checkpoint_path is None:
        return
    if Path(cfg.checkpoint_path).is_file():
        raise ValueError(f"checkpoint_path {cfg.checkpoint_path} is no folder. Name one.")
    if cfg.resume or cfg.overwrite:
        return
    if checkpoints(Path(cfg.checkpoint_path)):
        raise ValueError(
            f"{cfg.checkpoint_path} holds checkpoints of a training. Pass --resume to continue it, --overwrite to "
            "start over, or name another checkpoint_path."
        )
