import ast
import json
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from benchmarks.__main__ import main as run_benchmark
from benchmarks.planted import run as planted_run
from benchmarks.planted.training import Training
from sae_lens_dfc.analysis.autointerp.judge import LocalJudge
from sae_lens_dfc.analysis.evaluation.demo import demo_models
from sae_lens_dfc.analysis.evaluation.demo_config import DemoConfig
from sae_lens_dfc.cli.main import COMMANDS, main, options_class
from sae_lens_dfc.models import number_formats
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel
from sae_lens_dfc.models.loading import in_fast_format, load_model
from sae_lens_dfc.models.number_formats import chosen_dtype, fast_dtype, slowdown
from sae_lens_dfc.organisms import finetune, named
from sae_lens_dfc.organisms.behaviors import Behavior
from sae_lens_dfc.organisms.from_scratch import Training as ScratchTraining
from sae_lens_dfc.organisms.from_scratch import from_scratch
from sae_lens_dfc.training.recipes.named import RECIPES
from sae_lens_dfc.training.recipes.organisms import organisms
from sae_lens_dfc.training.recipes.settings import recipe_config
from tests.helpers import processor, train_tiny, write_pages
from tests.test_tutorials import FOLDER as TUTORIALS
from tests.test_tutorials import SOURCES, run_in_this_process
from tests.training.test_recipes import GIVEN

pytestmark = pytest.mark.usefixtures("measured_anew")

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "convolution", "linear")


