"""Exports one model's part of a crosscoder as a SAELens SAE: its latents, weights and metadata."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_lens_dfc.crosscoders.feature_acts_difference import FeatureActsDifference
from sae_lens_dfc.crosscoders.groups import EXCLUSIVE_TO, SHARED
from sae_lens_dfc.crosscoders.partition import Partition
from sae_lens_dfc.models.config import OTHER, ModelName
from sae_lens_dfc.stats.affine_maps import AffineMaps

ROWS_PER_CHUNK = 8192
"""Latents processed at a time: all of a large dictionary in double precision would take many times
its size."""
NOT_MEASURED = "not measured: export_sae was given no rows"
OF_SAELENS = ("dataset_path", "context_size", "sae_lens_training_version")
"""Metadata that SAELens' tools read and that is the same for both models."""
MODEL_METADATA = ("model_name", "revision", "model_class_name", "hook_name", "prepend_bos")


@torch.no_grad()
def exported(
    crosscoder: JumpReLUSAE,
    partition: Partition,
    model: ModelName,
    affine_maps: AffineMaps | None = None,
    rows: Iterable[Float[Tensor, "_ d_in"]] | None = None,
) -> JumpReLUSAE:
    """Implements `Crosscoder.export_sae`; see there.

    Raises:
        ValueError: There is no such model, no latent uses it, or the map or the rows have the wrong
            width.
    """
    if model not in partition.models:
        raise ValueError(f"A crosscoder has the models a and b, not {model!r}.")
    latents = kept_latents(partition, model)
    if len(latents) == 0:
        raise ValueError(
            f"No latent of this crosscoder uses model {model.upper()}: all {partition.d_sae} are the other model's. "
            "Export the other one."
        )
    weights = one_model_weights(crosscoder, partition, model, affine_maps)
    metadata = _metadata(crosscoder, partition, model, affine_maps is not None)
    metadata["latents"] = latents.tolist()
    is_by_head = str(metadata.get("hook_name", "")).endswith("hook_z")
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(
            d_in=weights["W_enc"].shape[0],
            d_sae=len(latents),
            dtype=crosscoder.cfg.dtype,
            device=str(crosscoder.device),
            apply_b_dec_to_input=crosscoder.cfg.apply_b_dec_to_input,
            reshape_activations="hook_z" if is_by_head else "none",
            metadata=SAEMetadata(**metadata),
        )
    )
    sae.load_state_dict(weights)
    sae.cfg.metadata.difference_to_crosscoder = NOT_MEASURED
    if rows is not None:
        difference = _difference(crosscoder, sae, partition, model, rows)
        sae.cfg.metadata.difference_to_crosscoder = difference
    return sae


def kept_latents(partition: Partition, model: ModelName) -> Int[Tensor, " n_kept"]:
    """Indices of the latents that use a model, in the crosscoder's order.

    >>> kept_latents(Partition(d_a=2, d_b=2, n_a_exclusive=1, n_b_exclusive=2, n_shared=2), "a")
    tensor([0, 3, 4])
    """
    other = partition.slices[EXCLUSIVE_TO[OTHER[model]]]
    latents = torch.arange(partition.d_sae)
    return torch.cat([latents[: other.start], latents[other.stop :]])


