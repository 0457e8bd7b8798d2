"""Derivative-based pre-training of graph neural networks on crystals, on one core or many nodes."""

__version__ = "0.1.0"