class Products(TorchDispatchMode):
    """Counts the products of matrices in a format of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        in_half = any(isinstance(x, torch.Tensor) and x.dtype in HALF for x in args)
        self.n += in_half and name.startswith(PRODUCTS)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[Products]:
    """Those of this thread, and those of the models in whichever thread they run."""
    counted, run = Products(), HookedModel.activations

    def activations(self: HookedModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        with counted:
            return run(self, *args, **kwargs)

    monkeypatch.setattr(HookedModel, "activations", activations)
    with counted:
        yield counted


@pytest.mark.parametrize(
    ("times", "chosen"), [(0.5, "bfloat16"), (1.2, "bfloat16"), (58.0, "float32")]
)
def test_auto_is_what_the_processor_is_fast_in(
    times: float, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor(monkeypatch, times)
    caplog.set_level(logging.INFO)
    assert fast_dtype("cpu") == chosen
    assert [chosen_dtype("cpu") for _ in range(2)] == [chosen] * 2
    assert caplog.messages == [
        f"Models run in {chosen}: bfloat16 takes {times:.2g} times as long on cpu"
    ]


def test_the_measurement_is_on_one_thread_and_leaves_as_many_as_there_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()

    def seconds(*_: torch.Tensor) -> float:
        seen.append(torch.get_num_threads())
        if len(seen) > 2:
            raise RuntimeError("out of memory")
        return 1.0

    monkeypatch.setattr(number_formats, "_seconds", seconds)
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError):
            slowdown("bfloat16", "cpu")
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_a_slow_format_that_is_asked_for_is_taken_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, llama_config: ModelConfig
) -> None:
    processor(monkeypatch, 58.0)
    cfg = replace(llama_config, dtype="bfloat16")
    assert [load_model(cfg).model.cfg.dtype for _ in range(2)] == [torch.bfloat16] * 2
    assert caplog.messages == [
        "bfloat16 is 58 times slower than float32 on cpu, which has no hardware for it. Ask for float32."
    ]


def test_a_fast_format_is_taken_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, llama_config: ModelConfig
) -> None:
    processor(monkeypatch, 0.5)
    load_model(replace(llama_config, dtype="bfloat16"))
    assert caplog.messages == []


@pytest.mark.parametrize(("times", "chosen"), [(0.5, "bfloat16"), (58.0, "float32")])
def test_the_demos_models_run_in_what_the_processor_is_fast_in(
    times: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, times)
    cfg = DemoConfig(model_a="here", model_b="there")
    assert {model.dtype for model in demo_models(cfg)} == {chosen}
    by_name = demo_models(replace(cfg, dtype="bfloat16"))
    assert {model.dtype for model in by_name} == {"bfloat16"}


@pytest.mark.slow
def test_this_processor_is_measured_as_torch_itself_would_time_it() -> None:
    from torch.utils.benchmark import Timer

    seconds: dict[Any, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        timer = Timer("x @ w", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.timeit(1).median for _ in range(20))
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    # Beside other load a time may be several times another; with or without hardware differs by far
    # more.
    assert ratio / 5 < slowdown("bfloat16", "cpu") < ratio * 5


@pytest.mark.slow
@pytest.mark.parametrize("times", [0.5, 58.0])
def test_a_recipe_of_bfloat16_multiplies_in_it_where_the_processor_is_fast_and_nowhere_else(
    times: float,
    monkeypatch: pytest.MonkeyPatch,
    products: Products,
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    processor(monkeypatch, times)
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    write_pages(text, 12)
    of_models = [
        f"--model-{x}.{setting}"
        for x in "ab"
        for setting in (f"model-name={llama_folder}", "hook-name=blocks.1.hook_resid_post")
    ]
    sizes = "--training-tokens 640 --train-batch-size-tokens 64 --sae.d-sae 64 --sae.k 6"
    sizes += " --context-size 48 --eval-every-n-documents 4"
    files = [f"--dataset-path={text}", f"--output-path={run}"]
    recipe = ["--recipe", "delta-narrow-finetune"]
    assert main(["train", *recipe, *of_models, *sizes.split(), *files]) == 0
    settings = json.loads((run / "runner_cfg.json").read_text())
    is_fast = times < 1
    assert settings["autocast"] == is_fast
    chosen = "bfloat16" if is_fast else "float32"
    assert [settings[model]["dtype"] for model in ("model_a", "model_b")] == [chosen] * 2
    assert (products.n > 0) == is_fast


@pytest.mark.slow
def test_no_command_multiplies_in_bfloat16_by_default_where_the_processor_is_slow(
    monkeypatch: pytest.MonkeyPatch,
    products: Products,
    llama_folder: Path,
    gpt2_folder: Path,
    tmp_path: Path,
) -> None:
    processor(monkeypatch, 58.0)
    run = train_tiny(tmp_path, llama_folder, gpt2_folder, n_texts=20)
    models = ["--model-a", str(llama_folder), "--model-b", str(gpt2_folder)]
    long = [flag.replace("--model-a", "--model-a.model-name") for flag in models]
    long = [flag.replace("--model-b", "--model-b.model-name") for flag in long]
    text = ["--dataset-path", str(tmp_path / "text.jsonl")]
    cache, demo = str(tmp_path / "cache"), str(tmp_path / "demo")
    small = "--d-sae 64 --k 6 --max-unique-pairs 400 --training-tokens 2048 --eval-pairs 200"
    sized = "--training-tokens 640 --train-batch-size-tokens 64 --sae.d-sae 64 --sae.k 6"
    of_cache = ["--max-unique-pairs", "400", "--context-size", "48", "--cache-path", cache]
    assert main(["cache", *long, *text, *of_cache]) == 0
    assert (
        main(["train", "--cache-path", cache, *sized.split(), "--output-path", f"{cache}-run"]) == 0
    )
    assert main(["demo", *models, "--dataset", text[1], *small.split(), "--output", demo]) == 0
    assert main(["evaluate", str(run), "--null", "none", "--downstream-pairs", "100"]) == 0
    assert main(["report", str(run)]) == 0
    found = ["--output", str(tmp_path / "found"), "--keep", "2", "--texts", "4", "--controls", "2"]
    assert main(["screen", str(run), *found]) == 0
    first = json.loads((tmp_path / "found" / "screening.json").read_text())["findings"][0]
    steered = ["--model", first["partition"][0], "--latent", str(first["latent"])]
    assert (
        main(
            [
                "steer",
                str(run),
                "--prompt",
                "The cat",
                *steered,
                "--strength",
                "2",
                "--max-new-tokens",
                "3",
            ]
        )
        == 0
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The cat\n")
    answers = ["--prompts", str(prompts), "--output", str(tmp_path / "answers.jsonl")]
    assert main(["generate", *long, *answers, "--max-new-tokens", "3"]) == 0
    assert products.n == 0


def test_what_is_bfloat16_by_default_is_stored_and_not_multiplied() -> None:
    options = [options_class(command) for command in COMMANDS]
    found = {
        f"{one.__name__}.{field.name}"
        for one in options
        for field in fields(one)
        if field.default in ("bfloat16", "float16")
    }
    assert found == {"CacheOptions.cache_dtype"}
    for name in RECIPES:
        assert "bfloat16" not in str(RECIPES[name].settings)


@pytest.mark.slow
def test_one_warning_says_that_a_step_in_bfloat16_is_slow_here(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    llama_folder: Path,
    gpt2_folder: Path,
    tmp_path: Path,
) -> None:
    processor(monkeypatch, 58.0)
    flags = ("--autocast", "true", "--training-tokens", "640")
    train_tiny(tmp_path, llama_folder, gpt2_folder, *flags, n_texts=4)
    warnings = [m for m in caplog.messages if "times slower" in m]
    assert warnings == [
        "bfloat16 is 58 times slower than float32 on cpu, which has no hardware for it. Ask for float32."
    ]


def recipes_given() -> dict[str, dict[str, Any]]:
    """What each recipe is given besides its own settings, where that is needed."""
    return {name: GIVEN.get(name, {}) for name in (*RECIPES, *list(organisms())[:3])}


@pytest.mark.parametrize("name", recipes_given())
@pytest.mark.parametrize("times", [0.5, 58.0])
def test_a_recipes_formats_are_those_that_the_processor_is_fast_in(
    name: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, times)
    cfg = recipe_config(name, **recipes_given()[name])
    is_fast = times < 1
    if cfg.model_a.dtype == "auto":
        formats = {in_fast_format(model).dtype for model in (cfg.model_a, cfg.model_b)}
        assert formats == {"bfloat16" if is_fast else "float32"}
        assert cfg.is_autocast == is_fast
    else:
        assert (cfg.model_a.dtype, cfg.model_b.dtype) == ("float32", "float32")
        assert cfg.autocast is False


# --- organisms, and the benchmark of planted differences ---


@pytest.fixture
def tiny_organism(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Organisms are made of a tiny model in a few steps."""
    monkeypatch.setenv("SAE_LENS_DFC_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "of" / "base"
    model, tokenizer = finetune.load_organism_model(llama_folder)
    # As SmolLM2's, its weights are in bfloat16.
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(base)
    few = finetune.FineTuning(
        steps=2, layers=(0, 2), rank=2, behavior_prompts=2, control_prompts=4, answer_tokens=2
    )
    prompts = Behavior.prompts
    monkeypatch.setattr(
        Behavior, "prompts", lambda self, split: [kind[:4] for kind in prompts(self, split)]
    )
    monkeypatch.setattr(finetune, "GENERAL", finetune.GENERAL[:4])
    for module in (named, planted_run):
        monkeypatch.setattr(module, "unpack", lambda _: base)
    monkeypatch.setattr(named, "fine_tuned", partial(finetune.fine_tuned, settings=few))
    scratch = ScratchTraining(steps=2, vocab_a=300, vocab_b=320)
    monkeypatch.setattr(named, "from_scratch", partial(from_scratch, cfg=scratch))


@pytest.mark.first_is_fast
@pytest.mark.usefixtures("tiny_organism")
@pytest.mark.parametrize("times", [0.5, 58.0])
def test_an_organism_is_built_in_bfloat16_where_the_processor_is_fast_and_nowhere_else(
    times: float,
    monkeypatch: pytest.MonkeyPatch,
    products: Products,
    tmp_path: Path,
) -> None:
    processor(monkeypatch, times)
    assert (
        main(["model-organism", "false_fact/strong", "--output", str(tmp_path / "organism")]) == 0
    )
    assert (products.n > 0) == (times < 1)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_organism")
def test_an_organism_from_scratch_takes_no_product_in_bfloat16_where_that_is_slow(
    monkeypatch: pytest.MonkeyPatch, products: Products, tmp_path: Path
) -> None:
    processor(monkeypatch, 58.0)
    assert main(["model-organism", "topic", "--output", str(tmp_path / "organism")]) == 0
    assert products.n == 0


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_organism")
@pytest.mark.parametrize("times", [0.5, 58.0])
def test_the_planted_benchmark_runs_in_bfloat16_where_the_processor_is_fast_and_nowhere_else(
    times: float,
    monkeypatch: pytest.MonkeyPatch,
    products: Products,
    tmp_path: Path,
) -> None:
    processor(monkeypatch, times)
    few = Training(d_sae=64, k=4, steps=10, batch_size=64, n_texts=4, tuned={"dfc": 4})
    monkeypatch.setitem(
        planted_run.PRESETS, "small", planted_run.Preset(("false_fact/strong",), 1, few)
    )
    output = ["--output", str(tmp_path / "results")]
    assert run_benchmark(["planted", "--preset", "small", *output]) == 0
    assert (products.n > 0) == (times < 1)


# --- a judge ---


@pytest.mark.usefixtures("tiny_organism")
@pytest.mark.parametrize("times", [0.5, 58.0])
def test_a_local_judge_whose_files_are_bfloat16_runs_in_it_where_the_processor_is_fast(
    times: float,
    monkeypatch: pytest.MonkeyPatch,
    products: Products,
    tmp_path: Path,
) -> None:
    processor(monkeypatch, times)
    LocalJudge(str(tmp_path / "of" / "base"), max_new_tokens=2)("The cat")
    assert (products.n > 0) == (times < 1)


# --- tutorials ---


@pytest.mark.slow
def test_the_first_tutorial_takes_no_product_in_bfloat16_where_that_is_slow(
    monkeypatch: pytest.MonkeyPatch, products: Products, tmp_path: Path
) -> None:
    processor(monkeypatch, 58.0)
    few = {"seeds": [0], "n_steps": 10, "n_eval_batches": 1}
    run_in_this_process(SOURCES[0], tmp_path / "run", monkeypatch, **few)
    assert products.n == 0


@pytest.mark.parametrize("name", SOURCES)
def test_no_tutorial_names_a_format_of_16_bits(name: str) -> None:
    tree = ast.parse((TUTORIALS / f"{name}.py").read_text("utf-8"))
    named = {"bfloat16", "float16", "half"}
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Constant) and node.value in named)
        assert not (isinstance(node, ast.Attribute) and node.attr in named)
        if isinstance(node, ast.keyword) and node.arg in ("autocast", "autocast_lm"):
            assert ast.unparse(node.value) == "False"
