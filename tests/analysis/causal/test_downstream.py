from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from sae_lens_dfc import Crosscoder, CrosscoderConfig
from sae_lens_dfc.analysis.causal import downstream as downstream_module
from sae_lens_dfc.analysis.causal.downstream import downstream, edits_of
from sae_lens_dfc.analysis.steering import splicing
from sae_lens_dfc.analysis.steering.hooks import changed
from sae_lens_dfc.analysis.steering.splicing import Edit, loss_and_kl, reading_of, spliced
from sae_lens_dfc.data.activations import PairedRows, paired_activations
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.text.cpython_docs import reference_pages
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.models.loading import load_model
from sae_lens_dfc.stats.jackknife import SE
from tests.helpers import make_acts, make_firing_dfc, stream_of


def rows_of(pair: ModelPair, n_pairs: int = 300, **kwargs: Any) -> list[PairedRows]:
    stream = stream_of(pair, reference_pages()[:2], n_pairs=n_pairs, batch_size_prompts=5)
    return list(paired_activations(pair, stream.batches(PairCounts()), PairCounts(), **kwargs))


@pytest.fixture(scope="module")
def rows(pair: ModelPair) -> list[PairedRows]:
    """Some are outliers, and not every token is paired."""
    return rows_of(pair, outlier_factor=1.2)


@pytest.fixture(scope="module")
def means(rows: list[PairedRows]) -> Tensor:
    return torch.cat([r.acts for r in rows]).mean(dim=0)


@torch.no_grad()
def identity(d_a: int, d_b: int, exclusive: bool = False) -> Crosscoder:
    """Two latents for each dimension, one for each sign: all shared, or each its own model's."""
    d_in = d_a + d_b
    n_a, n_b = (2 * d_a, 2 * d_b) if exclusive else (0, 0)
    crosscoder = Crosscoder(
        CrosscoderConfig(
            d_in=d_in, d_sae=2 * d_in, d_a=d_a, d_b=d_b, n_a_exclusive=n_a, n_b_exclusive=n_b
        )
    )
    signs = torch.cat([x for d in torch.eye(d_in).split([d_a, d_b]) for x in (d, -d)])
    crosscoder.W_dec.copy_(signs)
    crosscoder.W_enc.copy_(signs.T)
    for weight in (crosscoder.b_enc, crosscoder.b_dec, crosscoder.threshold):
        weight.zero_()
    return crosscoder


def plain(metrics: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in metrics.items() if not name.endswith(SE)}


def test_an_identity_recovers_all_of_the_loss_and_ablation_is_what_it_is_measured_from(
    pair: ModelPair, rows: list[PairedRows], means: Tensor
) -> None:
    result = downstream(identity(pair.d_a, pair.d_b, exclusive=True), pair, rows, means)
    for m in ("a", "b"):
        assert result[f"loss/{m}/zero"] != pytest.approx(result[f"loss/{m}/untouched"], rel=1e-6)
        for name in ("loss_recovered", "loss_recovered_from_mean"):
            assert result[f"{name}/{m}"] == pytest.approx(1, abs=1e-4)
            assert result[f"{name}/{m}/exclusive_only"] == pytest.approx(1, abs=1e-4)
        assert result[f"kl/{m}"] == pytest.approx(0, abs=1e-6)
        # It has no bias and no shared latent, so these are zero ablation by other ways.
        for variant in ("/shared_only", "/without_exclusive"):
            assert result[f"loss_recovered/{m}{variant}"] == pytest.approx(0, abs=1e-4)
            assert result[f"kl/{m}{variant}"] == pytest.approx(result[f"kl/{m}/zero"], rel=1e-3)
        assert result[f"loss/{m}{SE}"] > 0


def test_a_crosscoder_that_gives_the_mean_recovers_nothing_from_mean_ablation(
    pair: ModelPair, rows: list[PairedRows], means: Tensor
) -> None:
    crosscoder = identity(pair.d_a, pair.d_b)
    with torch.no_grad():
        crosscoder.W_dec.zero_()
        crosscoder.b_dec.copy_(means)
    result = downstream(crosscoder, pair, rows, means)
    for m in ("a", "b"):
        assert result[f"loss_recovered_from_mean/{m}"] == 0
        assert result[f"kl/{m}"] == result[f"kl/{m}/mean"]


def test_without_exclusive_latents_there_are_no_keys_of_them(
    pair: ModelPair, rows: list[PairedRows], means: Tensor
) -> None:
    result = plain(downstream(identity(pair.d_a, pair.d_b), pair, rows, means))
    names = {"loss", "kl", "loss_recovered", "loss_recovered_from_mean", "spliced_share"}
    ablations = {f"{x}/zero" for x in ("loss", "kl")} | {f"{x}/mean" for x in ("loss", "kl")}
    wanted = names | ablations | {"loss/untouched"}
    found = {name.replace("/a", "", 1) for name in result if "/a" in name}
    assert found == wanted


