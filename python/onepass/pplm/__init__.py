"""PPLM: generation steered by bags of words and discriminators, Uber's way and PPLM.jl's.

Names load on first use: perturbation needs torch, generation transformers, the command rich.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Bag": ".bags",
    "ClassificationHead": ".heads",
    "ClassifierHead": ".heads",
    "DiscriminatorV1": ".discriminator",
    "DiscriminatorV2": ".discriminator",
    "HyperParams": ".discriminator",
    "PPLM_BOW": ".perturb",
    "PPLM_BOW_DISCRIM": ".perturb",
    "PPLM_DISCRIM": ".perturb",
    "bag_weights": ".bags",
    "build_bows_one_hot_vectors": ".bags",
    "full_text_generation": ".generate",
    "fuse": ".sampling",
    "generate_text_pplm": ".generate",
    "get_bag_of_words_indices": ".bags",
    "get_classifier": ".heads",
    "get_discriminator": ".discriminator",
    "load_head": ".heads",
    "nucleus_sample": ".sampling",
    "perturb_hidden_bow": ".adam",
    "perturb_hidden_discrim": ".adam",
    "perturb_past": ".perturb",
    "perturb_past_bow": ".adam",
    "perturb_past_discrim": ".adam",
    "perturb_probs": ".adam",
    "pplm": ".settings",
    "run_pplm_example": ".generate",
    "sample_normal": ".sample",
    "sample_pplm": ".sample",
    "save_discriminator": ".heads",
    "steered": ".decoding",
    "stream_pplm": ".generate",
    "temp_softmax": ".sampling",
    "to_var": ".sampling",
    "top_k_filter": ".sampling",
    "top_k_sample": ".sampling",
    "train_discriminator": ".discriminator",
}
__all__ = [
    "Bag",
    "ClassificationHead",
    "ClassifierHead",
    "DiscriminatorV1",
    "DiscriminatorV2",
    "HyperParams",
    "PPLM_BOW",
    "PPLM_BOW_DISCRIM",
    "PPLM_DISCRIM",
    "bag_weights",
    "build_bows_one_hot_vectors",
    "full_text_generation",
    "fuse",
    "generate_text_pplm",
    "get_bag_of_words_indices",
    "get_classifier",
    "get_discriminator",
    "load_head",
    "nucleus_sample",
    "perturb_hidden_bow",
    "perturb_hidden_discrim",
    "perturb_past",
    "perturb_past_bow",
    "perturb_past_discrim",
    "perturb_probs",
    "pplm",
    "run_pplm_example",
    "sample_normal",
    "sample_pplm",
    "save_discriminator",
    "steered",
    "stream_pplm",
    "temp_softmax",
    "to_var",
    "top_k_filter",
    "top_k_sample",
    "train_discriminator",
]

if TYPE_CHECKING:
    from .adam import (
        perturb_hidden_bow,
        perturb_hidden_discrim,
        perturb_past_bow,
        perturb_past_discrim,
        perturb_probs,
    )
    from .bags import Bag, bag_weights, build_bows_one_hot_vectors, get_bag_of_words_indices
    from .decoding import steered
    from .discriminator import (
        DiscriminatorV1,
        DiscriminatorV2,
        HyperParams,
        get_discriminator,
        train_discriminator,
    )
    from .generate import full_text_generation, generate_text_pplm, run_pplm_example, stream_pplm
    from .heads import (
        ClassificationHead,
        ClassifierHead,
        get_classifier,
        load_head,
        save_discriminator,
    )
    from .perturb import PPLM_BOW, PPLM_BOW_DISCRIM, PPLM_DISCRIM, perturb_past
    from .sample import sample_normal, sample_pplm
    from .sampling import fuse, nucleus_sample, temp_softmax, to_var, top_k_filter, top_k_sample
    from .settings import pplm


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.pplm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
