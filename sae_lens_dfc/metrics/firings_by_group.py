"""On which group of text each latent fires."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluation_data import PairData


@torch.no_grad()
def firings_by_group(crosscoder: Crosscoder, data: PairData) -> dict[str, Float[Tensor, " d_sae"]]:
    """For each group of the held-out text, the share of each latent's firings; NaN if it never
    fires."""
    names = list(dict.fromkeys(context.group for context in data.contexts))
    of_context = torch.tensor([names.index(context.group) for context in data.contexts])
    counts = torch.zeros(len(names), crosscoder.cfg.d_sae)
    for rows in data.held_out:
        fires = (crosscoder.encode(rows.acts.to(crosscoder.device)) > 0).float().cpu()
        counts.index_add_(0, of_context[rows.context], fires)
    return dict(zip(names, counts / counts.sum(dim=0), strict=True))


def top_group(shares: Mapping[str, Float[Tensor, " d_sae"]], latent: int) -> tuple[str, float]:
    """The group of text on which a latent fires most, and the share of its firings there; without a
    name and NaN if it never fires.

    >>> top_group({"en": torch.tensor([0.25]), "de": torch.tensor([0.75])}, 0)
    ('de', 0.75)
    """
    of_latent = {name: values[latent].item() for name, values in shares.items()}
    most = max(of_latent, key=lambda name: of_latent[name])
    return (most if of_latent[most] > 0 else "", of_latent[most])
