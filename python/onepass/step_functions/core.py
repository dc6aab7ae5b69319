"""The scores' definition: each is a line of arithmetic on facts of a row of logits.

All that is asked for of a row comes from one pass over its vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lazy_logits import LazyLogits
from ..ops._check import (
    IGNORED,
    check_choice,
    check_floating,
    check_labels,
    check_logits,
    check_same_device,
    check_tokens,
    values_checked,
)
from ..ops._launch import IMPLS, accumulation_dtype
from ..ops.vocab_pair_stats import vocab_pair_stats
from ..ops.vocab_stats import vocab_stats
from .filters import check_filter, kept_of_both, top_p_count
from .ranges import check_range

BASES = ("e", "2")
SLAB_NUMEL = 1 << 19  # logits that are sorted at one time


class Facts(NamedTuple):
    """Of every row, [...] each; None where no score asks for it.

    logit, logp                    z and log p of the target
    entropy                        of the row, in nats
    contrast_logit, contrast_logp  of the contrast target, in its row
    gain                           logp - contrast_logp
    kl                             KL(row || contrast row)
    kept                           tokens that top_p keeps
    noisy                          [n, ...] log p of the target in noisy runs
    """

    logit: Any = None
    logp: Any = None
    entropy: Any = None
    contrast_logit: Any = None
    contrast_logp: Any = None
    gain: Any = None
    kl: Any = None
    kept: Any = None
    noisy: Any = None


class Options(NamedTuple):
    """How scores are expressed: log-probabilities for probabilities; bits ("2") or nats ("e");
    `power`, what perplexity raises to the cross-entropy; what a deviation of 0 is raised by."""

    logprob: bool = False
    base: str = "e"
    power: str = "e"
    eps: float = 0.0

    def probability(self, logp: Tensor) -> Tensor:
        return logp if self.logprob else logp.exp()

    def difference(self, f: Facts) -> Tensor:
        return f.gain if self.logprob else f.logp.exp() - f.contrast_logp.exp()

    def cross_entropy(self, logp: Tensor) -> Tensor:
        return -logp / math.log(2) if self.base == "2" else -logp

    def perplexity(self, logp: Tensor) -> Tensor:
        entropy = self.cross_entropy(logp)
        return entropy.exp2() if self.power == "2" else entropy.exp()

    def z_score(self, f: Facts) -> Tensor:
        noisy = self.probability(f.noisy)
        deviation = noisy.std(0) if noisy.numel() else noisy.sum(0)  # std warns of no rows
        return (self.probability(f.logp) - noisy.mean(0)) / (deviation + self.eps)


class Score(NamedTuple):
    """The facts that a score is made of, and how."""

    needs: tuple[str, ...]
    of: Callable[[Facts, Options], Tensor]


SCORES = {
    "logit": Score(("logit",), lambda f, o: f.logit),
    "probability": Score(("logp",), lambda f, o: o.probability(f.logp)),
    "entropy": Score(("entropy",), lambda f, o: f.entropy),
    "crossentropy": Score(("logp",), lambda f, o: o.cross_entropy(f.logp)),
    "perplexity": Score(("logp",), lambda f, o: o.perplexity(f.logp)),
    "contrast_logits": Score(("contrast_logit",), lambda f, o: f.contrast_logit),
    "contrast_prob": Score(("contrast_logp",), lambda f, o: o.probability(f.contrast_logp)),
    "contrast_logits_diff": Score(
        ("logit", "contrast_logit"), lambda f, o: f.logit - f.contrast_logit
    ),
    "contrast_prob_diff": Score(
        ("logp", "contrast_logp", "gain"), lambda f, o: o.difference(f)
    ),
    "pcxmi": Score(("gain",), lambda f, o: -f.gain / math.log(2)),
    "kl_divergence": Score(("kl",), lambda f, o: f.kl),
    "in_context_pvi": Score(("gain",), lambda f, o: -f.gain),
    "mc_dropout_prob_avg": Score(("logp", "noisy"), lambda f, o: o.z_score(f)),
    "top_p_size": Score(("kept",), lambda f, o: f.kept),
}  # fmt: skip
# of a row: what vocab_stats calls it
OWN = {"logit": "label_logit", "logp": "logp", "entropy": "entropy"}
# of the contrast: what it is in its own row
CONTRASTS = {"contrast_logit": "logit", "contrast_logp": "logp", "gain": "logp"}
PAIRED = {*CONTRASTS, "kl"}


def scores(
    logits: Tensor,
    target_ids: Tensor,
    names: Sequence[str],
    *,
    contrast_logits: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    base: str = "e",
    logprob: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens_to_keep: int = 1,
    noisy_logps: Tensor | None = None,
    eps: float = 0.0,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """Scores of the tokens that follow, by name, each of the shape of `target_ids`.

    Args:
        logits: [..., V] of the positions before the tokens, or `onepass.LazyLogits`, which are not
            made (kl_divergence with a filter and top_p_size sort a few rows at a time).
        target_ids: [...] the tokens; -100 does not count: its scores are 0.
        names: of the scores below.
        contrast_logits: [..., V] of another context. Without them a contrast is another token of
            the same row.
        contrast_ids: [...] the tokens of the contrast (default: `target_ids`); -100: scores that
            contrast tokens are 0 there.
        base: of crossentropy; "e" for nats, "2" for bits. Perplexity is 1 / p in either.
        logprob: log p in place of p in probability, contrast_prob, contrast_prob_diff and
            mc_dropout_prob_avg.
        top_k, top_p, min_tokens_to_keep: of kl_divergence; top_p also of top_p_size. top_k=0 and
            top_p=1.0 keep every token.
        noisy_logps: [n, ...] log p of `target_ids` in n >= 2 noisy runs, for mc_dropout_prob_avg.
        eps: added to its standard deviation; at 0, a deviation of 0 gives inf or NaN.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        float32 (float64 for float64 logits) and differentiable in both logits, but top_p_size,
        int64. `logits` are read once for all scores of one row, once more, beside
        `contrast_logits`, for kl_divergence, and once more for top_p_size.

    Raises:
        AttributeError: a name that is none of these. TypeError: not a tensor. ValueError: shapes,
        dtypes, devices, numbers that do not fit, a contrast that is missing. IndexError: a token
        outside the vocabulary (on a GPU with ONEPASS_STRICT=1).

    Formula, with z a row of logits, p = softmax(z), t the target, c the contrast in its own row q:
        logit                 z_t
        probability           p_t
        entropy               -sum_v p_v log p_v
        crossentropy          -log p_t
        perplexity            1 / p_t
        contrast_logits       z'_c of the contrast's row z'
        contrast_prob         q_c
        contrast_logits_diff  z_t - z'_c
        contrast_prob_diff    p_t - q_c
        pcxmi                 log2 q_c - log2 p_t (Yin et al. 2109.07446, as inseq signs it)
        in_context_pvi        log q_c - log p_t (Lu et al. 2310.12300)
        kl_divergence         sum_v p_v log(p_v / q_v) over the kept v, p and q renormalised there
        mc_dropout_prob_avg   (p_t - mean of noisy p_t) / their standard deviation, unbiased
        top_p_size            how many of the likeliest tokens have probability top_p together
    Kept are the tokens that top_p and then top_k leave by the sum of both rows' logits.
    """
    names = check_names(names)
    check_logits(logits)
    target = token_rows("target_ids", target_ids, logits)
    check_options(base, impl, eps)
    check_filter(top_k, top_p, min_tokens_to_keep, logits.shape[-1])
    needs = {fact for name in names for fact in SCORES[name].needs}
    if contrast_logits is not None:
        check_floating("contrast_logits", contrast_logits)
        if contrast_logits.shape != logits.shape:
            raise ValueError(
                f"contrast_logits must have the shape of logits, {tuple(logits.shape)}: "
                f"got {tuple(contrast_logits.shape)}"
            )
        dtypes = logits.dtype, contrast_logits.dtype
        if "kl" in needs and dtypes.count(torch.float64) == 1:
            raise ValueError(
                "kl_divergence needs logits and contrast_logits both float64 or neither: got "
                f"{dtypes[0]}, {dtypes[1]}"
            )
        check_same_device("contrast_logits", contrast_logits, "logits", logits)
    if contrast_ids is not None:
        contrast_ids = token_rows("contrast_ids", contrast_ids, logits)
    for name in names:
        if contrast_needs(SCORES[name].needs) and contrast_logits is None and contrast_ids is None:
            raise ValueError(f"{name} needs contrast_ids or contrast_logits: got neither")
        if name == "kl_divergence" and contrast_logits is None:
            raise ValueError("kl_divergence needs contrast_logits, the row of another context")
    if "noisy" in needs:
        check_noisy(noisy_logps, target)
    counts = paired = target != IGNORED
    if contrast_ids is not None:
        paired = counts & (contrast_ids != IGNORED)
    if contrast_logits is None and contrast_ids is not None and needs & set(CONTRASTS):
        facts = two_token_facts(logits, target, contrast_ids, needs, impl)
    else:
        facts = row_facts(logits, target, own_needs(needs), impl)
        if contrast_logits is not None:
            ids = target if contrast_ids is None else torch.where(paired, contrast_ids, IGNORED)
            other = row_facts(contrast_logits, ids, contrast_needs(needs), impl)
            facts = against(facts, other)
    if "kl" in needs:
        filters = (top_k, top_p, min_tokens_to_keep)
        facts = facts._replace(kl=kl_rows(logits, contrast_logits, *filters, paired, impl))
    if "kept" in needs:
        kept = [top_p_count(rows, top_p) for rows in _slabs(logits.detach())]
        facts = facts._replace(kept=torch.cat(kept).view(target.shape) if kept else target)
    options = Options(logprob, base, base, eps)
    facts = facts._replace(noisy=noisy_logps)
    found = {name: SCORES[name].of(facts, options) for name in names}
    return {
        name: torch.where(paired if PAIRED & set(SCORES[name].needs) else counts, score, 0)
        for name, score in found.items()
    }


def check_names(names: Sequence[str]) -> list[str]:
    """The names, after checking that all are known."""
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"no score is asked for: wanted some of {', '.join(SCORES)}")
    for name in names:
        if name not in SCORES:
            raise AttributeError(f"no score {name!r}: the known ones are {', '.join(SCORES)}")
    return list(dict.fromkeys(names))


def check_options(base: object, impl: object, eps: object) -> None:
    """Raises for what scores cannot be expressed in."""
    check_choice("base", base, BASES)
    check_choice("impl", impl, IMPLS)
    check_range("eps", eps)


def check_noisy(noisy_logps: object, target: Tensor) -> None:
    """Raises unless these are two or more noisy runs of the target's rows."""
    if noisy_logps is None:
        raise ValueError("mc_dropout_prob_avg needs noisy_logps, log p in two or more noisy runs")
    check_floating("noisy_logps", noisy_logps)
    assert isinstance(noisy_logps, Tensor)
    if noisy_logps.shape[1:] != target.shape or len(noisy_logps) < 2:
        raise ValueError(
            f"noisy_logps must be [n, ...], n >= 2 runs of rows {tuple(target.shape)}: "
            f"got {tuple(noisy_logps.shape)}"
        )


