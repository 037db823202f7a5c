from dataclasses import replace

import pytest

from sae_lens_dfc.analysis.steering.prompts import prompt_ids, span_mask
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHOUTED = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


@pytest.fixture(params=["a", "b"])
def model(request: pytest.FixtureRequest, pair: ModelPair) -> HookedModel:
    return getattr(pair, request.param)


@pytest.fixture
def chat_model(llama_config: ModelConfig) -> HookedModel:
    return load_model(replace(llama_config, chat_template=CHAT))


def held(model: HookedModel, prompt: str, span: str, raw: bool = False) -> list[int]:
    ids, mask = prompt_ids(model, prompt, raw), span_mask(model, prompt, span, raw)
    return [i for i, holds in zip(ids, mask, strict=True) if holds]


@pytest.mark.parametrize("span", ["cat", "mat in 1989", "naïve", "日本", "The", ".", " on "])
def test_the_tokens_of_a_span_hold_it_and_none_can_be_spared(model: HookedModel, span: str) -> None:
    prompt = "The cat sat on the mat in 1989, naïve 日本 text."
    ids = held(model, prompt, span)
    assert span in model.tokenizer.decode(ids)
    for i in range(len(ids)):
        assert span not in model.tokenizer.decode(ids[:i] + ids[i + 1 :])


def test_a_span_is_found_wherever_it_stands(model: HookedModel) -> None:
    ids = held(model, "cat and cat and cat", "cat")
    assert model.tokenizer.decode(ids).count("cat") == 3
    assert "and" not in model.tokenizer.decode(ids)


def test_the_beginning_of_sequence_token_is_in_no_span(model: HookedModel) -> None:
    mask = span_mask(model, "The cat", "The cat")
    assert mask == [False, *[True] * (len(prompt_ids(model, "The cat")) - 1)]


def test_what_the_template_says_is_in_no_span(chat_model: HookedModel) -> None:
    prompt = "  the user asks: who is the user"
    ids = held(chat_model, prompt, "user")
    assert chat_model.tokenizer.decode(ids).count("user") == 2
    text = chat_model.tokenizer.decode(prompt_ids(chat_model, prompt))
    assert text.count("user") == 3 and "assistant:" in text
    # The template strips the spaces in front; none of its own stands for them.
    with pytest.raises(ValueError, match="is not in the prompt"):
        span_mask(chat_model, prompt, "  ")


def test_without_the_template_the_prompt_is_read_as_it_is(chat_model: HookedModel) -> None:
    ids = prompt_ids(chat_model, "The cat", raw=True)
    assert chat_model.tokenizer.decode(ids, skip_special_tokens=True) == "The cat"
    of_cat = held(chat_model, "The cat", "cat", raw=True)
    assert chat_model.tokenizer.decode(of_cat) == " cat"


@pytest.mark.parametrize("span", ["dog", "", "Cat"])
def test_a_span_that_is_not_there_is_refused(model: HookedModel, span: str) -> None:
    with pytest.raises(ValueError, match="is not in the prompt 'The cat'"):
        span_mask(model, "The cat", span)


def test_a_template_that_changes_the_prompt_is_refused(llama_config: ModelConfig) -> None:
    model = load_model(replace(llama_config, chat_template=SHOUTED))
    with pytest.raises(ValueError, match="does not hold the prompt as it is"):
        span_mask(model, "The cat", "cat")
