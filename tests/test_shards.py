"""Datasets on disk: what is written is read, whatever is damaged is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from groups import on_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpt_hpc.data import joining, shard_file, shards
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.statistics import estimate_edges
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.structure import Batch, Structure

FLAT = ("positions", "cell", "pbc", "atomic_numbers", "atom_ptr", "energy", "forces", "stress", "target")
MASKS = ("energy_mask", "forces_mask", "stress_mask", "target_mask")
UNITS = {"gap": "eV", "Größe": "1"}


def random_structure(rng: np.random.Generator, index: int, labels: str = "efsp") -> Structure:
    n = int(rng.integers(1, 12))
    return Structure(
        positions=torch.tensor(rng.normal(size=(n, 3))),
        cell=torch.tensor(5 * np.eye(3) + 0.3 * rng.normal(size=(3, 3))),
        pbc=torch.tensor(rng.random(3) < 0.8),
        atomic_numbers=torch.tensor(rng.integers(1, 119, n)),
        energy=float(rng.normal()) if "e" in labels else None,
        forces=torch.tensor(rng.normal(size=(n, 3))) if "f" in labels else None,
        stress=torch.tensor(rng.normal(size=(3, 3))) if "s" in labels else None,
        properties={"gap": float(rng.random()), "Größe": 1.0} if "p" in labels else {},
        structure_id=f"säure-{index}",
        group=f"A{index % 3}",
    )


def structures(count: int, seed: int = 0) -> list[Structure]:
    rng = np.random.default_rng(seed)
    kinds = ["efsp", "ef", "", "sp", "e"]
    return [random_structure(rng, i, kinds[int(rng.integers(len(kinds)))]) for i in range(count)]


def written(path: Path, items: list[Structure], **options: object) -> Path:
    write_dataset(items, path, provenance={"source": "test"}, property_units=UNITS, **options)  # type: ignore[arg-type]
    return path


def assert_equal(one: Structure, other: Structure) -> None:
    for name in ("positions", "cell", "pbc", "atomic_numbers", "forces", "stress"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), name
    assert (one.energy, dict(one.properties)) == (other.energy, dict(other.properties))
    assert (one.structure_id, one.group) == (other.structure_id, other.group)


@pytest.mark.parametrize("options", [{}, {"shard_atoms": 40}, {"compression": "gzip"}, {"compression": "lzf"}])
def test_what_is_written_is_read(tmp_path: Path, options: dict[str, object]) -> None:
    items = structures(60)
    dataset = Dataset.open(written(tmp_path / "d", items, **options))
    assert len(dataset) == 60
    for i, item in enumerate(items):
        assert_equal(dataset.get(i), item)
    assert dataset.property_units == UNITS
    assert dataset.elements == sorted({z for s in items for z in s.atomic_numbers.tolist()})
    assert dataset.num_atoms.tolist() == [s.num_atoms for s in items]
    assert dataset.edge_estimate.tolist() == [estimate_edges(s.num_atoms, s.volume) for s in items]
    assert dataset.has_stress.tolist() == [s.stress is not None for s in items]


def test_a_batch_is_that_of_its_structures_in_the_order_asked_for(tmp_path: Path) -> None:
    items = structures(40)
    dataset = Dataset.open(written(tmp_path / "d", items, shard_atoms=50))
    order = np.random.default_rng(1).permutation(40)[:25]
    batch = dataset.read(order, dtype=torch.float64, target="gap")
    expected = Batch.from_structures([items[i] for i in order], dtype=torch.float64, target="gap")
    for name in FLAT + MASKS:
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert batch.structure_index.tolist() == order.tolist()
    assert dataset.read([], dtype=torch.float32).num_structures == 0
    assert dataset.read([3]).positions.dtype == torch.float32


def test_float32_shards_keep_cell_and_energy_in_float64(tmp_path: Path) -> None:
    items = structures(10)
    dataset = Dataset.open(written(tmp_path / "d", items, dtype="float32"))
    for i, item in enumerate(items):
        assert torch.equal(dataset.get(i).positions, item.positions.float().double())
        assert torch.equal(dataset.get(i).cell, item.cell)
        assert dataset.get(i).energy == item.energy


def test_several_datasets_are_read_as_one(tmp_path: Path) -> None:
    items = structures(30)
    bare = [replace(s, energy=None, forces=None, stress=None, properties={}) for s in items[20:]]
    paths = [written(tmp_path / "a", items[:20]), written(tmp_path / "b", bare)]
    dataset = Dataset.open(paths)
    for i, item in enumerate(items[:20] + bare):
        assert_equal(dataset.get(i), item)
    assert [m.num_structures for m in dataset.manifests] == [20, 10]
    assert not dataset.read(np.arange(20, 30), target="gap").target_mask.any()
    write_dataset(items, tmp_path / "c", provenance={}, property_units={"gap": "meV", "Größe": "1"})
    with pytest.raises(DataError, match=r"property gap is in meV, in an earlier dataset in eV"):
        Dataset.open([paths[0], tmp_path / "c"])


def test_the_same_structures_are_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = structures(30)
    one = written(tmp_path / "one", items[:20])
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    for again in (one, copy):
        with pytest.raises(
            DataError, match=rf"dataset {again}: holds the same data as {one} \(digest [0-9a-f]{{16}}\)"
        ):
            Dataset.open([one, again])
    other = written(tmp_path / "other", items[17:])
    with pytest.raises(DataError) as refused:
        Dataset.open([one, other])
    refused.match(rf"datasets {one} and {other}: both have structure_id 'säure-17' \(3 shared in all\)")
    refused.match("ingest both sources into one dataset")
    rest = written(tmp_path / "rest", items[20:])
    assert len(Dataset.open([one, rest])) == 30
    # Ids whose hashes are equal by chance are told apart; those that are shared are found all the same.
    monkeypatch.setattr(joining, "hashed", lambda ids: np.zeros(len(ids), dtype=np.uint64))
    assert len(Dataset.open([one, rest])) == 30
    with pytest.raises(DataError, match=r"both have structure_id 'säure-17' \(3 shared in all\)"):
        Dataset.open([one, other])


def test_elements_and_atoms_of_a_part_are_found_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = structures(40)
    dataset = Dataset.open(written(tmp_path / "one", items, shard_atoms=30))
    assert len(dataset.files.paths) > 3
    monkeypatch.setattr(shards, "SLICE_STRUCTURES", 3)
    assert dataset.atoms_in(np.array([3, 4, 17, 20, 39])) == dataset.num_atoms[[3, 4, 17, 20, 39]].sum()
    for indices in (np.array([3, 4, 17, 39]), np.arange(40), np.array([], dtype=np.int64)):
        expected = {z for i in indices for z in items[i].atomic_numbers.tolist()}
        shares = on_ranks(3, partial(dataset.elements_of, indices))
        assert set().union(*shares) == dataset.elements_of(indices) == expected


def test_shared_ids_are_looked_for_in_16_bytes_a_structure() -> None:
    ids = np.array([f"some/long/name/of/a/structure/{k:080d}" for k in range(50_000)]).astype("S")
    parts = np.split(ids, 50)
    wide = [part.astype("S200") for part in parts]
    assert len(np.unique(joining.hashed(ids))) == len(ids)
    np.testing.assert_array_equal(joining.hashed(parts[3]), joining.hashed(wide[3]))
    tracemalloc.start()
    joining.refuse_shared_ids([Path("a"), Path("b")], [30_000, 20_000], lambda: parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * len(ids)
    with pytest.raises(DataError, match=r"datasets a and b: .*/0*7' \(2 shared in all\)"):
        joining.refuse_shared_ids([Path("a"), Path("b")], [50_000, 2], lambda: [*parts, ids[[9, 7]]])


def test_a_shard_is_readable_with_plain_h5py(tmp_path: Path) -> None:
    items = structures(20)
    with h5py.File(written(tmp_path / "d", items) / "shard_00000.h5") as file:
        ptr = file["atom_ptr"][:]
        assert file["positions"].attrs["units"] == "Å"
        assert file["properties/gap"].attrs["units"] == "eV"
        assert file.attrs["schema_version"] == 1
        assert file.attrs["edge_estimate_cutoff"] == 8.0
        assert json.loads(file.attrs["provenance"]) == {"source": "test"}
        assert file["structure_id"].asstr()[7] == "säure-7"
        np.testing.assert_array_equal(file["positions"][ptr[5] : ptr[6]], items[5].positions)
        assert file["positions"].chunks is not None


def test_a_label_that_nobody_has_is_not_written(tmp_path: Path) -> None:
    items = [random_structure(np.random.default_rng(0), i, "e") for i in range(5)]
    with h5py.File(written(tmp_path / "d", items) / "shard_00000.h5") as file:
        assert "energy" in file
        assert not {"forces", "stress", "properties"} & set(file)


def test_the_same_data_have_the_same_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is like; a record of a run is compared with data that another release may have ingested."""
    one, other = (written(tmp_path / name, structures(10, seed)) for name, seed in (("a", 0), ("c", 1)))
    monkeypatch.setattr(shard_file, "__doc__", "Other words.")
    again = written(tmp_path / "b", structures(10, 0), compression="gzip")
    assert len({(path / "shard_00000.h5").read_bytes() for path in (one, again)}) == 2
    digests = [Dataset.open(path).manifests[0].digest for path in (one, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_edge_estimate_is_capped_by_the_nearest_neighbours() -> None:
    assert estimate_edges(10, 1.0) == 2500
    assert estimate_edges(2, 1000.0) == round(2 * 4 / 3 * np.pi * 512 * 2 / 1000)
    assert estimate_edges(1, 0.0) == 250


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_found(tmp_path_factory: pytest.TempPathFactory, draws: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "d"
    shard = written(path, structures(8)) / "shard_00000.h5"
    content = bytearray(shard.read_bytes())
    place = draws.draw(st.integers(0, len(content) - 1))
    content[place] ^= draws.draw(st.integers(1, 255))
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard .*shard_00000.h5: SHA-256 is [0-9a-f]{16}.*its bytes have changed"):
        Dataset.open(path)


def spoil_missing_shard(path: Path) -> None:
    (path / "shard_00000.h5").unlink()


def spoil_truncated(path: Path) -> None:
    content = (path / "shard_00000.h5").read_bytes()
    (path / "shard_00000.h5").write_bytes(content[:-100])


def spoil_version(path: Path) -> None:
    text = (path / "dataset.json").read_text()
    (path / "dataset.json").write_text(text.replace('"schema_version": 1', '"schema_version": 99'))


def spoil_manifest(path: Path) -> None:
    text = (path / "dataset.json").read_text()
    (path / "dataset.json").write_text(text[: len(text) // 2])


def spoil_no_manifest(path: Path) -> None:
    (path / "dataset.json").unlink()


def spoil_no_shards_either(path: Path) -> None:
    (path / "dataset.json").unlink()
    (path / "shard_00000.h5").unlink()


def spoil_empty(path: Path) -> None:
    raw = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(raw | {"num_structures": 0, "shards": []}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_shard, r"shard .*shard_00000.h5: is missing.\nCopy it again"),
        (spoil_truncated, r"shard .*: has \d+ bytes, expected \d+: truncated or replaced.\nCopy it again"),
        (spoil_version, r"dataset.json: schema_version is 99, expected 1.\n.*ingest the data again"),
        (spoil_manifest, r"dataset.json: cannot be read: JSONDecodeError"),
        (
            spoil_no_manifest,
            r"dataset.json is missing: its ingest did not finish.\nRun the same `dpt-hpc",
        ),
        (spoil_no_shards_either, r"dataset.json is missing: this is no dataset.\nName a directory"),
        (spoil_empty, r"dataset .*: is empty \(0 structures\).\nIngest again"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_dataset_is_refused(tmp_path: Path, spoil: object, message: str, verify: bool) -> None:
    path = written(tmp_path / "d", structures(5))
    spoil(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        Dataset.open(path, verify=verify)


def test_a_missing_directory_and_no_path_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset .*nothing: no such directory.\nMake it with `dpt-hpc ingest"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="no path was given"):
        Dataset.open([])


def test_unverified_garbage_is_still_a_data_error(tmp_path: Path) -> None:
    path = written(tmp_path / "d", structures(5))
    shard = path / "shard_00000.h5"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"shard .*: cannot be read"):
        Dataset.open(path, verify=False)


def test_a_target_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    dataset = Dataset.open(written(tmp_path / "d", structures(5)))
    with pytest.raises(DataError, match=r"target is 'gaps', but the dataset has Größe, gap"):
        dataset.read([0], target="gaps")
    with pytest.raises(IndexError, match="indices 5 to 5, expected 0 to 4"):
        dataset.read([5])


def test_output_directories(tmp_path: Path) -> None:
    path = written(tmp_path / "d", structures(5))
    with pytest.raises(DataError, match=r"output .*: holds a dataset already"):
        written(path, structures(5))
    foreign = tmp_path / "run"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("")
    with pytest.raises(DataError, match=r"output .*: is not empty; it holds config.yaml"):
        written(foreign, structures(5))
    with pytest.raises(DataError, match="not one structure is left"):
        written(tmp_path / "e", [])
    with pytest.raises(DataError, match="no unit is stated for property Größe, gap"):
        write_dataset(structures(20), tmp_path / "f", provenance={})


KILLED = """
import sys, time, torch
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.structure import Structure
eye = torch.eye(3, dtype=torch.float64)
def endless():
    i = 0
    while True:
        i += 1
        yield Structure(eye[:1], 4 * eye, torch.ones(3, dtype=torch.bool), torch.tensor([29]), structure_id=str(i))
        if i == 500:
            print("on the way", flush=True)
            time.sleep(60)
write_dataset(endless(), sys.argv[1], provenance={}, shard_atoms=100)
"""


def test_a_killed_writer_leaves_nothing_that_opens_and_may_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on the way\n"
        process.kill()
    assert len(list(path.glob("shard_*.h5"))) >= 4
    (path / "shard_00004.h5.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="its ingest did not finish"):
        Dataset.open(path)
    assert len(Dataset.open(written(path, structures(7)))) == 7
    assert sorted(p.name for p in path.iterdir()) == ["dataset.json", "shard_00000.h5"]


def test_an_error_among_the_structures_leaves_no_dataset(tmp_path: Path) -> None:
    def failing() -> Iterator[Structure]:
        yield from structures(3)
        raise DataError("no")

    with pytest.raises(DataError):
        write_dataset(failing(), tmp_path / "d", provenance={}, property_units=UNITS)
    assert not (tmp_path / "d").exists()


def test_labels_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    items = structures(3)
    items[1] = replace(items[1], energy=float("nan"))
    with pytest.raises(DataError, match="structure säure-1: energy_per_atom is not finite"):
        written(tmp_path / "d", items)


def test_a_disk_that_does_not_take_the_shard(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"output .*: cannot be written: .*\nCheck"):
        written(tmp_path / "file" / "d", structures(3))
