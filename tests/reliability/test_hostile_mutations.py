"""Files with random damage: what reads one gives something sound or one clear error, never another,
and never hangs.

`--mutations N` makes N of each kind of file.
"""

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from benchmarks.suite import figures_of
from sae_lens_dfc.analysis.autointerp.concerns import CONCERNS, read_concerns
from sae_lens_dfc.analysis.options import HeldOutOptions
from sae_lens_dfc.analysis.report.build import report_settings
from sae_lens_dfc.analysis.report.page_data import references
from sae_lens_dfc.analysis.report.results import read_evidence, read_metrics, stored_maxima
from sae_lens_dfc.analysis.report.summary import headlines, lead, warnings
from sae_lens_dfc.analysis.report.tables import measures_table
from sae_lens_dfc.analysis.saved_run.held_out import run_config
from sae_lens_dfc.analysis.screening.verdicts import CausalTest
from sae_lens_dfc.cli.arguments import with_files
from sae_lens_dfc.cli.parser import settings_taken
from sae_lens_dfc.core.journal import Journal as Kept
from sae_lens_dfc.core.schema import from_plain
from sae_lens_dfc.core.tensor_files import checksum, load_state, save_state
from sae_lens_dfc.core.terminal import text_table
from sae_lens_dfc.crosscoders.inference import load_crosscoder
from sae_lens_dfc.data.activations import StatefulBatch, StreamState
from sae_lens_dfc.data.batches import Batches, shuffled
from sae_lens_dfc.data.cache.build import data_settings
from sae_lens_dfc.data.cache.manifest import WriterProgress, progress_path
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.contexts import PairCounts
from sae_lens_dfc.data.pair import ModelPair
from sae_lens_dfc.data.paired_text import PairedText
from sae_lens_dfc.models.config import ModelConfig
from sae_lens_dfc.organisms.organism import (
    items_from_json,
    read_organism_manifest,
)
from sae_lens_dfc.training.checkpoint import checkpoints, load_checkpoint, load_place
from sae_lens_dfc.training.config import CrosscoderRunnerConfig
from sae_lens_dfc.training.from_cache import with_cache
from sae_lens_dfc.training.runner import CrosscoderTrainingRunner
from sae_lens_dfc.training.trainer import CrosscoderTrainer
from tests.data.cache.test_cache import HEADER, write
from tests.helpers import make_firing_dfc, train_tiny

logger = logging.getLogger(__name__)

MAX_SECONDS = 5.0


# --- damage ---

STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 10**6, 10**12, -(10**12), 2**63 - 1, 2**63, 10**40),
    *(0.0, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "../../x", "/etc/passwd", "\0", "\x1b[2J", "<script>", "\ud800", "a" * 10_000),
    *([], [[]], [None], [1, "a"], {}, {"": {}}, {"a": None}, {"__class__": 1}),
]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        # Headers are at the start, and decide more than all that follows.
        at = draw.choice((at, min(at, draw.randrange(200))))
        kind = draw.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            del data[at : at + draw.choice((1, 4, 100, len(data)))]
        elif kind == 3:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 64)))
        else:
            data[at : at + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, b"9" * 8))
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in children:
        yield (*path, name)
        if isinstance(child, dict | list):
            yield from places(child, (*path, name))


def damaged_values(values: Any, draw: random.Random) -> Any:
    """With one or a few entries replaced, left out, renamed, doubled or moved."""
    values = json.loads(json.dumps(values))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        found = list(places(values))
        if not found:
            return values
        *outer, last = draw.choice(found)
        holder = values
        for name in outer:
            holder = holder[name]
        kind = draw.randrange(8)
        if kind < 4:
            holder[last] = deepcopy(draw.choice(STRANGE))
        elif kind == 4:
            del holder[last]
        elif kind == 5 and isinstance(holder, dict):
            holder[f"{last}{draw.choice(('', 'x', '.'))}"] = holder.pop(last)
        elif kind == 6 and isinstance(holder, list):
            holder += [holder[last]] * draw.choice((1, 100))
        elif kind == 7 and isinstance(holder[last], int | float):
            holder[last] = -holder[last] * draw.choice((1, 0.5, 10**9))
    return values


