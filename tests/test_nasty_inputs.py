"""The kernels on numbers that nobody means: refused by name, or right. `make sanitize` runs these, too."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from message_cases import BASES, derivatives, inputs
from systems import NASTY, batch_of
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.ops import RadialBasis, gather_aggregate, radius_graph, spline_taps

HUGE = [-0.0, 1e-300, 1e-12, -1e6, 1e10, 1e19, -1e300, math.inf, -math.inf, math.nan]
often = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def reals(draw: st.DrawFn, *shape: int) -> Tensor:
    """Numbers of an honest size, but for a few."""
    flat = torch.rand(math.prod(shape), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    flat = flat.double()
    for _ in range(draw(st.integers(0, 2)) if len(flat) else 0):
        flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from(HUGE))
    return flat.reshape(shape)


@given(draws=st.data())
@often
def test_a_graph_is_refused_or_right(draws: st.DataObject) -> None:
    sizes = draws.draw(st.lists(st.integers(0, 5), max_size=4))
    count = len(sizes)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    positions = 9 * draws.draw(reals(sum(sizes), 3)) - 3
    cells = 3.7 * torch.eye(3, dtype=torch.float64) + draws.draw(reals(count, 3, 3))
    pbc = draws.draw(reals(count, 3)) > 0.5
    cutoff = draws.draw(st.sampled_from([0.0, 1e-300, 2.0, 4.0]))
    nearest, images = draws.draw(st.sampled_from([None, 1, 3, 2**62])), draws.draw(st.sampled_from([None, 0, 1, 2**62]))
    try:
        graph = radius_graph(positions, cells, pbc, ptr, cutoff, nearest, images)
    except DataError:
        return
    source, target = graph.edge_index
    owner = torch.repeat_interleave(torch.arange(count), ptr.diff())
    assert torch.equal(owner[source], owner[target])
    shifts = torch.where(pbc[owner[source]], graph.cell_shifts.double(), 0.0)
    assert torch.equal(shifts, graph.cell_shifts.double())
    translations = torch.einsum("ei,eij->ej", shifts, torch.where(pbc[..., None], cells, 0.0)[owner[source]])
    lengths = (positions[source] + translations - positions[target]).norm(dim=1)
    rounding = 1e-9 * (1 + positions[target].abs().amax(1) + translations.abs().amax(1))
    assert bool((lengths <= cutoff + rounding).all())


GRAPH = radius_graph(*batch_of([NASTY["triclinic, smaller than the cutoff"], NASTY["primitive fcc"]]), 3.0)


@given(draws=st.data(), basis=st.sampled_from(list(BASES.values())), single=st.booleans())
@often
def test_messages_take_any_number(draws: st.DataObject, basis: RadialBasis, single: bool) -> None:
    """Through both derivatives: with lengths and features of an honest size, all that comes out is finite."""
    dtype = torch.float32 if single else torch.float64
    tensors = inputs(GRAPH, basis, dtype=dtype)
    k = draws.draw(st.integers(0, 3))
    spoilt = draws.draw(reals(*tensors[k].shape)).to(dtype)
    tensors[k] = spoilt.clone().requires_grad_()
    found = derivatives(tensors, basis, GRAPH)
    if bool((spoilt.abs() < 1e3).all()):
        assert all(bool(value.isfinite().all()) for value in found.values())


@given(weights=reals(GRAPH.num_edges, 3), features=reals(GRAPH.num_atoms, 3))
@often
def test_sums_over_neighbours_take_any_number(weights: Tensor, features: Tensor) -> None:
    found = gather_aggregate(weights, features, GRAPH)
    plain = gather_aggregate(weights, features, GRAPH, backend="reference")
    finite = plain.isfinite() & (plain.abs() < 1e200)  # sums of infinities depend on their order
    torch.testing.assert_close(found[finite], plain[finite], rtol=1e-9, atol=1e-3)


@given(lengths=reals(GRAPH.num_edges))
@often
def test_windows_lie_within_the_table_at_any_length(lengths: Tensor) -> None:
    taps = spline_taps(lengths, BASES["bspline"])
    assert int(taps.first.min()) >= 0
    assert int(taps.first.max()) <= taps.count - 4
