"""The compiled operations (csrc/ops.h). Pointers are tensor.data_ptr(); only dpt_hpc.ops imports this."""

from enum import Enum

has_cuda: bool
level: str

class RadiusFault:
    class Kind(Enum):
        NONE = ...
        POSITIONS = ...
        CELL = ...
        IMAGES = ...
        COINCIDENT = ...
        EDGES = ...

    @property
    def kind(self) -> Kind: ...
    @property
    def structure(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def source(self) -> int: ...
    @property
    def value(self) -> float: ...

class RadiusSearch:
    @property
    def fault(self) -> RadiusFault: ...
    @property
    def num_edges(self) -> int: ...
    @property
    def num_truncated(self) -> int: ...

class CudaRadiusGraph:
    """Only where has_cuda is true."""

    def __init__(
        self,
        *,
        positions: int,
        cells: int,
        pbc: int,
        atom_ptr: int,
        num_structures: int,
        num_atoms: int,
        cutoff: float,
        max_images: int,
        fractions: int,
        records: int,
        faults: int,
    ) -> None: ...
    @staticmethod
    def record_bytes() -> int: ...
    def count(self, *, counts: int, coincident: int, stream: int) -> None: ...
    def select(
        self,
        *,
        counts: int,
        max_neighbors: int,
        offsets: int,
        distances: int,
        last_key: int,
        ties: int,
        stream: int,
    ) -> None: ...
    def fill(
        self,
        *,
        counts: int,
        max_neighbors: int,
        last_key: int,
        ties: int,
        target_ptr: int,
        num_edges: int,
        edge_index: int,
        cell_shifts: int,
        stream: int,
    ) -> None: ...

def radius_search(
    positions: int,
    cells: int,
    pbc: int,
    atom_ptr: int,
    num_structures: int,
    cutoff: float,
    max_neighbors: int,
    max_images: int,
    threads: int,
    target_ptr: int,
) -> RadiusSearch: ...
def radius_fill(search: RadiusSearch, target_ptr: int, threads: int, edge_index: int, cell_shifts: int) -> None: ...
def edges_by_source(sources: int, num_edges: int, num_atoms: int, ptr: int, order: int) -> None: ...
def cgconv_forward_float32(**arguments: float) -> None: ...
def cgconv_forward_float64(**arguments: float) -> None: ...
def cgconv_backward_float32(**arguments: float) -> None: ...
def cgconv_backward_float64(**arguments: float) -> None: ...
def cgconv_double_backward_float32(**arguments: float) -> None: ...
def cgconv_double_backward_float64(**arguments: float) -> None: ...
