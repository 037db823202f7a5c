"""Collects facts about a model, and decides whether two models share a basis."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_lens_dfc.models.hooked_model import HookedModel

SAMPLED_WEIGHTS = 65_536
"""Number of entries of a matrix that are compared; for two unrelated matrices the cosine is then
below 0.02."""
RELATED = 0.5
"""Median cosine of two models' matrices at or above which their weights count as related. A tiny
model and a copy of it with perturbed weights had 0.71; two models with different random seeds had
0.01."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that matter before anything is trained on it."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    """Width of the residual stream."""
    hook_name: str
    """Hook whose activations are read."""
    hook_width: int
    """Width of the activations at the hook."""
    n_parameters: int
    dtype: str
    device: str
    tokenizer: str
    """Kind of tokenizer, as `tokenizer_kind` names it."""
    n_vocabulary: int
    """Number of tokens in the tokenizer, including added ones."""
    chat_template: bool
    n_ctx: int
    """Maximum context length, in tokens."""
    prepend_bos: bool
    """Whether each context begins with a beginning-of-sequence token."""
    notes: tuple[str, ...]
    """One sentence for each thing that was fixed when it was opened."""
    tokenizer_sha256: str
    weights_sha256: str

    @classmethod
    def of(cls, model: HookedModel) -> "ModelFacts":
        """Collect the facts about an open model."""
        described = model.describe()
        first = next(model.model.parameters())
        return cls(
            name=model.name,
            architecture=architecture_of(model),
            n_layers=model.n_layers,
            d_model=int(model.model.cfg.d_model),
            hook_name=model.hook_name,
            hook_width=model.d_model,
            n_parameters=sum(p.numel() for p in model.model.parameters()),
            dtype=str(first.dtype).removeprefix("torch."),
            device=str(model.device),
            tokenizer=tokenizer_kind(model.tokenizer),
            n_vocabulary=len(model.tokenizer),
            chat_template=bool(model.tokenizer.chat_template),
            n_ctx=model.n_ctx,
            prepend_bos=len(model.bos_ids) > 0,
            notes=model.notes,
            tokenizer_sha256=described["tokenizer_sha256"],
            weights_sha256=described["weights_sha256"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain values, for JSON."""
        return {**asdict(self), "notes": list(self.notes)}


def architecture_of(model: HookedModel) -> str:
    """Name of the model's class in transformers."""
    original = getattr(model.model, "original_model", None)
    if original is not None:
        return type(original).__name__
    return str(
        getattr(model.model.cfg, "original_architecture", None) or type(model.model).__name__
    )


def tokenizer_kind(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the tokenizer's algorithm, and whether it works on bytes or characters."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    kind = type(backend.model).__name__
    if "ByteLevel" in f"{backend.pre_tokenizer!r} {backend.normalizer!r}":
        return f"{kind} of bytes"
    fallback = ", bytes where it must" if getattr(backend.model, "byte_fallback", False) else ""
    return f"{kind} of characters{fallback}"


class Basis(NamedTuple):
    """Whether a direction in one model's residual stream means the same in the other's."""

    is_shared: bool
    reason: str
    """Why the basis is shared or not."""
    median_cosine: float | None = None
    """Median cosine over matrices of the same name and shape; none if matrices were not
    compared."""


def basis(a: HookedModel, b: HookedModel) -> Basis:
    """Decide whether two models share a basis: the same architecture and widths, and related
    weights."""
    of_a, of_b = ModelFacts.of(a), ModelFacts.of(b)
    for what in ("architecture", "d_model", "hook_width"):
        ours, theirs = getattr(of_a, what), getattr(of_b, what)
        if ours != theirs:
            return Basis(False, f"{FACT_NAMES[what]} differ: {ours} and {theirs}.")
    if a is b or of_a.weights_sha256 == of_b.weights_sha256:
        return Basis(True, "The weights are the same: there is nothing to find.", 1.0)
    cosines = weight_cosines(a, b)
    if not cosines:
        return Basis(False, "No matrix of one has the name and shape of one of the other's.")
    median = statistics.median(cosines.values())
    how = f"the median cosine of {len(cosines)} matrices of one name and shape is {median:.2f}"
    if median < RELATED:
        return Basis(False, f"One architecture and width, but unrelated weights: {how}.", median)
    return Basis(True, f"One architecture and width, and related weights: {how}.", median)


FACT_NAMES = {
    "architecture": "The architectures",
    "d_model": "The widths",
    "hook_width": "The widths at the hooks",
}


@torch.no_grad()
def weight_cosines(a: HookedModel, b: HookedModel) -> dict[str, float]:
    """Cosine for each pair of matrices with the same name and shape, estimated on about `SAMPLE` of
    their entries.

    Vectors are left out, because the weights of norms are near 1 in any model.
    """
    of_b = dict(b.model.named_parameters())
    return {
        name: _cosine(weight, of_b[name])
        for name, weight in a.model.named_parameters()
        if weight.ndim > 1 and weight.numel() > 0
        if name in of_b and of_b[name].shape == weight.shape
    }


def _cosine(x: Tensor, y: Tensor) -> float:
    # Odd, so that the sample does not repeat the same columns.
    step = max(1, x.numel() // SAMPLED_WEIGHTS) | 1
    one, other = (w.flatten()[::step].float().cpu() for w in (x, y))
    return float(torch.cosine_similarity(one, other, dim=0))
