"""The Stained Glass Transform: embeddings moved by a learnt mean and learnt noise.

Estimators see embeddings in units of the vocabulary's own size and answer in the same units, so
that one setting suits models whose embeddings differ a hundredfold.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli.errors import one_line
from ..cli.files import replace, replace_text
from ..ops._check import check_above_0, check_choice, check_floating, check_number, check_weights
from ..ops.gaussian import cloak
from .embeddings import embedding_norms, embedding_rows
from .input_losses import positions
from .parameterizations import (
    BoundedMeanParameterization,
    CloakStandardDeviationParameterization,
    DirectMeanParameterization,
    DirectStandardDeviationParameterization,
    check_scale,
)
from .transform_file import CONFIG, FORMAT, WEIGHTS

ESTIMATORS = ("mlp", "transformer")
STD_PARAMETERIZATIONS = ("cloak", "direct")
HEAD_SIZE = 64  # of the attention, where the width is a multiple of it


class CloakOutput(NamedTuple):
    """What a transform did to embeddings [B, S, D]."""

    noisy: Tensor  # in the embeddings' dtype
    means: Tensor  # like the ones below in float32, in the units of the embeddings
    stds: Tensor
    seed: Tensor  # [] int64, that drew the noise


class TransformerCloak(nn.Module):
    """x~ = x + mask * (mean(x) + std(x) * eps), eps standard normal.

    Args:
        hidden_size: D of the embeddings.
        estimator: "mlp" looks at each token alone, "transformer" also at those before it.
        estimator_size: width of the estimators' hidden layer; 2 D where None.
        std_parameterization: "cloak" or "direct", see parameterizations.py.
        scale: (min, max) of the standard deviations, in units of `embedding_scale`.
        shallow: temperature of the "cloak" parameterization.
        mean_bound: largest absolute mean, in units of `embedding_scale`; None: no bound.
        init_std: standard deviation that training starts from, in the same units; the mean starts
            at 0.
        embedding_scale: root mean square of an embedding's features, by the median over the
            vocabulary: see `from_model`.
        base_model_name_or_path: which model's embeddings these are, for the record.

    Raises:
        TypeError: what is no number. ValueError: sizes, scales or names that do not fit.

    Source: Stained Glass Engine 2.8.1; arXiv 2506.09452.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        estimator: str = "mlp",
        estimator_size: int | None = None,
        std_parameterization: str = "cloak",
        scale: tuple[float, float] = (1e-4, 2.0),
        shallow: float = 1.0,
        mean_bound: float | None = None,
        init_std: float = 0.05,
        embedding_scale: float = 1.0,
        base_model_name_or_path: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("std_parameterization", std_parameterization, STD_PARAMETERIZATIONS)
        _check_size("hidden_size", hidden_size)
        width = 2 * hidden_size if estimator_size is None else estimator_size
        _check_size("estimator_size", width)
        check_number("init_std", init_std)
        low, high = check_scale(scale)
        check_above_0("embedding_scale", embedding_scale)
        self.config: dict[str, Any] = {
            "hidden_size": hidden_size,
            "estimator": estimator,
            "estimator_size": width,
            "std_parameterization": std_parameterization,
            "scale": [low, high],
            "shallow": shallow,
            "mean_bound": mean_bound,
            "init_std": init_std,
            "embedding_scale": embedding_scale,
            "base_model_name_or_path": base_model_name_or_path,
        }
        self.hidden_size, self.embedding_scale = hidden_size, embedding_scale
        self.std_parameterization: Any = (
            CloakStandardDeviationParameterization((low, high), shallow)
            if std_parameterization == "cloak"
            else DirectStandardDeviationParameterization((low, high))
        )
        if not low < init_std < high:
            raise ValueError(f"init_std must lie between {low} and {high}: got {init_std}")
        self.mean_parameterization: nn.Module = (
            DirectMeanParameterization()
            if mean_bound is None
            else BoundedMeanParameterization(mean_bound)
        )
        self.context = _Context(hidden_size) if estimator == "transformer" else None
        self.mean_estimator = _estimator(hidden_size, width)
        self.rho_estimator = _estimator(hidden_size, width)
        start = self.std_parameterization.inverse(torch.tensor(init_std, dtype=torch.float64))
        last: Any = self.rho_estimator[-1]
        nn.init.constant_(last.bias, float(start))

    @classmethod
    def from_model(cls, base_model: nn.Module, **options: Any) -> TransformerCloak:
        """A transform for the input embeddings of a transformers model, in their units and on
        their device.

        Raises:
            ValueError: a model without input embeddings, or with a median one of norm 0.
        """
        rows = next(embedding_rows(base_model))
        norm = float(embedding_norms(base_model).median())
        if not 0 < norm < math.inf:
            raise ValueError(
                f"the median norm of {type(base_model).__name__}'s input embeddings is {norm}:"
                " wanted a model with weights"
            )
        hidden_size = rows.shape[-1]
        scale = norm / math.sqrt(hidden_size)
        name = getattr(getattr(base_model, "config", None), "_name_or_path", None) or None
        options = {"embedding_scale": scale, "base_model_name_or_path": name, **options}
        return cls(hidden_size, **options).to(rows.device)

    @property
    def max_std(self) -> float:
        """The largest standard deviation that the transform can have."""
        return float(self.std_parameterization.max) * self.embedding_scale

    def forward(
        self,
        embeddings: Tensor,
        noise_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
    ) -> CloakOutput:
        """The transform of `embeddings`.

        Args:
            embeddings: [B, S, D].
            noise_mask: [B, S] positions or [B, S, D] features to change (nonzero); the others come
                out to the bit. None: what the attention mask has, and without one all.
            attention_mask: [B, S], 0 at padding, which no token's noise depends on.
            seed: of the noise, an int or one int64 on the device of the embeddings; None draws one
                from torch's generator.

        Raises:
            TypeError: not a tensor. ValueError: shapes that do not fit.
        """
        self._check(embeddings, attention_mask)
        if noise_mask is None:
            noise_mask = attention_mask
        else:
            positions(noise_mask, embeddings.shape)
        if not isinstance(seed, Tensor):
            seed = _seed(seed, embeddings.device)
        means, stds = self.estimate(embeddings, attention_mask)
        noisy = cloak(embeddings, means, stds, noise_mask, seed=seed)
        return CloakOutput(noisy, means, stds, seed)

    def estimate(
        self, embeddings: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(means, stds) [B, S, D] of what `forward` adds; draws nothing.

        Args:
            embeddings, attention_mask: as in `forward`.

        Raises:
            As `forward`.
        """
        self._check(embeddings, attention_mask)
        first: Any = self.mean_estimator[0]
        x = embeddings.to(first.weight.dtype) / self.embedding_scale
        if self.context is not None:
            x = self.context(x, attention_mask)
        means = self.mean_parameterization(self.mean_estimator(x).float()) * self.embedding_scale
        stds = self.std_parameterization(self.rho_estimator(x).float()) * self.embedding_scale
        return means, stds

    def _check(self, embeddings: Tensor, attention_mask: Tensor | None) -> None:
        check_floating("embeddings", embeddings)
        if embeddings.dim() != 3 or embeddings.shape[-1] != self.hidden_size:
            raise ValueError(
                f"embeddings must be [B, S, {self.hidden_size}]: got {list(embeddings.shape)}"
            )
        check_weights("attention_mask", attention_mask, embeddings.shape[:-1])

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write model.safetensors, which holds the settings too, and config.json, which repeats
        them for readers; whole or not at all. `state_dict`: in the place of its own, which is in
        shards."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        own = self.state_dict() if state_dict is None else state_dict
        state = {name: value.contiguous() for name, value in own.items()}
        config = json.dumps(self.config, indent=1)
        metadata = {"format": "pt", "kind": FORMAT, "config": config}

        def write(new: Path) -> None:
            save_file(state, new, metadata=metadata)
            new.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files for the owner alone

        replace(folder / WEIGHTS, write)
        replace_text(folder / CONFIG, config + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TransformerCloak:
        """The transform that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: a file of something else, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(
                f"no {WEIGHTS} in {str(folder)!r}: wanted the folder that save_pretrained wrote"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {one_line(error)}") from error
        if metadata.get("kind") != FORMAT:
            raise ValueError(f"{path} holds no transform of onepass ({FORMAT})")
        try:
            made = cls(**json.loads(metadata["config"]))
        except KeyError as error:
            raise ValueError(f"{path} is damaged: it has no settings") from error
        except Exception as error:  # an unknown one is a TypeError, too large a size torch's
            raise ValueError(f"{path} has settings that do not fit: {one_line(error)}") from error
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its settings: {one_line(error)}") from error
        return made


def _check_size(name: str, value: object) -> None:
    """ValueError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1: got {value!r}")


def _seed(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an int of 64 bits, a tensor of one or None: got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64, device=device)


def _estimator(hidden_size: int, width: int) -> nn.Sequential:
    """An MLP that answers 0, whatever it is asked, until it is trained."""
    last = nn.Linear(width, hidden_size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), last)


class _Context(nn.Module):
    """Adds to each token what causal self-attention finds in those up to it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.n_heads = hidden_size // HEAD_SIZE if hidden_size % HEAD_SIZE == 0 else 1
        self.norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        batch_size, length, _ = x.shape
        q, k, v = (
            part.view(batch_size, length, self.n_heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        visible = None
        if attention_mask is not None:
            own = torch.eye(length, dtype=torch.bool, device=x.device)  # padding sees itself
            earlier = torch.ones_like(own).tril()
            visible = ((attention_mask != 0)[:, None, None] & earlier) | own
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None
        )
        return x + self.out(found.transpose(1, 2).flatten(2))
