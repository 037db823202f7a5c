"""SAELens' trainer for one or several crosscoders on one stream, with checkpoints from which it goes on exactly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.types import MultiHookDataProvider
from typing_extensions import override

from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.evaluate import HeldOutEvaluator
from sae_lens_dfc.provider import Batches
from sae_lens_dfc.training.checkpoint import load_checkpoint, save_checkpoint

# SAELens routes batches to crosscoders by the hook they are from; here all of them take the same.
PAIR = "pair"


class CrosscoderTrainer(MultiSAETrainer):
    """SAELens' `MultiSAETrainer` where every crosscoder takes the same batches.

    Only its checkpoints differ: SAELens' are pickled, do not say where the data stands, and are
    written in place.

    Args:
        cfg: SAELens' settings, the same for all.
        crosscoders: The crosscoders by name.
        batches: Batches of raw activations.
        checkpoint_values: Gives what to keep with a checkpoint besides.
        evaluator: Measures on held-out pairs, at SAELens' intervals.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        crosscoders: Mapping[str, TrainingCrosscoder[Any]],
        batches: Batches,
        checkpoint_values: Callable[[], Mapping[str, Any]],
        evaluator: HeldOutEvaluator | None = None,
    ):
        super().__init__(
            cfg,
            saes=dict(crosscoders),
            hook_names=dict.fromkeys(crosscoders, PAIR),
            data_provider=({PAIR: batch} for batch in batches),
            evaluator=None if evaluator is None else _of_each(evaluator),
        )
        self.batches = batches
        self.checkpoint_values = checkpoint_values

    @override
    def _checkpoint_if_needed(self) -> None:
        passed = [t for t in self.checkpoint_thresholds if self.n_training_samples > t]
        if passed and self.cfg.checkpoint_path is not None:
            folder = Path(self.cfg.checkpoint_path) / str(self.n_training_samples)
            save_checkpoint(folder, self.trainers, self.batches.after, self.checkpoint_values())
            del self.checkpoint_thresholds[: len(passed)]

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint; the batches must already begin where it stands.

        Raises:
            ValueError: The checkpoint cannot be read.
        """
        load_checkpoint(folder, self.trainers)
        first = next(iter(self.trainers.values()))
        self.n_training_samples = first.n_training_samples
        self.n_training_steps = first.n_training_steps
        self.checkpoint_thresholds = [
            t for t in self.checkpoint_thresholds if t >= self.n_training_samples
        ]


def _of_each(evaluator: HeldOutEvaluator) -> Callable[..., dict[str, Any]]:
    def measures(
        saes: dict[str, TrainingSAE[Any]],
        data_provider: MultiHookDataProvider,  # noqa: ARG001
        activation_scalers: dict[str, ActivationScaler],
        hook_names: dict[str, str],  # noqa: ARG001
    ) -> dict[str, Any]:
        return {
            f"{name}/{measure}": value
            for name, sae in saes.items()
            for measure, value in evaluator(sae, iter(()), activation_scalers[name]).items()  # type: ignore[arg-type]
        }

    return measures