def damaged_text(text: str, draw: random.Random) -> bytes:
    """JSON with damage to what it says, or to how it says it."""
    if draw.random() < 0.3:
        return damaged_bytes(text.encode(), draw)
    return json.dumps(damaged_values(json.loads(text), draw)).encode("utf-8", "surrogatepass")


# --- what reads them ---


class Artifact(NamedTuple):
    """A sound file, how it is damaged, and what must not be surprised by it."""

    path: Path
    damage: Callable[[Path, random.Random], None]
    read: Callable[[], Any]


def of_json(path: Path, draw: random.Random) -> None:
    path.write_bytes(damaged_text(path.read_text(encoding="utf-8"), draw))


def of_bytes(path: Path, draw: random.Random) -> None:
    path.write_bytes(damaged_bytes(path.read_bytes(), draw))


def of_yaml(path: Path, draw: random.Random) -> None:
    if draw.random() < 0.4:
        return of_bytes(path, draw)
    values = damaged_values(yaml.safe_load(path.read_text()), draw)
    path.write_bytes(yaml.safe_dump(values).encode("utf-8", "surrogatepass"))
    return None


def of_state(path: Path, draw: random.Random) -> None:
    """A state whose values, names or shapes are other ones, and the file sound."""
    if draw.random() < 0.2:
        return of_bytes(path, draw)
    values, tensors = load_state(path)
    if draw.random() < 0.7:
        values = damaged_values(values, draw)
    else:
        name = draw.choice(list(tensors))
        x = tensors.pop(name)
        others = [
            x.double() * 1e30,
            x[:0] if x.ndim else x[None],
            x.flatten()[:3],
            x.bool(),
            x.reshape(1, -1),
        ]
        if kind := draw.randrange(len(others) + 2):
            tensors[name if kind < 6 else f"{name}x"] = others[kind % len(others)]
    save_state(path, load_state(path)._replace(values=values, tensors=tensors))
    return None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, gpt2_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    flags = ("--max-unique-pairs", "800", "--training-tokens", "1600", "--n-checkpoints", "2")
    flags += ("--reassign-at", "0.9")
    return train_tiny(folder, llama_folder, gpt2_folder, *flags, n_texts=4)


@pytest.fixture
def n_mutations(request: pytest.FixtureRequest) -> int:
    return int(str(request.config.getoption("--mutations")))


def check(name: str, artifact: Artifact, n: int) -> dict[str, int]:
    """Damage the file n times and read it each time; how often it was read and refused."""
    sound = artifact.path.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    artifact.read()
    for i in range(n):
        draw = random.Random(f"{name} {i}")
        artifact.path.write_bytes(sound)
        artifact.damage(artifact.path, draw)
        start = time.process_time()
        try:
            artifact.read()
            outcomes["read"] += 1
        except (ValueError, OSError) as error:
            outcomes["refused"] += 1
            assert str(error).strip(), f"{name} {i}: an error without words"
        except BaseException as error:
            raise AssertionError(
                f"mutation {i} of {name}: {error!r:.500}\n{artifact.path.read_bytes()[:500]!r}"
            ) from error
        assert time.process_time() - start < MAX_SECONDS, f"mutation {i} of {name}"
    artifact.path.write_bytes(sound)
    artifact.read()
    logger.info("%s: %s", name, outcomes)
    assert outcomes["refused"] > n / 10, outcomes
    return outcomes


