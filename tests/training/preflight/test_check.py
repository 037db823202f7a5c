"""A check of a training, through the command line, on tiny models."""

import json
import logging
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sae_lens_dfc.cli.main import main
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.training.preflight import check as check_module
from sae_lens_dfc.training.preflight import first_look, needs, rehearsal
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner

SMALL = [
    *("--context-size", "48", "--eval-every-n-documents", "4", "--d-sae", "64", "-k", "4"),
    *("--training-tokens", "1280", "--train-batch-size-tokens", "64"),
    *("--n-batches-in-buffer", "8", "--n-batches-for-norm-estimate", "2"),
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurements on fewer batches."""
    monkeypatch.setattr(check_module, "SECONDS_TO_READ", 0.1)
    monkeypatch.setattr(needs, "SECONDS_TO_HARVEST", 0.1)
    monkeypatch.setattr(needs, "SECONDS_TO_STEP", 0.1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    pages = reference_pages()[:12]
    chat = [{"role": role, "content": pages[0][:200]} for role in ("user", "assistant")]
    _write(folder / "text.jsonl", [{"text": page} for page in pages])
    _write(folder / "chats.jsonl", [{"messages": chat}] * 60)
    _write(folder / "nothing.jsonl", [{"text": ""}] * 8)
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """The tiny Llama with its weights moved a little."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return _saved(model, llama_folder, tmp_path_factory.mktemp("models") / "fine-tune")


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A Llama of the same shape and tokenizer that has nothing to do with the first."""
    config: Any = AutoModelForCausalLM.from_pretrained(llama_folder).config
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
    return _saved(model, llama_folder, tmp_path_factory.mktemp("models") / "other-seed")


def _saved(model: Any, tokenizer_of: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(a: Path | str, b: Path | str, dataset: Path | str, *more: str) -> list[str]:
    models = ["--model-a", str(a), "--model-b", str(b), "--dataset", str(dataset)]
    return ["check", *models, *SMALL, *more]


def told(args: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*args, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_two_tokenizers_fit_on_a_screen_that_ends_with_a_command_that_trains(
    llama_folder: Path,
    gpt2_folder: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "a run"
    args = flags(llama_folder, gpt2_folder, texts / "text.jsonl", "--output-path", str(output))
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines[: lines.index("Next:")])) <= 100
    screen = "\n".join(lines)
    assert "LlamaForCausalLM" in screen and "GPT2LMHeadModel" in screen
    assert "Basis: none shared. The architectures differ" in screen
    assert "Tokenizer: two." in screen
    assert "the other model has no token that ends at this character" in screen
    assert "A training of 20 steps of 64 pairs" in screen
    assert not output.exists()
    # A shell joins lines that end with a backslash.
    words = shlex.split("\n".join(lines[lines.index("Next:") + 1 :]).replace("\\\n", ""))
    assert words[:2] == ["sae-lens-dfc", "train"]
    assert main(words[1:]) == 0
    assert (output / "sae_weights.safetensors").exists()


@pytest.mark.slow
def test_coverage_and_reasons_are_those_that_align_counts(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Held out is none of 12 documents, and all are read.
    whole = ["--eval-every-n-documents", "100", "--context-size", "200"]
    found = told(flags(llama_folder, gpt2_folder, texts / "text.jsonl", *whole), capsys)
    tokenizers = ["--tokenizer-a", str(llama_folder), "--tokenizer-b", str(gpt2_folder)]
    align = told(["align", *tokenizers, str(texts / "text.jsonl")], capsys)
    (source,) = found["sources"]
    if source["is_whole"]:
        assert found["coverage"] == align
    assert found["coverage"]["coverage_a"] == pytest.approx(align["coverage_a"], abs=0.03)
    first = found["reasons"][0]
    assert first["reason"] == "the other model has no token that ends at this character"
    assert first["a"] == found["coverage"]["dropped_a"]["no_partner"]


@pytest.mark.slow
def test_a_model_and_its_fine_tune_share_basis_and_tokenizer_and_another_seed_no_basis(
    llama_folder: Path,
    fine_tune: Path,
    other_seed: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned = told(flags(llama_folder, fine_tune, texts / "text.jsonl"), capsys)
    assert tuned["one_tokenizer"] and tuned["basis"]["is_shared"]
    assert 0.8 < tuned["basis"]["median_cosine"] < 1
    assert tuned["coverage"]["coverage_a"] == 1 and tuned["reasons"] == []
    assert any("fine-tune" in note for note in tuned["notes"])
    delta = ["--architecture", "delta_crosscoder"]
    foreign = told(flags(llama_folder, other_seed, texts / "text.jsonl", *delta), capsys)
    assert foreign["one_tokenizer"] and not foreign["basis"]["is_shared"]
    assert abs(foreign["basis"]["median_cosine"]) < 0.2
    assert any("assumes that both models share a basis" in note for note in foreign["notes"])
    same = told(flags(llama_folder, llama_folder, texts / "text.jsonl"), capsys)
    assert "there is nothing to find" in same["basis"]["reason"]
    assert not any("docs/how-to/fine-tune.md" in note for note in same["notes"])


@pytest.mark.slow
def test_a_data_set_of_empty_documents_is_a_problem(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(llama_folder, gpt2_folder, texts / "nothing.jsonl")) == 1
    printed = capsys.readouterr()
    assert "PROBLEM: All 6 documents of" in printed.out and "LlamaForCausalLM" in printed.out
    assert "Once this is fixed:" in printed.out
    (line,) = [line for line in printed.err.splitlines() if "error:" in line]
    assert "Training would fail: All 6 documents of" in line
    assert "empty in column 'text'. Its columns are ['text']" in line


@pytest.mark.slow
@pytest.mark.parametrize(("n", "is_said"), [(3, True), (4, False)])
def test_a_text_of_which_nothing_is_held_out_is_a_note(
    n: int,
    is_said: bool,
    llama_folder: Path,
    gpt2_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write(tmp_path / "few.jsonl", [{"text": page} for page in reference_pages()[:n]])
    notes = told(flags(llama_folder, gpt2_folder, tmp_path / "few.jsonl"), capsys)["notes"]
    assert (
        any("No document is held out: the text has 3 documents," in note for note in notes)
        == is_said
    )


@pytest.mark.slow
def test_chats_without_a_template_are_a_problem_and_with_one_are_none(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = flags(llama_folder, gpt2_folder, texts / "chats.jsonl")
    found = told(args, capsys, status=1)
    (problem,) = found["problems"]
    assert "has no chat template. Give one as chat_template" in problem
    assert [found["models"][name]["chat_template"] for name in "ab"] == [False, False]
    template = str(texts / "template.jinja")
    args += ["--model-a.chat-template", template, "--model-b.chat-template", template]
    found = told(args, capsys)
    assert found["models"]["a"]["chat_template"] and found["problems"] == []
    assert any("chat template" in one["reason"] for one in found["reasons"])


def test_what_cannot_be_opened_hides_nothing_else(
    llama_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(llama_folder, "/no/model", texts / "text.jsonl")) == 1
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out and "12 documents, none read" in out
    assert "PROBLEM: Model B: Could not load a tokenizer from '/no/model'" in out
    found = told(flags("/no/model", "/none/either", "/no/data"), capsys, status=1)
    assert [problem.split("'")[1] for problem in found["problems"]] == [
        *("/no/model", "/none/either", "/no/data")
    ]


@pytest.mark.slow
def test_an_output_folder_in_use_is_told_and_the_rest_is_measured(
    llama_folder: Path, gpt2_folder: Path, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cfg.json").write_text("{}")
    more = ["--output-path", str(tmp_path / "run")]
    found = told(flags(llama_folder, gpt2_folder, texts / "text.jsonl", *more), capsys, status=1)
    assert ["already holds a run" in problem for problem in found["problems"]] == [True]
    assert found["needs"]["seconds"]["total"] > 0


@pytest.mark.slow
def test_an_architecture_that_the_widths_do_not_fit_is_told_and_the_text_is_read(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--architecture", "delta_crosscoder"]
    found = told(flags(llama_folder, gpt2_folder, texts / "text.jsonl", *more), capsys, status=1)
    assert "needs one width and one basis" in found["problems"][0]
    assert found["coverage"]["pairs"] > 0


@pytest.mark.slow
def test_a_crosscoder_larger_than_the_machine_is_not_built(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = flags(llama_folder, gpt2_folder, texts / "text.jsonl", "--d-sae", "100000000000")
    assert main(args) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: Training takes 130 TB of memory, and the machine has" in out
    assert "not measured, as it does not fit" in out


@pytest.mark.slow
def test_a_recipe_a_file_and_short_names_say_what_train_would_do(
    llama_folder: Path, gpt2_folder: Path, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "c.yaml").write_text(f"dataset_path: {texts / 'text.jsonl'}\nlr: 3e-3\n")
    models = ["--model-a", str(llama_folder), "--model-b", str(gpt2_folder)]
    more = ["--recipe", "dfc-reassigned", "--config", str(tmp_path / "c.yaml"), "--dtype=float64"]
    found = told(["check", *models, *SMALL, *more], capsys)
    assert [found["models"][name]["dtype"] for name in "ab"] == ["float64", "float64"]
    assert "--json" not in found["next"] and "--recipe dfc-reassigned" in found["next"]
    assert "--model-b.dtype=float64" in found["next"] and "--sae.k 4" in found["next"]


@pytest.mark.slow
def test_without_a_number_of_latents_the_demos_is_taken_and_told(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = flags(llama_folder, gpt2_folder, texts / "text.jsonl")
    args[args.index("--d-sae") : args.index("--d-sae") + 2] = []
    assert told(args, capsys)["next"].endswith("--sae.d-sae 2048")


@pytest.mark.slow
def test_text_that_is_repeated_is_told_with_what_saves_the_models_passes(
    llama_folder: Path, gpt2_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max-unique-pairs", "400"]
    found = told(flags(llama_folder, gpt2_folder, texts / "text.jsonl", *few), capsys)
    assert any("with --keep-in-memory" in note for note in found["notes"])
    assert found["needs"]["distinct_pairs"] <= 400
    more = [*few, "--keep-in-memory"]
    found = told(flags(llama_folder, gpt2_folder, texts / "text.jsonl", *more), capsys)
    assert not any("with --keep-in-memory" in note for note in found["notes"])
    assert found["needs"]["harvested_pairs"] <= 400


def test_a_check_of_a_training_on_a_cache_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model-a", "x", "--model-b", "y", "--cache-path", "runs/cache"]) == 1
    assert "which a training on a cache does not open" in capsys.readouterr().err


@pytest.mark.slow
def test_train_says_first_what_the_first_documents_come_to(
    llama_folder: Path, gpt2_folder: Path, texts: Path, tmp_path: Path, caplog: Any
) -> None:
    models = ["--model-a.model-name", str(llama_folder), "--model-b.model-name", str(gpt2_folder)]
    sae = ["--sae.d-sae", "64", "--sae.k", "4", "--max-unique-pairs", "500"]
    args = ["train", *models, "--dataset-path", str(texts / "text.jsonl"), *sae]
    args += ["--context-size", "48", "--eval-every-n-documents", "4", "--training-tokens", "1280"]
    args += ["--train-batch-size-tokens", "64", "--n-batches-in-buffer", "8"]
    with caplog.at_level(logging.INFO, logger="sae_lens_dfc"):
        assert main([*args, "--output-path", str(tmp_path / "run")]) == 0
    said = caplog.text
    assert "of A's tokens and" in said and "are paired" in said
    assert (
        "training takes 1,280 (training_tokens), of 500 (max_unique_pairs), each 2.6 times" in said
    )
    assert said.index("are paired") < said.index("Trained on")


@pytest.mark.slow
def test_the_estimate_is_within_half_of_what_the_training_takes(
    llama_folder: Path,
    gpt2_folder: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class OwnClock:
        """The time that this process has had a core, whatever else the machine does."""

        perf_counter = staticmethod(time.process_time)

    for module in (first_look, rehearsal):
        monkeypatch.setattr(module, "time", OwnClock)
    monkeypatch.setattr(needs, "SECONDS_TO_HARVEST", 3.0)
    monkeypatch.setattr(needs, "SECONDS_TO_STEP", 2.0)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another at work, which counts as work
    took: list[float] = []
    run_all = CrosscoderTrainingRunner.run_all

    def timed(self: CrosscoderTrainingRunner) -> Any:
        begin = time.process_time()
        result = run_all(self)
        took.append(time.process_time() - begin)
        return result

    try:
        args = flags(llama_folder, gpt2_folder, texts / "text.jsonl", "--n-checkpoints", "0")
        args += ["--training-tokens", "30000", "--output-path", str(tmp_path / "run")]
        found = told(args, capsys)
        monkeypatch.setattr(CrosscoderTrainingRunner, "run_all", timed)
        assert main(shlex.split(found["next"])[1:]) == 0
    finally:
        torch.set_num_threads(n_threads)
    assert took[-1] / 1.5 < found["needs"]["seconds"]["total"] < took[-1] * 1.5
