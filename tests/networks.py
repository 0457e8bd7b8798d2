"""Every network, in every way of computing it, at sizes that keep tests quick: what all of them must pass."""

from __future__ import annotations

from dataclasses import replace

from dpt_hpc.models import CGCNNOptions, ModelOptions, TorchMDETOptions
from dpt_hpc.network_options import PaiNNOptions, SchNetOptions

CGCNN = CGCNNOptions(cutoff=5.0, max_neighbors=None)
ET = TorchMDETOptions(
    cutoff=5.0,
    max_neighbors=None,
    hidden=24,
    layers=3,
    heads=4,
    radial=16,
    readout_hidden=16,
    table_knots=256,
)
SMALL: tuple[ModelOptions, ...] = (
    CGCNN,
    ET,
    SchNetOptions(cutoff=5.0, max_neighbors=None, hidden=16, layers=2, gaussians=21, gaussian_width=0.06),
    PaiNNOptions(cutoff=5.0, max_neighbors=None, hidden=16, layers=2, radial=8, readout_hidden=8),
)
"""Each network at small sizes: a new one has its line here, and passes through every test that all networks pass."""

NETWORKS: dict[str, ModelOptions] = {
    f"{options.name}, {way}": replace(options, **changes)
    for options in SMALL
    for way, changes in {
        "exact": {},
        "table": {"filters": "table"},
        "reference": {"backend": "reference"},
    }.items()
}

ENVELOPES: dict[str, ModelOptions] = {
    "cgcnn, cosine envelope": replace(CGCNN, envelope="cosine"),
    "cgcnn, polynomial envelope, table": replace(CGCNN, envelope="polynomial", filters="table"),
    "cgcnn, gate": replace(CGCNN, envelope="gate"),
    "cgcnn, gate, table": replace(CGCNN, envelope="gate", filters="table"),
}

SMOOTH_ET = "torchmd_et, cosine envelope"

NETWORKS |= {name: ENVELOPES[name] for name in ("cgcnn, cosine envelope", "cgcnn, gate, table")}
NETWORKS |= {SMOOTH_ET: replace(ET, envelope="cosine")}
"""Every network, in every way of computing it."""

SMOOTH = (
    ENVELOPES
    | {
        SMOOTH_ET: NETWORKS[SMOOTH_ET],
        "torchmd_et, cosine envelope, table": replace(ET, envelope="cosine", filters="table"),
    }
    | {name: options for name, options in NETWORKS.items() if options.name in ("schnet", "painn")}
)
"""Those whose energy and forces are continuous when a pair crosses the cutoff; CGCNN and the transformer as
published have no envelope on their messages, or not on all of them."""
