"""radius_graph: equal to brute force on everything nasty, deterministic, and clear about what it refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from systems import FCC, NASTY, System, batch_of, random_system, supercell, system
from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.errors import DataError
from dpt_hpc.ops import RadiusGraph, radius_graph, reference
from dpt_hpc.ops.radius_fault import fault_error

ALL = list(NASTY.values())
LARGE = supercell(FCC, 3.6, 9, rattle=0.1)  # 2,916 atoms: shared between threads


def assert_same(graph: RadiusGraph, expected: RadiusGraph) -> None:
    assert graph.edge_index.dtype == torch.int64
    assert graph.cell_shifts.dtype == torch.int32
    assert torch.equal(graph.target_ptr, expected.target_ptr)
    assert torch.equal(graph.edge_index, expected.edge_index)
    assert torch.equal(graph.cell_shifts, expected.cell_shifts)
    assert graph.num_truncated == expected.num_truncated


def edge_lengths(graph: RadiusGraph, positions: Tensor, cell: Tensor, atom_ptr: Tensor) -> Tensor:
    source, target = graph.edge_index
    structure = torch.bucketize(target, atom_ptr[1:], right=True)
    shift = torch.einsum("ea,eax->ex", graph.cell_shifts.to(positions.dtype), cell[structure])
    return (positions[source] + shift - positions[target]).norm(dim=1)


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("cutoff", [2.5, 6.0, 10.0])
def test_equals_brute_force_on_nasty_systems(name: str, cutoff: float) -> None:
    batch = batch_of([NASTY[name]])
    assert_same(radius_graph(*batch, cutoff), reference.radius_graph(*batch, cutoff))


def test_ten_angstrom_in_a_two_angstrom_cell() -> None:
    batch = batch_of([NASTY["one atom with its own images"]])
    graph = radius_graph(*batch, 10.0)
    assert_same(graph, reference.radius_graph(*batch, 10.0))
    assert graph.num_edges == 514  # lattice points within 5 of the origin, less the origin


@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_equals_brute_force_on_random_nasty_cells(start: int) -> None:
    for seed in range(start, start + 100):
        batch = batch_of([random_system(seed)])
        cutoff = 1.0 + seed % 7 if batch[0].shape[0] > 2 else 10.0
        assert_same(radius_graph(*batch, cutoff), reference.radius_graph(*batch, cutoff))


def test_batch_equals_loop_over_its_structures() -> None:
    batch = batch_of([*ALL, LARGE, *ALL])
    graph = radius_graph(*batch, 4.0)
    parts = [radius_graph(*batch_of([s]), 4.0) for s in [*ALL, LARGE, *ALL]]
    firsts = batch[3][:-1].tolist()
    assert torch.equal(graph.edge_index, torch.cat([p.edge_index + f for p, f in zip(parts, firsts, strict=True)], 1))
    assert torch.equal(graph.cell_shifts, torch.cat([p.cell_shifts for p in parts]))
    assert torch.equal(graph.target_ptr.diff(), torch.cat([p.target_ptr.diff() for p in parts]))


@pytest.mark.parametrize("max_neighbors", [1, 6, 13, 250])
def test_max_neighbors_keeps_the_nearest_of_the_full_list(max_neighbors: int) -> None:
    batch = batch_of(ALL)
    full, cut = radius_graph(*batch, 5.0), radius_graph(*batch, 5.0, max_neighbors=max_neighbors)
    assert_same(cut, reference.radius_graph(*batch, 5.0, max_neighbors=max_neighbors))
    counts = full.target_ptr.diff()
    assert torch.equal(cut.target_ptr.diff(), counts.clamp(max=max_neighbors))
    assert cut.num_truncated == int((counts > max_neighbors).sum())
    lengths, kept = edge_lengths(full, *batch[:2], batch[3]), edge_lengths(cut, *batch[:2], batch[3])
    for i in range(full.num_atoms):
        nearest = lengths[full.target_ptr[i] : full.target_ptr[i + 1]].sort().values[:max_neighbors]
        row = kept[cut.target_ptr[i] : cut.target_ptr[i + 1]].sort().values
        torch.testing.assert_close(row, nearest, rtol=0, atol=1e-7)


def test_ties_go_to_the_lower_source_and_shift() -> None:
    graph = radius_graph(*batch_of([system([[0, 0, 0]], 2 * torch.eye(3))]), 2.5, max_neighbors=4)
    assert graph.cell_shifts.tolist() == [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0, 1]]


@pytest.mark.parametrize("max_neighbors", [None, 9])
@pytest.mark.parametrize("max_images", [0, 1, 2])
def test_max_images_limits_the_shifts(max_images: int, max_neighbors: int | None) -> None:
    batch = batch_of(ALL)
    graph = radius_graph(*batch, 5.0, max_neighbors, max_images)
    assert int(graph.cell_shifts.abs().max()) <= max_images
    assert_same(graph, reference.radius_graph(*batch, 5.0, max_neighbors, max_images))


@pytest.mark.parametrize("max_neighbors", [None, 20])
def test_same_bits_with_any_number_of_threads(max_neighbors: int | None) -> None:
    batch, threads = batch_of([*ALL, LARGE, *ALL]), torch.get_num_threads()
    graphs = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            graphs.append(radius_graph(*batch, 4.0, max_neighbors))
    finally:
        torch.set_num_threads(threads)
    for graph in graphs[1:]:
        assert_same(graph, graphs[0])


@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
def test_same_bits_on_every_processor_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(_C, level):
        pytest.skip(f"this processor has no {level}")
    batch = batch_of([*ALL, LARGE])
    expected = radius_graph(*batch, 4.0, 30)
    for name in ("radius_search", "radius_fill"):
        monkeypatch.setattr(_C, name, getattr(getattr(_C, level), name))
    assert_same(radius_graph(*batch, 4.0, 30), expected)


def test_float32_positions_are_compared_in_float64() -> None:
    batch = batch_of([*ALL, LARGE], dtype=torch.float32)
    double = [t.double() if t.is_floating_point() else t for t in batch]
    assert_same(radius_graph(*batch, 4.0), radius_graph(*double, 4.0))


def test_exact_at_the_cutoff() -> None:
    # 3-4-5 triangles in a cubic cell: the pair at exactly 5 belongs to the graph, and 5 - 1e-12 leaves it out.
    batch = batch_of([system([[0, 0, 0], [3, 4, 0]], 100 * torch.eye(3))])
    assert radius_graph(*batch, 5.0).num_edges == 2
    assert radius_graph(*batch, 5.0 - 1e-12).num_edges == 0


def test_every_edge_has_its_reverse() -> None:
    graph = radius_graph(*batch_of([*ALL, *map(random_system, range(50))]), 5.0)
    forward = torch.cat([graph.edge_index.T, graph.cell_shifts], 1)
    backward = torch.cat([graph.edge_index.flip(0).T, -graph.cell_shifts], 1)
    assert torch.equal(torch.unique(forward, dim=0), torch.unique(backward, dim=0))
    assert torch.unique(forward, dim=0).shape == forward.shape


def test_wrapping_changes_shifts_and_nothing_else() -> None:
    one = NASTY["triclinic, smaller than the cutoff"]
    steps = torch.tensor([[3, -1, 0], [0, 7, -2], [-5, 0, 1]])
    moved = replace(one, positions=one.positions + steps.double() @ one.cell)
    graph, other = (radius_graph(*batch_of([s]), 5.0) for s in (one, moved))
    source, target = graph.edge_index
    shift = graph.cell_shifts + steps[target] - steps[source]
    found = torch.cat([target[:, None], source[:, None], shift], 1)
    expected = torch.cat([other.edge_index.flip(0).T, other.cell_shifts], 1)
    assert torch.equal(torch.unique(found, dim=0), torch.unique(expected, dim=0))


def test_by_source_is_the_stable_order() -> None:
    graph = radius_graph(*batch_of(ALL), 5.0, max_neighbors=20)
    order, ptr = graph.by_source
    assert torch.equal(order, torch.argsort(graph.edge_index[0], stable=True))
    assert torch.equal(ptr.diff(), torch.bincount(graph.edge_index[0], minlength=graph.num_atoms))
    assert graph.by_source[0] is order


@pytest.mark.parametrize("systems", [[], [NASTY["no atoms"]], [NASTY["no atoms"], ALL[2], NASTY["no atoms"]]])
def test_empty_batches_and_structures(systems: list[System]) -> None:
    batch = batch_of(systems)
    graph = radius_graph(*batch, 3.0)
    assert_same(graph, reference.radius_graph(*batch, 3.0))
    assert graph.by_source[1].shape == (graph.num_atoms + 1,)


def test_zero_cutoff_and_isolated_atoms_have_no_edges() -> None:
    assert radius_graph(*batch_of(ALL), 0.0).num_edges == 0
    assert radius_graph(*batch_of([NASTY["isolated atoms"]]), 8.0).target_ptr.tolist() == [0, 0, 0]


def one(**changes: Tensor | float) -> dict[str, Tensor | float]:
    positions, cell, pbc, atom_ptr = batch_of([ALL[2]])
    return {"positions": positions, "cell": cell, "pbc": pbc, "atom_ptr": atom_ptr, "cutoff": 3.0} | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (one(positions=torch.zeros(3, 3).half()), TypeError, "positions: expected torch.float32 or torch.float64, got"),
        (one(positions=torch.zeros(3, 2)), ValueError, r"positions: expected shape \(N, 3\), got \(3, 2\)"),
        (one(cell=torch.eye(3)), ValueError, r"cell: expected shape \(B, 3, 3\), got \(3, 3\)"),
        (one(pbc=torch.ones(1, 3)), TypeError, "pbc: expected torch.bool, got torch.float32"),
        (one(pbc=torch.ones(3, dtype=torch.bool)), ValueError, r"pbc: expected shape \(1, 3\), got \(3,\)"),
        (one(atom_ptr=torch.tensor([0, 3, 3])), ValueError, r"atom_ptr: expected shape \(2,\), got \(3,\)"),
        (one(atom_ptr=torch.tensor([0, 3]).int()), TypeError, "atom_ptr: expected torch.int64, got torch.int32"),
        (one(atom_ptr=torch.tensor([0, 2])), ValueError, r"atom_ptr: .* N = 3, got \[0, 2\]"),
        (one(cutoff=-1.0), ValueError, "cutoff: expected a finite length >= 0 Å, got -1.0"),
        (one(cutoff=float("nan")), ValueError, "cutoff: expected a finite length"),
        (one(max_neighbors=0), ValueError, "max_neighbors: expected None or an integer >= 1, got 0"),
        (one(max_images=-1), ValueError, "max_images: expected None or an integer >= 0, got -1"),
        (one(cell=torch.full((1, 3, 3), torch.nan)), DataError, "cell of structure 0 of the batch: expected finite"),
        (one(cell=torch.zeros(1, 3, 3)), DataError, "cell of structure 0 .* span a volume, got .*\n.*pbc to False"),
        (one(cell=1e-4 * torch.eye(3)[None]), DataError, "structure 0 .* about .* periodic images .* cutoff of 3.0 Å"),
    ],
)
def test_refuses(arguments: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="(?s)radius_graph: .*" + message):
        radius_graph(**arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_positions_that_are_not_finite_are_named(value: float) -> None:
    positions, *rest = batch_of(ALL[:4])
    positions[3, 1] = value  # the second atom of the third structure
    with pytest.raises(DataError, match="positions of structure 2 of the batch, atom 1: expected finite"):
        radius_graph(positions, *rest, 3.0)


@pytest.mark.parametrize("pad", [[], [LARGE]])
def test_coincident_atoms_are_named(pad: list[System]) -> None:
    cell = NASTY["left-handed"].cell
    twins = system(torch.stack([torch.ones(3), torch.zeros(3), torch.ones(3) + cell[0] + 0.001]), cell)
    with pytest.raises(DataError, match=r"atoms 2 and 0 of structure 1 of the batch are 0.00173 Å\s+apart"):
        radius_graph(*batch_of([ALL[0], twins, *pad]), 3.0)


def test_a_coincident_pair_in_a_large_structure_is_named() -> None:
    positions = LARGE.positions.clone()
    positions[2500] = positions[17]
    with pytest.raises(DataError, match="atoms 2500 and 17 of structure 1"):
        radius_graph(*batch_of([ALL[0], replace(LARGE, positions=positions)]), 3.0)


def test_too_many_edges_are_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([*ALL, LARGE, *ALL])
    expected, search = radius_graph(*batch, 4.0), _C.radius_search
    # Between an eighth of the limit and the limit the search is done twice, and nothing else changes.
    for limit in (expected.num_edges, 2 * expected.num_edges, 9 * expected.num_edges):
        monkeypatch.setattr(_C, "radius_search", partial(search, most_edges=limit))
        assert_same(radius_graph(*batch, 4.0), expected)
    for limit in (expected.num_edges - 1, 1000, 0):
        monkeypatch.setattr(_C, "radius_search", partial(search, most_edges=limit))
        with pytest.raises(DataError, match=r"edges or more, expected fewer than 2\^31.\nMake the batches smaller"):
            radius_graph(*batch, 4.0)
    assert radius_graph(*batch_of([NASTY["isolated atoms"]]), 4.0).num_edges == 0


def test_the_number_of_edges_is_said() -> None:
    fault = SimpleNamespace(kind=_C.RadiusFault.Kind.EDGES, value=2.0**31)
    error = fault_error(fault, torch.tensor([0]), torch.zeros(0, 3, 3), 5.0)
    assert "2147483648 edges or more" in str(error)
