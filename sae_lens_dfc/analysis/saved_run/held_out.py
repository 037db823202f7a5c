"""Opens a saved run: its crosscoder, models and held-out text."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.results import LATENTS_FILENAME, read_evidence
from sae_lens_dfc.analysis.saved_run.run_text import OwnSource, own_source, text_signs, with_sources
from sae_lens_dfc.core.parsing import read_object
from sae_lens_dfc.core.terminal import MOST_OF_OURS, said_by
from sae_lens_dfc.crosscoders.inference import Crosscoder, load_crosscoder
from sae_lens_dfc.data.config import SourceConfig
from sae_lens_dfc.data.contexts import Part
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText, chosen_formats, open_pair
from sae_lens_dfc.metrics.evaluate import check_models
from sae_lens_dfc.metrics.exclusivity.decoders import relative_decoder_norms
from sae_lens_dfc.metrics.exclusivity.evidence import LatentEvidence
from sae_lens_dfc.models.config import NO_ADAPTER, ModelConfig
from sae_lens_dfc.models.hooked_model import check_device
from sae_lens_dfc.models.number_formats import FORMATS, is_slow, say_kept
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)


def opened_run(
    run: str, options: HeldOutOptions, **of_models: Any
) -> tuple[Crosscoder, CrosscoderRunnerConfig, ModelPair]:
    """A run's crosscoder, its settings updated by the options, and its two models.

    Args:
        run: Folder written by `train` or `demo`.
        options: Current locations of models and text.
        of_models: Overrides for both models' settings.

    Raises:
        ValueError: The folder holds no run, or a model cannot be opened or is not the run's.
    """
    crosscoder = load_crosscoder(run)
    cfg = run_config(run, options)
    if cfg.sae.d_sae != crosscoder.cfg.d_sae:
        raise ValueError(
            f"{run} mixes two trainings: its crosscoder has {crosscoder.cfg.d_sae} latents, but its {RUNNER_CFG_FILENAME} has "
            f"{cfg.sae.d_sae}. Give a folder that training wrote."
        )
    cfg = replace(
        cfg, model_a=replace(cfg.model_a, **of_models), model_b=replace(cfg.model_b, **of_models)
    )
    crosscoder.to(cfg.device)
    _say_formats(run, cfg)
    pair = open_pair(cfg)
    check_models(crosscoder, pair)
    return crosscoder, cfg, pair


def _say_formats(run: str, cfg: CrosscoderRunnerConfig) -> None:
    """Log when the models keep dtypes from training that `auto` would not choose on this device."""
    formats = chosen_formats(cfg)
    for model in (cfg.model_a, cfg.model_b):
        check_device(model.device)
        if model.dtype in FORMATS and is_slow(model.dtype, model.device):
            formats.append((model.dtype, model.device))
    say_kept(f"Run {run}", formats)


def run_config(run: str, options: HeldOutOptions) -> CrosscoderRunnerConfig:
    """A run's settings updated by the options.

    Raises:
        ValueError: The folder has no settings, or they are from another version.
    """
    path = Path(run) / RUNNER_CFG_FILENAME
    if not path.is_file():
        raise ValueError(f"{run} has no {RUNNER_CFG_FILENAME}. Give a folder written by training.")
    values = read_object(path)
    if options.device is not None:
        values["device"] = options.device  # the run's device may not be available here
    try:
        cfg = CrosscoderRunnerConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a configuration of this version's CrosscoderTrainingRunner: {said_by(error, MOST_OF_OURS)} "
            "Train it with that runner, or use the version that did."
        ) from error
    changes: dict[str, Any] = {
        "device": options.device,
        "eval_pairs": options.eval_pairs,
        "model_a": _moved(cfg.model_a, options.model_a, options.base_a, options.device),
        "model_b": _moved(cfg.model_b, options.model_b, options.base_b, options.device),
    }
    cfg = replace(cfg, **{name: value for name, value in changes.items() if value is not None})
    if options.dataset is None:
        return cfg
    return _reading(cfg, options.dataset, _own_source(run, options.dataset, cfg))


def _reading(
    cfg: CrosscoderRunnerConfig, dataset: str, own: OwnSource | None
) -> CrosscoderRunnerConfig:
    """The settings to read a data set: those of the run's own source if it is one, otherwise those
    to read all of it."""
    if own is not None:
        return with_sources(cfg, [own.source])
    return with_sources(replace(cfg, sources=[], n_ranks=1), [SourceConfig(dataset)])


def _own_source(run: str, dataset: str | None, cfg: CrosscoderRunnerConfig) -> OwnSource | None:
    return None if dataset is None else own_source(text_signs(run), cfg, dataset)


def own_config(run: str, options: HeldOutOptions, n_pairs: int) -> CrosscoderRunnerConfig:
    """A run's settings on its own text, even when other text is evaluated, with at most `n_pairs`
    pairs for training or fitting maps."""
    cfg = run_config(run, replace(options, dataset=None))
    cfg = replace(cfg, max_unique_pairs=min(cfg.max_unique_pairs or n_pairs, n_pairs))
    own = _own_source(run, options.dataset, cfg)
    if own is None:
        return cfg
    sources = [own.source if i == own.number else s for i, s in enumerate(cfg.all_sources)]
    return with_sources(cfg, sources)


def is_own_text(run: str, options: HeldOutOptions) -> bool:
    """Whether a run is evaluated on the held-out part of all its own text, at whatever location.

    Raises:
        ValueError: The folder holds no run.
    """
    if options.dataset is None:
        return True
    cfg = run_config(run, replace(options, dataset=None))
    return len(cfg.all_sources) == 1 and _own_source(run, options.dataset, cfg) is not None


def held_out_text(
    run: str, options: HeldOutOptions, pair: ModelPair, by: str | None = None
) -> tuple[PairedText, Part]:
    """The text and part that a run is evaluated on: the held-out part of its own text, or all of
    another text.

    A `dataset` counts as the run's own text if the fingerprints of its rows match; this is logged.

    Raises:
        ValueError: The folder holds no run, or the text cannot be read.
    """
    cfg = run_config(run, replace(options, dataset=None))
    if options.dataset is None:
        return PairedText(cfg, pair, by=by), "held_out"
    signs = text_signs(run)
    own = own_source(signs, cfg, options.dataset)
    if own is not None:
        logger.info(
            "%s contains rows that %s was trained on: only its held-out part is read, every %dth document",
            *(options.dataset, run, cfg.eval_every_n_documents),
        )
    elif not signs:
        logger.warning(
            "%s has no fingerprints of its training rows: all of %s is read as other text, although it may be the run's own",
            *(run, options.dataset),
        )
    part: Part = "all" if own is None else "held_out"
    return PairedText(_reading(cfg, options.dataset, own), pair, by=by), part


def _moved(
    model: ModelConfig, name: str | None, base: str | None, device: str | None
) -> ModelConfig:
    if name is not None:
        model = replace(model, model_name=name, **NO_ADAPTER)
    return replace(model, base=base or model.base, device=device or model.device)


def evidence_of(run: str, folder: str | None, crosscoder: Crosscoder) -> LatentEvidence | None:
    """Exclusivity evidence of the latents, from a folder written by `evaluate --output` or else
    from the run; none if not measured.

    Raises:
        ValueError: The given folder has no evidence, or belongs to another crosscoder.
    """
    path = Path(folder or run) / LATENTS_FILENAME
    evidence = read_evidence(path, crosscoder.cfg.d_sae)
    if evidence is None:
        if folder is not None:
            raise ValueError(
                f"{path} does not exist or has no evidence. Give the folder that `evaluate {run} --output` wrote."
            )
        return None
    own, theirs = relative_decoder_norms(crosscoder).cpu(), evidence.relative_decoder_norm
    if own.shape != theirs.shape or not torch.allclose(own, theirs, atol=1e-3):
        raise ValueError(
            f"{path} belongs to another crosscoder than {run}: their decoder norms differ. Run `sae-lens-dfc evaluate {run} "
            "--output FOLDER` and give that folder."
        )
    return evidence
