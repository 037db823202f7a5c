"""Both models' losses on the text after each pair, against Hugging Face's own models."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_lens_dfc.analysis.causal.following_loss import after_each, following_losses
from sae_lens_dfc.analysis.evaluation.nulls import PairTask, null_case
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.metrics.evaluation_data import PairData
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from tests.helpers import dfc_config, write_pages


@pytest.fixture(scope="module")
def task(
    pair: ModelPair,
    llama_config: ModelConfig,
    gpt2_config: ModelConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> PairTask:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_pages(text)
    cfg = CrosscoderRunnerConfig(
        dataset_path=str(text),
        sae=dfc_config(d_a=pair.d_a, d_b=pair.d_b),
        model_a=llama_config,
        model_b=gpt2_config,
        max_unique_pairs=200,
        eval_pairs=600,
        context_size=32,
        training_tokens=1024,
        train_batch_size_tokens=256,
    )
    data = PairData.collect(PairedText(cfg, pair), "test")
    return PairTask(cfg, pair, data).with_losses()


@torch.no_grad()
def loss_of_next(name: str, ids: list[int], start: int, end: int) -> float:
    """Sum of the losses of the tokens from `start` to before `end`, one forward pass a text."""
    logits = AutoModelForCausalLM.from_pretrained(name)(torch.tensor([ids])).logits[0]
    log_p = logits.log_softmax(dim=-1)
    return -sum(log_p[i - 1, ids[i]].item() for i in range(start, end))


def test_losses_are_those_of_the_tokens_of_the_next_segment_and_of_the_next_eight(
    task: PairTask,
) -> None:
    assert task.following is not None
    checked: set[bool] = set()
    for rows, losses in zip(task.data.held_out, task.following, strict=True):
        for i in range(0, len(rows.acts), 31):
            segments = task.data.contexts[int(rows.context[i])].segments
            n = int(rows.segment[i])
            if n + 1 == len(segments):
                assert losses[i].isnan().all()
                continue
            models = (
                (task.cfg.model_a, segments.ids_a, segments.ends_a),
                (task.cfg.model_b, segments.ids_b, segments.ends_b),
            )
            last = min(n + 8, len(segments) - 1)
            for m, (model, ids, ends) in enumerate(models):
                for window, end in enumerate((ends[n + 1], ends[last])):
                    expected = loss_of_next(model.model_name, ids.tolist(), ends[n], end)
                    found = losses[i, window, m].item()
                    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
            checked.add(last == n + 8)
    assert checked == {False, True}


def test_the_text_of_eight_segments_follows_each_and_what_there_is_near_the_end() -> None:
    losses = torch.arange(1.0, 13).unsqueeze(1)
    followed = [sum(range(i + 1, min(i + 9, 13))) for i in range(1, 12)]
    after = after_each(losses)[..., 0]
    assert after[:-1, 0].tolist() == list(range(2, 13))
    assert after[:-1, 1].tolist() == followed and after[-1].isnan().all()


def test_only_as_many_pairs_as_asked_for_are_measured_in_whole_contexts(task: PairTask) -> None:
    some = torch.cat(following_losses(task.pair, task.data, 200))
    every = torch.cat(following_losses(task.pair, task.data))
    measured = ~some.flatten(start_dim=1).isnan().any(dim=1)
    assert 100 < measured.sum() < 400
    torch.testing.assert_close(some[measured], every[measured])


def test_the_null_of_one_model_has_its_losses_twice_and_shuffled_pairs_have_none(
    task: PairTask,
) -> None:
    twice = null_case("self", task).following
    assert twice is not None and task.following is not None
    for losses, own in zip(twice, task.following, strict=True):
        assert_equal(losses[..., 0], losses[..., 1])
        assert_equal(losses[..., 0], own[..., 0])
    assert null_case("shuffle", task).following is None


def assert_equal(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_a_model_without_its_upper_layers_is_refused(task: PairTask) -> None:
    half = load_model(replace(task.cfg.model_a, drop_unused_layers=True))
    with pytest.raises(ValueError, match="loaded with drop_unused_layers"):
        following_losses(ModelPair(half, task.pair.b), task.data)
