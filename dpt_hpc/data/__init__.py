"""Datasets: ingest of structure files, HDF5 shards, splits and sampling."""
