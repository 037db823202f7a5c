"""What other libraries train on the joined input: given what ours are, and measured as ours are."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import recovery
from benchmarks.peers import dictionary_learning, saelens
from benchmarks.peers.dictionary_learning import (
    DictionaryLearning,
    load_dictionary_learning,
)
from benchmarks.peers.saelens import PEERS, Normalization, as_crosscoder
from benchmarks.peers.separate_saes import match, recovery_of_matches
from benchmarks.recovery import (
    PRESETS,
    Run,
    row,
    run_benchmark,
    runs,
    toy_config,
    train,
)
from sae_lens_dfc import BatchTopKTrainingCrosscoder, BatchTopKTrainingCrosscoderConfig, ToyPair
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.recovery import OF_CALLS, Truth
from sae_lens_dfc.metrics.recovery import recovery as recovered

NOT_INSTALLED = dictionary_learning.missing()
needs_dictionary_learning = pytest.mark.skipif(NOT_INSTALLED is not None, reason=str(NOT_INSTALLED))
SAELENS, DICTIONARY_LEARNING, AS_IT_COMES, SEPARATE = PEERS
OURS = "batchtopk_crosscoder"


def small(name: str) -> Run:
    return Run("small", name, 0.4, 0, 0.0, False)


def batches(run: Run) -> Any:
    return ToyPair(toy_config(run)).batches(256, seed=run.seed)


@pytest.fixture
def no_dictionary_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(dictionary_learning, "distribution", absent)


# --- the score ---


def test_the_same_weights_are_the_same_crosscoder_whoever_trained_them() -> None:
    toy = ToyPair(toy_config(small(OURS)))
    raw = next(toy.batches(512)) * 3 + 1
    cfg = BatchTopKTrainingCrosscoderConfig(d_a=24, d_b=24, d_sae=64, k=5, decoder_norm="l2")
    ours = BatchTopKTrainingCrosscoder(cfg)
    ours.fit_normalization(raw)
    normalization = Normalization.of(cfg, raw)
    # Hand-made: each latent is one true feature, in the units in which the two models are joined.
    W_dec = normalize(toy.directions * normalization.scales, dim=-1)
    weights = {
        "W_enc": W_dec.T,
        "b_enc": torch.linspace(-1, 0.5, 64),
        "W_dec": W_dec,
        "b_dec": torch.linspace(-0.2, 0.3, 48),
        "threshold": torch.tensor(0.7),
    }
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(ours, name).data = weights[name].clone()
    ours.topk_threshold.fill_(0.7)
    theirs, mine = as_crosscoder(weights, normalization), ours.eval().to_inference()
    feature_acts = mine.encode(raw)
    assert 0 < (feature_acts > 0).float().mean() < 1
    torch.testing.assert_close(theirs.encode(raw), feature_acts, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs(raw), mine(raw), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.decoder_norms(), mine.decoder_norms())

    truth = Truth(toy.features, toy.directions, toy.frequencies)
    alive = torch.ones(64, dtype=torch.bool)
    scores = [recovered(c, truth, alive, "relative_norm") for c in (theirs, mine)]
    assert scores[0] == scores[1]
    assert scores[0]["exclusive_recall"] == 1 and scores[0]["false_exclusive_rate"] == 0


@pytest.mark.slow
def test_a_row_of_saelens_has_every_figure_and_its_own_settings() -> None:
    theirs, mine = row(small(SAELENS)), row(small(OURS))
    assert theirs.keys() == mine.keys()
    assert theirs["architecture"] == SAELENS
    assert theirs["settings"]["crosscoder"]["architecture"] == "batchtopk"
    assert theirs["settings"]["training"] == mine["settings"]["training"]
    assert theirs["explained_variance/a"] == pytest.approx(mine["explained_variance/a"], abs=0.15)
    assert theirs["l0"] == pytest.approx(5, abs=1)
    assert theirs["evidence_recall"] is not None


@pytest.mark.slow
@needs_dictionary_learning
def test_a_row_of_dictionary_learning_has_every_figure_and_its_version() -> None:
    theirs, mine = row(small(DICTIONARY_LEARNING)), row(small(OURS))
    assert theirs.keys() == mine.keys()
    assert theirs["versions"]["dictionary-learning"]
    assert theirs["settings"]["crosscoder"]["lr"] == mine["settings"]["training"]["lr"]
    assert theirs["explained_variance/a"] == pytest.approx(mine["explained_variance/a"], abs=0.2)
    assert theirs["l0"] == pytest.approx(5, abs=1)


def test_settings_of_a_peer_are_json_and_differ_by_size_and_seed() -> None:
    for name in PEERS:
        texts = {
            json.dumps(recovery.settings(replace_run(small(name), **changed)))
            for changed in ({}, {"size": 1.0}, {"seed": 3}, {"pairing_noise": 0.3}, {"null": True})
        }
        assert len(texts) == 5
        # By which `compare` knows what may be compared.
        pairs = {json.loads(text)["training"]["total_training_samples"] for text in texts}
        assert pairs == {200 * 256}


def replace_run(run: Run, **changed: Any) -> Run:
    return run._replace(**changed)


# --- two dictionaries that are matched ---


def hand_made(toy: ToyPair, raw: Tensor, shift: float) -> Crosscoder:
    """Two dictionaries of the true features of each model, read off by least squares: B's in
    another order."""
    a, b = toy.features.models.values()
    in_a, in_b = (toy.directions[:, m] for m in (a, b))
    in_b = in_b.flip(0)
    own_a, own_b = in_a.norm(dim=-1) > 0, in_b.norm(dim=-1) > 0
    rows = in_a[own_a], in_b[own_b]
    normalization = Normalization(torch.zeros(raw.shape[1]), torch.ones(2), a.stop)
    weights = {
        "W_enc": torch.block_diag(*(torch.linalg.pinv(r) for r in rows)),
        "b_enc": torch.zeros(sum(map(len, rows))),
        "W_dec": torch.block_diag(*rows),
        "b_dec": torch.zeros(raw.shape[1]),
        "threshold": torch.tensor(shift),
    }
    return as_crosscoder(weights, normalization, (len(rows[0]), len(rows[1])))


def test_matched_dictionaries_of_the_true_features_find_all_of_them_and_call_nothing_else() -> None:
    few = replace(toy_config(small(OURS)), n_features=20, active_features=2, noise=0.0)
    toy = ToyPair(few)
    raw = next(toy.batches(8192))
    crosscoder = hand_made(toy, raw, 0.05)
    alive = (crosscoder.encode(raw) > 0).any(dim=0)
    assert alive.all()
    truth = Truth(toy.features, toy.directions, toy.frequencies)
    matches = match(crosscoder, raw.split(2048), alive)
    assert 0 < matches.limit < 0.3
    assert len(matches.a) == len(matches.b) == toy.features.n_shared
    score = recovery_of_matches(crosscoder, truth, alive, matches)
    assert (score["exclusive_recall"], score["shared_recall"]) == (1, 1)
    assert (score["false_exclusive_rate"], score["exclusive_called"]) == (0, 4)
    # A dead latent has no counterpart, and is called nothing for it.
    shared = int(matches.a[0])
    alive[shared] = False
    without = match(crosscoder, raw.split(2048), alive)
    assert not without.is_alone[shared] and shared not in without.a
    assert without.is_alone[matches.b[0]]  # the other half of it is alone now


@pytest.mark.slow
def test_a_row_of_two_dictionaries_has_no_evidence_and_every_other_figure() -> None:
    theirs, mine = row(small(SEPARATE)), row(small(OURS))
    assert theirs.keys() - mine.keys() == {"matching_limit"} and mine.keys() <= theirs.keys()
    assert all(theirs[name] is None for name in OF_CALLS)
    assert theirs["explained_variance/b"] == pytest.approx(mine["explained_variance/b"], abs=0.15)
    # Five in each; SAELens' threshold rises from 0, and is low after so few steps.
    assert 9 < theirs["l0"] < 14
    assert set(theirs["settings"]["crosscoder"]) == {"a", "b"}


# --- the input ---


def seen_by_saelens(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[Tensor]:
    """What a SAELens trainer's dictionary reconstructs in its first steps."""
    seen: list[Tensor] = []

    class Watched(SAETrainer[Any, Any]):
        def step(self, batch: Tensor) -> Any:
            output = super().step(batch)
            seen.append(output.sae_in.detach().clone())
            return output

    monkeypatch.setattr(where, "SAETrainer", Watched)
    train(small(name), batches(small(name)))
    return seen