def used(folder: Path) -> None:
    crosscoder = load_crosscoder(folder)
    acts = torch.ones(2, crosscoder.cfg.d_in, dtype=crosscoder.dtype)
    assert crosscoder.decode(crosscoder.encode(acts)).shape == acts.shape


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_damaged_crosscoder(name: str, tmp_path: Path, n_mutations: int) -> None:
    make_firing_dfc().save_model(tmp_path / "saved")
    damage = of_json if name == "cfg.json" else of_bytes
    path = tmp_path / "saved" / name
    check(name, Artifact(path, damage, lambda: used(tmp_path / "saved")), n_mutations)


@pytest.mark.slow
def test_damaged_settings_of_a_run(run: Path, tmp_path: Path, n_mutations: int) -> None:
    folder = shutil.copytree(run, tmp_path / "run")

    def read() -> None:
        cfg = run_config(str(folder), HeldOutOptions())
        assert isinstance(report_settings(cfg), dict) and cfg.all_sources and cfg.saes
        json.dumps(cfg.to_dict())

    check("runner_cfg.json", Artifact(folder / "runner_cfg.json", of_json, read), n_mutations)


def test_damaged_measures(tmp_path: Path, n_mutations: int) -> None:
    metrics = {
        **{f"{p}explained_variance/{m}": 0.5 for p in ("", "null/self/") for m in "ab"},
        **{
            f"exclusive/{what}/{m}_exclusive": 3 for what in ("significant", "judged") for m in "ab"
        },
        **{f"latents/{name}": 10 for name in ("a_exclusive", "b_exclusive", "shared")},
        **{f"null/self/transfer/auc/a_exclusive{end}": 0.5 for end in ("", "/p5", "/p95")},
        "l0": 20.5,
        "l0/se": 0.1,
        "pairs_evaluated": 1000,
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))

    def read() -> None:
        found = read_metrics(tmp_path / "metrics.json")
        text_table(*measures_table(found))
        _ = lead(found, None), headlines(found), warnings(found), references(found)

    check("metrics.json", Artifact(tmp_path / "metrics.json", of_json, read), n_mutations)


def table_of_latents(path: Path) -> None:
    names = [*("latent", "partition", "max_activation", "is_a", "is_candidate", "is_two_sided")]
    names += ["firings", "relative_decoder_norm", "known", "known_se", "own_r2"]
    names += ["nu_error", "nu_error_se", "nu_reconstruction"]
    names += ["nu_reconstruction_se", "auc", "r2", "span", "p", "q"]
    names += ["is_exclusive"]
    crosscoder = make_firing_dfc()
    rows = [
        [i, crosscoder.partition.name_of(i), 1.5, *["True"] * 3, 7, *["0.25"] * 13, "False"]
        for i in range(24)
    ]
    path.write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")


def test_a_damaged_table_of_latents(tmp_path: Path, n_mutations: int) -> None:
    crosscoder, path = make_firing_dfc(), tmp_path / "latents.csv"
    table_of_latents(path)

    def read() -> None:
        evidence, maxima = read_evidence(path, 24), stored_maxima(tmp_path, crosscoder)
        assert maxima is not None and len(maxima) == 24
        assert evidence is None or all(len(x) == 24 for x in evidence)

    check("latents.csv", Artifact(path, of_bytes, read), n_mutations)


@pytest.mark.slow
def test_a_damaged_manifest_of_a_cache(run: Path, tmp_path: Path, n_mutations: int) -> None:
    cfg = run_config(str(run), HeldOutOptions())
    folder = whole_cache(tmp_path / "cache", cfg)
    asked = replace(cfg, reassign_at=[], model_a=ModelConfig(), model_b=ModelConfig())

    def read() -> None:
        cache = PairedActivationsCache(folder)
        with_cache(asked, cache)
        for batch in islice(cache.batches(16), 3):
            assert batch.acts.shape == (16, cache.d_a + cache.d_b)
        assert isinstance(cache.counts.coverage.a, float)

    check("manifest.json", Artifact(folder / "manifest.json", of_json, read), n_mutations)


