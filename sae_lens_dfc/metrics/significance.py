"""How surprising a measure is beside its null, and what is left after many latents were looked at."""

import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control
from torch import Tensor

QUANTILE = 0.95


def empirical_p(values: Float[Tensor, " n"], reference: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
    """Share of the reference at or above each value, the value itself counted: `(1 + #{r >= v}) / (1 + m)`.

    Never 0, since so many draws cannot tell. NaN is at or above nothing, and is not counted in the reference.

    >>> empirical_p(torch.tensor([3.0, 0.5]), torch.tensor([1.0, 2.0, 4.0]))
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    known = reference[~reference.isnan()].double().sort().values
    n_below = torch.searchsorted(known, values.double().nan_to_num(-torch.inf))
    return (1 + len(known) - n_below).double() / (1 + len(known))


def benjamini_hochberg(p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The false discovery rate at which each would just be accepted (Benjamini & Hochberg 1995).

    >>> benjamini_hochberg(torch.tensor([0.01, 0.5, 0.02], dtype=torch.double)).tolist()
    [0.03, 0.5, 0.03]
    """
    if len(p) == 0:
        return p.double()
    return torch.from_numpy(false_discovery_control(p.double().cpu().numpy())).to(p.device)


def share_beyond(
    values: Float[Tensor, " n"], null: Float[Tensor, " m"], quantile: float = QUANTILE
) -> float:
    """Share of the values above the null's quantile; NaN where there is nothing on either side.

    >>> share_beyond(torch.tensor([1.0, 5.0]), torch.arange(3.0))
    0.5
    """
    values, null = (x[~x.isnan()].double() for x in (values, null))
    if len(values) == 0 or len(null) == 0:
        return float("nan")
    return (values > torch.quantile(null, quantile)).double().mean().item()
