from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.causal.behavior import (
    BehaviorOptions,
    BehaviorResult,
    Steered,
    behavior,
    compare_effects,
    contexts_of,
)
from sae_lens_dfc.analysis.causal.directions import PROMPTS, Directions, random_directions
from sae_lens_dfc.analysis.causal.shared_vocabulary import common_outcomes, outcome_probabilities
from sae_lens_dfc.analysis.steering.hooks import added, changed, logits
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model

STRENGTHS = (1.0, 4.0)


def drawn(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def measured(
    pair: ModelPair, directions: Mapping[int, Directions], **options: Any
) -> BehaviorResult:
    given: dict[str, Any] = {"strengths": STRENGTHS, "n_random": 0, **options}
    groups = dict.fromkeys(directions, "shared")
    return behavior(pair, directions, groups, BehaviorOptions(**given))


@pytest.fixture(scope="module")
def twins(llama_config: ModelConfig) -> ModelPair:
    model = load_model(llama_config)
    # Untrained, all tokens are about as likely; so a direction decides.
    model.model.original_model.lm_head.weight.data *= 30  # type: ignore[union-attr, operator]
    return ModelPair(model, model)


def test_a_model_follows_itself(twins: ModelPair) -> None:
    d = drawn(16, seed=0)
    [found] = measured(twins, {3: Directions(d, d)}).latents.values()
    assert found.score == found.divergence == 0
    assert found.effect_in_source == found.effect_in_target > 0.1
    assert found.moved > 0.1


def test_steered_in_one_copy_only_all_that_moves_is_that_ones_own(twins: ModelPair) -> None:
    d, zero = drawn(16, seed=0), torch.zeros(16)
    for given in (Directions(d, zero, "a"), Directions(zero, d, "b")):
        [found] = measured(twins, {3: given}).latents.values()
        assert found.score == 1
        assert found.moved > 0.1
        assert found.divergence == pytest.approx(found.effect_in_source) != 0
        assert found.effect_in_target == 0


def test_opposite_steering_is_exclusive_though_both_move(twins: ModelPair) -> None:
    d = drawn(16, seed=0)
    [found] = measured(twins, {0: Directions(d, -d)}).latents.values()
    assert found.effect_in_target > 0.1
    assert 1 > found.score > 0.8
    assert found.moved > 0.1


def test_what_steering_brings_worked_by_hand() -> None:
    def steered(before: list[float], *after: list[float]) -> Steered:
        at_strengths = torch.tensor([[row] for row in after])
        return Steered(torch.tensor([[before]]).expand_as(at_strengths), at_strengths)

    # The source's third outcome gains 0.4; the target starts elsewhere and gains 0.3 there, then
    # 0.4 somewhere else.
    source = steered([0.5, 0.5, 0, 0], [0.3, 0.3, 0.4, 0], [0.3, 0.3, 0.4, 0])
    target = steered([0, 0, 0.1, 0.9], [0, 0, 0.4, 0.6], [0.4, 0, 0.1, 0.5])
    found = compare_effects(source, target)
    torch.testing.assert_close(found["unshared"], torch.tensor([0.1, 0.4]))
    torch.testing.assert_close(found["moved"], torch.tensor([0.4, 0.4]))
    torch.testing.assert_close(
        compare_effects(target, source)["unshared"], torch.tensor([0.0, 0.4])
    )


def test_two_vocabularies_are_compared_by_their_texts(pair: ModelPair) -> None:
    """Against a computation of its own: one prompt, one position, one strength at a time."""
    given = Directions(3 * drawn(16, seed=1), 3 * drawn(24, seed=2))
    result = measured(pair, {0: given}, n_continuation=0)
    unshared: list[float] = []
    moved: list[float] = []
    for prompt in PROMPTS:
        for strength in STRENGTHS:
            brought: list[Tensor] = []
            for model, vector, outcomes in zip(
                (pair.a, pair.b), given[:2], common_outcomes(pair.a, pair.b), strict=True
            ):
                ids = torch.tensor([prompt_ids(model, prompt)])
                before = logits(model, ids, torch.ones_like(ids))[0, -1]
                with changed(model, added(strength * vector)):
                    after = logits(model, ids, torch.ones_like(ids))[0, -1]
                p, p_0 = (outcome_probabilities(x, outcomes) for x in (after, before))
                brought.append((p - p_0).clamp(min=0))
            unshared.append(float((brought[0] - torch.minimum(*brought)).sum()))
            moved.append(float(brought[0].sum()))
    assert result.latents[0].score == pytest.approx(sum(unshared) / sum(moved), rel=1e-4)
    assert result.latents[0].moved == pytest.approx(sum(moved) / 6, rel=1e-4)
    assert 0 < result.latents[0].score < 1
    mass = result.metrics["behavior/other_mass/a"], result.metrics["behavior/other_mass/b"]
    assert mass == result.latents[0].other_mass
    assert all(0 < m < 1 for m in mass)


def test_both_models_read_the_same_of_the_sources_answer(pair: ModelPair) -> None:
    outcomes = common_outcomes(pair.a, pair.b)
    n_pairs: list[int] = []
    for source in ("a", "b"):
        for prompt, (context, before) in zip(
            PROMPTS,
            contexts_of(pair, source, outcomes, BehaviorOptions(n_continuation=6)),
            strict=True,
        ):
            read: list[list[str]] = []
            for name, model in (("a", pair.a), ("b", pair.b)):
                asked, ids = prompt_ids(model, prompt), context.ids[name]
                assert ids[: len(asked)] == asked
                assert context.positions[name][0] == len(asked) - 1
                new = [ids[len(asked) : i + 1] for i in context.positions[name]]
                # Of a character of which some bytes were read, tokenizers show a sign for all or
                # for each.
                read.append([str(model.tokenizer.decode(x)).rstrip("\ufffd") for x in new])
                assert before[name].shape[:2] == (5, len(new))
            assert read[0] == read[1]
            n_pairs.append(len(read[0]))
    assert max(n_pairs) > 2


@pytest.mark.slow
def test_metrics_are_means_over_groups_with_the_control_beside_them(pair: ModelPair) -> None:
    directions = {
        i: Directions(2 * drawn(16, i), 2 * drawn(24, 50 + i), "b" if i == 9 else "a")
        for i in (2, 5, 9)
    }
    groups = {2: "a_exclusive", 5: "a_exclusive", 9: "b_exclusive"}
    options = BehaviorOptions(strengths=STRENGTHS, n_random=2, n_continuation=1)
    metrics, latents, random = behavior(pair, directions, groups, options)
    two = [latents[2].score, latents[5].score]
    assert metrics["behavior/a_exclusive"] == pytest.approx(sum(two) / 2)
    assert metrics["behavior/a_exclusive/se"] == pytest.approx(abs(two[0] - two[1]) / 2)
    assert metrics["behavior/b_exclusive"] == latents[9].score
    assert "behavior/b_exclusive/se" not in metrics
    assert metrics["behavior/random"] == pytest.approx(sum(r.score for r in random) / 2)
    for name in ("moved", "effect_in_source", "effect_in_target", "divergence"):
        assert metrics[f"behavior/{name}/b_exclusive"] == getattr(latents[9], name)
    again = behavior(pair, directions, groups, options)
    assert again == (metrics, latents, random)


def test_a_larger_latent_does_more(twins: ModelPair) -> None:
    d = drawn(16, seed=0)
    found = measured(twins, {i: Directions(i * d, 0 * d) for i in (1, 9)}, strengths=(0.01,))
    assert found.latents[9].moved > 2 * found.latents[1].moved


def test_a_direction_too_small_to_move_anything_is_no_evidence(twins: ModelPair) -> None:
    d = 1e-30 * drawn(16, seed=0)
    [found] = measured(twins, {0: Directions(d, 0 * d)}).latents.values()
    assert found.moved == found.score == 0


def test_random_directions_are_seeded_unrelated_and_as_long_as_the_latents() -> None:
    like = [Directions(i * torch.ones(400), torch.ones(500) / i) for i in (1.0, 5.0)]
    control = random_directions(like, n=4, seed=0)
    assert [round(d.a.norm().item()) for d in control] == [20, 20, 100, 100]
    assert control[2].b.norm().item() == pytest.approx(500**0.5 / 5)
    cosine = torch.nn.functional.cosine_similarity
    for i in range(4):
        for j in range(i):
            assert cosine(control[i].a, control[j].a, dim=0).abs() < 0.2
        assert cosine(control[i].a, control[i].b[:400], dim=0).abs() < 0.2
    assert torch.equal(random_directions(like, 4, seed=0)[3].b, control[3].b)
    assert not torch.equal(random_directions(like, 4, seed=1)[3].b, control[3].b)


def test_directions_that_do_not_fit_are_refused(pair: ModelPair) -> None:
    a, b = drawn(16, 0), drawn(24, 0)
    for given, message in [
        ({}, "no latent to steer with"),
        ({7: Directions(b, a)}, "Latent 7's direction in model a must be 16 finite numbers.*24"),
        ({7: Directions(a, b * torch.inf)}, "direction in model b must be 24 finite"),
        ({7: Directions(0 * a, b)}, "source model a is zero: it does not fire"),
        ({7: Directions(a, 0 * b, "b")}, "source model b is zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            measured(pair, given)
    for groups in ({}, {7: "random"}):
        with pytest.raises(ValueError, match="Latent 7 needs a group other than 'random'"):
            behavior(pair, {7: Directions(a, b)}, groups)
    refused: list[dict[str, Any]] = [{"strengths": (0.0, 1.0)}, {"prompts": ()}, {"n_random": -1}]
    for wrong in refused:
        with pytest.raises(ValueError, match="at least one|at least 0|above"):
            BehaviorOptions(**wrong)
