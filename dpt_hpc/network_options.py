"""What can be chosen of a network: one class for each, checked as it is made.

Below the networks, which import torch: a config is read, and what is wrong in it told, without waiting for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

Pooling = Literal["add", "mean"]
Backend = Literal["native", "reference", "pyg"]
"""native: the kernels of dpt_hpc · reference: plain PyTorch, slow and obvious · pyg: the same with the reductions of
torch-scatter and the neighbour search of torch-cluster, on which the networks of PyTorch Geometric run."""

SHARED_LEAST = {
    "max_neighbors": 1,
    "max_images": 0,
    "num_elements": 1,
    "hidden": 1,
    "layers": 0,
    "readout_hidden": 1,
    "readout_layers": 0,
    "table_knots": 8,
}


@dataclass(frozen=True)
class NetworkOptions:
    """Options that every network has. A network's own class gives them their defaults, says what they mean for it, and
    adds its own; its `name`, a Literal, tells it apart.

    least: smallest values of its integer options, where they are not SHARED_LEAST · positive: options that must be more
    than zero.

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {}
    positive: ClassVar[tuple[str, ...]] = ("cutoff",)

    name: str = ""
    cutoff: float = 8.0
    max_neighbors: int | None = 250
    max_images: int | None = None
    num_elements: int = 100
    hidden: int = 128
    layers: int = 3
    readout_hidden: int = 128
    readout_layers: int = 1
    pooling: Pooling = "add"
    filters: Literal["exact", "table"] = "exact"
    table_knots: int = 512
    backend: Backend = "native"

    def __post_init__(self) -> None:
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name, least in (SHARED_LEAST | dict(self.least)).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, which this module does not import


