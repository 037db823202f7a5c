"""Defines `CrosscoderTrainingRunner`, which trains crosscoders on two models and a text, from
settings to saved runs."""

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

from sae_lens_dfc.core import distributed
from sae_lens_dfc.core.atomic_write import atomic_folder
from sae_lens_dfc.core.identity import other_devices
from sae_lens_dfc.core.interrupts import GracefulShutdown
from sae_lens_dfc.core.output_folder import check_output, file_lock, is_made
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.activations import PairedRows, StreamState
from sae_lens_dfc.data.batches import Batches
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText, open_pair
from sae_lens_dfc.metrics.evaluate import HeldOutEvaluator
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
    difference,
    is_run_of,
    warn_of_slow_formats,
)
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.data_parallel import data_parallel, for_this_rank
from sae_lens_dfc.training.formats import with_formats_settled
from sae_lens_dfc.training.resolve import resolve
from sae_lens_dfc.training.stream import TrainingStream
from sae_lens_dfc.training.trainer import CrosscoderTrainer

logger = logging.getLogger(__name__)


Crosscoders = dict[str, TrainingCrosscoder[Any]]


class CrosscoderTrainingRunner:
    """Trains one or several crosscoders on two models and one text.

    Args:
        cfg: All settings.
        override_pair: Loaded models to use instead of those in `cfg`.
        override_rows: Precomputed activations to use instead of running the models.

    Raises:
        ValueError: The settings do not fit the models, the text, the cache or the output folder.
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
        self._to_load = with_formats_settled(cfg, self.cache)
        warn_of_slow_formats(self._to_load)
        if self.cache is None and cfg.n_ranks != distributed.world_size():
            raise ValueError(
                f"n_ranks={cfg.n_ranks}, but {distributed.world_size()} processes are running. Leave it to torchrun."
            )
        self._override_pair = override_pair
        self.models = self.cache.models if self.cache else self.pair.describe()
        """Facts about the two models."""
        self.cfg = resolve(self._to_load, self.models, self.cache)
        check_rows(override_rows or ())
        source = override_rows if self.cache is None else self.cache
        self.stream = TrainingStream(
            self.cfg,
            PairedText(self.cfg, self.pair, distributed.rank()) if source is None else source,
        )
        """The batches to train on."""
        self.is_finished = resumes_finished and is_run_of(self.cfg, self._training)
        """Whether the training to resume is already finished, with its result in the output
        folder."""

    @cached_property
    def pair(self) -> ModelPair:
        """The two models; not loaded when training on a cache."""
        return self._override_pair or open_pair(self._to_load)

    def run(self) -> TrainingCrosscoder[Any]:
        """Train, save if `output_path` is set, and return the crosscoder in eval mode.

        Raises:
            ValueError: Several crosscoders are configured; use `run_all`.
        """
        if self.cfg.other_saes:
            raise ValueError(f"{len(self.cfg.saes)} crosscoders are configured. Call run_all().")
        (only,) = self.run_all().values()
        return only

    def run_all(self) -> Crosscoders:
        """Train all crosscoders on the same batches, save each if `output_path` is set, and return
        them by name.

        SIGINT (Ctrl-C), SIGTERM and SIGHUP stop it after the current step.

        Raises:
            ValueError: Another process uses the output folder or the checkpoints.
            Interrupted: A signal stopped it; the message names the checkpoint.
        """
        stop = GracefulShutdown()
        with self._claims(), stop.on_signals():
            return self._run_all(stop)

    @contextmanager
    def _claims(self) -> Iterator[None]:
        """Lock the output folder and the checkpoints for this training, on rank 0."""
        cfg = self.cfg
        paths = [path for path in (cfg.output_path, cfg.checkpoint_path) if path is not None]
        with ExitStack() as held:
            if distributed.rank() == 0:
                for path in paths:
                    held.enter_context(file_lock(path))
                if cfg.checkpoint_path is not None:
                    tidy_checkpoints(Path(cfg.checkpoint_path))
            if cfg.output_path is not None and not (cfg.resume and is_made(cfg.output_path)):
                # Another process may have finished while the models were loading.
                check_output(cfg.output_path, cfg.overwrite)
                check_checkpoints(cfg)
            yield

    def _run_all(self, stop: GracefulShutdown) -> Crosscoders:
        cfg = self.cfg
        crosscoders = {
            name: self._new(sae, cfg.seed + i) for i, (name, sae) in enumerate(cfg.saes.items())
        }
        # Before the batches: their thread runs the models too, and hooks are not thread-safe.
        evaluator = self._evaluator()
        checkpoint = self._checkpoint()
        start, counts = (None, None) if checkpoint is None else self._read_place(checkpoint)
        batches = self.stream.batches(stop, start, counts)
        try:
            if checkpoint is None:
                self._fit_normalization(crosscoders, batches)
            trainer = CrosscoderTrainer(
                for_this_rank(cfg.to_sae_trainer_config()),
                crosscoders,
                batches,
                lambda: {**self._training, "counts": self.stream.counts.to_dict()},
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

    @cached_property
    def _training(self) -> dict[str, Any]:
        """Identity of this training as plain values, which must match that of the checkpoint to
        resume."""
        return {"cfg": self.cfg.to_dict(), "models": self.models, **self.stream.made_of}

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
        # The manifest identifies the cache of a run; the fingerprints of the cache's text identify
        # the text itself.
        of_cache = {"text_of_cache": self.cache.manifest.get("text")} if self.cache else {}
        metadata.made_of = {**self.stream.made_of, **of_cache}
        return crosscoder

    def _checkpoint(self) -> Path | None:
        """The checkpoint to resume from, if `resume` is set and there is one."""
        if self.cfg.checkpoint_path is None:
            return None
        found = checkpoints(Path(self.cfg.checkpoint_path))
        if not self.cfg.resume:
            # Checkpoints of the overwritten training would be mistaken for this one's.
            remove_checkpoints(found)
            return None
        if not found:
            logger.info(
                "No checkpoint in %s: training starts from the beginning", self.cfg.checkpoint_path
            )
            return None
        logger.info("Resuming training from %s", found[-1])
        return found[-1]

    def _read_place(self, checkpoint: Path) -> tuple[StreamState | None, Any]:
        """The stream's state and counts at a checkpoint of this training."""
        place, values = load_place(checkpoint)
        now = self._training
        if not values.keys() >= {*now, "counts"} or not isinstance(values["cfg"], dict):
            raise ValueError(
                f"Checkpoint {checkpoint} does not record which training it belongs to."
            )
        if other := difference(values, now):
            raise ValueError(
                f"Checkpoint {checkpoint} belongs to another training: {other}. Resume with the settings it was started "
                "with, or name another checkpoint_path."
            )
        if devices := other_devices(values["cfg"], now["cfg"]):
            logger.warning(
                "Training resumes on another kind of device, which rounds differently: %s. The result will not be "
                "bit-identical",
                devices,
            )
        return place, values["counts"]

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

    # --- logging and saving ---

    @property
    def _logs(self) -> bool:
        return self.cfg.logger.log_to_wandb and distributed.rank() == 0

    def _evaluator(self) -> HeldOutEvaluator | None:
        if not self._logs:
            return None
        held_out = PairedText(self.cfg, self.pair).collect("held_out", "Held-out activations")
        return HeldOutEvaluator([rows.acts for rows in held_out.rows])

    def _start_wandb(self) -> None:
        log = self.cfg.logger
        if self._logs:
            try:
                wandb.init(
                    project=log.wandb_project,
                    entity=log.wandb_entity,
                    config=self.cfg.to_dict(),
                    name=log.run_name,
                    id=log.wandb_id,
                    resume="allow" if self.cfg.resume else None,
                )
            except wandb.Error as error:
                raise ValueError(
                    f"Weights & Biases does not start: {said_by(error)} Log in with `wandb login`, set WANDB_MODE=offline, or leave "
                    "logger.log_to_wandb out."
                ) from error

    def _finish(self, crosscoders: Crosscoders, trainer: CrosscoderTrainer) -> None:
        n_samples = trainer.n_training_samples
        n_pairs = self.stream.n_pairs
        n_pairs = n_pairs if self.cache else self._total(n_pairs)
        n_pairs = min(n_samples, n_pairs)  # a prefetched batch may be unused
        for crosscoder in crosscoders.values():
            crosscoder.eval()
            metadata = crosscoder.cfg.metadata
            metadata.samples_trained, metadata.pairs_trained = n_samples, n_pairs
        logger.info("Trained on %d samples of %d distinct pairs", n_samples, n_pairs)
        counts = self.stream.counts
        n_texts, n_empty = self._total(counts.texts), self._total(counts.empty)
        if n_empty > 0:
            logger.info("%d of the %d training documents read were empty", n_empty, n_texts)
        if self.cfg.output_path is None or distributed.rank() > 0:
            return
        with atomic_folder(self.cfg.output_path) as folder:
            several = len(crosscoders) > 1
            if several:
                write_cfg(self.cfg, folder)
            for name, crosscoder in crosscoders.items():
                # A single crosscoder fills the folder; of several, each gets a subfolder that is a
                # run of its own.
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
        write_cfg(cfg, folder)

    def _total(self, n: int) -> int:
        return int(distributed.all_reduce_sum(torch.tensor(n, device=self.cfg.device)))


def write_cfg(cfg: CrosscoderRunnerConfig, folder: Path) -> None:
    """Write a run's settings, from which evaluation opens its models and text."""
    (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict(), indent=2) + "\n")
