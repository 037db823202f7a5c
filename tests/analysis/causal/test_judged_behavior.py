from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_dfc.analysis.causal.directions import PROMPTS, Directions
from sae_lens_dfc.analysis.causal.judged_behavior import (
    JudgedOptions,
    judged_behavior,
    n_judgments,
)
from sae_lens_dfc.analysis.steering.generate import answer
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig


def options(**changes: Any) -> JudgedOptions:
    given: dict[str, Any] = {
        "strengths": (0.0, 2.0, 5.0),
        "n_random": 1,
        "max_new_tokens": 8,
        **changes,
    }
    return JudgedOptions(**given)


def drawn(size: int, seed: int) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def equality(prompt: str) -> str:
    """A judge that finds equal texts the same and all others unlike."""
    mark = prompt.split("BEGIN TEXT 1 ")[1].split("\n")[0]
    one, two = (
        prompt.split(f"BEGIN TEXT {n} {mark}\n")[1].split(f"\nEND TEXT {n} {mark}")[0]
        for n in (1, 2)
    )
    return "5" if one == two else "1"


def test_a_judge_that_sees_nothing_in_common_gives_5_and_is_asked_as_often_as_said(
    pair: ModelPair,
) -> None:
    asked: list[str] = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        return "Similarity: 1"

    directions = {i: Directions(drawn(16, i), drawn(24, i)) for i in (1, 2)}
    groups = {1: "a_exclusive", 2: "shared"}
    result = judged_behavior(pair, directions, groups, judge, options())
    assert result.scores == {1: 5, 2: 5}
    groups_of = ("a_exclusive", "shared", "random")
    assert result.metrics == {
        **{f"behavior/judged/{group}": 5 for group in groups_of},
        "behavior/judged/without_number": 0,
    }
    # 3 prompts: strength 0 once, 2 strengths of 2 latents and 1 control.
    assert len(asked) == n_judgments(2, options()) == 3 + 3 * 2 * 3
    assert [(j.prompt, j.strength) for j in result.latents[1]] == [
        *((prompt, 0) for prompt in PROMPTS),
        *((prompt, s) for prompt in PROMPTS for s in (2, 5)),
    ]


def test_the_score_is_the_papers_over_33_comparisons() -> None:
    assert len(JudgedOptions().strengths) * len(JudgedOptions().prompts) == 33
    assert n_judgments(1, JudgedOptions(n_random=0)) == 33


@pytest.mark.slow
def test_a_model_says_what_itself_says_until_one_copy_is_steered(llama_config: ModelConfig) -> None:
    twins = ModelPair.load(llama_config, llama_config)
    d = drawn(16, seed=0)
    alike, alone = Directions(d, d), Directions(d, 0 * d)
    groups = {0: "shared", 1: "a_exclusive"}
    result = judged_behavior(twins, {0: alike, 1: alone}, groups, equality, options())
    assert result.scores[0] == 1
    # Alike where neither is steered: 3 of 9.
    assert result.scores[1] == pytest.approx((3 * 1 + 6 * 5) / 9)
    ids = [prompt_ids(twins.a, prompt) for prompt in PROMPTS]
    unsteered = answer(twins.a, ids, options(), seed=options().seed)
    assert [j.text_a for j in result.latents[1][:3]] == unsteered
    assert [j.text_b for j in result.latents[1][:3]] == unsteered
    again = judged_behavior(twins, {0: alike, 1: alone}, groups, equality, options())
    assert again == result


def test_an_answer_that_is_no_number_is_counted_and_the_others_stay(
    pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    given = {0: Directions(drawn(16, 0), drawn(24, 0))}
    asked: list[str] = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        return "I cannot say" if len(asked) == 2 else "Similarity: 2"

    result = judged_behavior(pair, given, {0: "shared"}, judge, options())
    assert result.scores[0] == 4
    assert [j.similarity for j in result.latents[0]].count(None) == 1
    assert 0 < result.metrics["behavior/judged/without_number"] < 0.5
    assert "answered 'I cannot say'" in caplog.text


def test_prompts_that_leave_no_room_are_refused_before_anything_is_asked(pair: ModelPair) -> None:
    given = {0: Directions(drawn(16, 0), drawn(24, 0))}
    with pytest.raises(ValueError, match=r"more than model 'tiny-gpt2' can read \(256\)"):
        judged_behavior(pair, given, {0: "shared"}, equality, options(max_new_tokens=250))
    refused: list[dict[str, Any]] = [{"strengths": (-1.0,)}, {"strengths": ()}, {"n_random": -1}]
    for wrong in refused:
        with pytest.raises(ValueError, match="at least one|at least 0|0 or above"):
            options(**wrong)
