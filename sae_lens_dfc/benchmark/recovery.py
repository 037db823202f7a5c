"""Which crosscoder finds known differences: toy pairs, over dictionary sizes, seeds and wrongly paired rows."""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_dfc.benchmark.peers import PEERS, SEPARATE
from sae_lens_dfc.benchmark.provenance import commit, provenance
from sae_lens_dfc.benchmark.separate import match, recovery_of_matches
from sae_lens_dfc.crosscoders.base import CrosscoderTrainingConfig, TrainingCrosscoder
from sae_lens_dfc.crosscoders.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.delta import DeltaTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.dfc import DFCTrainingCrosscoderConfig, exclusivity_tests
from sae_lens_dfc.crosscoders.dsf import DSFTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.crosscoders.standard import StandardTrainingCrosscoderConfig
from sae_lens_dfc.evaluate import evaluate
from sae_lens_dfc.files import read_json
from sae_lens_dfc.metrics.moments import PairMoments
from sae_lens_dfc.metrics.recovery import OF_CALLS, Truth, recovery, recovery_of_calls
from sae_lens_dfc.metrics.stitching import fit_stitching
from sae_lens_dfc.recipes import TEST_AT
from sae_lens_dfc.synthetic import ToyPair, ToyPairConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig

logger = logging.getLogger(__name__)

