"""Opening a dataset: shards are checked, staged and indexed by the ranks together, and what is wrong is told to all."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from groups import ThreadRank, nodes_of, on_ranks, refused
from test_shards import structures, written
from test_stores import same

from dpt_hpc.data import manifest, shared_memory
from dpt_hpc.data.group import agree
from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 structures in 13 shards."""
    return written(tmp_path_factory.mktemp("opening") / "small", structures(200, seed=3), shard_atoms=100)


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_shard_is_named_on_every_rank_whoever_checked_it(small: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    shard = copy / "shard_00003.h5"
    content = shard.read_bytes()
    shard.unlink()
    message = r"shard .*/copy/shard_00003.h5: is missing.\nCopy it again"
    if damage == "truncated":
        shard.write_bytes(content[:-1])
        message = rf"shard .*/copy/shard_00003.h5: has {len(content) - 1} bytes, expected {len(content)}: truncated"
    if damage == "altered":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        message = r"shard .*/copy/shard_00003.h5: SHA-256 is .* its bytes have changed"
    refused(on_ranks(2, lambda node: Dataset.open(copy, node=node)), DataError, message)
    stage = str(tmp_path / "stage")
    refused(on_ranks(2, lambda node: Dataset.open(copy, node=node, stage=stage)), DataError, message)
    assert not list((tmp_path / "stage").rglob("*00003*"))


def test_a_shard_that_the_system_does_not_read_is_named_on_every_rank(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a broken disk names no file; it cannot be had on a sound one."""
    digest = manifest.sha256_of

    def sha256_of(path: Path) -> str:
        if path == small / "shard_00003.h5":
            raise OSError(5, "Input/output error")
        return digest(path)

    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    message = r"shard .*/shard_00003.h5: cannot be read on .*: Input/output error\.\nIf other nodes can"
    refused(on_ranks(2, lambda node: Dataset.open(small, node=node)), DataError, message)


def test_an_error_that_is_not_ours_is_told_on_the_ranks_that_would_wait_for_it() -> None:
    def work(node: ThreadRank) -> None:
        agree(node, lambda: np.zeros(1 << 52) if node.rank == 1 else None)

    first, second = on_ranks(2, work)
    refused([first], EnvironmentFault, r"rank 1 of 2 on .*: \w*MemoryError: Unable to allocate .*\nThat rank's own")
    assert isinstance(second, MemoryError)


def test_the_ranks_of_a_node_keep_one_index_of_the_structures(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Dataset.open(small)

    def work(node: ThreadRank) -> tuple[np.ndarray, ...]:
        dataset = Dataset.open(small, node=node)
        counted = shared_memory.kept_once(7, node, lambda values: np.copyto(values, np.arange(7)))
        return dataset.atom_ptr, dataset.edge_estimate, counted

    for shared in (True, False):
        if not shared:  # each rank then has its own, whole
            monkeypatch.setattr(shared_memory, "SHARED", Path("/nowhere"))
        one, other = on_ranks(2, work)
        assert isinstance(one, tuple)
        assert isinstance(other, tuple)
        for mine, theirs, expected in zip(one, other, (alone.atom_ptr, alone.edge_estimate, np.arange(7)), strict=True):
            np.testing.assert_array_equal(mine, expected)
            np.testing.assert_array_equal(theirs, expected)
            with pytest.raises(ValueError, match="read-only"):
                alone.atom_ptr[0] = 1
            mine.flags.writeable = True
            mine[3] = -5
            assert (theirs[3] == -5) == shared


def test_all_ranks_divide_the_hashing_and_every_node_looks_at_every_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    digest = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: hashed.append(path) or digest(path))
    nodes = nodes_of([2, 1])
    on_ranks(3, lambda rank: Dataset.open(small, node=nodes[rank.rank], everyone=rank))
    assert sorted(hashed) == sorted(small.glob("shard_*.h5"))
    # What one node alone does not see, all are told; whichever rank would have hashed it.
    partly = Path(shutil.copytree(small, tmp_path / "partly"))
    (partly / "shard_00000.h5").unlink()
    for seen in ([partly, partly, small], [small, small, partly]):
        work = partial(lambda seen, rank: Dataset.open(seen[rank.rank], node=nodes[rank.rank], everyone=rank), seen)
        refused(on_ranks(3, work), DataError, r"shard .*/partly/shard_00000.h5: is missing")


def test_staged_shards_are_read_from_the_copy_which_is_used_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    one, other = on_ranks(2, lambda node: Dataset.open(small, node=node, stage="${TMPDIR}/stage"))
    assert isinstance(one, Dataset)
    assert isinstance(other, Dataset)
    copies = sorted((tmp_path / "stage").rglob("*.h5"))
    assert one.files.paths == other.files.paths == copies
    assert len(copies) == len(list(small.glob("*.h5")))
    same(other.read(np.arange(200)), Dataset.open(small).read(np.arange(200)))
    made = [path.stat().st_mtime_ns for path in copies]
    copies[2].write_bytes(bytes(copies[2].stat().st_size))
    left, growing = (copies[0].with_name(f".{copies[0].name}.{name}") for name in ("left", "growing"))
    for half in (left, growing):
        half.write_bytes(b"half")
    os.utime(left, (1.7e9, 1.7e9))
    # Renamed or removed by another job between two looks: here, a name without a file.
    copies[0].with_name(f".{copies[0].name}.gone").symlink_to("nowhere")
    again = Dataset.open(small, stage="${TMPDIR}/stage")
    assert growing.exists()
    assert not left.exists(), "what a killed job left half copied fills the disk"
    same(again.read(np.arange(200)), one.read(np.arange(200)))
    now = [path.stat().st_mtime_ns for path in copies]
    assert [k for k, (a, b) in enumerate(zip(made, now, strict=True)) if a != b] == [2]


def test_a_stage_that_cannot_be_is_told(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ConfigError, match=r"data.stage is '\$NOWHERE/x', but the variable NOWHERE is not set on"):
        Dataset.open(small, stage="$NOWHERE/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"data.stage .*/file/dataset-\w+: cannot be written on .*\nName a"):
        Dataset.open(small, stage=str(tmp_path / "file"))
