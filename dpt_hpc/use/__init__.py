"""A trained network in use: loaded, asked for energies, forces, stress, properties and embeddings of any structures."""

from dpt_hpc.use.model import Model, load
from dpt_hpc.use.predicted import Embedding, Predicted
from dpt_hpc.use.structures import as_structure

__all__ = ["Embedding", "Model", "Predicted", "as_structure", "load"]
