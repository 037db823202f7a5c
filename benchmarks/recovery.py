"""Benchmarks recovery of known differences on toy pairs, over architectures, dictionary sizes,
seeds and wrongly paired rows."""

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

from benchmarks.peers.saelens import PEERS, SEPARATE
from benchmarks.peers.separate_saes import match, recovery_of_matches
from benchmarks.provenance import commit, provenance
from sae_lens_dfc.core.parsing import read_json
from sae_lens_dfc.core.terminal import said_by
from sae_lens_dfc.crosscoders.architectures.batchtopk import BatchTopKTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.delta import DeltaTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.dfc import (
    DFCTrainingCrosscoderConfig,
    exclusivity_tests,
)
from sae_lens_dfc.crosscoders.architectures.dsf import DSFTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.architectures.standard import StandardTrainingCrosscoderConfig
from sae_lens_dfc.crosscoders.base import TrainingCrosscoder
from sae_lens_dfc.crosscoders.config import CrosscoderTrainingConfig
from sae_lens_dfc.crosscoders.inference import Crosscoder
from sae_lens_dfc.metrics.evaluate import evaluate
from sae_lens_dfc.metrics.exclusivity.known import fit_probes
from sae_lens_dfc.metrics.recovery import OF_CALLS, Truth, recovery, recovery_of_calls
from sae_lens_dfc.stats.affine_maps import fit_affine_maps
from sae_lens_dfc.stats.moments import PairMoments
from sae_lens_dfc.synthetic import ToyPair, ToyPairConfig
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.recipes.named import REASSIGN_AT

logger = logging.getLogger(__name__)

FILENAME = "recovery.json"
BATCHES_FOR_NORM = 10
EVAL_BATCH_SIZE = 2048
# Samples for training, evaluation and affine maps must not overlap.
EVAL_SEED, FIT_SEED = 1_000_000, 2_000_000


@dataclass(frozen=True)
class Preset:
    """Sizes of the benchmark."""

    toy: ToyPairConfig
    """The toy pair; its seed is replaced by the run's."""
    steps: int
    """Training steps."""
    batch_size: int
    """Pairs per step."""
    lr: float
    """Learning rate of Adam, decaying to 0 over the last fifth."""
    l1_coefficient: float
    """L1 coefficient at which the standard crosscoder's L0 is about the others' k."""
    seeds: int
    """Number of toy pairs, each with its own crosscoders."""
    eval_batches: int
    """Batches of 2048 fresh pairs for evaluation."""
    sizes: tuple[float, ...] = (0.4, 1.0, 2.0)
    """Dictionary sizes, as multiples of the number of features."""
    pairing_noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Shares of wrongly paired rows; those above 0, like the null, only at dictionary size 1."""


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
    """Registry name of the architecture, or name of a recipe or a peer."""
    size: float
    seed: int
    pairing_noise: float
    null: bool = False
    """Whether the two toy models share every feature."""
    firing_correlation: float = 0.0
    """Scale of the correlations between features' firing."""