FILENAME = "recovery.json"
BATCHES_FOR_NORM = 10
EVAL_BATCH_SIZE = 2048
# Samples of training, of evaluation and of the maps between the models must not meet.
EVAL_SEED, FIT_SEED = 1_000_000, 2_000_000


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    toy: ToyPairConfig
    """The toy pair; its seed is the run's."""
    steps: int
    """Training steps."""
    batch_size: int
    """Pairs in one step."""
    lr: float
    """Adam's step, falling to 0 over the last fifth."""
    l1_coefficient: float
    """Penalty of the standard crosscoder at which about as many latents are active as the others' k."""
    seeds: int
    """Toy pairs, each with its own crosscoders."""
    eval_batches: int
    """Batches of 2048 fresh pairs to measure on."""
    sizes: tuple[float, ...] = (0.4, 1.0, 2.0)
    """Dictionary sizes, in units of the number of features."""
    pairing_noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Shares of wrongly paired rows; those above 0 at dictionary size 1 only, as the null."""


PRESETS = {
    "small": Preset(
        toy=ToyPairConfig(
            n_features=64, d_a=24, d_b=24, a_exclusive_fraction=0.1, b_exclusive_fraction=0.1
        ),
        steps=200,
        batch_size=256,
        lr=6e-3,
        l1_coefficient=2.0,
        seeds=1,
        eval_batches=4,
        pairing_noise=(0.0, 0.3),
    ),
    "full": Preset(
        toy=ToyPairConfig(n_features=384, d_a=96, d_b=96),
        steps=1000,
        batch_size=1024,
        lr=3e-3,
        l1_coefficient=3.0,
        seeds=5,
        eval_batches=20,
    ),
}


class Run(NamedTuple):
    """One crosscoder to train."""

    preset: str
    name: str
    """Registry name of the architecture, or a recipe's or a peer's."""
    size: float
    seed: int
    pairing_noise: float
    null: bool
    """Whether the two toy models share every feature."""


def _crosscoders(
    preset: Preset,
) -> dict[str, tuple[type[CrosscoderTrainingConfig], dict[str, Any]]]:
    """What is compared: the five architectures, our recipe, variants of both, and other libraries' dictionaries.

    All have the same number of active latents and inputs scaled by variance; none anneals k. Ours have our
    dead-latent loss, two variants with SAELens' weight for it; the others have their own, and the sizes of a BatchTopK crosscoder. Decoders are tied by a fitted map, since a toy pair has no common basis: the
    Delta-Crosscoder, which needs one, is here out of its element.
    """
    k: dict[str, Any] = {"k": preset.toy.active_features}
    warm_up = {"l1_warm_up_steps": preset.steps // 10}
    penalty = preset.l1_coefficient
    # Our default is the literature's, a 32nd.
    as_saelens = {"aux_loss_coefficient": 1.0}
    tests = {**exclusivity_tests(TEST_AT, preset.steps), "decoder_norm": "sum"}
    return {
        "standard_crosscoder": (
            StandardTrainingCrosscoderConfig,
            {"l1_coefficient": penalty, **warm_up},
        ),
        "batchtopk_crosscoder": (BatchTopKTrainingCrosscoderConfig, k),
        "dsf_crosscoder": (DSFTrainingCrosscoderConfig, {**k, "tie": "linear_map"}),
        "delta_crosscoder": (DeltaTrainingCrosscoderConfig, k),
        "dfc": (DFCTrainingCrosscoderConfig, {**k, "decoder_norm": "sum"}),
        "dfc-tested": (DFCTrainingCrosscoderConfig, {**k, **tests}),
        "dfc-tested-l2": (DFCTrainingCrosscoderConfig, {**k, **tests, "decoder_norm": "l2"}),
        "dfc-l2": (DFCTrainingCrosscoderConfig, {**k, "decoder_norm": "l2"}),
        "standard-third": (
            StandardTrainingCrosscoderConfig,
            {"l1_coefficient": penalty / 3, **warm_up},
        ),
        "batchtopk-aux-1": (BatchTopKTrainingCrosscoderConfig, {**k, **as_saelens}),
        "dfc-tested-aux-1": (DFCTrainingCrosscoderConfig, {**k, **tests, **as_saelens}),
        **dict.fromkeys(PEERS, (BatchTopKTrainingCrosscoderConfig, k)),
    }


CLEAN_ONLY = ("dfc-l2", "dfc-tested-l2", "standard-third", "dictionary-learning-as-it-comes")
"""Variants that are trained at each size, but not on wrong pairs and not on the null."""


def runs(preset_name: str) -> list[Run]:
    """Every crosscoder of a preset: all sizes on clean pairs; noise and null at one size."""
    preset = PRESETS[preset_name]
    clean = [(size, 0.0, False) for size in preset.sizes]
    noisy = [(1.0, noise, False) for noise in preset.pairing_noise if noise > 0]
    return [
        Run(preset_name, name, size, seed, noise, null)
        for seed in range(preset.seeds)
        for size, noise, null in [*clean, *noisy, (1.0, 0.0, True)]
        for name in _crosscoders(preset)
        if (size, noise, null) in clean or name not in CLEAN_ONLY
    ]


def toy_config(run: Run) -> ToyPairConfig:
    """The toy pair of a run. The null keeps as many features and shares them all."""
    exclusive = {"a_exclusive_fraction": 0.0, "b_exclusive_fraction": 0.0} if run.null else {}
    toy = PRESETS[run.preset].toy
    return replace(toy, seed=run.seed, pairing_noise=run.pairing_noise, **exclusive)


def training_config(run: Run) -> CrosscoderRunnerConfig:
    """The training of a run, without models or text."""
    preset = PRESETS[run.preset]
    config_class, settings = _crosscoders(preset)[run.name]
    d_sae = round(run.size * preset.toy.n_features)
    sae = config_class(d_a=preset.toy.d_a, d_b=preset.toy.d_b, d_sae=d_sae, **settings)
    return CrosscoderRunnerConfig(
        sae=sae,
        training_tokens=preset.steps * preset.batch_size,
        train_batch_size_tokens=preset.batch_size,
        lr=preset.lr,
        lr_warm_up_steps=preset.steps // 20,
        lr_decay_steps=preset.steps // 5,
        n_batches_for_norm_estimate=BATCHES_FOR_NORM,
        seed=run.seed,
    )


class Drawn(Iterator[Tensor]):
    """Batches of a toy pair, and the processor's seconds that drawing them took: no part of a training's."""

    def __init__(self, batches: Iterator[Tensor]):
        self.batches = batches
        self.seconds = 0.0

    def __next__(self) -> Tensor:
        start = time.process_time()
        batch = next(self.batches)
        self.seconds += time.process_time() - start
        return batch


def train(run: Run, batches: Iterator[Tensor]) -> Crosscoder:
    """The crosscoder of a run, trained by SAELens' trainer, or what another library's trainer made of the same pairs."""
    cfg = training_config(run)
    if run.name in PEERS:
        return PEERS[run.name].train(cfg, batches)
    torch.manual_seed(cfg.seed)
    crosscoder = get_sae_training_class(cfg.sae.architecture())[0](cfg.sae)
    assert isinstance(crosscoder, TrainingCrosscoder)
    crosscoder.fit_normalization(torch.cat(list(islice(batches, cfg.n_batches_for_norm_estimate))))
    SAETrainer(cfg=cfg.to_sae_trainer_config(), sae=crosscoder, data_provider=batches).fit()
    return crosscoder.eval().to_inference()


def row(run: Run) -> dict[str, Any]:
    """Train a run's crosscoder and hold it against the truth.

    Returns:
        The run, the measures of `recovery` and `recovery_of_calls`, explained variance and L0 on fresh pairs, the seconds of
        the whole and the processor's seconds of the training alone, all settings, and where it ran.
    """
    started = time.monotonic()
    cfg = training_config(run)
    batches = Drawn(ToyPair(toy_config(run)).batches(cfg.train_batch_size_tokens, seed=run.seed))
    start = time.process_time()
    crosscoder = train(run, batches)
    training_seconds = time.process_time() - start - batches.seconds
    # Whatever was trained on wrong pairs is measured on right ones.
    pair = ToyPair(replace(toy_config(run), pairing_noise=0.0))
    n_batches = PRESETS[run.preset].eval_batches
    to_match = islice(pair.batches(EVAL_BATCH_SIZE, FIT_SEED), n_batches)
    held_out = islice(pair.batches(EVAL_BATCH_SIZE, EVAL_SEED), n_batches)
    truth = Truth(pair.features, pair.directions, pair.frequencies)
    if run.name == SEPARATE:
        metrics, firing, _ = evaluate(crosscoder, held_out)
        found = _found_by_matching(crosscoder, truth, firing.counts > 0, to_match)
    else:
        metrics, firing, evidence = evaluate(
            crosscoder, held_out, fit_stitching(PairMoments.of(to_match), pair.cfg.d_a)
        )
        assert evidence is not None  # the models are mapped
        by: Literal["partition", "relative_norm"]
        by = "partition" if isinstance(cfg.sae, DFCTrainingCrosscoderConfig) else "relative_norm"
        found = {
            **recovery(crosscoder, truth, firing.counts > 0, by),
            **recovery_of_calls(crosscoder, truth, evidence),
        }
    return {
        "architecture": run.name,
        "d_sae": cfg.sae.d_sae,
        "d_sae_per_feature": run.size,
        "seed": run.seed,
        "pairing_noise": run.pairing_noise,
        "null": run.null,
        **found,
        **{name: metrics[name] for name in ("explained_variance/a", "explained_variance/b", "l0")},
        "alive": (firing.counts > 0).double().mean().item(),
        "seconds": round(time.monotonic() - started, 1),
        "training_seconds": round(training_seconds, 2),
        **provenance(*(PEERS[run.name].packages if run.name in PEERS else ())),
        "settings": settings(run),
    }


def _found_by_matching(
    crosscoder: Crosscoder, truth: Truth, alive: Bool[Tensor, " d_sae"], acts: Iterable[Tensor]
) -> dict[str, Any]:
    """The measures of two dictionaries that are matched; of evidence none, as no latent is there in both models to compare with."""
    matches = match(crosscoder, acts, alive)
    found = recovery_of_matches(crosscoder, truth, alive, matches)
    return found | dict.fromkeys(OF_CALLS) | {"matching_limit": matches.limit}


def settings(run: Run) -> dict[str, Any]:
    """All that decides a run's numbers at one commit and one set of versions."""
    cfg = training_config(run)
    sae = {name: value for name, value in cfg.sae.to_dict().items() if name != "metadata"}
    training = asdict(cfg.to_sae_trainer_config())
    values = {
        "preset": run.preset,
        "toy": asdict(toy_config(run)),
        "crosscoder": sae,
        "training": {
            name: training[name]
            for name in (
                *("total_training_samples", "train_batch_size_samples", "lr", "lr_end"),
                *("lr_warm_up_steps", "lr_decay_steps", "adam_beta1", "adam_beta2"),
                "dead_feature_window",
            )
        },
        "pairs_for_normalization": cfg.n_batches_for_norm_estimate * cfg.train_batch_size_tokens,
        "evaluation_pairs": PRESETS[run.preset].eval_batches * EVAL_BATCH_SIZE,
        "evaluation_seed": EVAL_SEED,
    }
    if run.name in PEERS:
        values |= PEERS[run.name].settings(cfg)
    return json.loads(json.dumps(values))


