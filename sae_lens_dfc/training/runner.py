"""The recipe, read top to bottom: two models and text in, trained crosscoders out."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import get_sae_training_class
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc import ranks
from sae_lens_dfc.activations import Bookmark, Marked, PairedRows
from sae_lens_dfc.cache import PairedActivationsCache
from sae_lens_dfc.contexts import PairCounts
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig, TrainingCrosscoder
from sae_lens_dfc.evaluate import HeldOutEvaluator
from sae_lens_dfc.manifest import first_difference
from sae_lens_dfc.output import all_or_nothing, check_output, is_made, sole_user
from sae_lens_dfc.pair import ModelPair
from sae_lens_dfc.provider import Batches, epochs, epochs_in_memory, shuffled
from sae_lens_dfc.stopping import Stop
from sae_lens_dfc.training.caching import with_cache
from sae_lens_dfc.training.checkpoint import (
    checkpoints,
    load_place,
    remove_checkpoints,
    tidy_checkpoints,
)
from sae_lens_dfc.training.checks import (
    check_checkpoints,
    check_rows,
    check_tests,
    deciding_settings,
    is_run_of,
    with_models,
)
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data import PairedText, open_pair
from sae_lens_dfc.training.parallel import data_parallel, for_this_rank
from sae_lens_dfc.training.trainer import CrosscoderTrainer

logger = logging.getLogger(__name__)


Crosscoders = dict[str, TrainingCrosscoder[Any]]


class CrosscoderTrainingRunner:
    """Trains a crosscoder, or several at once, on two models and one text.

    Args:
        cfg: All settings.
        override_pair: Models already loaded, in place of those `cfg` names.
        override_rows: Activations already computed, in place of running the models.

    Raises:
        ValueError: Something in the configuration does not fit the models, the text, the cache or the output folder.
    """

    def __init__(
        self,
        cfg: CrosscoderRunnerConfig,
        override_pair: ModelPair | None = None,
        override_rows: Sequence[PairedRows] | None = None,
    ):
        resumes_finished = cfg.resume and cfg.output_path is not None and is_made(cfg.output_path)
        if cfg.output_path is not None and not resumes_finished:
            check_output(cfg.output_path, cfg.overwrite)
        check_checkpoints(cfg)
        check_tests(cfg)
        self.cache: PairedActivationsCache | None = None
        if cfg.cache_path is not None:
            self.cache = PairedActivationsCache(cfg.cache_path)
            cfg = with_cache(cfg, self.cache)
        elif cfg.n_ranks != ranks.world_size():
            raise ValueError(
                f"n_ranks={cfg.n_ranks}, and {ranks.world_size()} processes are here. Leave it to torchrun."
            )
        self.cfg = cfg
        self._override_pair = override_pair
        self.models = self.cache.models if self.cache else self.pair.describe()
        """What is known of the two models."""
        self.cfg = with_models(cfg, self.models)
        self.is_finished = resumes_finished and is_run_of(self.cfg)
        """Whether the training to resume has ended, and its result is in the output folder."""
        if override_rows is None and self.cache is None:
            _ = self.data  # raises when the text does not fit
        self.counts = PairCounts()
        """What became of the training text, counted once however often it is repeated."""
        check_rows(override_rows or ())
        self._rows = override_rows
        self._is_text_counted = False

    @cached_property
    def pair(self) -> ModelPair:
        """The two models; training on a cache does not open them."""
        return self._override_pair or open_pair(self.cfg)

    @cached_property
    def data(self) -> PairedText:
        """The text that this process reads; rows already computed do not open it."""
        return PairedText(self.cfg, self.pair, ranks.rank())

    def run(self) -> TrainingCrosscoder[Any]:
        """Train, save if `output_path` is set, and return the crosscoder in eval mode.

        Raises:
            ValueError: There are several: `run_all` returns them.
        """
        if self.cfg.other_saes:
            raise ValueError(f"{len(self.cfg.saes)} crosscoders are configured. Call run_all().")
        (only,) = self.run_all().values()
        return only

    def run_all(self) -> Crosscoders:
        """Train all crosscoders on the same batches, save each if `output_path` is set, and return them by name.

        Ctrl-C (SIGINT), SIGTERM and SIGHUP end it after the step that it is at.

        Raises:
            ValueError: Another process is at work on the output folder or the checkpoints.
            Stopped: It was asked to end. Its `KeyboardInterrupt` says where the checkpoint is.
        """
        stop = Stop()
        with self._claims(), stop.on_signals():
            return self._run_all(stop)

    @contextmanager
    def _claims(self) -> Iterator[None]:
        """Output folder and checkpoints are this training's, on one rank for all."""
        cfg = self.cfg
        paths = [path for path in (cfg.output_path, cfg.checkpoint_path) if path is not None]
        with ExitStack() as held:
            if ranks.rank() == 0:
                for path in paths:
                    held.enter_context(sole_user(path))
                if cfg.checkpoint_path is not None:
                    tidy_checkpoints(Path(cfg.checkpoint_path))
            if cfg.output_path is not None and not (cfg.resume and is_made(cfg.output_path)):
                # While the models were opened, another process may have ended with it.
                check_output(cfg.output_path, cfg.overwrite)
                check_checkpoints(cfg)
            yield

    def _run_all(self, stop: Stop) -> Crosscoders:
        cfg = self.cfg
        self.counts, self._is_text_counted = PairCounts(), False
        crosscoders = {
            name: self._new(sae, cfg.seed + i) for i, (name, sae) in enumerate(cfg.saes.items())
        }
        # Before the batches: their thread runs the models too, and hooks are not made for two threads.
        evaluator = self._evaluator()
        checkpoint = self._checkpoint()
        start = None if checkpoint is None else self._read_place(checkpoint)
        batches = Batches(self._marked_batches(start, stop), cfg.prefetch_llm_batches, start, stop)
        try:
            if checkpoint is None:
                self._fit_normalization(crosscoders, batches)
            trainer = CrosscoderTrainer(
                for_this_rank(cfg.to_sae_trainer_config()),
                crosscoders,
                batches,
                lambda: {**self._identity, "counts": self.counts.to_dict()},
                evaluator,
            )
            self._start_wandb()
            with ExitStack() as open_trainers:
                for one in trainer.trainers.values():
                    self._compile(one.sae)
                    open_trainers.enter_context(data_parallel(one))
                if checkpoint is not None:
                    trainer.resume(checkpoint)
                trainer.fit()
        finally:
            batches.close()
            if self._logs:
                wandb.finish()
        self._finish(crosscoders, trainer)
        return crosscoders

    # --- before training ---

    @property
    def _identity(self) -> dict[str, Any]:
        """What a training must have in common with the checkpoint that it goes on from, as plain values."""
        has_text = self._rows is None and self.cache is None
        return {
            "cfg": self.cfg.to_dict(),
            "models": self.models,
            "cache": self.cache.fingerprint if self.cache else None,
            "text": [s.fingerprint for s in self.data.sources] if has_text else None,
        }

    def _new(self, sae: CrosscoderTrainingConfig, seed: int) -> TrainingCrosscoder[Any]:
        torch.manual_seed(seed)
        crosscoder = get_sae_training_class(sae.architecture())[0](sae)
        assert isinstance(crosscoder, TrainingCrosscoder)
        crosscoder.check_batch(self.cfg.train_batch_size_tokens)
        crosscoder.to(self.cfg.device)
        metadata = crosscoder.cfg.metadata
        a, b = self.models["model_a"], self.models["model_b"]
        metadata.model_a, metadata.model_b = a, b
        metadata.model_name = f"{a['model_name']} x {b['model_name']}"
        metadata.hook_name = f"{a['hook_name']} x {b['hook_name']}"
        metadata.dataset_path = ", ".join(source.dataset_path for source in self.cfg.all_sources)
        metadata.context_size = self.cfg.context_size
        return crosscoder

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from, if that is asked for and there is one."""
        if self.cfg.checkpoint_path is None:
            return None
        found = checkpoints(Path(self.cfg.checkpoint_path))
        if not self.cfg.resume:
            # Of a training that is overwritten; left there, they would be taken for this one's.
            remove_checkpoints(found)
            return None
        if not found:
            logger.info(
                "No checkpoint in %s: training starts at its beginning", self.cfg.checkpoint_path
            )
            return None
        logger.info("Training goes on from %s", found[-1])
        return found[-1]

    def _read_place(self, checkpoint: Path) -> Bookmark | None:
        place, values = load_place(checkpoint)
        now = self._identity
        if not values.keys() >= {*now, "counts"} or not isinstance(values["cfg"], dict):
            raise ValueError(f"Checkpoint {checkpoint} does not say of which training it is.")
        difference = first_difference(
            {**{name: values[name] for name in now}, "cfg": deciding_settings(values["cfg"])},
            {**now, "cfg": deciding_settings(now["cfg"])},
        )
        if difference:
            raise ValueError(
                f"Checkpoint {checkpoint} is of another training: {difference}. Resume with the settings it was begun "
                "with, or name another checkpoint_path."
            )
        self.counts.load(values["counts"])
        rows = None if place is None else place.values.get("rows")
        self._is_text_counted = isinstance(rows, dict) and rows.get("epoch", 0) != 0
        return place

    def _fit_normalization(self, crosscoders: Crosscoders, batches: Batches) -> None:
        n_batches = self.cfg.n_batches_for_norm_estimate
        sample = tqdm(islice(batches, n_batches), "Estimating scales", n_batches, leave=False)
        acts = torch.cat(list(sample)).to(self.cfg.device)
        for crosscoder in crosscoders.values():
            crosscoder.fit_normalization(acts)

    def _compile(self, crosscoder: TrainingCrosscoder[Any]) -> None:
        if self.cfg.compile_sae:
            crosscoder.training_forward_pass = torch.compile(
                crosscoder.training_forward_pass, mode=self.cfg.sae_compilation_mode
            )

    # --- the data ---

    def _marked_batches(self, start: Bookmark | None, stop: Stop) -> Iterator[Marked]:
        cfg = self.cfg
        batch_size = cfg.train_batch_size_tokens // ranks.world_size()
        if self.cache is not None:
            return self.cache.batches(
                batch_size,
                cfg.seed,
                cfg.cache_window_shards,
                start,
                share=(ranks.rank(), ranks.world_size()),
            )
        in_memory = cfg.keep_in_memory or self._rows is not None
        repeat = epochs_in_memory if in_memory else epochs
        return shuffled(
            lambda place: stop.between(repeat(self.training_rows, place)),
            batch_size,
            cfg.n_batches_in_buffer * batch_size,
            cfg.activations_mixing_fraction,
            cfg.seed,
            start,
        )

    def training_rows(self, start: Bookmark | None = None) -> Iterator[PairedRows]:
        """One pass over the training text, from a place on."""
        if self._rows is not None:
            self.counts.pairs = sum(len(rows.acts) for rows in self._rows)
            return iter(self._rows)
        if self._is_text_counted:
            return self.data.rows("training", PairCounts(), start)
        self._is_text_counted = True
        if start is None:
            self.counts = PairCounts()
        return self.data.rows("training", self.counts, start)

    # --- logging and saving ---

    @property
    def _logs(self) -> bool:
        return self.cfg.logger.log_to_wandb and ranks.rank() == 0

    def _evaluator(self) -> HeldOutEvaluator | None:
        if not self._logs:
            return None
        held_out = PairedText(self.cfg, self.pair).collect("held_out", "Held-out activations")
        return HeldOutEvaluator([rows.acts for rows in held_out.rows])

    def _start_wandb(self) -> None:
        log = self.cfg.logger
        if self._logs:
            wandb.init(
                project=log.wandb_project,
                entity=log.wandb_entity,
                config=self.cfg.to_dict(),
                name=log.run_name,
                id=log.wandb_id,
                resume="allow" if self.cfg.resume else None,
            )

    def _finish(self, crosscoders: Crosscoders, trainer: CrosscoderTrainer) -> None:
        n_samples = trainer.n_training_samples
        n_pairs = len(self.cache) if self.cache else self._total(self.counts.pairs)
        n_pairs = min(n_samples, n_pairs)  # a batch made ahead may not have been used
        for crosscoder in crosscoders.values():
            crosscoder.eval()
            metadata = crosscoder.cfg.metadata
            metadata.samples_trained, metadata.pairs_trained = n_samples, n_pairs
        logger.info("Trained on %d samples of %d distinct pairs", n_samples, n_pairs)
        if self.cfg.output_path is None or ranks.rank() > 0:
            return
        with all_or_nothing(self.cfg.output_path) as folder:
            several = len(crosscoders) > 1
            if several:
                _write_cfg(self.cfg, folder)
            for name, crosscoder in crosscoders.items():
                # One run fills the folder; of several, each has a folder in it that is a run of its own.
                own = folder / name if several else folder
                sparsity = trainer.trainers[name].log_feature_sparsity
                self._save(crosscoder, self.cfg.of_one(name), sparsity, own)

    def _save(
        self,
        crosscoder: TrainingCrosscoder[Any],
        cfg: CrosscoderRunnerConfig,
        log_feature_sparsity: Tensor,
        folder: Path,
    ) -> None:
        crosscoder.save_inference_model(folder)
        save_file({"sparsity": log_feature_sparsity}, folder / SPARSITY_FILENAME)
        _write_cfg(cfg, folder)

    def _total(self, n: int) -> int:
        return int(ranks.total(torch.tensor(n, device=self.cfg.device)))


def _write_cfg(cfg: CrosscoderRunnerConfig, folder: Path) -> None:
    (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict(), indent=2) + "\n")
