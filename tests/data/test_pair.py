import threading

import pytest
import torch

from sae_lens_dfc.data.alignment.segments import Segment
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.hooked_model import HookedModel

TEXT = "The cat sat on the mat in 1989, naïvely."


def test_activations_are_those_of_each_model_alone_at_the_paired_tokens(pair: ModelPair) -> None:
    segments, _ = pair.segments(TEXT)
    context = [pair.bos_segment, *segments]
    (acts,) = pair.activations([context])
    for i, segment in enumerate(context):
        for model, ids, columns in (
            (pair.a, [s.ids_a for s in context[: i + 1]], slice(0, 16)),
            (pair.b, [s.ids_b for s in context[: i + 1]], slice(16, 40)),
        ):
            # The model reads only the text up to here, so nothing later can have leaked in.
            flat = torch.tensor([[t for part in ids for t in part]])
            alone = model.activations(flat, torch.ones_like(flat))[0, -1]
            torch.testing.assert_close(acts[i, columns], alone, atol=1e-5, rtol=1e-4)
        assert segment.ids_a and segment.ids_b


def test_a_batch_gives_what_its_contexts_give_alone(pair: ModelPair) -> None:
    contexts = [[pair.bos_segment, *pair.segments(text)[0]] for text in (TEXT, "short", TEXT * 2)]
    for alone, together in zip(
        (pair.activations([c])[0] for c in contexts), pair.activations(contexts), strict=True
    ):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_one_model_twice_gives_the_same_activations_twice(pair: ModelPair) -> None:
    twin = ModelPair(pair.a, pair.a)
    segments, coverage = twin.segments(TEXT)
    (acts,) = twin.activations([[twin.bos_segment, *segments]])
    assert torch.equal(acts[:, :16], acts[:, 16:])
    assert coverage.a == coverage.b == 1


def test_one_config_twice_loads_one_model(llama_config: ModelConfig) -> None:
    twin = ModelPair.load(llama_config, llama_config)
    assert twin.a is twin.b


def test_numbered_segments_give_the_activations_of_the_segments(pair: ModelPair) -> None:
    bos = pair.tokenizer.bos_token_id
    numbers = torch.cat([torch.tensor([[bos]]), pair.to_tokens(TEXT)], dim=1)
    _, cache = pair.run_with_cache(numbers, names_filter=["any"])
    (expected,) = pair.activations([[pair.bos_segment, *pair.segments(TEXT)[0]]])
    torch.testing.assert_close(cache["any"][0], expected)


def test_the_same_segment_keeps_its_number(pair: ModelPair) -> None:
    assert torch.equal(pair.to_tokens(TEXT), pair.to_tokens(TEXT))
    assert pair._segments[pair.tokenizer.bos_token_id] == Segment(pair.a.bos_ids, pair.b.bos_ids)


def test_lone_surrogates_do_not_break_a_text(pair: ModelPair) -> None:
    segments, _ = pair.segments("a\ud800b")
    assert segments


def test_models_on_two_devices_run_at_the_same_time(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = [pair.bos_segment, *pair.segments(TEXT)[0]]
    (one_after_the_other,) = pair.activations([context])
    both_are_running = threading.Barrier(2, timeout=20)
    run = HookedModel.activations

    def wait_for_the_other(self: HookedModel, *args: torch.Tensor) -> torch.Tensor:
        both_are_running.wait()
        return run(self, *args)

    # To torch these are two devices, and the same one.
    monkeypatch.setattr(
        HookedModel,
        "device",
        property(lambda self: torch.device("cpu:0" if self is pair.b else "cpu")),
    )
    monkeypatch.setattr(HookedModel, "activations", wait_for_the_other)
    (at_once,) = pair.activations([context])
    assert torch.equal(at_once, one_after_the_other)
