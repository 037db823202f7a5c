"""What must fit before a training starts: the models, the output folder, and the checkpoints there are."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_dfc.activations import PairedRows
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.dfc import DFCTrainingCrosscoderConfig, exclusivity_tests
from sae_lens_dfc.files import read_object
from sae_lens_dfc.manifest import first_difference
from sae_lens_dfc.training.checkpoint import checkpoints
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

# What may differ between a training and its resumption: none of it changes a batch or a weight. Models and cache may have
# moved; that they are the same is seen from what is in them.
MAY_CHANGE = (
    *("resume", "overwrite", "output_path", "checkpoint_path", "n_checkpoints", "cache_path"),
    *("logger", "prefetch_llm_batches", "eval_pairs"),
)


def deciding_settings(cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is trained, as JSON gives them back.

    Raises:
        ValueError: They are not those of a training.
    """
    kept = {name: value for name, value in cfg.items() if name not in MAY_CHANGE}
    parts = [kept.get("sae"), kept.get("model_a"), kept.get("model_b")]
    others = kept.get("other_saes")
    if not isinstance(others, list) or not all(isinstance(x, dict) for x in (*parts, *others)):
        raise ValueError(
            "These are not settings of a training: a crosscoder or a model is missing."
        )
    for sae in (kept["sae"], *kept["other_saes"]):
        sae["metadata"] = None
    for model in ("model_a", "model_b"):
        kept[model] = {
            **kept[model],
            "model_name": None,
            "device": None,
            "drop_unused_layers": None,
        }
    return json.loads(json.dumps(kept))


def is_run_of(cfg: CrosscoderRunnerConfig) -> bool:
    """Whether the output folder holds what this training would make.

    Raises:
        ValueError: It holds another run, and may not be overwritten.
    """
    path = Path(cfg.output_path or "") / RUNNER_CFG_FILENAME
    difference: str | None = f"{RUNNER_CFG_FILENAME} is not there"
    if path.is_file():
        try:
            was = CrosscoderRunnerConfig.from_dict(read_object(path)).to_dict()
            difference = first_difference(deciding_settings(was), deciding_settings(cfg.to_dict()))
        except ValueError as error:
            difference = f"{RUNNER_CFG_FILENAME} is not this version's: {error}"
    if difference is not None and not cfg.overwrite:
        raise ValueError(
            f"Output folder {cfg.output_path} holds another run: {difference}. Name another, or pass --overwrite "
            "besides --resume."
        )
    return difference is None


def check_tests(cfg: CrosscoderRunnerConfig) -> None:
    """Refuse tests of exclusive latents when no crosscoder has any.

    Raises:
        ValueError: `test_at` is set, and none is a DFC.
    """
    if cfg.test_at and not any(isinstance(s, DFCTrainingCrosscoderConfig) for s in cfg.all_saes):
        raise ValueError(
            f"test_at={cfg.test_at} is for a dfc, and this is a {cfg.sae.architecture()}: it has no exclusive "
            "latents to test."
        )


def check_rows(rows: Sequence[PairedRows]) -> None:
    """Refuse activations that hold NaN or infinity; those that `paired_activations` gives hold none.

    Raises:
        ValueError: Some do.
    """
    broken = [i for i, of_batch in enumerate(rows) if not of_batch.acts.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(rows)} batches of activations hold NaN or infinity, the first is number {broken[0]}. Leave "
            "such rows out."
        )


def check_checkpoints(cfg: CrosscoderRunnerConfig) -> None:
    """Refuse to begin where another training left checkpoints: they would be taken for this one's.

    Raises:
        ValueError: There are some, and neither resuming nor overwriting is asked for.
    """
    if cfg.checkpoint_path is None or cfg.resume or cfg.overwrite:
        return
    if checkpoints(Path(cfg.checkpoint_path)):
        raise ValueError(
            f"{cfg.checkpoint_path} holds checkpoints of a training. Pass --resume to go on with it, --overwrite to "
            "begin anew, or name another checkpoint_path."
        )


def with_models(
    cfg: CrosscoderRunnerConfig, models: dict[str, dict[str, Any]]
) -> CrosscoderRunnerConfig:
    """The same settings with the models' hooks, their widths where they are 0, and the steps of the tests.

    Args:
        cfg: Settings.
        models: `ModelPair.describe()`, or what a cache says of its models.

    Raises:
        ValueError: A width is set, but is not the model's.
    """
    first, *others = [_with_models(sae, cfg, models) for sae in cfg.all_saes]
    return replace(
        cfg,
        sae=first,
        other_saes=others,
        model_a=replace(cfg.model_a, hook_name=models["model_a"]["hook_name"]),
        model_b=replace(cfg.model_b, hook_name=models["model_b"]["hook_name"]),
    )


def _with_models(
    sae: CrosscoderTrainingConfig, cfg: CrosscoderRunnerConfig, models: dict[str, dict[str, Any]]
) -> CrosscoderTrainingConfig:
    widths: dict[str, int] = {}
    for which in ("a", "b"):
        said, model = getattr(sae, f"d_{which}"), models[f"model_{which}"]
        widths[f"d_{which}"] = model["d_model"]
        if said not in (0, model["d_model"]):
            raise ValueError(
                f"sae.d_{which}={said}, but hook {model['hook_name']!r} of model {model['model_name']!r} is "
                f"{model['d_model']} wide. Set d_{which}={model['d_model']}, or leave it out."
            )
    is_tested = cfg.test_at and isinstance(sae, DFCTrainingCrosscoderConfig)
    tests = exclusivity_tests(cfg.test_at, cfg.training_steps) if is_tested else {}
    # Training writes into the metadata: a copy, or two runs from one configuration would name each other's models.
    return replace(sae, d_in=0, metadata=deepcopy(sae.metadata), **widths, **tests)
