"""Ingest: structure files of any kind in, a dataset of HDF5 shards out. The only door of ase and pymatgen."""

from dpt_hpc.data.ingest.options import IngestOptions
from dpt_hpc.data.ingest.pipeline import ingest
from dpt_hpc.data.ingest.report import IngestReport, SourceReport

__all__ = ["IngestOptions", "IngestReport", "SourceReport", "ingest"]
