"""The BatchTopK crosscoder: every latent is shared, and all compete in one pool."""

from dataclasses import dataclass

from typing_extensions import override

from sae_lens_dfc.crosscoders.architectures.topk import (
    TopKTrainingCrosscoder,
    TopKTrainingCrosscoderConfig,
)


@dataclass(kw_only=True)
class BatchTopKTrainingCrosscoderConfig(TopKTrainingCrosscoderConfig):
    """Settings of a BatchTopK crosscoder (Minder et al., arXiv 2504.02922).

    >>> BatchTopKTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=64, k=4).d_in
    40
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_crosscoder"


class BatchTopKTrainingCrosscoder(TopKTrainingCrosscoder[BatchTopKTrainingCrosscoderConfig]):
    """Keeps the `k * batch` largest scores of the batch, over all latents and pairs."""

    @override
    def topk_groups(self) -> list[tuple[slice, float]]:
        return [(slice(0, self.cfg.d_sae), 1.0)]
