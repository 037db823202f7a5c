"""Computes the terms of a crosscoder's loss, as pure functions."""

from jaxtyping import Bool, Float
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor

from sae_lens_dfc.crosscoders.partition import Partition, decode_blocks


def reconstruction_losses(
    acts: Float[Tensor, "batch d_in"],
    reconstruction: Float[Tensor, "batch d_in"],
    partition: Partition,
) -> dict[str, Float[Tensor, ""]]:
    """Squared L2 reconstruction error of each model, summed over its dimensions and averaged over
    the batch.

    arXiv 2602.11729, equation 2: squared, weight 1 for each model.

    >>> import torch
    >>> partition = Partition(d_a=1, d_b=2, n_a_exclusive=0, n_b_exclusive=0, n_shared=4)
    >>> losses = reconstruction_losses(torch.ones(5, 3), torch.zeros(5, 3), partition)
    >>> {name: loss.item() for name, loss in losses.items()}
    {'mse_loss_a': 1.0, 'mse_loss_b': 2.0}
    """
    squared_error = (reconstruction - acts).pow(2)
    return {
        f"mse_loss_{model}": squared_error[:, inputs].sum(dim=-1).mean()
        for model, inputs in partition.models.items()
    }


def dead_latents_decoded(
    scores: Float[Tensor, "batch d_sae"],
    W_dec_unit: Float[Tensor, "d_sae d_in"],
    dead: Bool[Tensor, " d_sae"],
    partition: Partition,
    k_aux: int,
) -> Float[Tensor, "batch d_in"]:
    """Reconstruction by each row's `k_aux` strongest dead latents, without bias.

    They encode the input, as in the public code of arXiv 2602.11729 (its text: the error). An
    exclusive latent decodes to its own model only, so it gets no gradient from the other model's
    residual.

    Args:
        scores: Pre-activations in the units in which latents compete.
        W_dec_unit: Decoder for activations in those units.
        dead: Which latents count as dead; at least one.
        partition: Which latents may use which model.
        k_aux: Number of dead latents used per row.
    """
    acts = calculate_topk_aux_acts(min(k_aux, int(dead.sum())), scores, dead).relu()
    return decode_blocks(acts, W_dec_unit, partition)


def dead_latent_loss(
    residual: Float[Tensor, "batch d_in"],
    decoded: Float[Tensor, "batch d_in"],
    n_dead: int,
    k_aux: int,
) -> Float[Tensor, ""]:
    """Squared error of the dead latents' reconstruction of the residual (AuxK, Gao et al. 2024).

    The loss is scaled down in proportion if fewer than `k_aux` latents are dead, as in SAELens.

    Args:
        residual: Residual of the reconstruction by living latents, detached.
        decoded: Reconstruction by each row's strongest dead latents.
        n_dead: Number of dead latents.
        k_aux: Number of dead latents used per row.

    >>> import torch
    >>> dead_latent_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), n_dead=1, k_aux=2)
    tensor(2.)
    """
    # Not `min(n_dead / k_aux, 1.0)`: compiled by torch 2.8, that is 0.
    return min(n_dead, k_aux) / k_aux * (decoded - residual).pow(2).sum(dim=-1).mean()


def explained_variances(
    acts: Float[Tensor, "batch d_in"],
    reconstruction: Float[Tensor, "batch d_in"],
    partition: Partition,
) -> dict[str, Float[Tensor, ""]]:
    """Explained variance of each model's reconstruction, over the batch."""
    explained: dict[str, Tensor] = {}
    for model, inputs in partition.models.items():
        x = acts[:, inputs]
        error = (x - reconstruction[:, inputs]).pow(2).sum()
        explained[model] = 1 - error / (x - x.mean(dim=0)).pow(2).sum()
    return explained


def difference_loss(
    acts: Float[Tensor, "batch d_in"],
    alone: Float[Tensor, "batch d_in"],
    units: Float[Tensor, "2"],
    partition: Partition,
) -> Float[Tensor, ""]:
    """Squared L2 error of the two models' difference, reconstructed without the shared latents,
    averaged over the batch.

    arXiv 2603.04426: `|| (x_b - x_a) - (W_b - W_a) [0; z] ||^2`, on raw activations. Ours are
    centered and scaled for each model, so the decoder bias is included and the two scales are
    undone.

    Args:
        acts: Normalized activations.
        alone: Their reconstruction by the latents that are not shared.
        units: Factor for each model that converts its normalized activations to a common unit.
        partition: Which columns belong to which model; both models have the same width.

    >>> import torch
    >>> partition = Partition(d_a=1, d_b=1, n_a_exclusive=0, n_b_exclusive=0, n_shared=4)
    >>> difference_loss(torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2), partition)
    tensor(4.)
    """
    a, b = (
        (acts - alone)[:, inputs] * unit
        for inputs, unit in zip(partition.models.values(), units, strict=True)
    )
    return (b - a).pow(2).sum(dim=-1).mean()
