"""The cache's files: what is written is read, in any order, and damage is found."""

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_dfc.data.activations import PairedRows, StreamState
from sae_lens_dfc.data.cache import reader as cache_module
from sae_lens_dfc.data.cache.manifest import (
    CacheHeader,
    WriterProgress,
    progress_path,
    write_manifest,
)
from sae_lens_dfc.data.cache.reader import PairedActivationsCache
from sae_lens_dfc.data.cache.writer import CacheWriter
from sae_lens_dfc.data.contexts import PairCounts

D_A, D_B, N, BATCH = 3, 4, 23, 10
HEADER = CacheHeader(
    models={"model_a": {"d_model": D_A}, "model_b": {"d_model": D_B}},
    configs={},
    data={"context_size": 8},
    text={},
    dtype="float32",
    shard_rows=32,
    origins=False,
)


class KilledError(Exception):
    """Stands in for a kill."""


def marked(start: StreamState | None = None, stop: int = N) -> Iterator[PairedRows]:
    """Batches of ten rows; row i holds i, in both models."""
    for i in range(0 if start is None else start.values["text"], stop):
        mark = torch.arange(i * BATCH, (i + 1) * BATCH)
        acts = mark.float()[:, None].expand(-1, D_A + D_B).contiguous()
        yield PairedRows(acts, mark, mark, (), StreamState({"text": i + 1}, {"m": acts[-1:]}))


def write(folder: Path, header: CacheHeader = HEADER, stop: int = N) -> PairedActivationsCache:
    writer = CacheWriter(folder, header)
    writer.write(marked(writer.progress.after, stop), PairCounts(pairs=stop * BATCH))
    write_manifest(folder, header, [writer.progress])
    return PairedActivationsCache(folder)


def in_order(cached: PairedActivationsCache) -> Tensor:
    return torch.cat([cached.shard(i)["acts"] for i in range(len(cached.shards))])


def served(cached: PairedActivationsCache, n: int, batch_size: int = 16, **kwargs: Any) -> Tensor:
    batches = islice(cached.batches(batch_size, **kwargs), n)
    return torch.cat([batch.acts for batch in batches])[:, 0].long()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_come_back_as_they_were_written(dtype: str, tmp_path: Path) -> None:
    cached = write(tmp_path / "c", replace(HEADER, dtype=dtype))
    expected = torch.arange(N * BATCH).float()[:, None].expand(-1, D_A + D_B)
    rows = in_order(cached)
    assert str(rows.dtype) == f"torch.{dtype}" and len(cached) == N * BATCH
    assert torch.equal(rows, expected.to(rows.dtype))
    assert [shard.rows for shard in cached.shards] == [32] * 7 + [6]


def test_files_are_hardly_larger_than_the_rows(tmp_path: Path) -> None:
    header = replace(
        HEADER,
        models={"model_a": {"d_model": 300}, "model_b": {"d_model": 400}},
        dtype="bfloat16",
        shard_rows=1000,
    )
    rows = PairedRows(torch.randn(3000, 700), torch.arange(3000), torch.arange(3000))
    writer = CacheWriter(tmp_path, header)
    writer.write(iter([rows]), PairCounts())
    write_manifest(tmp_path, header, [writer.progress])
    writer.path.unlink()  # it only serves to resume
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert on_disk < 1.002 * 3000 * 700 * 2


def test_the_manifest_tells_the_norms_of_each_model(tmp_path: Path) -> None:
    cached = write(tmp_path / "c")
    norms = torch.arange(N * BATCH).double()
    for model, width in (("a", D_A), ("b", D_B)):
        told, true = cached.manifest["norms"][model], norms * width**0.5
        assert told["mean"] == pytest.approx(float(true.mean()), rel=1e-6)
        assert told["std"] == pytest.approx(float(true.std()), rel=1e-6)


# --- reading ---


