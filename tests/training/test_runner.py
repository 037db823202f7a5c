import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from sae_lens_dfc import (
    BatchTopKTrainingCrosscoderConfig,
    Crosscoder,
    CrosscoderRunnerConfig,
    CrosscoderTrainingRunner,
    DeltaTrainingCrosscoderConfig,
    DFCTrainingCrosscoder,
    DFCTrainingCrosscoderConfig,
    DSFTrainingCrosscoderConfig,
    StandardTrainingCrosscoderConfig,
)
from sae_lens_dfc.crosscoders.architectures.topk import TopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.data.contexts import PairCounts, in_order
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import open_pair
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.metrics.evaluate import evaluate
from sae_lens_dfc.models.config import ModelConfig
from tests.helpers import make_acts, make_dfc, write_pages

NO_WANDB = LoggingConfig(log_to_wandb=False)
DFC = DFCTrainingCrosscoderConfig(
    d_a=16, d_b=24, d_sae=64, k=4, a_exclusive_fraction=0.1, b_exclusive_fraction=0.1
)
EVERY: list[CrosscoderTrainingConfig] = [
    StandardTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=64, l1_warm_up_steps=5),
    BatchTopKTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=64, k=4),
    DSFTrainingCrosscoderConfig(d_a=16, d_b=24, d_sae=64, k=4, tie="linear_map"),
    DeltaTrainingCrosscoderConfig(d_a=16, d_b=16, d_sae=64, k=4),
    replace(DFC, k_initial=8, k_anneal_steps=5, reassign_steps=[10], evidence_window=5),
]


ON_THE_SPARSE_PATH: list[CrosscoderTrainingConfig] = [
    replace(sae, training_path="sparse")
    for sae in EVERY
    if isinstance(sae, TopKTrainingCrosscoderConfig)
]


def kind(sae: CrosscoderTrainingConfig) -> str:
    """The architecture, and how its steps are to be computed: at these sizes densely, unless told
    otherwise."""
    path = getattr(sae, "training_path", "auto")
    return sae.architecture() + (", sparse" if path == "sparse" else "")


every = pytest.mark.parametrize("sae", [*EVERY, *ON_THE_SPARSE_PATH], ids=kind)