def _crosscoders(
    preset: Preset,
) -> dict[str, tuple[type[CrosscoderTrainingConfig], dict[str, Any]]]:
    """The crosscoders compared: the five architectures, our recipe, variants of both, and other
    libraries' dictionaries.

    All have the same L0 and inputs normalized by variance; none anneals k. Ours use our dead-latent
    loss, two variants with SAELens' coefficient; the others use their own, with the sizes of a
    BatchTopK crosscoder. Decoders are tied by a fitted map, since a toy pair has no common basis;
    the Delta-Crosscoder, which assumes one, is at a disadvantage here.
    """
    k: dict[str, Any] = {"k": preset.toy.active_features}
    warm_up = {"l1_warm_up_steps": preset.steps // 10}
    penalty = preset.l1_coefficient
    # Our default is 1/32, as in the literature.
    as_saelens = {"aux_loss_coefficient": 1.0}
    tests = {**exclusivity_tests(REASSIGN_AT, preset.steps), "decoder_norm": "sum"}
    return {
        "standard_crosscoder": (
            StandardTrainingCrosscoderConfig,
            {"l1_coefficient": penalty, **warm_up},
        ),
        "batchtopk_crosscoder": (BatchTopKTrainingCrosscoderConfig, k),
        "dsf_crosscoder": (DSFTrainingCrosscoderConfig, {**k, "tie": "linear_map"}),
        "delta_crosscoder": (DeltaTrainingCrosscoderConfig, k),
        "dfc": (DFCTrainingCrosscoderConfig, {**k, "decoder_norm": "sum"}),
        "dfc-reassigned": (DFCTrainingCrosscoderConfig, {**k, **tests}),
        "dfc-reassigned-l2": (DFCTrainingCrosscoderConfig, {**k, **tests, "decoder_norm": "l2"}),
        "dfc-l2": (DFCTrainingCrosscoderConfig, {**k, "decoder_norm": "l2"}),
        "standard-third": (
            StandardTrainingCrosscoderConfig,
            {"l1_coefficient": penalty / 3, **warm_up},
        ),
        "batchtopk-aux-1": (BatchTopKTrainingCrosscoderConfig, {**k, **as_saelens}),
        "dfc-reassigned-aux-1": (DFCTrainingCrosscoderConfig, {**k, **tests, **as_saelens}),
        **dict.fromkeys(PEERS, (BatchTopKTrainingCrosscoderConfig, k)),
    }


CLEAN_ONLY = ("dfc-l2", "dfc-reassigned-l2", "standard-third", "dictionary-learning-as-it-comes")
"""Variants trained at each size, but not on wrong pairs or the null."""


def runs(preset_name: str) -> list[Run]:
    """All runs of a preset: every size on clean pairs; noise and null at one size."""
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
    """The toy pair of a run. The null has the same number of features, all shared."""
    exclusive = {"a_exclusive_fraction": 0.0, "b_exclusive_fraction": 0.0} if run.null else {}
    toy = PRESETS[run.preset].toy
    return replace(
        toy,
        seed=run.seed,
        pairing_noise=run.pairing_noise,
        firing_correlation=run.firing_correlation,
        **exclusive,
    )


def training_config(run: Run) -> CrosscoderRunnerConfig:
    """Training settings of a run, without models or text."""
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
    """Batches of a toy pair, with the CPU time spent sampling them, which is excluded from the
    training time."""

    def __init__(self, batches: Iterator[Tensor]):
        self.batches = batches
        self.seconds = 0.0

    def __next__(self) -> Tensor:
        start = time.process_time()
        batch = next(self.batches)
        self.seconds += time.process_time() - start
        return batch


def train(run: Run, batches: Iterator[Tensor]) -> Crosscoder:
    """Train a run's crosscoder with SAELens' trainer, or a peer with its own library's trainer on
    the same pairs."""
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
    """Train a run's crosscoder and compare it with the ground truth.

    Returns:
        The run, the measures of `recovery` and `recovery_of_calls`, explained variance and L0 on
        fresh pairs, the total seconds and the CPU seconds of training alone, all settings, and the
        provenance.
    """
    started = time.monotonic()
    cfg = training_config(run)
    batches = Drawn(ToyPair(toy_config(run)).batches(cfg.train_batch_size_tokens, seed=run.seed))
    start = time.process_time()
    crosscoder = train(run, batches)
    training_seconds = time.process_time() - start - batches.seconds
    # Evaluation always uses correctly paired rows.
    pair = ToyPair(replace(toy_config(run), pairing_noise=0.0))
    n_batches = PRESETS[run.preset].eval_batches
    to_match = islice(pair.batches(EVAL_BATCH_SIZE, FIT_SEED), n_batches)
    held_out = islice(pair.batches(EVAL_BATCH_SIZE, EVAL_SEED), n_batches)
    truth = Truth(pair.features, pair.directions, pair.frequencies)
    if run.name == SEPARATE:
        metrics, firing, _ = evaluate(crosscoder, held_out)
        found = _found_by_matching(crosscoder, truth, firing.counts > 0, to_match)
    else:
        to_fit = list(to_match)
        metrics, firing, evidence = evaluate(
            crosscoder,
            held_out,
            fit_affine_maps(PairMoments.of(to_fit), pair.cfg.d_a),
            fit_probes(crosscoder, to_fit),
        )
        assert evidence is not None  # there are maps and probes
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
        "firing_correlation": run.firing_correlation,
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
    """The measures of two matched dictionaries; without evidence, because no latent is shared and
    could serve as reference."""
    matches = match(crosscoder, acts, alive)
    found = recovery_of_matches(crosscoder, truth, alive, matches)
    return found | dict.fromkeys(OF_CALLS) | {"matching_limit": matches.limit}


def settings(run: Run) -> dict[str, Any]:
    """Everything that determines a run's results at one commit and one set of versions."""
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
    """Run all runs of a preset; see `run_missing`."""
    return run_missing(runs(preset), path, jobs)


def run_missing(wanted: Sequence[Run], path: Path, jobs: int) -> list[dict[str, Any]]:
    """Run these runs, writing the results after each; existing results are not recomputed.

    Runs that need a missing package are skipped, and how to install it is logged.

    Args:
        wanted: The runs.
        path: File of results.
        jobs: Processes, one thread each.

    Raises:
        ValueError: The file holds something else.
    """
    rows = {i: old for i, old in _resumed(path, wanted)}
    others = {str(row["commit"]) for row in rows.values()} - {str(commit())}
    if others:
        logger.warning(
            "%s holds results from other commits, which are kept: %s", path, sorted(others)
        )
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
            raise TypeError("it is not a list of rows.")
        known = {
            json.dumps([row["architecture"], row["settings"]], sort_keys=True): row for row in rows
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not hold results of this benchmark: {said_by(error)} Name another --output."
        ) from None
    for i, run in enumerate(wanted):
        key = json.dumps([run.name, settings(run)], sort_keys=True)
        if key in known:
            yield i, known.pop(key)
    if known:
        raise ValueError(
            f"{path} holds {len(known)} results with other settings. Name another --output, or delete it."
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
    # Spawned, not forked: a forked child inherits torch's thread pool in an undefined state.
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _be_a_worker) as pool,
        _no_bars_in_children(),
    ):
        pending = {pool.submit(row, run): i for i, run in todo.items()}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:
            # After one failure, do not wait hours for the others.
            pool.shutdown(cancel_futures=True)


def _be_a_worker() -> None:
    """Use one thread, and exit when the parent process ends, even if it was killed."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _no_bars_in_children() -> Iterator[None]:
    """tqdm reads this variable at import, which in a child happens before any of our code runs."""
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