def one_model_weights(
    crosscoder: JumpReLUSAE,
    partition: Partition,
    model: ModelName,
    affine_maps: AffineMaps | None,
) -> dict[str, Tensor]:
    """Weights of the SAE whose pre-activations are the crosscoder's with the other model's input
    predicted.

    Let model A be kept, `c = b_dec` be subtracted from the input, and B's input be predicted as
    `(x_a - r) P + m`. Then the pre-activation `(x_a - c_a) W_a + (x_b - c_b) W_b + b_enc` equals

        (x_a - c_a) (W_a + P W_b) + b_enc + ((c_a - r) P + m - c_b) W_b

    `P`, `r` and `m` are the map's matrix and means; without a map, `P = 0` and `m = b_dec`, which
    is about B's mean. Where `W_b` is 0, as for A-exclusive latents, the result is bit-identical to
    the crosscoder.

    Raises:
        ValueError: The map has the wrong widths.
    """
    own, other = partition.models[model], partition.models[OTHER[model]]
    latents = kept_latents(partition, model).to(crosscoder.device)
    b_dec = crosscoder.b_dec.double()
    center = b_dec * crosscoder.cfg.apply_b_dec_to_input
    matrix, guess = None, b_dec[other]
    if affine_maps is not None:
        origin, matrix, end = _map_from(model, affine_maps.to(crosscoder.device))
        widths = len(center[own]), len(center[other])
        if matrix.shape != widths:
            raise ValueError(
                f"The map goes from {matrix.shape[0]} dimensions to {matrix.shape[1]}, this crosscoder's model "
                f"{model.upper()} has {widths[0]} and the other one {widths[1]}. Fit it to this pair's activations."
            )
        guess = end + (center[own] - origin) @ matrix
    encoders: list[Tensor] = []
    biases: list[Tensor] = []
    for some in latents.split(ROWS_PER_CHUNK):
        W_other = crosscoder.W_enc[other][:, some].double()
        W_enc = crosscoder.W_enc[own][:, some]
        encoders.append(W_enc if matrix is None else (W_enc + matrix @ W_other).to(W_enc))
        biases.append(crosscoder.b_enc[some] + (guess - center[other]) @ W_other)
    weights = {
        "W_enc": torch.cat(encoders, dim=1),
        "b_enc": torch.cat(biases),
        "W_dec": crosscoder.W_dec[latents][:, own],
        "b_dec": b_dec[own],
        "threshold": crosscoder.threshold[latents],
    }
    return {name: w.to(crosscoder.dtype).contiguous() for name, w in weights.items()}


def _map_from(model: ModelName, affine_maps: AffineMaps) -> tuple[Tensor, Tensor, Tensor]:
    """Source mean, matrix and target mean of the map out of a model."""
    a, b = affine_maps.mean_a.double(), affine_maps.mean_b.double()
    if model == "a":
        return a, affine_maps.a_to_b.double(), b
    return b, affine_maps.b_to_a.double(), a


def _metadata(
    crosscoder: JumpReLUSAE, partition: Partition, model: ModelName, is_mapped: bool
) -> dict[str, Any]:
    """Metadata for SAELens, SAEDashboard and SAEBench, and the SAE's provenance."""
    trained = crosscoder.cfg.metadata
    of_model: dict[str, Any] = trained.get(f"model_{model}") or {}
    metadata = {name: trained[name] for name in OF_SAELENS if name in trained}
    metadata |= {name: of_model[name] for name in MODEL_METADATA if name in of_model}
    layer = re.search(r"blocks\.(\d+)\.", str(of_model.get("hook_name", "")))
    if layer is not None:
        metadata["hook_layer"] = int(layer[1])
        metadata["seqpos_slice"] = [1, None]  # position 0 was not trained on
    metadata["exported_from"] = {
        "model": model,
        "model_a": trained.get("model_a"),
        "model_b": trained.get("model_b"),
        "architecture": trained.training_architecture,
        "latents": partition.sizes,
    }
    metadata["other_model_filled_in_by"] = "an affine map" if is_mapped else "its mean (b_dec)"
    return metadata


def _difference(
    crosscoder: JumpReLUSAE,
    sae: JumpReLUSAE,
    partition: Partition,
    model: ModelName,
    rows: Iterable[Float[Tensor, "_ d_in"]],
) -> dict[str, float]:
    """`FeatureActsDifference` over the rows."""
    own, latents = partition.models[model], kept_latents(partition, model).to(sae.device)
    measured = FeatureActsDifference(_groups(partition, model), sae.b_dec.detach())
    by_head = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()  # rows have the heads joined
    for acts in rows:
        if acts.shape[-1] != partition.d_in:
            raise ValueError(
                f"Rows are {acts.shape[-1]} wide, this crosscoder's are {partition.d_a} + {partition.d_b}. Give both "
                "models' raw activations, joined."
            )
        acts = acts.to(sae.device)
        two, one = crosscoder.encode(acts)[:, latents], sae.encode(acts[:, own])
        measured.update(acts[:, own], two, one, sae.decode(two), sae.decode(one))
    if by_head:
        sae.turn_on_forward_pass_hook_z_reshaping()
    return measured.compute()


def _groups(partition: Partition, model: ModelName) -> dict[str, slice]:
    """Each partition's slice of the kept latents."""
    name = EXCLUSIVE_TO[model]
    n_own, n_shared = partition.sizes[name], partition.n_shared
    return {name: slice(0, n_own), SHARED: slice(n_own, n_own + n_shared)}