@pytest.fixture
def kinds_trained(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kinds of crosscoders that took training steps, as their steps' outputs show them."""
    seen: set[str] = set()
    step = TrainingCrosscoder[Any].training_forward_pass

    def watched(self: TrainingCrosscoder[Any], step_input: TrainStepInput) -> TrainStepOutput:
        output = step(self, step_input)
        is_sparse = output.feature_acts.is_sparse
        seen.add(self.cfg.architecture() + (", sparse" if is_sparse else ""))
        return output

    monkeypatch.setattr(TrainingCrosscoder, "training_forward_pass", watched)
    return seen


def fresh(cfg: Any) -> Any:
    """SAELens writes metadata into the configs it is given, so tests do not share one."""
    return type(cfg).from_dict(cfg.to_dict())


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    write_pages(path, 12)
    return path


@pytest.fixture
def cfg(
    text_file: Path, llama_config: ModelConfig, gpt2_config: ModelConfig
) -> CrosscoderRunnerConfig:
    return CrosscoderRunnerConfig(
        sae=fresh(DFC),
        model_a=llama_config,
        model_b=gpt2_config,
        dataset_path=str(text_file),
        eval_every_n_documents=4,
        context_size=48,
        training_tokens=64 * 40,
        train_batch_size_tokens=64,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=4,
        lr=3e-3,
        lr_warm_up_steps=5,
        dead_feature_window=10,
    )


def test_from_two_model_names_and_a_text_to_a_saved_crosscoder(
    cfg: CrosscoderRunnerConfig, tmp_path: Path
) -> None:
    trained = CrosscoderTrainingRunner(replace(cfg, output_path=str(tmp_path / "run"))).run()
    saved = SAE.load_from_disk(tmp_path / "run")
    assert isinstance(saved, Crosscoder)
    assert saved.max_forbidden_weight() == 0
    acts = make_acts(10, 40)
    torch.testing.assert_close(saved.encode(acts), trained.encode(acts), atol=1e-4, rtol=1e-4)
    metadata = saved.cfg.metadata
    assert metadata.model_a["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata.model_b["d_model"] == 24
    assert metadata.pairs_trained > 1000


@pytest.mark.first_is_fast
@every
def test_every_architecture_trains_on_two_models_and_is_opened_by_saelens(
    sae: CrosscoderTrainingConfig,
    cfg: CrosscoderRunnerConfig,
    pair: ModelPair,
    tmp_path: Path,
    kinds_trained: set[str],
) -> None:
    models = pair if sae.d_a != sae.d_b else ModelPair(pair.a, pair.a)
    here = replace(cfg, sae=fresh(sae), output_path=str(tmp_path / "run"))
    trained = CrosscoderTrainingRunner(here, models).run()
    first, again = (SAE.load_from_disk(tmp_path / "run") for _ in range(2))
    acts = make_acts(10, sae.d_in)
    assert torch.equal(first.encode(acts), again.encode(acts))
    assert torch.equal(first.encode(acts), trained.to_inference().encode(acts))
    assert kinds_trained == {kind(sae)}


@pytest.mark.slow
def test_firing_is_counted_anew_after_the_last_test(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, tmp_path: Path
) -> None:
    # Before the test one latent's place was another's: counts from then would be of the wrong
    # latents.
    here = replace(cfg, reassign_at=[0.5], output_path=str(tmp_path / "run"))
    runner = CrosscoderTrainingRunner(here, pair)
    assert runner.cfg.to_sae_trainer_config().feature_sampling_window == 20
    trained = runner.run()
    counted = load_file(tmp_path / "run" / "sparsity.safetensors")["sparsity"]
    # Ten of twenty steps' batches of 64: a rate is a multiple of 1 / 1280.
    firings = (10 ** counted.double() * 20 * 64).round(decimals=3)
    assert torch.allclose(firings, firings.round(), atol=0.01)
    assert trained.cfg.metadata.l0 == pytest.approx(4, abs=0.2)


def test_tests_of_a_crosscoder_without_exclusive_latents_are_refused(
    cfg: CrosscoderRunnerConfig,
) -> None:
    batchtopk = BatchTopKTrainingCrosscoderConfig(d_sae=64, k=4)
    with pytest.raises(ValueError, match="is for a dfc, and this is a batchtopk_crosscoder"):
        CrosscoderTrainingRunner(replace(cfg, sae=batchtopk, reassign_at=[0.5]))


def test_widths_that_an_architecture_cannot_take_are_refused_before_training(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    delta = DeltaTrainingCrosscoderConfig(d_sae=64, k=4)
    with pytest.raises(ValueError, match="needs one width and one basis; got d_a=16 and d_b=24"):
        CrosscoderTrainingRunner(replace(cfg, sae=delta), pair)


def test_training_beats_the_untrained_crosscoder(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    runner = CrosscoderTrainingRunner(cfg, pair)
    assert runner.stream.text is not None
    held = [rows.acts for rows in runner.stream.text.rows("held_out", PairCounts())]
    untrained = DFCTrainingCrosscoder(fresh(DFC))
    untrained.fit_normalization(torch.cat(held))
    before, *_ = evaluate(untrained.to_inference(), held)
    after, *_ = evaluate(runner.run().to_inference(), held)
    for model in ("a", "b"):
        key = f"explained_variance/{model}"
        assert after[key] > max(before[key], 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 1])
def test_the_same_seed_gives_the_same_weights(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, prefetch: int
) -> None:
    one, other = (
        CrosscoderTrainingRunner(replace(cfg, prefetch_llm_batches=prefetch), pair).run()
        for _ in range(2)
    )
    assert torch.equal(one.W_dec, other.W_dec)


def test_no_held_out_document_is_trained_on(cfg: CrosscoderRunnerConfig, pair: ModelPair) -> None:
    data = CrosscoderTrainingRunner(cfg, pair).stream.text
    assert data is not None
    counts = [PairCounts(), PairCounts()]
    training = {tuple(c.segments) for c in in_order(data.stream("training").batches(counts[0]))}
    held = {tuple(c.segments) for c in in_order(data.stream("held_out").batches(counts[1]))}
    assert (counts[0].texts, counts[1].texts) == (9, 3)
    assert held and not training & held


@pytest.mark.slow
def test_distinct_pairs_are_counted_once_however_often_the_text_repeats(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = replace(cfg, max_unique_pairs=300, keep_in_memory=False)
    runner = CrosscoderTrainingRunner(cfg, pair)
    with caplog.at_level(logging.INFO, logger="sae_lens_dfc"):
        runner.run()
    assert 290 <= runner.stream.counts.pairs <= 300
    assert f"2560 samples of {runner.stream.counts.pairs} distinct pairs" in caplog.text


@pytest.mark.slow
def test_two_runs_from_one_configuration_name_their_own_models(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    cfg = replace(cfg, sae=replace(DFC, d_in=0, d_a=0, d_b=0), training_tokens=64)
    first = CrosscoderTrainingRunner(cfg, pair).run()
    CrosscoderTrainingRunner(cfg, ModelPair(pair.a, pair.a)).run()
    assert first.cfg.metadata.model_b["d_model"] == 24


def test_widths_are_taken_from_the_models_when_left_out(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    runner = CrosscoderTrainingRunner(replace(cfg, sae=replace(DFC, d_in=0, d_a=0, d_b=0)), pair)
    assert (runner.cfg.sae.d_a, runner.cfg.sae.d_b, runner.cfg.sae.d_in) == (16, 24, 40)


def test_a_wrong_width_is_named_with_the_right_one(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    cfg = replace(cfg, sae=replace(DFC, d_in=0, d_b=23))
    with pytest.raises(ValueError, match=r"sae.d_b=23, but hook .* is 24 wide. Set d_b=24"):
        CrosscoderTrainingRunner(cfg, pair)


@pytest.mark.slow
def test_an_output_folder_with_a_run_is_left_alone_unless_told(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cfg.json").write_text("old")
    (tmp_path / "run" / "metrics.json").write_text("old")
    cfg = replace(cfg, output_path=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run. Pass --overwrite"):
        CrosscoderTrainingRunner(cfg, pair)
    assert (tmp_path / "run" / "metrics.json").exists()
    CrosscoderTrainingRunner(replace(cfg, overwrite=True), pair).run()
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "cfg.json").read_text() != "old"


def test_warm_up_and_dead_window_fit_a_short_run(cfg: CrosscoderRunnerConfig) -> None:
    trainer = replace(cfg, lr_warm_up_steps=None, dead_feature_window=None).to_sae_trainer_config()
    assert (trainer.total_training_steps, trainer.lr_warm_up_steps) == (40, 4)
    assert trainer.dead_feature_window == 4


def test_a_failed_run_leaves_nothing_behind(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, tmp_path: Path
) -> None:
    Dataset.from_dict({"text": ["", "", "", ""]}).save_to_disk(tmp_path / "empty")
    cfg = replace(
        cfg, output_path=str(tmp_path / "out" / "run"), dataset_path=str(tmp_path / "empty")
    )
    with pytest.raises(ValueError, match="are empty in column"):
        CrosscoderTrainingRunner(cfg, pair).run()
    assert not (tmp_path / "out").exists()


def test_settings_survive_json(cfg: CrosscoderRunnerConfig) -> None:
    again = CrosscoderRunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again.to_dict() == cfg.to_dict()


def test_settings_of_an_architecture_that_nobody_registered_name_it(
    cfg: CrosscoderRunnerConfig,
) -> None:
    values = cfg.to_dict()
    values["sae"]["architecture"] = "my_crosscoder"
    with pytest.raises(ValueError, match="'my_crosscoder' is not registered"):
        CrosscoderRunnerConfig.from_dict(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval_every_n_documents": 1}, "eval_every_n_documents must be at least 2"),
        ({"context_size": 1}, "context_size must be at least 2"),
        ({"training_tokens": 10}, "training_tokens=10 is less than one batch"),
        ({"n_checkpoints": 2}, "n_checkpoints=2 needs a checkpoint_path"),
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens must be above 0"),
        ({"n_batches_for_norm_estimate": 0}, "n_batches_for_norm_estimate must be above 0"),
        ({"max_unique_pairs": 0}, "max_unique_pairs must be above 0"),
        ({"device": "gpu"}, "device 'gpu' is not available"),
    ],
)
def test_contradicting_settings_are_refused(
    cfg: CrosscoderRunnerConfig, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(cfg, **overrides)


def test_saelens_context_of_too_many_tokens_is_refused_in_one_line(pair: ModelPair) -> None:
    numbers = pair.to_tokens(" ".join(reference_pages()[:3]))[:, :250]
    with pytest.raises(ValueError, match=r"tokens is more than model .* can read \(256\)"):
        pair.run_with_cache(numbers, names_filter=["both"])


def test_contexts_longer_than_a_model_can_read_are_refused(
    cfg: CrosscoderRunnerConfig, pair: ModelPair
) -> None:
    with pytest.raises(
        ValueError, match=r"context_size=300 is more than .* can read \(256 tokens\)"
    ):
        CrosscoderTrainingRunner(replace(cfg, context_size=300), pair)


def test_wandb_is_off_unless_asked_for(cfg: CrosscoderRunnerConfig) -> None:
    assert not cfg.logger.log_to_wandb


@pytest.mark.first_is_fast
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_wandb_gets_the_held_out_measures(
    path: Any, cfg: CrosscoderRunnerConfig, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(cfg, sae=replace(fresh(DFC), training_path=path))
    logged: dict[str, Any] = {}
    calls: list[str] = []
    monkeypatch.setattr("wandb.init", lambda **_: calls.append("init"))
    monkeypatch.setattr("wandb.log", lambda metrics, **_: logged.update(metrics))
    monkeypatch.setattr("wandb.finish", lambda: calls.append("finish"))
    log = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=2)
    CrosscoderTrainingRunner(replace(cfg, logger=log), pair).run()
    assert calls == ["init", "finish"]
    # SAELens' trainer of several crosscoders puts each one's name in front, also when there is one.
    assert {
        "crosscoder/held_out/explained_variance/a",
        "crosscoder/metrics/l0/a_exclusive",
        "crosscoder/losses/mse_loss_b",
    } <= set(logged)
    assert logged["crosscoder/metrics/l0"] == pytest.approx(4, abs=0.05)


@pytest.mark.slow
def test_autocast_on_the_sparse_path_is_the_coarse_product_and_nothing_else(
    cfg: CrosscoderRunnerConfig, pair: ModelPair, kinds_trained: set[str]
) -> None:
    sparse = replace(fresh(EVERY[-1]), training_path="sparse")
    coarse = replace(sparse, encoder_product="bfloat16")
    runs = [
        replace(cfg, sae=fresh(sparse)),
        replace(cfg, sae=fresh(sparse), autocast=True),
        replace(cfg, sae=fresh(coarse)),
    ]
    exact, cast, product = (CrosscoderTrainingRunner(run, pair).run().state_dict() for run in runs)
    assert kinds_trained == {"dfc, sparse"}
    for name, weights in product.items():
        assert torch.equal(cast[name], weights), name
    assert not torch.equal(exact["W_dec"], product["W_dec"])


@pytest.mark.slow
def test_the_models_forward_passes_are_compiled_when_asked(
    cfg: CrosscoderRunnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def compile_nothing(function: Any, mode: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            asked.append((function.__name__, mode))
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    cfg = replace(cfg, compile_llm=True, llm_compilation_mode="max-autotune-no-cudagraphs")
    pair = open_pair(replace(cfg, autocast_lm=True))
    assert pair.a.autocast and pair.b.autocast
    pair.activations([[pair.bos_segment, *pair.segments("The cat sat.")[0]]])
    assert asked == [("run_with_cache", "max-autotune-no-cudagraphs")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("training_path", ["dense", "sparse"])
def test_a_compiled_step_trains_the_same(
    training_path: Any, cfg: CrosscoderRunnerConfig, tmp_path: Path
) -> None:
    # In a process of its own: the checks of shapes that tests add cannot be compiled.
    folders = [tmp_path / name for name in ("plain", "compiled")]
    for folder in folders:
        here = replace(
            cfg,
            sae=replace(fresh(DFC), training_path=training_path),
            training_tokens=64 * 10,
            dead_feature_window=2,
            output_path=str(folder),
            compile_sae=folder.name == "compiled",
        )
        path = tmp_path / f"{folder.name}.json"
        path.write_text(json.dumps(here.to_dict()))
        program = (
            "import json, sys; from sae_lens_dfc import *; "
            "cfg = CrosscoderRunnerConfig.from_dict(json.load(open(sys.argv[1]))); "
            "CrosscoderTrainingRunner(cfg).run()"
        )
        subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True)
    plain, compiled = (load_file(folder / "sae_weights.safetensors") for folder in folders)
    for name, weights in plain.items():
        torch.testing.assert_close(compiled[name], weights, atol=1e-3, rtol=1e-2)


# --- SAELens' own runners, unmodified ---


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("autocast", [False, True])
def test_saelens_trainer_takes_a_crosscoder_and_any_iterator(
    autocast: bool, path: str, kinds_trained: set[str]
) -> None:
    def batches() -> Any:
        while True:
            yield make_acts(64, 12)

    cfg = SAETrainerConfig(
        total_training_samples=64 * 30,
        autocast=autocast,
        train_batch_size_samples=64,
        logger=NO_WANDB,
        lr=1e-3,
        lr_end=1e-3,
    )
    trained = SAETrainer(cfg, make_dfc(training_path=path), batches()).fit()
    assert kinds_trained == {kind(trained.cfg)}
    assert trained.is_normalization_fitted
    assert trained.cfg.metadata.l0 == pytest.approx(6, abs=0.1)
    assert trained.to_inference().max_forbidden_weight() == 0


@pytest.mark.slow
def test_saelens_multi_sae_trainer_trains_all_architectures_on_one_stream(
    kinds_trained: set[str],
) -> None:
    def batches() -> Any:
        while True:
            acts = make_acts(64, 40)
            yield {"unequal": acts, "equal": acts[:, :32]}

    saes = {
        kind(c): get_sae_training_class(c.architecture())[0](fresh(c))
        for c in [*EVERY, *ON_THE_SPARSE_PATH]
    }
    hooks = {name: "unequal" if sae.cfg.d_in == 40 else "equal" for name, sae in saes.items()}
    cfg = SAETrainerConfig(
        total_training_samples=64 * 20,
        train_batch_size_samples=64,
        logger=NO_WANDB,
        lr=1e-3,
        lr_end=1e-3,
    )
    MultiSAETrainer(cfg, saes, hooks, batches()).fit()
    assert kinds_trained == set(saes)
    for sae in saes.values():
        assert (
            isinstance(sae, TrainingCrosscoder) and sae.to_inference().max_forbidden_weight() == 0
        )


@every
def test_saelens_language_model_runner_takes_a_pair_with_two_tokenizers(
    sae: Any, pair: ModelPair, tmp_path: Path, kinds_trained: set[str]
) -> None:
    pair = pair if sae.d_a != sae.d_b else ModelPair(pair.a, pair.a)
    cfg = LanguageModelSAERunnerConfig(
        sae=fresh(sae),
        model_name="llama x gpt2",
        hook_name="both",
        dataset_path="unused",
        is_dataset_tokenized=False,
        context_size=24,
        seqpos_slice=(1, None),
        training_tokens=64 * 20,
        train_batch_size_tokens=64,
        store_batch_size_prompts=4,
        n_batches_in_buffer=8,
        output_path=str(tmp_path / "out"),
        checkpoint_path=None,
        model_from_pretrained_kwargs={},
        logger=NO_WANDB,
        verbose=False,
    )
    # One page again and again would warn of a small data set; enough of them do not.
    texts = Dataset.from_dict({"text": reference_pages()[:20] * 100})
    with pytest.warns(UserWarning, match="Dataset is not tokenized"):
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=texts, override_model=pair)  # type: ignore[arg-type]
    trained = runner.run()
    assert kinds_trained == {kind(sae)}
    saved = SAE.load_from_disk(tmp_path / "out")
    acts = make_acts(5, sae.d_in)
    torch.testing.assert_close(
        saved.encode(acts), trained.eval().encode(acts), atol=1e-4, rtol=1e-4
    )


def test_saelens_command_line_offers_the_architectures() -> None:
    flags = ["--d_a", "3", "--d_b", "5", "--d_in", "8", "--k", "4", "--verbose", "false"]
    flags += ["--training_path", "sparse", "--encoder_product", "bfloat16"]
    cfg = _parse_cfg_args(["--architecture", "dfc", *flags])
    assert isinstance(cfg.sae, DFCTrainingCrosscoderConfig)
    assert (cfg.sae.d_in, cfg.sae.k) == (8, 4)
    assert (cfg.sae.training_path, cfg.sae.encoder_product) == ("sparse", "bfloat16")


@every
def test_saelens_synthetic_runner_takes_a_crosscoder(
    sae: Any, tmp_path: Path, kinds_trained: set[str]
) -> None:
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=50, hidden_dim=sae.d_in),
        sae=fresh(sae),
        training_samples=64 * 20,
        batch_size=64,
        eval_samples=640,
        output_path=str(tmp_path / "out"),
        checkpoint_path=None,
        logger=NO_WANDB,
    )
    result = SyntheticSAERunner(cfg).run()
    assert result.final_eval is not None
    assert kinds_trained == {kind(sae)}
    assert 0 <= result.final_eval.mcc <= 1
    assert isinstance(SAE.load_from_disk(tmp_path / "out"), Crosscoder)