def run_benchmark(preset: str, path: Path, jobs: int) -> list[dict[str, Any]]:
    """All runs of a preset, the results written after each; what is there already is not run again.

    What needs a package that is not installed is left out, and it is said how to install it.

    Args:
        preset: Name in `PRESETS`.
        path: The results' file.
        jobs: Processes, one thread each.

    Raises:
        ValueError: The file holds something else.
    """
    wanted = runs(preset)
    rows = {i: old for i, old in _resumed(path, wanted)}
    others = {str(row["commit"]) for row in rows.values()} - {str(commit())}
    if others:
        logger.warning("%s has results of other commits, which are kept: %s", path, sorted(others))
    todo = _possible({i: run for i, run in enumerate(wanted) if i not in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, result in tqdm(_results(todo, jobs), "Crosscoders", len(todo), unit=" runs"):
        rows[i] = result
        write([rows[j] for j in sorted(rows)], path)
    return [rows[i] for i in sorted(rows)]


def _resumed(path: Path, wanted: Sequence[Run]) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.exists():
        return
    try:
        rows = read_json(path, finite=False)
        if not isinstance(rows, list):
            raise TypeError("not a list of rows")
        known = {
            json.dumps([row["architecture"], row["settings"]], sort_keys=True): row for row in rows
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a result of this benchmark ({error!r}). Name another --output."
        ) from None
    for i, run in enumerate(wanted):
        key = json.dumps([run.name, settings(run)], sort_keys=True)
        if key in known:
            yield i, known.pop(key)
    if known:
        raise ValueError(
            f"{path} holds {len(known)} results of other settings. Name another --output, or delete it."
        )


def _possible(todo: Mapping[int, Run]) -> dict[int, Run]:
    peers = {run.name for run in todo.values()} & set(PEERS)
    missing = {name: what for name in sorted(peers) if (what := PEERS[name].missing()) is not None}
    for name, what_to_do in missing.items():
        logger.warning("%s is left out: %s", name, what_to_do)
    return {i: run for i, run in todo.items() if run.name not in missing}


def _results(todo: Mapping[int, Run], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if jobs == 1:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ((i, row(run)) for i, run in todo.items())
        finally:
            torch.set_num_threads(n_threads)
        return
    # Spawned, not forked: a forked child inherits torch's thread pool in whatever state it is.
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _be_a_worker) as pool,
        _no_bars_in_children(),
    ):
        pending = {pool.submit(row, run): i for i, run in todo.items()}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            # After one failure the others are not worth hours of waiting.
            pool.shutdown(cancel_futures=True)


def _be_a_worker() -> None:
    """One thread, and an end with the process that started this one, even if that was killed."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _no_bars_in_children() -> Iterator[None]:
    """tqdm reads this when it is imported, which in a child is before any code of ours."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One row a line, in place of the old file only when the new one is whole."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n")
    temporary.replace(path)