def seen_by_dictionary_learning(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Tensor]:
    seen: list[Tensor] = []

    def train_sae(data: Any, configs: list[dict[str, Any]], steps: int, **kwargs: Any) -> None:
        trainer = configs[0]["trainer"](**configs[0])
        # Of our window, a tenth of 20 steps, in pairs.
        assert trainer.dead_feature_threshold == (2 * 256 if name == DICTIONARY_LEARNING else None)
        assert kwargs["normalize_activations"] == (name == DICTIONARY_LEARNING)
        seen.extend(islice(data, steps))
        d_in, d_sae = configs[0]["activation_dim"], configs[0]["dict_size"]
        weights = {
            "encoder.weight": torch.randn(d_sae, d_in),
            "encoder.bias": torch.zeros(d_sae),
            "decoder.weight": torch.randn(d_in, d_sae),
            "b_dec": torch.zeros(d_in),
            "threshold": torch.tensor(1.0),
        }
        folder = Path(kwargs["save_dir"]) / "trainer_0"
        folder.mkdir()
        torch.save(weights, folder / "ae.pt")

    class Trainer:
        dead_feature_threshold: int | None = None

        def __init__(self, **_: Any):
            pass

    package = DictionaryLearning(train_sae, Trainer)
    monkeypatch.setattr(saelens, "load_dictionary_learning", lambda: package)
    train(small(name), batches(small(name)))
    return seen