@dataclass(frozen=True)
class CGCNNOptions(NetworkOptions):
    """Options of CGCNN; the defaults are the paper's experiments, with an exact graph.

    name: the network
    cutoff: Å
    max_neighbors: the nearest neighbours of each atom that are kept; null keeps all
    max_images: periodic images per axis: 1 and 2 reproduce the paper's two codes; null is exact
    num_elements: width of the one-hot encoding of Z
    hidden: node channels F
    layers: how many CGConv layers
    gaussians: how many radial functions
    gaussian_width: their sigma, as a fraction of the cutoff (0.05 in the paper's experiments, 0.2 in its release)
    envelope: null, as in the paper: the energy jumps when a pair crosses the cutoff. Otherwise the message m of a pair
        vanishes there with slope zero, and the mean over neighbours is sum of w m / (1 + sum of w), w the envelope:
        energy and forces are continuous. cosine and polynomial multiply each message, and a step takes four times as
        long (see CGConv); gate closes CGConv's own gate within the last few gaussian_width, which costs next to
        nothing. Where an atom has more than max_neighbors neighbours, energies still jump when the farthest one that is
        kept changes, under any envelope
    readout_hidden: width of the read-out
    readout_layers: hidden layers of the read-out
    pooling: sum or mean of the nodes of a structure
    filters: exact evaluates the radial functions on every edge; table interpolates the filters between knots
    table_knots: intervals of that table
    backend: of the messages: native is the fused kernels, reference and pyg are plain twins (dpt_hpc.ops.backends)

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {"gaussians": 4}
    positive: ClassVar[tuple[str, ...]] = ("cutoff", "gaussian_width")

    name: Literal["cgcnn"] = "cgcnn"
    hidden: int = 100
    layers: int = 4
    gaussians: int = 50
    gaussian_width: float = 0.05
    envelope: Literal["cosine", "polynomial", "gate"] | None = None
    readout_hidden: int = 150
    readout_layers: int = 3


@dataclass(frozen=True)
class TorchMDETOptions(NetworkOptions):
    """Options of the equivariant transformer; the defaults are the paper's, with an exact graph.

    name: the network
    cutoff: Å
    max_neighbors: the nearest neighbours of each atom that are kept; null keeps all
    max_images: periodic images per axis: 1 and 2 reproduce the paper's two codes; null is exact
    num_elements: how many elements have an embedding, from hydrogen on
    hidden: channels C of scalars and of vectors
    layers: how many attention layers
    heads: of the attention; they share the channels equally
    radial: how many radial functions, whose means and widths are trained
    own_images: whether an atom's periodic images are among the neighbours that its embedding starts from; false, as in
        the paper's code, lets the energy depend on the cell that describes a crystal
    envelope: cosine: the vector messages vanish at the cutoff too (their filters have no bias), so that energy and
        forces are continuous there; null: as published
    readout_hidden: width of the read-out
    readout_layers: hidden layers of the read-out
    vector_norm: whitened: a LayerNorm of the vectors too, before a head reads them (the energy does not); null: none
    pooling: sum or mean of the atoms of a structure
    filters: exact evaluates the radial functions on every edge; table interpolates the filters between knots
    table_knots: intervals of that table
    backend: of the messages: native is the fused kernels, reference and pyg are plain twins (dpt_hpc.ops.backends)

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {"layers": 1, "heads": 1, "radial": 2}

    name: Literal["torchmd_et"] = "torchmd_et"
    hidden: int = 128
    layers: int = 8
    heads: int = 8
    radial: int = 50
    own_images: bool = True
    envelope: Literal["cosine"] | None = None
    readout_hidden: int = 128
    readout_layers: int = 2
    vector_norm: Literal["whitened"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads:
            raise ValueError(f"heads is {self.heads}, expected a divisor of hidden, which is {self.hidden}")


@dataclass(frozen=True)
class SchNetOptions(NetworkOptions):
    """Options of SchNet; the defaults are those published for crystals, on the graph of the other networks (8 Å).

    name: the network
    cutoff: Å
    max_neighbors: the nearest neighbours of each atom that are kept; null keeps all
    max_images: periodic images per axis; null is exact
    num_elements: how many elements have an embedding, from hydrogen on
    hidden: channels F of the atoms and of the filters
    layers: how many interaction blocks
    gaussians: how many radial functions; 81 on 8 Å are 0.1 Å apart, as published
    gaussian_width: their sigma, as a fraction of the cutoff; 0.028 of 8 Å is gamma = 1 / (2 sigma²) = 10 / Å², as
        published
    readout_hidden: width of the read-out of each atom
    readout_layers: hidden layers of that read-out
    pooling: sum or mean of the energies of the atoms of a structure
    filters: exact evaluates the filters on every edge; table interpolates them between knots, which is faster
    table_knots: intervals of that table
    backend: of the messages: native is the fused kernels, reference and pyg are plain twins (dpt_hpc.ops.backends)

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {"gaussians": 4}
    positive: ClassVar[tuple[str, ...]] = ("cutoff", "gaussian_width")

    name: Literal["schnet"] = "schnet"
    hidden: int = 64
    layers: int = 6
    gaussians: int = 81
    gaussian_width: float = 0.028
    readout_hidden: int = 32
    readout_layers: int = 1


@dataclass(frozen=True)
class PaiNNOptions(NetworkOptions):
    """Options of PaiNN; the defaults are the published ones, on the graph of the other networks (8 Å, published: 5 Å).

    name: the network
    cutoff: Å
    max_neighbors: the nearest neighbours of each atom that are kept; null keeps all
    max_images: periodic images per axis; null is exact
    num_elements: how many elements have an embedding, from hydrogen on
    hidden: channels F of scalars and of vectors
    layers: how many message and update blocks
    radial: how many radial functions sin(n pi d / r_c) / d
    readout_hidden: width of the read-out of each atom
    readout_layers: hidden layers of that read-out
    pooling: sum or mean of the energies of the atoms of a structure
    filters: exact evaluates the radial functions on every edge; table interpolates the filters between knots
    table_knots: intervals of that table
    backend: of the messages: native is the fused kernels, reference and pyg are plain twins (dpt_hpc.ops.backends)

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {"radial": 1}

    name: Literal["painn"] = "painn"
    hidden: int = 128
    layers: int = 3
    radial: int = 20
    readout_hidden: int = 64
    readout_layers: int = 1


ModelOptions = CGCNNOptions | TorchMDETOptions | SchNetOptions | PaiNNOptions
"""Options of any network; `name` tells them apart. Configs, the command line and their messages follow from this."""
