"""The recipe, read top to bottom: two models and text in, a trained crosscoder out."""

import json
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.activations import PairCounts, PairedRows
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.dfc import exclusivity_tests
from sae_lens_dfc.evaluate import HeldOutEvaluator
from sae_lens_dfc.output import all_or_nothing, check_output
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.provider import epochs, shuffled_batches
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText

logger = logging.getLogger(__name__)


class CrosscoderTrainingRunner:
    """Trains a crosscoder on two models and one text.

    Args:
        cfg: All settings.
        override_pair: Models already loaded, in place of those `cfg` names.
        override_rows: Activations already computed, in place of running the models.

    Raises:
        ValueError: Something in the configuration does not fit the models, the text or the output folder.
    """

    def __init__(
        self,
        cfg: CrosscoderRunnerConfig,
        override_pair: ModelPair | None = None,
        override_rows: Sequence[PairedRows] | None = None,
    ):
        if cfg.output_path is not None:
            check_output(cfg.output_path, cfg.overwrite)
        self.pair = override_pair or ModelPair.load(cfg.model_a, cfg.model_b)
        self.cfg = with_models(cfg, self.pair)
        if override_rows is None:
            _ = self.data  # raises when the text does not fit
        self.counts = PairCounts()
        """What became of the training text, counted once however often it is repeated."""
        self._rows = override_rows
        self._is_text_counted = False

    @cached_property
    def data(self) -> PairedText:
        """The text; rows already computed do not open it again."""
        return PairedText(self.cfg, self.pair)

    def run(self) -> TrainingCrosscoder[Any]:
        """Train, save if `output_path` is set, and return the crosscoder in eval mode."""
        cfg = self.cfg
        self.counts, self._is_text_counted = PairCounts(), False
        torch.manual_seed(cfg.seed)
        architecture = cfg.sae.architecture()
        crosscoder = get_sae_training_class(architecture)[0](cfg.sae)
        assert isinstance(crosscoder, TrainingCrosscoder)
        crosscoder.to(cfg.device)
        self._set_metadata(crosscoder)
        # Before the batches: their thread runs the models too, and hooks are not made for two threads.
        evaluator = self._evaluator()
        batches = shuffled_batches(
            epochs(self.training_rows, cfg.keep_in_memory),
            batch_size=cfg.train_batch_size_tokens,
            buffer_size=cfg.n_batches_in_buffer * cfg.train_batch_size_tokens,
            mix_fraction=cfg.activations_mixing_fraction,
            prefetch=cfg.prefetch_llm_batches,
        )
        try:
            n_batches = cfg.n_batches_for_norm_estimate
            sample = tqdm(islice(batches, n_batches), "Estimating scales", n_batches, leave=False)
            crosscoder.fit_normalization(torch.cat(list(sample)).to(cfg.device))
            trainer = SAETrainer(
                cfg=cfg.to_sae_trainer_config(),
                sae=crosscoder,
                data_provider=batches,
                evaluator=evaluator,
            )
            self._start_wandb()
            trainer.fit()
        finally:
            if isinstance(batches, PrefetchingIterator):
                batches.close()
            if cfg.logger.log_to_wandb:
                wandb.finish()
        crosscoder.eval()
        n_samples = trainer.n_training_samples
        n_pairs = min(n_samples, self.counts.pairs)  # a batch made ahead may not have been used
        crosscoder.cfg.metadata.samples_trained, crosscoder.cfg.metadata.pairs_trained = (
            n_samples,
            n_pairs,
        )
        logger.info("Trained on %d samples of %d distinct pairs", n_samples, n_pairs)
        if cfg.output_path is not None:
            with all_or_nothing(cfg.output_path) as folder:
                self._save(crosscoder, trainer.log_feature_sparsity, folder)
        return crosscoder

    def training_rows(self) -> Iterator[PairedRows]:
        """One pass over the training text."""
        if self._rows is not None:
            self.counts.pairs = sum(len(rows.acts) for rows in self._rows)
            return iter(self._rows)
        counts = PairCounts() if self._is_text_counted else self.counts
        self._is_text_counted = True
        return self.data.rows(self.data.training_contexts(counts), counts)

    def _set_metadata(self, crosscoder: TrainingCrosscoder[Any]) -> None:
        metadata = crosscoder.cfg.metadata
        for name, value in self.pair.describe().items():
            metadata[name] = value
        metadata.model_name = f"{self.pair.a.name} x {self.pair.b.name}"
        metadata.hook_name = f"{self.pair.a.hook_name} x {self.pair.b.hook_name}"
        metadata.dataset_path = self.cfg.dataset_path
        metadata.context_size = self.cfg.context_size

    def _evaluator(self) -> HeldOutEvaluator | None:
        if not self.cfg.logger.log_to_wandb:
            return None
        counts = PairCounts()
        contexts = list(self.data.held_out_contexts(counts))
        rows = self.data.collect(contexts, counts, "Held-out activations")
        return HeldOutEvaluator([batch.acts for batch in rows])

    def _start_wandb(self) -> None:
        log = self.cfg.logger
        if log.log_to_wandb:
            wandb.init(
                project=log.wandb_project,
                entity=log.wandb_entity,
                config=self.cfg.to_dict(),
                name=log.run_name,
                id=log.wandb_id,
            )

    def _save(
        self, crosscoder: TrainingCrosscoder[Any], log_feature_sparsity: Tensor, folder: Path
    ) -> None:
        crosscoder.save_inference_model(folder)
        save_file({"sparsity": log_feature_sparsity}, folder / SPARSITY_FILENAME)
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict(), indent=2))


def with_models(cfg: CrosscoderRunnerConfig, pair: ModelPair) -> CrosscoderRunnerConfig:
    """The same settings with the models' hooks, their widths where they are 0, and the steps of the tests.

    Raises:
        ValueError: A width is set, but is not the model's.
    """
    for which, model in (("a", pair.a), ("b", pair.b)):
        said = getattr(cfg.sae, f"d_{which}")
        if said not in (0, model.d_model):
            raise ValueError(
                f"sae.d_{which}={said}, but hook {model.hook_name!r} of model {model.name!r} is {model.d_model} wide. "
                f"Set d_{which}={model.d_model}, or leave it out."
            )
    # Training writes into the metadata: a copy, or two runs from one configuration would name each other's models.
    metadata = deepcopy(cfg.sae.metadata)
    tests = exclusivity_tests(cfg.test_at, cfg.training_steps) if cfg.test_at else {}
    return replace(
        cfg,
        sae=replace(cfg.sae, d_in=0, d_a=pair.d_a, d_b=pair.d_b, metadata=metadata, **tests),
        model_a=replace(cfg.model_a, hook_name=pair.a.hook_name),
        model_b=replace(cfg.model_b, hook_name=pair.b.hook_name),
    )
