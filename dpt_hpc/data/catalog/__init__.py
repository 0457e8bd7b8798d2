"""Public datasets by name: a catalog of pinned files, downloads of them, and what makes each a dataset of ours."""

from dpt_hpc.data.catalog.entries import Catalog, Entry, RawFile
from dpt_hpc.data.catalog.obtain import RAW, Obtained, Sources, fill_mirror, get_dataset, obtain

__all__ = ["RAW", "Catalog", "Entry", "Obtained", "RawFile", "Sources", "fill_mirror", "get_dataset", "obtain"]
