"""Energy models: networks that give one number per structure, and the derivatives of that number."""

from dpt_hpc.models.cgcnn import CGCNN, CGCNNOptions
from dpt_hpc.models.derivatives import Prediction, predict
from dpt_hpc.models.energy_model import EnergyModel, NodeFeatures
from dpt_hpc.models.heads import noise_head as build_noise_head
from dpt_hpc.models.heads import predict_noise
from dpt_hpc.models.precision import set_precision
from dpt_hpc.models.scaling import Scaling
from dpt_hpc.models.torchmd_et import TorchMDET, TorchMDETOptions

__all__ = [
    "CGCNN",
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

ModelOptions = CGCNNOptions | TorchMDETOptions
"""Options of every network there is; each network owns its own, and `name` tells them apart."""


def model_options(content: dict[str, object]) -> ModelOptions:
    """The options that were written down as `content`. Raises TypeError for options that no network has, ValueError for
    values out of range."""
    networks = {kind.name: kind for kind in (CGCNNOptions, TorchMDETOptions)}
    name = content.get("name")
    if name not in networks:
        raise ValueError(f"name is {name!r}, expected {' or '.join(networks)}")
    return networks[name](**content)  # type: ignore[arg-type]


def build_model(options: ModelOptions, *, noise_head: bool = False) -> Scaling:
    """A freshly initialised network for its options, wrapped with the identity scaling.

    noise_head: with a head that predicts the noise of every atom, drawn after the network, which is the same without.
    """
    network = TorchMDET(options) if isinstance(options, TorchMDETOptions) else CGCNN(options)
    return Scaling(network, build_noise_head(network) if noise_head else None)