@pytest.mark.parametrize("batch_size", [1, 7, 16, 100, 300])
@pytest.mark.parametrize("window_shards", [1, 3, 16])
def test_each_row_comes_once_in_an_epoch(
    batch_size: int, window_shards: int, tmp_path: Path
) -> None:
    cached = write(tmp_path / "c")
    n = -(-3 * len(cached) // batch_size)
    rows = served(cached, n, batch_size, window_shards=window_shards)
    for epoch in range(3):
        one = rows[epoch * len(cached) : (epoch + 1) * len(cached)]
        assert torch.equal(one.sort().values, torch.arange(len(cached)))
    assert not torch.equal(rows[: len(cached)], rows[len(cached) : 2 * len(cached)])


def test_both_halves_of_a_row_stay_together(tmp_path: Path) -> None:
    for batch in islice(write(tmp_path / "c").batches(16), 40):
        assert (batch.acts == batch.acts[:, :1]).all()


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    cached = write(tmp_path / "c")
    one, same, other = (served(cached, 40, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("n", [0, 1, 13, 14, 15, 29, 60])
def test_batches_from_a_bookmark_are_those_that_would_have_come(n: int, tmp_path: Path) -> None:
    cached = write(tmp_path / "c")
    whole = list(islice(cached.batches(16, window_shards=3), n + 30))
    start = whole[n - 1].after if n else None
    rest = islice(PairedActivationsCache(tmp_path / "c").batches(16, 0, 3, start), 30)
    for one, other in zip(rest, whole[n:], strict=True):
        assert torch.equal(one.acts, other.acts) and one.after == other.after


def test_processes_share_the_rows(tmp_path: Path) -> None:
    cached = write(tmp_path / "c")
    rows = [set(served(cached, 8, 16, share=(rank, 2)).tolist()) for rank in (0, 1)]
    assert not rows[0] & rows[1] and len(rows[0]) + len(rows[1]) >= 200
    with pytest.raises(ValueError, match="has 8 shards, too few for 9 processes"):
        next(cached.batches(16, share=(8, 9)))


# --- resuming ---


@pytest.mark.parametrize("n_before", [0, 1, 3, 4, 10, 16, 22])
def test_a_stopped_cache_goes_on_to_the_same_files(n_before: int, tmp_path: Path) -> None:
    def stopped() -> Iterator[PairedRows]:
        yield from islice(marked(), n_before)
        raise KilledError

    whole = write(tmp_path / "whole")
    with pytest.raises(KilledError):
        CacheWriter(tmp_path / "c", HEADER).write(stopped(), PairCounts())
    assert len(CacheWriter(tmp_path / "c", HEADER).progress.shards) == n_before * BATCH // 32
    write(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(whole.folder)


def test_settings_other_than_those_it_was_begun_with_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c")
    other = replace(HEADER, data={"context_size": 9})
    with pytest.raises(ValueError, match="another cache: data.context_size was 8 and is 9"):
        CacheWriter(tmp_path / "c", other)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path / "whole")
    made, n_written = Path.write_bytes, 0

    def until_full(self: Path, content: bytes) -> int:
        nonlocal n_written
        a_shard = self.name.startswith(".rows")
        n_written += a_shard
        if a_shard and n_written > 3:
            made(self, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return made(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", until_full)
        with pytest.raises(OSError, match="No space left.*The 96 rows written before are kept"):
            CacheWriter(tmp_path / "c", HEADER).write(marked(), PairCounts())
    assert not list((tmp_path / "c").glob(".*")), "half a shard was left behind"
    write(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(whole.folder)


def test_too_large_for_the_number_format_is_an_error_not_an_infinity(tmp_path: Path) -> None:
    rows = PairedRows(torch.full((4, 7), 1e6), torch.arange(4), torch.arange(4))
    writer = CacheWriter(tmp_path / "c", replace(HEADER, dtype="float16"))
    with pytest.raises(ValueError, match="too large for a cache in float16. Cache in bfloat16"):
        writer.write(iter([rows]), PairCounts())


def test_an_unknown_number_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        CacheWriter(tmp_path, replace(HEADER, dtype="int8"))


# --- damage ---


def test_a_truncated_shard_is_found_on_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "c").folder / "rows-00000-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000002.safetensors holds \d+ bytes.*truncated"):
        PairedActivationsCache(tmp_path / "c")


def test_a_missing_shard_is_found_on_opening(tmp_path: Path) -> None:
    (write(tmp_path / "c").folder / "rows-00000-000002.safetensors").unlink()
    with pytest.raises(ValueError, match="holds 0 bytes.*truncated or missing"):
        PairedActivationsCache(tmp_path / "c")


@pytest.mark.parametrize("where", [0, 50, 300, -1])
def test_a_flipped_byte_is_found_before_its_row_is_used(where: int, tmp_path: Path) -> None:
    path = write(tmp_path / "c").folder / "rows-00000-000002.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    cached = PairedActivationsCache(tmp_path / "c")
    with pytest.raises(ValueError, match="000002.safetensors is damaged: its checksum is"):
        served(cached, 40)


def test_a_cache_half_written_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not finished. Resume it with `sae-lens-dfc cache`"):
        PairedActivationsCache(tmp_path / "c")
    with pytest.raises(ValueError, match="holds no cache. Make one with"):
        PairedActivationsCache(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', "\xff"])
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="damaged|has format 99"):
        PairedActivationsCache(tmp_path / "c")


def test_a_damaged_progress_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c")
    path = progress_path(tmp_path / "c", 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged.*Cache again with --overwrite"):
        WriterProgress.load(path)


def test_shards_are_ordinary_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "c")
    rows = load_file(tmp_path / "c" / "rows-00000-000000.safetensors")
    assert set(rows) == {"acts"} and rows["acts"].shape == (32, D_A + D_B)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["shards"][0]["rows"] == 32


def test_a_gather_takes_the_rows_asked_for_from_every_shard() -> None:
    window = [torch.arange(5.0)[:, None], torch.arange(5.0, 7.0)[:, None]]
    rows = cache_module._gathered(window, torch.tensor([6, 0, 5, 3]))
    assert rows[:, 0].tolist() == [0, 3, 5, 6]


def test_a_cache_is_written_without_temporary_files_that_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # safetensors' save_file writes a temporary file beside its own; a killed process left it there,
    # and the cache could not be resumed.
    made: list[str] = []
    monkeypatch.setattr(
        "sae_lens_dfc.core.tensor_files.save_file", lambda *_, **__: made.append("a file")
    )
    write(tmp_path / "c")
    assert not made
