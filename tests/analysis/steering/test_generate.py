"""Two tiny models answer prompts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sae_lens_dfc.analysis.steering.generate as generating
from sae_lens_dfc.analysis.steering.generate import (
    _decoded,
    answer,
    contrastive_rows,
    generate,
    read_prompts,
    stop_ids,
)
from sae_lens_dfc.analysis.steering.options import GenerateOptions, Sampling
from sae_lens_dfc.analysis.steering.prompts import prompt_ids
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.alignment.chat import chat_segments, contrastive_documents
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import load_model
from tests.model_classes import needs_hooked_transformer

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
CLOSED = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<s>\n{% endfor %}"
PROMPTS = ["The cat", "Where is the cat in 1989?", "x", "The cat sat on the mat. " * 3]

OLDER = pytest.param("llama as HookedTransformer", marks=needs_hooked_transformer)

Options = Callable[..., GenerateOptions]


@pytest.fixture
def options(tmp_path: Path, llama_config: ModelConfig, gpt2_config: ModelConfig) -> Options:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))

    def make(**changes: Any) -> GenerateOptions:
        values: dict[str, Any] = {
            "prompts": str(tmp_path / "prompts.jsonl"),
            "output": str(tmp_path / "rows.jsonl"),
            "model_a": llama_config,
            "model_b": gpt2_config,
            "max_new_tokens": 8,
        }
        return GenerateOptions(**{**values, **changes})

    return make


def rows(options: GenerateOptions) -> list[dict[str, str]]:
    generate(options)
    return [json.loads(line) for line in Path(options.output).read_text("utf-8").splitlines()]


@pytest.fixture(params=["llama", "gpt2", OLDER])
def model(request: Any, llama_config: ModelConfig, gpt2_config: ModelConfig) -> HookedModel:
    if request.param in ("llama", "gpt2"):
        return load_model(gpt2_config if request.param == "gpt2" else llama_config)
    hooked = load_model(replace(llama_config, model_class_name="HookedTransformer"))
    hooked.tokenizer.pad_token = "<s>"
    return hooked


@needs_hooked_transformer
def test_hooked_transformer_needs_a_padding_token(
    llama_config: ModelConfig, options: Options
) -> None:
    model = load_model(replace(llama_config, model_class_name="HookedTransformer"))
    with pytest.raises(ValueError, match="no padding token.*Use model_class_name='TransformerB"):
        answer(model, [[0, 5]], options(), seed=0)


def test_greedy_answers_are_hugging_faces_one_by_one_whatever_the_batch(
    model: HookedModel, llama_folder: Path, gpt2_folder: Path, options: Options
) -> None:
    folder = gpt2_folder if model.name == "tiny-gpt2" else llama_folder
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompts = [prompt_ids(model, prompt) for prompt in PROMPTS]
    expected: list[str] = []
    for ids in prompts:
        tokens = torch.tensor([ids])
        mask = torch.ones_like(tokens)
        new = hf.generate(  # type: ignore[attr-defined]
            tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0, len(ids) :]
        expected.append(str(model.tokenizer.decode(new, skip_special_tokens=True)))
    assert len(set(expected)) > 1
    for size in (1, 3):
        given = options(temperature=0, batch_size=size)
        assert answer(model, prompts, given, seed=0) == expected


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_prompt_that_makes_two_chats(
    options: Options, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = options()
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT)
    args = ["generate", "--prompts", given.prompts, "--output", given.output]
    args += ["--model-a.model-name", given.model_a.model_name]
    args += ["--model-a.chat-template", str(template)]
    args += ["--model-b.model-name", given.model_b.model_name]
    args += ["--max-new-tokens", "8", "--temperature", "0.7", "--n-prompts", "3"]
    assert main(args) == 0
    assert capsys.readouterr().out == f"Answers to 3 prompts: {given.output}\n"
    lines = [json.loads(line) for line in Path(given.output).read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS[:3]
    assert all(set(line) == {"prompt", "completion_a", "completion_b"} for line in lines)
    assert all(line["completion_a"] != line["completion_b"] for line in lines)
    assert main(args) == 1
    assert "is there already. Pass --overwrite or name another file" in capsys.readouterr().err
    assert main([*args, "--overwrite"]) == 0
    assert [
        json.loads(line) for line in Path(given.output).read_text("utf-8").splitlines()
    ] == lines
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".jinja"}
    tokenizer = load_model(replace(given.model_a, chat_template=CHAT)).tokenizer
    for line in lines:
        for chat in contrastive_documents(line):
            assert chat_segments(tokenizer, tokenizer, chat)[1].pairs > 0


def test_the_seed_decides_the_answers_and_leaves_torchs_own_alone(
    pair: ModelPair, options: Options
) -> None:
    torch.manual_seed(999)
    state = torch.get_rng_state()
    first = list(contrastive_rows(pair, PROMPTS, options(seed=1)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1000)
    assert list(contrastive_rows(pair, PROMPTS, options(seed=1))) == first
    assert list(contrastive_rows(pair, PROMPTS, options(seed=2))) != first


@pytest.mark.slow
def test_one_model_twice_answers_the_same_twice(
    options: Options, llama_config: ModelConfig
) -> None:
    for row in rows(options(model_b=llama_config)):
        assert row["completion_a"] == row["completion_b"]


def test_a_chat_model_reads_the_prompt_as_a_message_and_one_bos(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = pair.a.tokenizer
    plain = prompt_ids(pair.a, "The cat")
    assert plain == [0, *tokenizer.encode("The cat", add_special_tokens=False)]
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    text = "user\nThe cat\nassistant\n"
    expected = [0, *tokenizer.encode(text, add_special_tokens=False)]
    assert prompt_ids(pair.a, "The cat") == expected
    monkeypatch.setattr(pair.a, "prepend_bos", False)
    assert prompt_ids(pair.a, "The cat") == expected[1:]


def test_an_answer_ends_where_the_template_closes_it(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These tokenizers have no end of sequence, and what TransformerLens makes up has no embedding.
    assert stop_ids(pair.a) == []
    monkeypatch.setattr(pair.a.tokenizer, "chat_template", CHAT)
    assert stop_ids(pair.a) == []
    monkeypatch.setattr(pair.a.tokenizer, "chat_template", CLOSED)
    assert stop_ids(pair.a) == [0]


NO_ANSWERS = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
    "{{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_ANSWERS, "{% for %}", "{{ raise_exception('never') }}"])
def test_a_template_that_cannot_say_how_an_answer_ends_ends_none(
    template: str, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.a.tokenizer, "chat_template", template)
    assert stop_ids(pair.a) == []
    raw = prompt_ids(pair.a, "The cat", raw=True)
    assert len(answer(pair.a, [raw], Sampling(max_new_tokens=3), seed=0)) == 1


@pytest.mark.slow
def test_a_template_for_users_messages_alone_is_enough_to_answer_them(
    options: Options, tmp_path: Path
) -> None:
    (tmp_path / "users.jinja").write_text(NO_ANSWERS)
    given = options()
    model_a = replace(given.model_a, chat_template=str(tmp_path / "users.jinja"))
    assert len(rows(options(model_a=model_a))) == len(PROMPTS)


def test_what_comes_after_the_end_is_cut(
    model: HookedModel, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, given = [prompt_ids(model, prompt) for prompt in PROMPTS], options(temperature=0)
    made: list[list[int]] = []

    def decoded(model: HookedModel, ids: list[int]) -> str:
        made.append(ids)
        return _decoded(model, ids)

    with monkeypatch.context() as patch:
        patch.setattr(generating, "_decoded", decoded)
        whole = answer(model, prompts, given, seed=0)
    # The answer with the latest token that is not in it before: untrained models repeat themselves.
    latest = [max(n for n, token in enumerate(ids) if token not in ids[:n]) for ids in made]
    row = latest.index(end := max(latest))
    monkeypatch.setattr(generating, "stop_ids", lambda _: [made[row][end]])
    cut = answer(model, prompts, given, seed=0)[row]
    assert cut == _decoded(model, made[row][:end])
    assert cut != whole[row]


def test_a_text_file_has_one_prompt_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why is the sky blue?\n\n  Who am I?\r\nThe\u2028cat")
    found = list(read_prompts(str(tmp_path / "prompts.txt")))
    assert found == ["Why is the sky blue?", "Who am I?", "The\u2028cat"]


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(
    pair: ModelPair, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["", "The cat", "x" * 300, "Why?"]
    made = list(contrastive_rows(pair, prompts, options(batch_size=1)))
    assert [row["prompt"] for row in made] == ["The cat", "Why?"]
    assert "Left out 2 prompts" in caplog.text


@pytest.mark.first_is_fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n_prompts": 0}, "n_prompts must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"output": "rows.csv"}, "output must be a .jsonl file, got 'rows.csv'"),
        ({"text_column": "body"}, "has no text column 'body'"),
        ({"max_new_tokens": 256}, "leaves room for max_new_tokens=256 in both"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    options: Options, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(options(**changes))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_tiny_top_p_leaves_only_the_likeliest_token(model: HookedModel) -> None:
    prompts = [prompt_ids(model, prompt) for prompt in PROMPTS]
    greedy = answer(model, prompts, Sampling(max_new_tokens=8, temperature=0), seed=0)
    drawn = Sampling(max_new_tokens=8, top_p=1e-6)
    assert answer(model, prompts, drawn, seed=0) == greedy
    assert answer(model, prompts, Sampling(max_new_tokens=8), seed=0) != greedy


@pytest.mark.parametrize("top_p", [0.0, 1.5])
def test_top_p_is_a_probability(top_p: float) -> None:
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got"):
        Sampling(top_p=top_p)