def test_every_peer_gets_the_normalized_pairs_that_ours_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESETS, "small", replace(PRESETS["small"], steps=20))
    ours = seen_by_saelens(monkeypatch, recovery, OURS)
    separate = seen_by_saelens(monkeypatch, saelens, SEPARATE)
    others = [
        [torch.cat(both, dim=1) for both in zip(separate[::2], separate[1::2], strict=True)],
        seen_by_saelens(monkeypatch, saelens, SAELENS),
        seen_by_dictionary_learning(monkeypatch, DICTIONARY_LEARNING),
        seen_by_dictionary_learning(monkeypatch, AS_IT_COMES),
    ]
    assert len(ours) == 20 and ours[0].shape == (256, 48)
    assert ours[0].std() > 1.5 * next(batches(small(OURS))).std()  # it is not what came in
    for theirs in others:
        assert len(theirs) == len(ours)
        for step in (0, 1, -1):
            torch.testing.assert_close(theirs[step], ours[step])


# --- the package that may not be there ---


@pytest.mark.slow
@pytest.mark.usefixtures("no_dictionary_learning")
def test_without_the_package_its_rows_are_left_out_and_it_is_said_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [small(DICTIONARY_LEARNING), small(SAELENS)]
    monkeypatch.setattr(recovery, "runs", lambda _: wanted)
    with caplog.at_level(logging.WARNING):
        rows = run_benchmark("small", tmp_path / "recovery.json", jobs=1)
    assert [r["architecture"] for r in rows] == [SAELENS]
    (line,) = [r.getMessage() for r in caplog.records if r.name == recovery.__name__]
    assert line.startswith(f"{DICTIONARY_LEARNING} is left out: ")
    assert "pip install --no-deps dictionary-learning==0.1.0" in line
    with pytest.raises(
        ValueError, match="is not installed. Install it with `pip install --no-deps"
    ):
        load_dictionary_learning()


@pytest.mark.usefixtures("no_dictionary_learning")
def test_rows_that_are_there_are_kept_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small(DICTIONARY_LEARNING)
    monkeypatch.setattr(recovery, "runs", lambda _: [run])
    path = tmp_path / "recovery.json"
    old = {"architecture": run.name, "settings": recovery.settings(run), "commit": None}
    path.write_text(json.dumps([old]))
    assert run_benchmark("small", path, jobs=1) == [old]


def test_the_preset_holds_the_peers_at_every_size_noise_and_on_the_null() -> None:
    for name in (SAELENS, DICTIONARY_LEARNING, SEPARATE):
        own = [r for r in runs("full") if r.name == name]
        ours = [r for r in runs("full") if r.name == OURS]
        assert [replace_run(r, name=OURS) for r in own] == ours


@needs_dictionary_learning
def test_the_installed_package_is_imported_without_its_dependencies() -> None:
    package = load_dictionary_learning()
    assert package.trainer.__name__ == "BatchTopKTrainer"


def test_a_package_of_another_version_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        locate_file: Callable[[str], Path] = staticmethod(lambda _: Path("/nowhere"))

    monkeypatch.setattr(dictionary_learning, "distribution", lambda _: Other)
    with pytest.raises(ValueError, match="could not be imported: ModuleNotFoundError"):
        load_dictionary_learning()