def token_rows(name: str, ids: Tensor, logits: Tensor) -> Tensor:
    ids = check_tokens(name, ids, logits).to(torch.int64)
    if values_checked(ids):
        check_labels(name, ids, logits.shape[-1])
    return ids


def check_ids(
    name: str, ids: object, vocab_size: int, n_texts: int | None = None, least: int = 1
) -> None:
    """Raises unless these are tokens of the vocabulary [B, S], S >= least."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(ids).__name__}")
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] < least or not integers:
        raise ValueError(
            f"{name} must be token ids [B, S], B >= 1, S >= {least}: got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    if n_texts is not None and len(ids) != n_texts:
        raise ValueError(f"{name} must be as many texts as are scored, {n_texts}: got {len(ids)}")
    if values_checked(ids):
        check_labels(name, ids, vocab_size, ignore_index=None)


def counted(score: Tensor, target: Tensor) -> Tensor:
    """The scores, 0 of a target that does not count."""
    return torch.where(target != IGNORED, score, 0)


def own_needs(needs: Iterable[str]) -> set[str]:
    """Which facts of its own row a score needs."""
    return {"logp" if fact == "gain" else fact for fact in needs} & set(OWN)


def contrast_needs(needs: Iterable[str]) -> set[str]:
    """Which facts a score needs of the contrast's row, as that row's own."""
    return {CONTRASTS[fact] for fact in needs if fact in CONTRASTS}


def row_facts(logits: Tensor, target: Tensor, needs: Iterable[str], impl: str) -> Facts:
    """Facts of rows' own tokens, in one pass; none where none is needed."""
    want = sorted(OWN[fact] for fact in needs)
    if not want:
        return Facts()
    s = vocab_stats(logits, target, want=want, impl=impl)
    return Facts(s.label_logit, s.logp, s.entropy)


