"""Scores of every token of a given text, from one forward: the text is fed to the model as if it
had said it, and no logits [B, S, V] are made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._check import IGNORED, check_weights
from ..training.hidden_states import (
    check_language_model,
    lazy_within,
    training_mode,
    without_adapter,
)
from .contrast import aligned_position
from .core import PAIRED, SCORES, check_ids, check_options
from .core import scores as scores_of_rows
from .dropout import check_dropout, noisy_runs
from .filters import check_filter
from .on_rows import is_own, row_function, score_of_rows
from .registry import STEP_SCORES_MAP, check_is_step_function

# Of 512 tokens, 50257 logits and 64 hidden features 10 MB at the peak in 199 ms, where whole logits
# are 98 MB; slabs of 8 MB take 23 MB and 165 ms, of 64 MB 64 MB and 133 ms (one thread).
CPU_SLAB_BYTES = 4 << 20
ROWS = 64  # that a registered function is called with


def step_scores(
    model: nn.Module,
    input_ids: Tensor,
    scores: Sequence[str],
    *,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_attention_mask: Tensor | None = None,
    contrast_source_ids: Tensor | None = None,
    contrast_source_mask: Tensor | None = None,
    contrast_targets_alignments: Sequence[tuple[int, int]] | None = None,
    same_context: bool = False,
    base: str = "e",
    logprob: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens_to_keep: int = 1,
    n_mcd_steps: int = 5,
    eps: float = 0.0,
    seed: int | None = None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """What step functions would say at every step of this text, by name, [B, S - 1] each.

    Args:
        model: a causal or encoder-decoder language model of transformers.
        input_ids: [B, S] the text; the source [B, T] of an encoder-decoder model.
        scores: names of `onepass.step_functions.scores`, or of functions that were registered,
            which are called with a forward_output and target_ids alone.
        attention_mask: of `input_ids`; 0 for padding, on either side of a text.
        decoder_input_ids, decoder_attention_mask: [B, S] the text of an encoder-decoder model, with
            the token that it starts from.
        contrast_ids, contrast_attention_mask: [B, S'] a contrastive text: the scores of a token
            compare it with that text's token of the same position, after that text's beginning.
        contrast_source_ids, contrast_source_mask: [B, T'] another source for the contrast.
        contrast_targets_alignments: pairs of a position of the text and one of the contrast, for
            texts whose positions are not the same.
        same_context: compare the contrast's tokens after the text's own beginning: its model runs
            once.
        base, logprob, top_k, top_p, min_tokens_to_keep, eps, impl: as of `scores`.
        n_mcd_steps, seed: of mc_dropout_prob_avg, which runs the whole text so often.

    Returns:
        Column t is the score of token t + 1, 0 where it or the token before it is padding. No
        gradients; the model runs in evaluation mode (but for dropout's sake), and its modes are as
        before after.

    Raises:
        AttributeError: a name that is no score. ValueError: shapes or numbers that do not fit,
        padding within a text, a contrast that is missing, a model without dropout, without a
        language-model head or whose tokens see those after them. IndexError: a contrastive text
        that is too short. TypeError: not a model.
    """
    asked = dict.fromkeys([scores] if isinstance(scores, str) else scores)
    if not asked:
        raise ValueError(f"no score is asked for: wanted some of {', '.join(STEP_SCORES_MAP)}")
    for name in asked:
        check_is_step_function(name)
    names = [name for name in asked if is_own(name)]
    check_language_model(model)
    for mask_name, mask, ids in (
        ("contrast_attention_mask", contrast_attention_mask, contrast_ids),
        ("contrast_source_mask", contrast_source_mask, contrast_source_ids),
    ):
        if mask is not None and ids is None:
            raise ValueError(f"{mask_name}: pass the ids that it is of, too")
    text = _text(model, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
    needs = {fact for name in names for fact in SCORES[name].needs}
    paired = [name for name in names if PAIRED & set(SCORES[name].needs)]
    contrast = None
    if paired:
        if contrast_ids is None and contrast_source_ids is None:
            raise ValueError(f"{paired[0]} needs contrast_ids: got None")
        contrast = text.contrast(
            *(contrast_ids, contrast_attention_mask, contrast_source_ids, contrast_source_mask),
            *(contrast_targets_alignments, model),
        )
        if same_context and (contrast_source_ids is not None or "kl" in needs):
            what = "kl_divergence" if "kl" in needs else "contrast_source_ids"
            raise ValueError(f"{what} compares two contexts: leave same_context out")
    if "noisy" in needs:
        check_dropout(model, n_mcd_steps, eps)
    check_options(base, impl, eps)
    check_filter(top_k, top_p, min_tokens_to_keep, _vocab_size(model))

    for each in (text, contrast):
        if each is not None:
            each.check(model)
    labels = text.labels()
    options: dict[str, Any] = {
        "base": base, "logprob": logprob, "top_k": top_k, "top_p": top_p,
        "min_tokens_to_keep": min_tokens_to_keep, "eps": eps, "impl": impl,
    }  # fmt: skip

    def noisy() -> Tensor:
        logps = scores_of_rows(text.rows(model), labels, ["probability"], logprob=True, impl=impl)
        return logps["probability"]

    slab = CPU_SLAB_BYTES if input_ids.device.type == "cpu" else None
    lazy = lazy_within(model, "scoring", max_slab_bytes=slab)
    with torch.no_grad(), training_mode(model, False), lazy:
        rows = text.rows(model)
        if contrast is not None:
            options["contrast_ids"] = contrast.labels()
            if not same_context:
                options["contrast_logits"] = contrast.rows(model)
        if "noisy" in needs:
            options["noisy_logps"] = noisy_runs(model, noisy, n_mcd_steps, seed, False)
        found = scores_of_rows(rows, labels, names, **options) if names else {}
        for name in asked:
            if name not in found:
                found[name] = _registered(model, name, rows, labels)
        return {name: found[name] for name in asked}


def _registered(model: nn.Module, name: str, rows: Tensor, labels: Tensor) -> Tensor:
    """Its scores [B, S - 1] of logits [B, S - 1, V], some rows at a time."""
    ids = labels.clamp_min(0).flatten().split(ROWS)
    found = [
        score_of_rows(row_function(model, name), name, *part)
        for part in zip(rows.flatten(0, 1).split(ROWS), ids, strict=True)
    ]
    return torch.where(labels != IGNORED, torch.cat(found).view(labels.shape), 0)


@dataclass
class Text:
    """A text, what it follows from in an encoder-decoder model, and the positions that are scored:
    each token but the first, unless others are named."""

    ids: Tensor  # [B, S]
    mask: Tensor | None
    source: tuple[Tensor, Tensor | None] | None = None
    positions: Tensor | None = None  # [S - 1]

    def contrast(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        source_ids: Tensor | None,
        source_mask: Tensor | None,
        alignments: Any,
        model: nn.Module,
    ) -> Text:
        """The text that this one is compared with."""
        if source_ids is not None and self.source is None:
            raise ValueError("contrast_source_ids are for encoder-decoder models")
        n_texts, length = self.ids.shape
        positions = [aligned_position(at, alignments) for at in range(1, length)]
        if ids is None:
            ids, mask = self.ids, self.mask
        _check_text("contrast_ids", ids, mask, _vocab_size(model), n_texts)
        if min(positions) < 1 or max(positions) >= ids.shape[1]:
            raise IndexError(
                f"contrast_ids have {ids.shape[1]} tokens: wanted one before and at each of the "
                f"positions {min(positions)} to {max(positions)}"
            )
        source = self.source
        if source_ids is not None:
            size = _vocab_size(model, "input")
            _check_text("contrast_source_ids", source_ids, source_mask, size, n_texts, least=1)
            source = source_ids, _whole(source_mask)
        return Text(ids, _whole(mask), source, torch.tensor(positions, device=ids.device))

    def check(self, model: nn.Module) -> None:
        """Raises where the text has more tokens than the model takes, or padding within, which some
        models count as positions and others do not."""
        if self.mask is not None:
            parts = (self.mask.diff(dim=1, prepend=torch.zeros_like(self.mask[:, :1])) == 1).sum(1)
            if bool((parts > 1).any()):
                raise ValueError(
                    f"the mask of text {int(parts.argmax())} is 0 between tokens: wanted padding"
                    " before or after a text only"
                )
        config: Any = getattr(without_adapter(model), "config", None)
        decoder = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(decoder, "max_position_embeddings", None)
        if isinstance(positions, int) and self.ids.shape[1] > positions:
            raise ValueError(
                f"a text has {self.ids.shape[1]} tokens, more than the {positions} that the model"
                " takes: cut it"
            )

    def labels(self) -> Tensor:
        """The tokens that are scored [B, S - 1]; -100 where they or those before are padding."""
        if self.mask is None:
            return self._at(self.ids, 0)
        counts = (self._at(self.mask, 0) != 0) & (self._at(self.mask, -1) != 0)
        return torch.where(counts, self._at(self.ids, 0), IGNORED)

    def rows(self, model: nn.Module) -> Tensor:
        """The logits [B, S - 1, V] that predict them."""
        ids, mask, moved = _at_the_left(self.ids, self.mask)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.source is not None:
            given = {f"decoder_{name}": value for name, value in given.items()}
            source, source_mask, _ = _at_the_left(*self.source)
            given |= {"input_ids": source, "attention_mask": source_mask}
        logits: Tensor = model(**given, use_cache=False).logits
        if moved is None:
            return self._at(logits, -1)
        n_texts, length = ids.shape
        places = self._at(torch.arange(length, device=ids.device)[None], -1) - moved
        return logits[torch.arange(n_texts, device=ids.device)[:, None], places % length]

    def _at(self, tensor: Tensor, shift: int) -> Tensor:
        """What stands at the scored positions, or before them."""
        if self.positions is not None:
            return tensor.index_select(1, self.positions + shift)
        return tensor[:, 1:] if shift == 0 else tensor[:, :-1]


def _text(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
) -> Text:
    config, size = getattr(without_adapter(model), "config", None), _vocab_size(model)
    if not getattr(config, "is_encoder_decoder", False):
        if decoder_input_ids is not None:
            raise ValueError("decoder_input_ids are for encoder-decoder models: pass input_ids")
        if decoder_attention_mask is not None:
            raise ValueError(
                "decoder_attention_mask is for encoder-decoder models: pass attention_mask"
            )
        _check_text("input_ids", input_ids, attention_mask, size)
        return Text(input_ids, _whole(attention_mask))
    if decoder_input_ids is None:
        raise ValueError("an encoder-decoder model needs decoder_input_ids, the text: got None")
    _check_text("decoder_input_ids", decoder_input_ids, decoder_attention_mask, size)
    size, n_texts = _vocab_size(model, "input"), len(decoder_input_ids)
    _check_text("input_ids", input_ids, attention_mask, size, n_texts, least=1)
    source = input_ids, _whole(attention_mask)
    return Text(decoder_input_ids, _whole(decoder_attention_mask), source)


def _whole(mask: Tensor | None) -> Tensor | None:
    """A mask of 0 and 1: models sum it to positions."""
    return None if mask is None else (mask != 0).long()


def _at_the_left(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids and mask with padding behind each text, for the models that count positions from the left
    edge whatever the mask; and by how much each was moved [B, 1], None where none was."""
    if mask is None or bool(mask[:, 0].all()):
        return ids, mask, None
    moved, length = mask.argmax(1, keepdim=True), ids.shape[1]
    order = (torch.arange(length, device=ids.device) + moved) % length
    return ids.gather(1, order), mask.gather(1, order), moved


def _vocab_size(model: nn.Module, side: str = "output") -> int:
    """The rows of the output head, or of the embedding of an encoder's tokens; where they cannot be
    asked for, `scores` or the model finds out."""
    find = getattr(without_adapter(model), f"get_{side}_embeddings", lambda: None)
    return len(getattr(find(), "weight", range(sys.maxsize)))


def _check_text(
    name: str,
    ids: Tensor,
    mask: Tensor | None,
    vocab_size: int,
    n_texts: int | None = None,
    least: int = 2,
) -> None:
    check_ids(name, ids, vocab_size, n_texts, least)
    check_weights(f"the mask of {name}", mask, ids.shape)