def whole_cache(folder: Path, cfg: CrosscoderRunnerConfig) -> Path:
    """Of rows of its own, and with all that a training asks it for."""
    models = {
        f"model_{m}": {"model_name": m, "hook_name": "h", "d_model": d}
        for m, d in (("a", 3), ("b", 4))
    }
    values = cfg.to_dict()
    configs = {name: {**values[name], "model_name": name[-1], "hook_name": "h"} for name in models}
    data = {**data_settings(cfg), "n_ranks": 1}
    return write(folder, replace(HEADER, models=models, configs=configs, data=data)).folder


@pytest.mark.slow
def test_a_damaged_shard(tmp_path: Path, n_mutations: int) -> None:
    folder = write(tmp_path / "cache", stop=4).folder
    path = folder / "rows-00000-000000.safetensors"

    def read() -> None:
        assert PairedActivationsCache(folder).shard(0)["acts"].shape == (32, 7)

    def damage_and_sign(path: Path, draw: random.Random) -> None:
        """A stranger signs what he damaged."""
        of_bytes(path, draw)
        if path.stat().st_size == 0:
            return
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0] |= {"size": path.stat().st_size, "xxh3": checksum(path)}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    signed = (folder / "manifest.json").read_bytes()
    check("shard", Artifact(path, of_bytes, read), n_mutations // 4)

    def read_signed() -> None:
        try:
            read()
        finally:
            (folder / "manifest.json").write_bytes(signed)

    check("shard, signed", Artifact(path, damage_and_sign, read_signed), n_mutations)


@pytest.mark.slow
def test_damaged_progress_of_a_cache(tmp_path: Path, n_mutations: int) -> None:
    write(tmp_path / "cache")
    path = progress_path(tmp_path / "cache", 0)
    check("progress", Artifact(path, of_state, lambda: WriterProgress.load(path)), n_mutations)


# --- checkpoints ---


@pytest.fixture(scope="module")
def trainer(run: Path, pair: ModelPair) -> CrosscoderTrainer:
    cfg = run_config(str(run), HeldOutOptions())
    runner = CrosscoderTrainingRunner(
        replace(cfg, output_path=None, checkpoint_path=None, n_checkpoints=0), pair
    )
    crosscoders = {name: runner._new(sae, 0) for name, sae in runner.cfg.saes.items()}
    return CrosscoderTrainer(cfg.to_sae_trainer_config(), crosscoders, Batches(iter(()), 0), dict)


STATES = ["crosscoder/trainer_state", "crosscoder/sae_weights", "rank-00000"]


@pytest.mark.parametrize("name", [*STATES, "checksums"])
def test_a_damaged_checkpoint(
    name: str,
    run: Path,
    trainer: CrosscoderTrainer,
    pair: ModelPair,
    tmp_path: Path,
    n_mutations: int,
) -> None:
    *_, last = checkpoints(run.with_name("run-checkpoints"))
    folder = shutil.copytree(last, tmp_path / last.name)
    cfg = run_config(str(run), HeldOutOptions())
    text = PairedText(cfg, pair, 0)
    sums = folder / "checksums.json"
    signed = sums.read_bytes()

    def sign(path: Path, draw: random.Random) -> None:
        (of_bytes if "weights" in name else of_state)(path, draw)
        if path.stat().st_size > 0:
            key = str(path.relative_to(folder))
            sums.write_text(json.dumps({**json.loads(signed), key: checksum(path)}))

    def rows(place: StreamState | None) -> Iterator[StatefulBatch]:
        """Until the first is there, as a training that goes on would."""
        for found in text.rows("training", PairCounts(), place):
            yield StatefulBatch(found.acts, found.after)
            return

    def read() -> None:
        try:
            place, _ = load_place(folder)
            load_checkpoint(folder, trainer.trainers)
            next(shuffled(rows, 64, 512, 0.5, 0, place), None)
        finally:
            sums.write_bytes(signed) if name != "checksums" else None

    suffix, damage = (".json", of_json) if name == "checksums" else (".safetensors", sign)
    path = folder / f"{name}{suffix}"
    check(f"checkpoint {name}", Artifact(path, damage, read), n_mutations // 3)


# --- settings and results ---


def test_a_damaged_config(tmp_path: Path, n_mutations: int) -> None:
    path = tmp_path / "c.yaml"
    values = {
        "sae": [{"d_sae": 64, "k": 4, "architecture": "dfc"}, {"d_sae": 32, "k": 4}],
        "model_a": {"model_name": "a", "hook_name": "blocks.1.hook_resid_post"},
        "sources": [{"dataset_path": "x", "weight": 2.0}, {"dataset_path": "y"}],
        "lr": 0.001,
        "reassign_at": [0.5, 0.9],
        "overwrite": True,
        "recipe": "dfc-reassigned",
    }
    path.write_text(yaml.safe_dump(values))

    def read() -> None:
        arguments = with_files(["train", "--config", str(path)], settings_taken())
        flags = [*arguments.of_files, *(flag for sae in arguments.saes for flag in sae)]
        assert all(isinstance(flag, str) for flag in flags)

    check("config", Artifact(path, of_yaml, read), n_mutations)


@pytest.mark.first_is_fast
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_damaged_concerns(suffix: str, tmp_path: Path, n_mutations: int) -> None:
    path = tmp_path / f"c.{suffix}"
    path.write_text(json.dumps(dict(CONCERNS)))
    damage = of_yaml if suffix == "yaml" else of_json
    check(f"concerns.{suffix}", Artifact(path, damage, lambda: read_concerns(path)), n_mutations)


def test_a_damaged_screening_that_is_under_way(tmp_path: Path, n_mutations: int) -> None:
    path = tmp_path / "s.progress.jsonl"
    effect = {"name": "ablated", "mean": 0.1, "low": 0.0, "high": 0.2, "controls": {"random": 0.1}}
    sample = {"model": "a", "change": "model-specific part ablated", "strength": 1.0, "prompt": "p"}
    sample |= {"before": "x", "after": "y"}
    way = {"shown": effect, "p": 0.1, "is_beyond": True}
    test = {"source": "a", "n_texts": 5, "baseline_js_bits": 0.4, "off_topic": effect}
    test |= dict.fromkeys(("ablated", "patched", "used"), way)
    lines = [
        {"settings": {"seed": 0}},
        {"name": "tested 3", "result": {**test, "samples": [sample]}},
    ]

    def of_lines(path: Path, draw: random.Random) -> None:
        if draw.random() < 0.3:
            return of_bytes(path, draw)
        damaged = [damaged_values(line, draw) if i else line for i, line in enumerate(lines)]
        path.write_text("".join(json.dumps(line) + "\n" for line in damaged))
        return None

    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read() -> None:
        for result in Kept(path, {"seed": 0}).results.values():
            from_plain(CausalTest, result, "A causal test")

    check("progress.jsonl", Artifact(path, of_lines, read), n_mutations)


def test_a_damaged_organism(tmp_path: Path, n_mutations: int) -> None:
    items = [["prompt", "answer", "ordinary"]] * 2
    splits = {split: [items, items] for split in ("training", "discovery", "test")}
    path = tmp_path / "planted.json"
    path.write_text(json.dumps({"settings": {"seed": 0}, "items": splits, "sha256": {"a": "b"}}))

    def read() -> None:
        items_from_json(read_organism_manifest(tmp_path).get("items", {}))

    check("planted.json", Artifact(path, of_json, read), n_mutations)


@pytest.mark.parametrize("name", ["recovery", "planted", "step", "data"])
def test_damaged_results_of_a_benchmark(name: str, tmp_path: Path, n_mutations: int) -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    found = sorted([*results.glob(f"{name}.json"), *results.glob(f"{name}-*.json")])
    content = json.loads(found[0].read_text())
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content[:3] if isinstance(content, list) else content))
    check(f"{name}.json", Artifact(path, of_json, lambda: figures_of(path)), n_mutations // 5)