class HuggingFace:
    """The Llama itself, in its own class, and its loss and logits where TransformerLens takes no
    part."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    @torch.no_grad()
    def run(
        self, ids: Tensor, first: int, replaced: list[int], by: Tensor | float = 0.0
    ) -> tuple[float, Tensor]:
        """Loss of the tokens after position `first`, and log-probabilities from there on."""

        def hook(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
            acts = (output if isinstance(output, Tensor) else output[0]).clone()
            acts[0, replaced] = torch.as_tensor(by)
            return acts if isinstance(output, Tensor) else (acts, *output[1:])

        handle = self.model.model.layers[1].register_forward_hook(hook)
        labels = ids.clone()
        labels[: first + 1] = -100
        output = self.model(ids[None], labels=labels[None])
        handle.remove()
        return output.loss.item(), output.logits[0, first:-1].log_softmax(dim=-1)


def contexts_of(rows: list[PairedRows]) -> Iterator[tuple[Tensor, list[int]]]:
    """A's tokens of each context, and at which positions it has rows."""
    for batch in rows:
        for context in batch.contexts:
            at = batch.segment[batch.context == context.number].numpy()
            positions = context.segments.last_a[at].tolist()
            yield torch.from_numpy(context.segments.ids_a), positions


def test_loss_and_divergence_are_those_of_hugging_faces_own_model(
    pair: ModelPair, rows: list[PairedRows], means: Tensor, llama_folder: Path
) -> None:
    model = HuggingFace(llama_folder)
    n = untouched = zero = kl = 0.0
    spliced_rows = tokens = 0
    for ids, at in contexts_of(rows):
        spliced_rows, tokens = spliced_rows + len(at), tokens + len(ids) - 1
        predicted = len(ids) - 1 - min(at)
        before, log_p = model.run(ids, min(at), replaced=[])
        after, log_q = model.run(ids, min(at), replaced=at)
        n += predicted
        untouched += before * predicted
        zero += after * predicted
        kl += kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    assert 0.5 < spliced_rows / tokens < 0.99
    result = downstream(identity(pair.d_a, pair.d_b), pair, rows, means)
    assert result["loss/a/untouched"] == pytest.approx(untouched / n, rel=1e-5)
    assert result["loss/a/zero"] == pytest.approx(zero / n, rel=1e-5)
    assert result["kl/a/zero"] == pytest.approx(kl / n, rel=1e-4)
    assert result["spliced_share/a"] == pytest.approx(spliced_rows / tokens)


def test_divergence_is_torchs_own_for_sharp_and_for_flat_predictions() -> None:
    for scale in (0.1, 1, 30):
        p, q = torch.randn(20, 50) * scale, torch.randn(20, 50) * scale
        ids = torch.randint(0, 50, (20,))
        loss, kl = loss_and_kl(q, p, ids)
        expected = kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        torch.testing.assert_close(kl, expected)
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(q, ids, reduction="none")
        )


@pytest.mark.parametrize("m", ["a", "b"])
def test_only_the_rows_positions_are_replaced(
    pair: ModelPair, rows: list[PairedRows], m: str
) -> None:
    model, batch = getattr(pair, m), rows[0]
    reading = reading_of(model, m, batch)
    before = model.activations(reading.ids, reading.mask)
    # Every row stands where its own activation is.
    own = batch.acts[:, slice(0, pair.d_a) if m == "a" else slice(pair.d_a, None)]
    torch.testing.assert_close(before[reading.context, reading.position], own)
    values = torch.randn_like(own)
    with changed(model, spliced(reading, Edit(values))):
        after = model.activations(reading.ids, reading.mask)
    assert torch.equal(after[reading.context, reading.position], values)
    elsewhere = torch.ones(before.shape[:2], dtype=torch.bool)
    elsewhere[reading.context, reading.position] = False
    assert torch.equal(after[elsewhere], before[elsewhere])
    assert (elsewhere & (reading.mask == 1))[:, 1:].any()


def test_taking_silent_exclusive_latents_out_changes_nothing(
    pair: ModelPair, rows: list[PairedRows], means: Tensor
) -> None:
    crosscoder = make_firing_dfc(d_a=pair.d_a, d_b=pair.d_b)
    with torch.no_grad():
        for name in ("a_exclusive", "b_exclusive"):
            crosscoder.threshold[crosscoder.partition.slices[name]] = torch.inf
    result = downstream(crosscoder, pair, rows, means)
    for m in ("a", "b"):
        assert result[f"loss/{m}/without_exclusive"] == result[f"loss/{m}/untouched"]
        assert result[f"kl/{m}/without_exclusive"] == 0
        assert result[f"loss/{m}/shared_only"] == result[f"loss/{m}"]
        assert result[f"kl/{m}"] > 1e-3


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-4)


