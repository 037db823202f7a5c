"""Whether a direction is made of a few of a dictionary's."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

N_PARTS = 5
CHUNK = 512


@torch.no_grad()
def explained_by_few(
    directions: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "latents d"],
    excluded: Bool[Tensor, "n latents"] | None = None,
    n_parts: int = N_PARTS,
) -> Float[Tensor, " n"]:
    """Share of each direction's squared norm that a few dictionary directions explain, chosen by orthogonal matching pursuit.

    A dictionary of more directions than dimensions spans everything, so that only a sparse combination says something.

    Args:
        directions: What is to be explained; NaN comes back for a zero direction.
        dictionary: Directions to explain it with.
        excluded: Which of them a direction must not use, such as itself.
        n_parts: How many are used.

    Returns:
        Shares from 0 (at right angles to all) to 1.

    >>> explained_by_few(torch.tensor([[3.0, 4.0, 0.0]]), torch.eye(3)[1:], n_parts=1)
    tensor([0.6400])
    """
    shares = [
        _chunk(
            d, dictionary, None if excluded is None else excluded[i * CHUNK :][: len(d)], n_parts
        )
        for i, d in enumerate(directions.split(CHUNK))
    ]
    return torch.cat(shares) if shares else directions.new_zeros(0)


def _chunk(
    directions: Tensor, dictionary: Tensor, excluded: Tensor | None, n_parts: int
) -> Float[Tensor, " n"]:
    target, atoms = normalize(directions.double()), normalize(dictionary.double())
    known = directions.norm(dim=-1) > 0
    residual, basis = target, target.new_zeros(len(target), 0, target.shape[1])
    for _ in range(min(n_parts, len(atoms))):
        fit = (residual @ atoms.T).abs()
        if excluded is not None:
            fit = fit.masked_fill(excluded, -1)
        atom = atoms[fit.argmax(dim=1)]
        # Gram-Schmidt; one chosen already leaves nothing, and adds nothing.
        rest = atom - torch.einsum("nk,nkd->nd", torch.einsum("nd,nkd->nk", atom, basis), basis)
        norm = rest.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 1e-6, rest / norm.clamp(min=1e-6), 0)
        basis = torch.cat([basis, unit[:, None]], dim=1)
        residual = residual - (residual * unit).sum(dim=-1, keepdim=True) * unit
    share = 1 - residual.pow(2).sum(dim=-1)
    return torch.where(known, share, torch.nan).float()
