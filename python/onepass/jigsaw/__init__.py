"""Jigsaw: a noise transform of input embeddings and the adapters that alone understand it.

Names load on first use: the losses need torch, the trainer transformers, an adapter PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ActivationsDict": ".activations",
    "BoundedMeanParameterization": ".parameterizations",
    "CloakStandardDeviationParameterization": ".parameterizations",
    "DirectMeanParameterization": ".parameterizations",
    "ComponentLossesDict": ".activations",
    "DirectStandardDeviationParameterization": ".parameterizations",
    "HyperparametersDict": ".activations",
    "JigsawArguments": ".arguments",
    "JigsawDataset": ".data",
    "JigsawModel": ".trainer",
    "JigsawTrainer": ".trainer",
    "NearestEmbedding": ".attack",
    "NoiseMaskedNoisyTransformerModel": ".models",
    "NoiseTokenizer": ".data",
    "NoisyOutput": ".models",
    "PeftNoiseMaskedNoisyTransformerModel": ".models",
    "TransformerCloak": ".cloak",
    "compute_jigsaw_ce_losses": ".losses",
    "compute_jigsaw_l2_losses": ".losses",
    "compute_masked_cross_entropy": ".losses",
    "compute_masked_normalized_l2_loss": ".losses",
    "gaussian_entropy_log_loss": ".entropy",
    "gaussian_mixture_entropy": ".entropy",
    "jigsaw_loss_factory": ".loss",
    "jigsaw_sgt_loss_factory": ".loss",
    "measure": ".evaluate",
    "mutual_information_sub_batch": ".entropy",
    "recovery_rate": ".attack",
    "square_mahalanobis_distance": ".entropy",
    "voronoi_characteristic_length": ".entropy",
}
__all__ = [
    "ActivationsDict",
    "BoundedMeanParameterization",
    "CloakStandardDeviationParameterization",
    "ComponentLossesDict",
    "DirectMeanParameterization",
    "DirectStandardDeviationParameterization",
    "HyperparametersDict",
    "JigsawArguments",
    "JigsawDataset",
    "JigsawModel",
    "JigsawTrainer",
    "NearestEmbedding",
    "NoiseMaskedNoisyTransformerModel",
    "NoiseTokenizer",
    "NoisyOutput",
    "PeftNoiseMaskedNoisyTransformerModel",
    "TransformerCloak",
    "compute_jigsaw_ce_losses",
    "compute_jigsaw_l2_losses",
    "compute_masked_cross_entropy",
    "compute_masked_normalized_l2_loss",
    "entropy",
    "gaussian_entropy_log_loss",
    "gaussian_mixture_entropy",
    "jigsaw_loss_factory",
    "jigsaw_sgt_loss_factory",
    "measure",
    "mutual_information_sub_batch",
    "recovery_rate",
    "square_mahalanobis_distance",
    "voronoi_characteristic_length",
]

if TYPE_CHECKING:
    from . import entropy as entropy
    from .activations import (
        ActivationsDict,
        ComponentLossesDict,
        HyperparametersDict,
    )
    from .arguments import JigsawArguments
    from .attack import NearestEmbedding, recovery_rate
    from .cloak import TransformerCloak
    from .data import JigsawDataset, NoiseTokenizer
    from .entropy import (
        gaussian_entropy_log_loss,
        gaussian_mixture_entropy,
        mutual_information_sub_batch,
        square_mahalanobis_distance,
        voronoi_characteristic_length,
    )
    from .evaluate import measure
    from .loss import (
        jigsaw_loss_factory,
        jigsaw_sgt_loss_factory,
    )
    from .losses import (
        compute_jigsaw_ce_losses,
        compute_jigsaw_l2_losses,
        compute_masked_cross_entropy,
        compute_masked_normalized_l2_loss,
    )
    from .models import (
        NoiseMaskedNoisyTransformerModel,
        NoisyOutput,
        PeftNoiseMaskedNoisyTransformerModel,
    )
    from .parameterizations import (
        BoundedMeanParameterization,
        CloakStandardDeviationParameterization,
        DirectMeanParameterization,
        DirectStandardDeviationParameterization,
    )
    from .trainer import JigsawModel, JigsawTrainer


def __getattr__(name: str) -> Any:
    if name == "entropy":
        return import_module(".entropy", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.jigsaw' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