def test_partitions_are_decoded_apart_and_add_up() -> None:
    crosscoder = make_firing_dfc()
    acts = make_acts(40, 12)
    with torch.no_grad():
        crosscoder.b_enc.add_(500)  # every latent fires, the exclusive ones too
    edits = edits_of(crosscoder, acts, means=torch.zeros(12))
    feature_acts = crosscoder.encode(acts)
    for m, inputs in crosscoder.partition.models.items():
        own = crosscoder.partition.slices[f"{m}_exclusive"]
        written = feature_acts[:, own] @ crosscoder.W_dec[own, inputs]
        rebuilt = crosscoder.decode(feature_acts)[:, inputs]
        assert written.abs().max() > 1
        close(edits[m][""].values, rebuilt)
        close(edits[m]["/exclusive_only"].values, crosscoder.b_dec[inputs] + written)
        close(edits[m]["/shared_only"].values, rebuilt - written)
        close(edits[m]["/without_exclusive"].values, -written)
        assert [name for name, edit in edits[m].items() if edit.adds] == ["/without_exclusive"]


def random_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def test_under_shuffled_pairs_every_reconstruction_goes_to_its_own_place(
    pair: ModelPair, rows: list[PairedRows], means: Tensor
) -> None:
    result = downstream(identity(pair.d_a, pair.d_b), pair, rows, means, random_order)
    for m in ("a", "b"):
        assert result[f"kl/{m}"] == pytest.approx(0, abs=1e-6)
        assert result[f"loss_recovered/{m}"] == pytest.approx(1, abs=1e-4)


def test_under_shuffled_pairs_a_row_is_encoded_with_another_row_of_b() -> None:
    crosscoder = make_firing_dfc()
    acts = make_acts(9, 12)
    order = random_order(9).tolist()
    assert order != sorted(order)
    edits = edits_of(crosscoder, acts, torch.zeros(12), random_order)
    for i, j in enumerate(order):
        rebuilt = crosscoder(torch.cat([acts[i, :5], acts[j, 5:]])[None])[0]
        close(edits["a"][""].values[i], rebuilt[:5])
        close(edits["b"][""].values[j], rebuilt[5:])


def test_an_order_that_names_a_row_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="must give each of 0 to 8 once for 9 rows"):
        edits_of(make_firing_dfc(), make_acts(9, 12), torch.zeros(12), lambda n: torch.zeros(n))


def test_one_model_twice_is_measured_twice(llama_config: ModelConfig) -> None:
    twin = ModelPair.load(llama_config, llama_config)
    assert twin.a is twin.b
    rows = rows_of(twin, n_pairs=200)
    crosscoder = identity(twin.d_a, twin.d_b)
    with torch.no_grad():
        crosscoder.W_dec[:, twin.d_a :] = 0  # A is rebuilt, B is not
    result = downstream(crosscoder, twin, rows, torch.ones(twin.d_a + twin.d_b))
    assert result["loss/a/zero"] == result["loss/b/zero"]
    assert result["loss_recovered/a"] == pytest.approx(1, abs=1e-4)
    assert result["loss_recovered/b"] == 0


@pytest.mark.slow
def test_how_much_is_held_at_once_changes_no_measure(
    pair: ModelPair, rows: list[PairedRows], means: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    crosscoder = make_firing_dfc(d_a=pair.d_a, d_b=pair.d_b)
    whole = downstream(crosscoder, pair, rows, means)
    monkeypatch.setattr(downstream_module, "MAX_LOGITS", 2 * 32 * 600)
    monkeypatch.setattr(splicing, "MAX_LOGITS_AT_ONCE", {"cpu": 3 * 600})
    parts = downstream(crosscoder, pair, rows, means)
    assert plain(parts) == pytest.approx(plain(whole), rel=1e-3, abs=1e-3)


def test_a_context_of_which_no_row_is_left_counts_as_not_replaced(
    pair: ModelPair, rows: list[PairedRows], means: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream_module, "MAX_LOGITS", 1)  # context by context
    batch = rows[0]
    keep = batch.context != batch.contexts[0].number
    fewer = batch._replace(
        acts=batch.acts[keep], context=batch.context[keep], segment=batch.segment[keep]
    )
    crosscoder = identity(pair.d_a, pair.d_b)
    with_it = downstream(crosscoder, pair, [fewer], means)
    without = downstream(crosscoder, pair, [fewer._replace(contexts=batch.contexts[1:])], means)
    assert with_it["loss/a"] == pytest.approx(without["loss/a"])
    assert with_it["spliced_share/a"] < without["spliced_share/a"]


def test_no_rows_is_an_error_not_a_measure(pair: ModelPair, rows: list[PairedRows]) -> None:
    crosscoder, means = identity(pair.d_a, pair.d_b), torch.zeros(pair.d_a + pair.d_b)
    with pytest.raises(ValueError, match="No pair was evaluated"):
        downstream(crosscoder, pair, [], means)
    with pytest.raises(ValueError, match="come without their contexts"):
        downstream(crosscoder, pair, [rows[0]._replace(contexts=())], means)


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
def test_a_model_without_its_upper_layers_is_refused(
    pair: ModelPair, llama_config: ModelConfig, hook_name: str
) -> None:
    half = load_model(replace(llama_config, hook_name=hook_name, drop_unused_layers=True))
    with pytest.raises(ValueError, match="loaded with drop_unused_layers"):
        downstream(identity(16, 24), ModelPair(half, pair.b), [], torch.zeros(40))