def two_token_facts(
    logits: Tensor, target: Tensor, other: Tensor, needs: set[str], impl: str
) -> Facts:
    """Facts of rows' own tokens and of others in the same rows, in one pass. log p of the other is
    that of the target and the step between their logits, in which an offset has no say."""
    want = {OWN[fact] for fact in needs & set(OWN)} | {"label_logit", "contrast_logit"}
    if "contrast_logp" in needs:
        want |= {"logp", "lse"}
    s = vocab_stats(logits, target, contrast_labels=other, want=sorted(want), impl=impl)
    gain, logp = s.label_logit - s.contrast_logit, None
    if s.lse is not None:
        logp = torch.where(s.label_logit.isinf(), s.contrast_logit - s.lse, s.logp - gain)
    return Facts(s.label_logit, s.logp, s.entropy, s.contrast_logit, logp, gain)


def against(facts: Facts, other: Facts) -> Facts:
    """The facts of a row with those of the contrast's row."""
    gain = None if facts.logp is None or other.logp is None else facts.logp - other.logp
    return facts._replace(contrast_logit=other.logit, contrast_logp=other.logp, gain=gain)


def kl_rows(
    logits: Tensor,
    contrast_logits: Any,
    top_k: int,
    top_p: float,
    min_tokens_to_keep: int,
    mask: Tensor | None,
    impl: str,
) -> Tensor:
    """KL(row || contrast row) over the tokens that the filter keeps, [...]."""
    if top_k == 0 and top_p == 1:
        pair = vocab_pair_stats(
            contrast_logits, target_logits=logits, mask=mask, want=("kl",), impl=impl
        )
        assert pair.kl is not None
        return pair.kl
    found = []
    for own, other in zip(_slabs(logits), _slabs(contrast_logits), strict=True):
        left_out = ~kept_of_both(own, other, top_k, top_p, min_tokens_to_keep)
        own, other = (rows.masked_fill(left_out, -torch.inf) for rows in (own, other))
        found.append(vocab_pair_stats(other, target_logits=own, want=("kl",), impl=impl).kl)
    kl = torch.cat(found) if found else logits.new_zeros(0)
    return kl.view(logits.shape[:-1])


def _slabs(logits: Tensor) -> Iterator[Tensor]:
    """The rows themselves, [n, V] in the accumulation dtype, some at a time."""
    rows = logits.reshape(-1, logits.shape[-1])
    for some in rows.split(max(1, SLAB_NUMEL // logits.shape[-1])):
        whole = some.materialize() if isinstance(some, LazyLogits) else some
        yield whole.to(accumulation_dtype(logits.dtype))
