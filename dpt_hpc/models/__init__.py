"""Energy models: networks that give one number per structure, and the derivatives of that number."""

from dpt_hpc.models.cgcnn import CGCNN
from dpt_hpc.models.derivatives import Prediction, predict
from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.heads import predict_noise
from dpt_hpc.models.networks import NETWORKS, build_model, model_options
from dpt_hpc.models.precision import set_precision
from dpt_hpc.models.scaling import Scaling
from dpt_hpc.models.torchmd_et import TorchMDET
from dpt_hpc.network_options import CGCNNOptions, ModelOptions, TorchMDETOptions

__all__ = [
    "CGCNN",
    "NETWORKS",
    "CGCNNOptions",
    "EnergyModel",
    "ModelOptions",
    "NodeFeatures",
    "Prediction",
    "Scaling",
    "TorchMDET",
    "TorchMDETOptions",
    "build_model",
    "model_options",
    "predict",
    "predict_noise",
    "set_precision",
]
