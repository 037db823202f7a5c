"""The terms of a crosscoder's loss, as pure functions."""

from jaxtyping import Bool, Float
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor

from sae_lens_dfc.crosscoders.partition import Partition, decode_blocks


def reconstruction_losses(
    acts: Float[Tensor, "batch d_in"],
    reconstruction: Float[Tensor, "batch d_in"],
    partition: Partition,
) -> dict[str, Float[Tensor, ""]]:
    """Squared L2 error of each model, summed over its dimensions and averaged over the batch.

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
    """What each row's `k_aux` strongest dead latents decode to, without bias.

    They act on the input, as in the public code of arXiv 2602.11729 (its text: on the error). An exclusive latent
    decodes to its own model only, so the other model's residual gives it no gradient.

    Args:
        scores: Pre-activations in the units in which latents compete.
        W_dec_unit: Decoder that belongs to those units.
        dead: Which latents count as dead; at least one.
        partition: Which latents may use which model.
        k_aux: How many latents take part in a row.
    """
    acts = calculate_topk_aux_acts(min(k_aux, int(dead.sum())), scores, dead).relu()
    return decode_blocks(acts, W_dec_unit, partition)


def dead_latent_loss(
    residual: Float[Tensor, "batch d_in"],
    decoded: Float[Tensor, "batch d_in"],
    n_dead: int,
    k_aux: int,
) -> Float[Tensor, ""]:
    """How badly the dead latents alone rebuild what the living ones left (AuxK of Gao et al. 2024).

    The loss shrinks in proportion when fewer than `k_aux` latents are dead, as in SAELens.

    Args:
        residual: What the living latents did not explain, detached.
        decoded: What the strongest dead latents of each row decode to.
        n_dead: How many latents are dead.
        k_aux: How many latents take part in a row.

    >>> import torch
    >>> dead_latent_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), n_dead=1, k_aux=2)
    tensor(2.)
    """
    # Compiled by torch 2.8, the smaller of the ratio and 1.0 is 0.
    return min(n_dead, k_aux) / k_aux * (decoded - residual).pow(2).sum(dim=-1).mean()


def explained_variances(
    acts: Float[Tensor, "batch d_in"],
    reconstruction: Float[Tensor, "batch d_in"],
    partition: Partition,
) -> dict[str, Float[Tensor, ""]]:
    """Share of each model's variance over the batch that its reconstruction explains."""
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
    """Squared L2 error of the two models' difference, rebuilt without the shared latents, averaged over the batch.

    arXiv 2603.04426: `|| (x_b - x_a) - (W_b - W_a) [0; z] ||^2`, of activations as they are. Ours are
    centred and scaled for each model: the decoder's bias takes part, and the two scales are undone.

    Args:
        acts: Normalised activations.
        alone: What the latents that are not shared rebuild of them.
        units: Factor for each model that takes its normalised activations to a unit common to both.
        partition: Says which columns are whose; both models have one width.

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
