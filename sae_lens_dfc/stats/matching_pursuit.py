"""Measures how well a few dictionary directions explain a direction, by orthogonal matching
pursuit."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

N_PARTS = 5
ROWS_PER_PRODUCT = 512


@torch.no_grad()
def explained_by_few(
    directions: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "latents d"],
    own: Int[Tensor, " n"] | None = None,
    n_parts: int = N_PARTS,
) -> Float[Tensor, " n"]:
    """Share of each direction's squared norm that a few dictionary directions explain, chosen by
    orthogonal matching pursuit.

    A dictionary with more directions than dimensions spans the whole space, so only sparse
    combinations are informative.

    Args:
        directions: Directions to explain; the result for a zero direction is NaN.
        dictionary: Directions to explain it with.
        own: Index in the dictionary of the direction itself, which is excluded; negative if it is
            not in the dictionary.
        n_parts: Maximum number of dictionary directions used for each.

    Returns:
        Shares from 0 (orthogonal to all) to 1.

    >>> explained_by_few(torch.tensor([[3.0, 4.0, 0.0]]), torch.eye(3)[1:], n_parts=1)
    tensor([0.6400])
    """
    atoms = normalize(dictionary)
    mine = torch.full((len(directions),), -1).to(atoms.device) if own is None else own
    shares = [
        _chunk(d, atoms, m, n_parts)
        for d, m in zip(
            directions.split(ROWS_PER_PRODUCT), mine.split(ROWS_PER_PRODUCT), strict=True
        )
    ]
    return torch.cat(shares) if shares else directions.new_zeros(0)


def _chunk(
    directions: Tensor, atoms: Tensor, own: Int[Tensor, " n"], n_parts: int
) -> Float[Tensor, " n"]:
    target = normalize(directions)
    has_own = (own >= 0).nonzero()[:, 0]
    residual, basis = target, target.new_zeros(len(target), 0, target.shape[1])
    for _ in range(min(n_parts, len(atoms))):
        fit = (residual @ atoms.T).abs()
        fit[has_own, own[has_own]] = -1
        best = fit.max(dim=1)
        # A zero atom if the direction itself is the only one in the dictionary.
        atom = atoms[best.indices] * (best.values >= 0)[:, None]
        # Gram-Schmidt; an atom that was already chosen has no component left and adds nothing.
        rest = atom - torch.einsum("nk,nkd->nd", torch.einsum("nd,nkd->nk", atom, basis), basis)
        norm = rest.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 1e-4, rest / norm.clamp(min=1e-4), 0)
        basis = torch.cat([basis, unit[:, None]], dim=1)
        residual = residual - (residual * unit).sum(dim=-1, keepdim=True) * unit
    share = 1 - residual.pow(2).sum(dim=-1)
    return torch.where(directions.norm(dim=-1) > 0, share, torch.nan)
