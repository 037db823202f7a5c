"""The commands on runs whose numbers say nothing: what they write is strict JSON and a page that
opens, or one line says why not."""

import json
import logging
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.saved_run.held_out import held_out_text, opened_run
from sae_lens_dfc.cli.main import main
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.data.cache.build import cache_activations
from sae_lens_dfc.data.cache.manifest import ACTS, MANIFEST_FILENAME
from sae_lens_dfc.data.config import CacheConfig
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.metrics.evaluate import Evaluation, evaluate
from sae_lens_dfc.models.config import ModelConfig
from tests.helpers import train_tiny

pytestmark = pytest.mark.slow

FEW = ["--eval-pairs", "600"]
FULLY = [*FEW, "--null", "none", "--downstream-pairs", "100", "--behavior-latents", "1"]
HOOK = "blocks.0.hook_resid_pre"


def strict(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are not in it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def check_written(folder: Path) -> None:
    """All that was written is strict JSON, and pages carry theirs whole."""
    files = [*folder.rglob("*.json")]
    assert files
    for path in files:
        strict(path.read_text())
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        [carried] = re.findall(
            r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL
        )
        assert strict(carried)["columns"].keys() >= {"latent", "rate"}
        assert not re.search(r">\s*(nan|inf|-inf)\s*<", text, re.IGNORECASE)


def said(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert main([*args, "--json"]) == 0
    return strict(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command leaves when it cannot do what was asked."""
    assert main(list(args)) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sae-lens-dfc: error")]
    assert len(lines) == 1
    return lines[0]


def test_commands_on_a_run_whose_latents_are_all_dead(
    tmp_path: Path,
    llama_folder: Path,
    gpt2_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train_tiny(tmp_path, llama_folder, gpt2_folder)
    dead = load_crosscoder(run)
    dead.threshold.data.fill_(math.inf)
    dead.save_model(run)
    capsys.readouterr()
    name, out = str(run), str(tmp_path / "evaluation")
    metrics = said(capsys, "evaluate", name, "--output", out, *FULLY)
    assert metrics["l0"] == 0 and metrics["dead_fraction/shared"] == 1
    assert metrics["explained_variance/a"] < 0.1 and metrics["exclusive/significant_share"] == 0
    assert said(capsys, "latents", name, *FEW)["latents"] == []
    assert said(capsys, "latents", name, "--sort", "evidence", "--evidence", out, *FEW)["latents"] == []  # fmt: skip
    page = Path(said(capsys, "report", name, *FEW)["report"]).read_text(encoding="utf-8")
    assert "No latent fires on the held-out text" in page
    steer = ("steer", name, "--model", "a", "--latent", "3", "--prompt", "The cat")
    assert "no maximum activation" in refused(capsys, *steer, "--strength", "1", *FEW)
    screen = ("screen", name, "--output", str(tmp_path / "screening"), "--fit-pairs", "300", *FEW)
    assert "No latent of" in refused(capsys, *screen)
    assert not (tmp_path / "screening").exists()
    exported = said(capsys, "export", name, "--model", "a", "--output", str(tmp_path / "sae"), *FEW)
    assert exported["l0/exported"] == 0
    check_written(tmp_path)
    # Of several runs at once as of one: what is no number is left out.
    copy = shutil.copytree(run, tmp_path / "copy")
    found = evaluate

    def with_nan(*args: Any, **kwargs: Any) -> Evaluation:
        one = found(*args, **kwargs)
        return one._replace(metrics={**one.metrics, "nothing": math.nan})

    monkeypatch.setattr("sae_lens_dfc.analysis.evaluation.evaluate_run.evaluate", with_nan)
    both = said(capsys, "evaluate", name, str(copy), *FEW)["runs"]
    assert len(both) == 2 and all("l0" in x and "nothing" not in x for x in both.values())


def narrow(folder: Path, tokenizer: Path, seed: int) -> Path:
    """A GPT-2 of width 1."""
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    config = GPT2Config(
        vocab_size=size, n_embd=1, n_layer=2, n_head=1, n_positions=256, bos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_commands_on_models_of_width_one_and_a_dictionary_of_one_latent(
    tmp_path: Path, llama_folder: Path, gpt2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = narrow(tmp_path / "a", gpt2_folder, 3), narrow(tmp_path / "b", llama_folder, 4)
    sizes = ["--sae.d-sae", "1", "--sae.k", "0.5"]
    none = ["--sae.a-exclusive-fraction", "0", "--sae.b-exclusive-fraction", "0"]
    run = train_tiny(tmp_path, a, b, *sizes, *none)
    capsys.readouterr()
    name, out = str(run), str(tmp_path / "evaluation")
    metrics = said(capsys, "evaluate", name, "--output", out, *FULLY)
    assert 0 < metrics["explained_variance/a"] < 1
    assert metrics["explained_variance/a"] == pytest.approx(metrics["explained_variance_median/a"])
    assert metrics["exclusive/significant_share"] == 0
    for sort in ("activation", "difference", "relative_decoder_norm"):
        [only] = said(capsys, "latents", name, "--sort", sort, *FEW)["latents"]
        assert only["latent"] == 0 and 0 < only["relative_decoder_norm"] < 1
    steer = ("steer", name, "--model", "b", "--latent", "0", "--prompt", "The cat", "--map")
    assert said(capsys, *steer, "--strength", "2", "--max-new-tokens", "2", *FEW)["mapped"]
    for model in "ab":
        said(capsys, "export", name, "--model", model, "--output", str(tmp_path / model / "sae"), *FEW)  # fmt: skip
    said(capsys, "report", name, *FEW)
    check_written(tmp_path)


def with_token(folder: Path, model: Path, value: float) -> tuple[Path, int]:
    """The model with an embedding in which a token of about one in 200 is this number; and the
    token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    counts = Counter(i for page in reference_pages()[:12] for i in tokenizer(page)["input_ids"])
    token = min(counts, key=lambda t: abs(counts[t] / counts.total() - 1 / 200))
    changed = LlamaForCausalLM.from_pretrained(model)
    changed.model.embed_tokens.weight.data[token] = value
    changed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, token


def test_a_model_that_overflows_at_a_few_tokens_is_measured_without_them_and_what_cannot_be_is_named(
    tmp_path: Path,
    llama_folder: Path,
    gpt2_folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Infinity in the residual stream, as of a model in float16: after it model A says nothing that
    is a number."""
    broken, token = with_token(tmp_path / "broken", llama_folder, math.inf)
    run = train_tiny(tmp_path, broken, gpt2_folder, "--model-a.hook-name", HOOK)
    capsys.readouterr()
    with caplog.at_level(logging.WARNING):
        metrics = said(capsys, "evaluate", str(run), "--output", str(tmp_path / "out"), *FULLY)
    options = HeldOutOptions(eval_pairs=2_000)
    _, _, pair = opened_run(str(run), options)
    held_out, part = held_out_text(str(run), options, pair)
    read = held_out.collect(part, "")
    at_token = sum(int((c.segments.ids_a[c.segments.last_a] == token).sum()) for c in read.contexts)
    assert 0 < read.counts.not_finite == at_token
    assert all(rows.acts.isfinite().all() for rows in read.rows)
    assert metrics["alignment/not_finite"] >= at_token
    assert 0 < metrics["explained_variance/a"] <= 1
    # Model B's predictions are measured; A's are no numbers, and that is said.
    assert "loss/b" in metrics and "loss/a" not in metrics
    assert re.search("Left out, since they are no finite numbers:.* loss/a", caplog.text)
    check_written(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_half_precision_train_a_crosscoder_in_float32(
    dtype: str, tmp_path: Path, llama_folder: Path, gpt2_folder: Path
) -> None:
    flags = [f"--model-{m}.dtype={dtype}" for m in "ab"]
    run = train_tiny(tmp_path, llama_folder, gpt2_folder, *flags, "--autocast", "--autocast-lm")
    options = HeldOutOptions(eval_pairs=600)
    crosscoder, _, pair = opened_run(str(run), options)
    text, part = held_out_text(str(run), options, pair)
    rows = text.collect(part, "").rows
    assert crosscoder.W_dec.dtype == torch.float32 and rows[0].acts.dtype == torch.float32
    metrics = evaluate(crosscoder, [r.acts for r in rows]).metrics
    assert all(math.isfinite(x) for x in metrics.values())
    assert 0.2 < metrics["explained_variance/a"] < 1


def test_a_training_that_diverges_ends_with_one_line_and_writes_no_run(
    tmp_path: Path, llama_folder: Path, gpt2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        train_tiny(tmp_path, llama_folder, gpt2_folder, "--lr", "1e6")
    errors = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert (
        len(errors) == 1 and "Training diverged: at step" in errors[0] and "Lower lr" in errors[0]
    )
    assert not (tmp_path / "run").exists()


def scaled(folder: Path, llama: Path, gpt2: Path, largest: float, dtype: str) -> CacheConfig:
    """A cache of a model A whose largest embedding is this number."""
    model = LlamaForCausalLM.from_pretrained(llama)
    weight = model.model.embed_tokens.weight.data
    weight.mul_(largest / weight.abs().max())
    model.save_pretrained(folder / "scaled")
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder / "scaled")
    return CacheConfig(
        model_a=ModelConfig(str(folder / "scaled"), HOOK),
        model_b=ModelConfig(str(gpt2), HOOK),
        cache_path=str(folder / "cache"),
        cache_dtype=dtype,
        max_unique_pairs=500,
        context_size=48,
    )


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, "float16", "too large for a cache in float16. Cache in bfloat16 or float32"),
        (3e-9, "float16", "too small for a cache in float16: they lose more than 1%"),
        (1e-39, "bfloat16", "too small for a cache in bfloat16: .* Cache in float32"),
        (1e25, "float32", "so large .* that their norm is"),
    ],
)
def test_a_cache_does_not_change_activations_in_silence(
    value: float, dtype: str, message: str, tmp_path: Path, llama_folder: Path, gpt2_folder: Path
) -> None:
    """Of infinity and of zero nobody would see later that they had been numbers."""
    with pytest.raises(ValueError, match=message):
        cache_activations(scaled(tmp_path, llama_folder, gpt2_folder, value, dtype))
    assert not (tmp_path / "cache" / MANIFEST_FILENAME).exists()


def test_a_cache_in_float32_keeps_denormal_activations(
    tmp_path: Path, llama_folder: Path, gpt2_folder: Path
) -> None:
    acts = cache_activations(scaled(tmp_path, llama_folder, gpt2_folder, 1e-39, "float32"))
    own = acts.shard(0)[ACTS][:, :16]
    assert 1e-40 < own.abs().max() <= 1e-39 and (own != 0).double().mean() > 0.9
