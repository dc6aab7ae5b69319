"""onepass: fused losses for language-model training beyond next-token cross-entropy.

Kernels return a few numbers per row, losses are plain torch on those numbers, one backward kernel
turns their gradients back. Names load on first use, so that importing the package costs nothing and
needs no Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "VocabStats": ".ops.vocab_stats",
    "vocab_stats": ".ops.vocab_stats",
    "VocabPairStats": ".ops.vocab_pair_stats",
    "vocab_pair_stats": ".ops.vocab_pair_stats",
    "RowMoments": ".ops.row_moments",
    "row_moments": ".ops.row_moments",
    "GaussianStats": ".ops.gaussian",
    "gaussian_stats": ".ops.gaussian",
    "cloak": ".ops.gaussian",
    "LazyLogits": ".lazy_logits",
    "MaterializedError": ".lazy_logits",
    "MaterializedWarning": ".lazy_logits",
    "strict": ".lazy_logits",
    "linear_cross_entropy": ".head_loss",
    "cross_entropy": ".losses",
    "masked_cross_entropy": ".losses",
    "masked_inner_product": ".losses",
    "masked_normalized_l2": ".losses",
    "Report": ".heads",
    "lazy_head": ".heads",
    "lazy_head_within": ".heads",
    "report": ".heads",
    "unlazy_head": ".heads",
    "count_items": ".parallel",
    "global_mean": ".parallel",
    "shift_labels": ".parallel",
    "masked_mean": ".reduce",
    "reduce_rows": ".reduce",
}
_MODULES = (
    "attribution",
    "circuit_breaker",
    "compat",
    "dpo",
    "integrations",
    "jigsaw",
    "nn",
    "pplm",
    "step_functions",
)
__all__ = [
    "GaussianStats",
    "LazyLogits",
    "MaterializedError",
    "MaterializedWarning",
    "Report",
    "RowMoments",
    "VocabPairStats",
    "VocabStats",
    "__version__",
    "cloak",
    "count_items",
    "cross_entropy",
    "gaussian_stats",
    "global_mean",
    "lazy_head",
    "lazy_head_within",
    "linear_cross_entropy",
    "masked_cross_entropy",
    "masked_inner_product",
    "masked_mean",
    "masked_normalized_l2",
    "reduce_rows",
    "report",
    "row_moments",
    "shift_labels",
    "strict",
    "unlazy_head",
    "vocab_pair_stats",
    "vocab_stats",
]

if TYPE_CHECKING:
    from . import attribution as attribution
    from . import circuit_breaker as circuit_breaker
    from . import compat as compat
    from . import dpo as dpo
    from . import integrations as integrations
    from . import jigsaw as jigsaw
    from . import nn as nn
    from . import pplm as pplm
    from . import step_functions as step_functions
    from .head_loss import linear_cross_entropy
    from .heads import Report, lazy_head, lazy_head_within, report, unlazy_head
    from .lazy_logits import LazyLogits, MaterializedError, MaterializedWarning, strict
    from .losses import (
        cross_entropy,
        masked_cross_entropy,
        masked_inner_product,
        masked_normalized_l2,
    )
    from .ops.gaussian import GaussianStats, cloak, gaussian_stats
    from .ops.row_moments import RowMoments, row_moments
    from .ops.vocab_pair_stats import VocabPairStats, vocab_pair_stats
    from .ops.vocab_stats import VocabStats, vocab_stats
    from .parallel import count_items, global_mean, shift_labels
    from .reduce import masked_mean, reduce_rows


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
