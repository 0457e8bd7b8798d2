"""Energy models: networks that give one number per structure, and the derivatives of that number."""

from dpt_hpc.models.cgcnn import CGCNN, CGCNNOptions
from dpt_hpc.models.derivatives import Prediction, predict
from dpt_hpc.models.energy_model import EnergyModel
from dpt_hpc.models.scaling import Scaling

__all__ = ["CGCNN", "CGCNNOptions", "EnergyModel", "Prediction", "Scaling", "build_model", "predict"]

ModelOptions = CGCNNOptions
"""Options of every network there is; each network owns its own."""


def build_model(options: ModelOptions) -> Scaling:
    """A freshly initialised network for its options, wrapped with the identity scaling."""
    return Scaling(CGCNN(options))
