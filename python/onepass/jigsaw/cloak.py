"""`TransformerCloak`: the Stained Glass transform of input embeddings, x + mean(x) + std(x) * eps.

It works in units of the base model's own embeddings, whose scale differs a hundredfold between
models: one recipe, learning rate and bound fit all.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli.errors import one_line
from ..ops._check import check_choice, check_floating, check_number, check_weights
from ..ops._launch import accumulation_dtype
from ..ops.gaussian import cloak
from .embeddings import embedding_norms, embedding_rows
from .parameterizations import (
    CloakStandardDeviationParameterization,
    DirectMeanParameterization,
    MeanParameterization,
    StdParameterization,
    from_config,
    to_config,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE, VERSION = "onepass-transformer-cloak", 1
ESTIMATORS = ("mlp", "transformer")
HEAD = 64  # features of an attention head, where they divide the width


class CloakOutput(NamedTuple):
    noisy: Tensor  # [B, S, D] in the dtype of the embeddings
    means: Tensor  # [B, S, D] float32
    stds: Tensor
    seed: Tensor  # int64: with the three above, all there is to the noise


class TransformerCloak(nn.Module):
    """Gaussian noise on input embeddings, of a mean and a standard deviation that are functions of
    them. A fresh one shifts nothing and adds noise of `initial_std`.

    Args:
        hidden_size: D of the embeddings.
        estimator: "mlp" (each token by itself) or "transformer" (a causal block of self-attention
            before it: each token and those before it).
        std_parameterization, mean_parameterization: bounds of both, in units of embedding_scale.
        embedding_scale: the size of an embedding's element; see `from_model`.
        initial_std: standard deviation to start at, in the same units.
        width: features of the estimator's inner layer; D where None.
        n_heads: of the attention; where None so many that each has 64 features.

    Raises:
        ValueError: sizes not above 0, an unknown estimator, heads that do not divide D, an initial
            standard deviation outside the bounds.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        estimator: str = "mlp",
        std_parameterization: StdParameterization | None = None,
        mean_parameterization: MeanParameterization | None = None,
        embedding_scale: float = 1.0,
        initial_std: float = 0.05,
        width: int | None = None,
        n_heads: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("estimator", estimator, ESTIMATORS)
        width = hidden_size if width is None else width
        if n_heads is None:
            n_heads = hidden_size // HEAD if hidden_size % HEAD == 0 else 1
        for name, size in (("hidden_size", hidden_size), ("width", width), ("n_heads", n_heads)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number above 0: got {size!r}")
        if hidden_size % n_heads:
            raise ValueError(f"n_heads must divide hidden_size={hidden_size}: got {n_heads}")
        check_number("embedding_scale", embedding_scale)
        if embedding_scale <= 0:
            raise ValueError(f"embedding_scale must be above 0: got {embedding_scale}")
        check_number("initial_std", initial_std)
        self.hidden_size, self.estimator = hidden_size, estimator
        self.embedding_scale, self.initial_std = float(embedding_scale), float(initial_std)
        self.width, self.n_heads = width, n_heads
        self.std_parameterization = std_parameterization or CloakStandardDeviationParameterization()
        self.mean_parameterization = mean_parameterization or DirectMeanParameterization()
        first_rho = self.std_parameterization.inverse(self.initial_std)
        self.attention = _Attention(hidden_size, n_heads) if estimator == "transformer" else None
        self.norm = nn.LayerNorm(hidden_size) if estimator == "transformer" else None
        self.inner = nn.Linear(hidden_size, width)
        self.mean_head = nn.Linear(width, hidden_size)
        self.rho_head = nn.Linear(width, hidden_size)
        for head, start in ((self.mean_head, 0.0), (self.rho_head, first_rho)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, start)

    @classmethod
    def from_model(cls, base_model: nn.Module, **options: Any) -> TransformerCloak:
        """A fresh transform for a model's embeddings, on its device: hidden_size is theirs, and
        embedding_scale the median norm of a row by sqrt(D).

        Raises:
            ValueError: a model without input embeddings, or whose median one is 0; and as above.
        """
        rows = next(embedding_rows(base_model))
        norm = float(embedding_norms(base_model).median())
        if not 0 < norm < math.inf:
            raise ValueError(
                f"the median norm of {type(base_model).__name__}'s input embeddings is {norm}:"
                " wanted a model with weights"
            )
        size = rows.shape[-1]
        options = {"embedding_scale": norm / math.sqrt(size), **options}
        return cls(size, **options).to(rows.device)

    @property
    def max_std(self) -> float:
        """The largest standard deviation there can be, in the embeddings' own units; maybe inf."""
        return self.embedding_scale * self.std_parameterization.max_std

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds: the type, its version, and each argument by name."""
        return {
            "model_type": MODEL_TYPE,
            "version": VERSION,
            "hidden_size": self.hidden_size,
            "estimator": self.estimator,
            "std_parameterization": to_config(self.std_parameterization),
            "mean_parameterization": to_config(self.mean_parameterization),
            "embedding_scale": self.embedding_scale,
            "initial_std": self.initial_std,
            "width": self.width,
            "n_heads": self.n_heads,
        }

    def estimate(
        self, embeddings: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(means, stds) [B, S, D], float32, of embeddings [B, S, D]."""
        x = embeddings.to(self.inner.weight.dtype) / self.embedding_scale
        if self.attention is not None and self.norm is not None:
            x = x + self.attention(x, attention_mask)
            x = self.norm(x)
        x = F.gelu(self.inner(x))
        means, rhos = self.mean_head(x), self.rho_head(x)
        wide = accumulation_dtype(means.dtype)
        means = self.mean_parameterization(means.to(wide))
        stds = self.std_parameterization(rhos.to(wide))
        return self.embedding_scale * means, self.embedding_scale * stds

    def forward(
        self,
        embeddings: Tensor,
        noise_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
    ) -> CloakOutput:
        """Transform embeddings.

        Args:
            embeddings: [B, S, D].
            noise_mask: [B, S] or [B, S, D], nonzero where to transform; None: where attention_mask
                is set, and without one everywhere. The rest comes out as it is, to the bit.
            attention_mask: [B, S], 0 at padding, which no token's noise depends on.
            seed: of the noise, an int or one int64 on the device; None draws one from torch's
                generator.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        check_floating("embeddings", embeddings)
        if embeddings.dim() != 3 or embeddings.shape[-1] != self.hidden_size:
            raise ValueError(
                f"embeddings must be [B, S, {self.hidden_size}], the transform's hidden_size: got"
                f" {tuple(embeddings.shape)}"
            )
        check_weights("attention_mask", attention_mask, embeddings.shape[:2])
        if noise_mask is None:
            noise_mask = attention_mask
        else:
            check_noise_mask(noise_mask, embeddings.shape)
        if not isinstance(seed, Tensor):
            seed = _seed(seed, embeddings.device)
        means, stds = self.estimate(embeddings, attention_mask)
        noisy = cloak(embeddings, means, stds, noise_mask, seed=seed)
        return CloakOutput(noisy, means, stds, seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each complete or not at all."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config, indent=2, allow_nan=False) + "\n"
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        mode = folder.stat().st_mode & 0o666
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            Path(partial, CONFIG).write_text(config, "utf-8")
            save_file(state, Path(partial, WEIGHTS), metadata={"format": "pt", "config": config})
            for name in (WEIGHTS, CONFIG):
                Path(partial, name).chmod(mode)  # safetensors makes files for the owner alone
                os.replace(Path(partial, name), folder / name)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu"
    ) -> TransformerCloak:
        """The transform that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: no such folder, or a file missing from it.
            ValueError: of another kind or version, damaged, or weights and config of two savings.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: no {name}, wanted a folder of save_pretrained")
        model = cls._from_config(folder / CONFIG)
        weights = folder / WEIGHTS
        try:
            with safe_open(weights, framework="pt", device=str(device)) as file:
                written_with = (file.metadata() or {}).get("config")
                state = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{weights}: not whole safetensors: {one_line(error)}") from None
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
            name = wrong[0]
            raise ValueError(
                f"{weights}: {name} is {found.get(name, 'missing')}, {CONFIG} wants"
                f" {wanted.get(name, 'none')}: not the weights of this {CONFIG}"
            )
        if written_with is not None and json.loads(written_with) != model.config:
            raise ValueError(
                f"{folder}: {CONFIG} and {WEIGHTS} were not saved together: save both again"
            )
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(True).eval()

    @classmethod
    def _from_config(cls, path: Path) -> TransformerCloak:
        try:
            config = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {one_line(error)}") from None
        kind = config.get("model_type") if isinstance(config, dict) else None
        if kind != MODEL_TYPE:
            raise ValueError(f"{path}: got model_type {kind!r}, wanted {MODEL_TYPE!r}")
        if config.get("version") != VERSION:
            raise ValueError(
                f"{path}: got version {config.get('version')!r}, this onepass reads {VERSION}"
            )
        options = {k: v for k, v in config.items() if k not in ("model_type", "version")}
        try:
            for name, kinds in (
                ("std_parameterization", StdParameterization),
                ("mean_parameterization", MeanParameterization),
            ):
                options[name] = from_config(options[name], kinds)
            return cls(**options)
        except KeyError as error:
            raise ValueError(f"{path}: no {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {one_line(error)}") from None

    def extra_repr(self) -> str:
        return f"{self.estimator}, embedding_scale={self.embedding_scale:.4g}"


class _Attention(nn.Module):
    """Causal self-attention behind a norm. It has no positions but those that its mask implies, so
    that padding on the left shifts nothing."""

    def __init__(self, hidden_size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.projections = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        n_rows, length, hidden_size = x.shape
        heads = self.projections(self.norm(x)).view(n_rows, length, 3, self.n_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = None
        if attention_mask is not None:
            seen = (attention_mask != 0)[:, None, None, :].expand(-1, 1, length, -1).tril()
            # Padding sees itself: a row that sees nothing would be NaN, and so its gradients.
            seen = seen | torch.eye(length, dtype=torch.bool, device=x.device)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None
        )
        return self.out(mixed.transpose(1, 2).reshape(n_rows, length, hidden_size))


def check_noise_mask(noise_mask: Tensor, shape: torch.Size) -> None:
    """Raises unless the mask marks tokens [B, S] or features [B, S, D]."""
    features = isinstance(noise_mask, Tensor) and noise_mask.dim() == 3
    check_weights("noise_mask", noise_mask, shape if features else shape[:2])


def _seed(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an int of 64 bits, a tensor of one or None: got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64, device=device)
