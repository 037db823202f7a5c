"""Exports the public API of `sae_lens_dfc`; importing it registers the architectures with
SAELens."""

from sae_lens import register_sae_class, register_sae_training_class

from sae_lens_dfc.crosscoders.architectures.batchtopk import (
    BatchTopKTrainingCrosscoder,
    BatchTopKTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.architectures.delta import (
    DeltaTrainingCrosscoder,
    DeltaTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.architectures.dfc import (
    DFCTrainingCrosscoder,
    DFCTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.architectures.dsf import (
    DSFTrainingCrosscoder,
    DSFTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.architectures.standard import (
    StandardTrainingCrosscoder,
    StandardTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig, load_crosscoder
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.data.cache.build import cache_activations
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.config import CacheConfig, SourceConfig
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.synthetic import ToyPair, ToyPairConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner
from sae_lens_dfc.training.trainer import CrosscoderSAETrainer

__all__ = [
    "BatchTopKTrainingCrosscoder",
    "BatchTopKTrainingCrosscoderConfig",
    "CacheConfig",
    "Crosscoder",
    "CrosscoderConfig",
    "CrosscoderRunnerConfig",
    "CrosscoderSAETrainer",
    "CrosscoderTrainingRunner",
    "DFCTrainingCrosscoder",
    "DFCTrainingCrosscoderConfig",
    "DSFTrainingCrosscoder",
    "DSFTrainingCrosscoderConfig",
    "DeltaTrainingCrosscoder",
    "DeltaTrainingCrosscoderConfig",
    "HookedModel",
    "ModelConfig",
    "ModelPair",
    "PairedActivationsCache",
    "Partition",
    "SourceConfig",
    "StandardTrainingCrosscoder",
    "StandardTrainingCrosscoderConfig",
    "ToyPair",
    "ToyPairConfig",
    "cache_activations",
    "load_crosscoder",
]

for _config, _crosscoder in (
    (StandardTrainingCrosscoderConfig, StandardTrainingCrosscoder),
    (BatchTopKTrainingCrosscoderConfig, BatchTopKTrainingCrosscoder),
    (DSFTrainingCrosscoderConfig, DSFTrainingCrosscoder),
    (DeltaTrainingCrosscoderConfig, DeltaTrainingCrosscoder),
    (DFCTrainingCrosscoderConfig, DFCTrainingCrosscoder),
):
    register_sae_training_class(_config.architecture(), _crosscoder, _config)
register_sae_class(CrosscoderConfig.architecture(), Crosscoder, CrosscoderConfig)
