"""Every network, in every way of computing it, at sizes that keep tests quick: what all of them must pass."""

from __future__ import annotations

from dataclasses import replace

from dpt_hpc.models import CGCNNOptions, ModelOptions, TorchMDETOptions

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

NETWORKS: dict[str, ModelOptions] = {
    f"{options.name}, {way}": replace(options, **changes)  # type: ignore[arg-type]
    for options in (CGCNN, ET)
    for way, changes in {
        "exact": {},
        "table": {"filters": "table"},
        "reference": {"backend": "reference"},
    }.items()
}
