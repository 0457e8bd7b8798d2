"""The compiled operations (csrc/ops.h). Pointers are tensor.data_ptr(); only dpt_hpc.ops imports this."""

has_cuda: bool
level: str

def edges_by_source(sources: int, num_edges: int, num_atoms: int, ptr: int, order: int) -> None: ...
