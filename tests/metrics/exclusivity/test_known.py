"""Share known, of latents of which it is known by construction how much the other model has."""

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.crosscoders.inference import Crosscoder, CrosscoderConfig
from sae_lens_dfc.metrics.exclusivity.known import N_REFERENCE, ShareKnown, fit_probes
from sae_lens_dfc.stats.jackknife import Estimate
from sae_lens_dfc.stats.probe import ProbeOptions

OPTIONS = ProbeOptions(hidden=128, steps=600, batch=256, lr=5e-3)
CONTEXT = 20
"""Rows of a context."""


def reader(n_a_exclusive: int = 1) -> Crosscoder:
    """Its one latent is A's first activation."""
    cfg = CrosscoderConfig(
        d_in=4, d_sae=1, d_a=2, d_b=2, n_a_exclusive=n_a_exclusive, n_b_exclusive=0
    )
    crosscoder = Crosscoder(cfg)
    crosscoder.W_enc.data = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    crosscoder.W_dec.data = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    return crosscoder


def known(kind: str, n: int = 8000) -> tuple[Estimate, Estimate]:
    """The share known of A's latent, whose activation is `u + v`, and the own R²."""
    generator = torch.Generator().manual_seed(1)

    def rows() -> Tensor:
        u, v, w = torch.rand(3, n, generator=generator)
        of_text = torch.rand(n // CONTEXT, generator=generator).repeat_interleave(CONTEXT)
        angle = 6.28 * u
        b = {
            "all": (u - v, u + v),
            "half": (u, w),
            "nothing": (w, 1 - w),
            "in another form": (angle.cos(), angle.sin()),
            "the text": (of_text, w),
        }[kind]
        # On a circle, the sine of twice the angle is a product of the two coordinates.
        y = {"in another form": 1 + (2 * angle).sin(), "the text": 5 * of_text + v}
        return torch.stack([y.get(kind, u + v), v, *b], dim=-1)

    crosscoder = reader()
    probes = fit_probes(crosscoder, list(rows().split(500)), OPTIONS)
    measure = ShareKnown(crosscoder, probes)
    held_out = rows()
    contexts = torch.arange(n) // CONTEXT
    for acts, context in zip(held_out.split(400), contexts.split(400), strict=True):
        measure.update(acts, crosscoder.encode(acts), context)
    found = measure.estimates()
    return found["known"], found["own_r2"]


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("half", 0.5),
        ("nothing", 0.0),
        ("all", 1.0),
        ("in another form", 1.0),
        ("the text", 0.0),
    ],
)
def test_the_share_known_is_the_share_that_the_other_model_has(kind: str, share: float) -> None:
    found, own = known(kind)
    assert own.value.item() > 0.95
    assert found.value.item() == pytest.approx(share, abs=0.06)
    assert 0 < found.se.item() < 0.05


@pytest.mark.slow
def test_the_standard_error_covers_the_sampling_of_the_text() -> None:
    """Ten disjoint sets of rows vary as one's standard error says."""
    found, _ = known("half", n=8000)
    assert found.degrees == 9
    assert abs(found.value.item() - 0.5) < 4 * found.se.item()


def test_a_latent_without_a_probe_is_not_measured() -> None:
    crosscoder = reader()
    silent = torch.zeros(100, 4)
    probes = fit_probes(crosscoder, [silent], OPTIONS)
    assert probes.latents.tolist() == []
    measure = ShareKnown(crosscoder, probes)
    measure.update(silent, crosscoder.encode(silent))
    assert measure.estimates()["known"].value.isnan().all()


@pytest.mark.slow
def test_only_candidates_and_some_shared_latents_are_measured() -> None:
    cfg = CrosscoderConfig(d_in=2, d_sae=400, d_a=1, d_b=1, n_a_exclusive=2, n_b_exclusive=2)
    crosscoder = Crosscoder(cfg)
    crosscoder.W_enc.data.fill_(1.0)
    crosscoder.W_dec.data.fill_(1.0)
    for inputs, latents in crosscoder.partition.forbidden_blocks():
        crosscoder.W_enc.data[inputs, latents] = 0
        crosscoder.W_dec.data[latents, inputs] = 0
    latents = fit_probes(crosscoder, [torch.rand(100, 2)], ProbeOptions(steps=1)).latents
    assert latents[:4].tolist() == [0, 1, 2, 3]
    assert len(latents) == 4 + N_REFERENCE
    assert latents[4:].tolist() == sorted(set(latents[4:].tolist()))


def test_without_candidates_nothing_is_measured() -> None:
    crosscoder = Crosscoder(CrosscoderConfig(d_in=2, d_sae=8, d_a=1, d_b=1))
    crosscoder.W_enc.data.fill_(1.0)
    crosscoder.W_dec.data.fill_(1.0)
    acts = torch.rand(100, 2)
    probes = fit_probes(crosscoder, [acts], ProbeOptions(steps=1))
    assert len(probes.latents) == 0
    measure = ShareKnown(crosscoder, probes)
    measure.update(acts, crosscoder.encode(acts))
    assert measure.estimates()["known"].value.isnan().all()
