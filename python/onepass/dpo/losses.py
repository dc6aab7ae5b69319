"""dpo_loss: a divergence makes scores of log-ratios, a link makes a loss of a pair's scores.

Two tables of small functions; a loss type names a link, or (as in the notebook) the sigmoid link on
one divergence. All of it is torch on [B] numbers, in log space: no probability is ever made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..ops._check import check_above_0, check_floating, check_number, check_same_device
from ..ops._launch import accumulation_dtype

MOST_EXPONENT = 80.0  # exp of it, in float32, leaves room for a batch's sum
MOST_SQUARED = 1e17  # its square does
LEAST_ALPHA = 1e-6  # below it the alpha divergence is its limit, the reverse KL


class DPOLoss(NamedTuple):
    """Of every pair, [B] each; the rewards, beta (log pi - log ref), are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


# ---------------------------------------------------------------- divergences: scores of log-ratios


def _exp_score(r: Tensor, a: float) -> Tensor:
    """(1 - exp(-a r)) / a, flat where the exponent passes its bound."""
    return (-a * r).clamp(max=MOST_EXPONENT).expm1() / -a


def reverse_kl(r: Tensor, alpha: float) -> Tensor:
    return r


def forward_kl(r: Tensor, alpha: float) -> Tensor:
    return _exp_score(r, 1.0)


def js_divergence(r: Tensor, alpha: float) -> Tensor:
    return math.log(2) + logsigmoid(r)


def alpha_divergence(r: Tensor, alpha: float) -> Tensor:
    return r if abs(alpha) < LEAST_ALPHA else _exp_score(r, alpha)


# f'(u) at u = exp(r), shifted to be 0 at r = 0: f is u log u, -log u, u log u - (u + 1) log((u + 1)
# / 2), and (u^(1-a) - (1 - a) u - a) / (a (a - 1)).
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


# ---------------------------------------------------------------- links: losses of a pair's scores


class Pairs(NamedTuple):
    """What a link may read: tensors are [B] (w is the chosen answer, l the rejected one)."""

    s_w: Tensor  # scores
    s_l: Tensor
    r_w: Tensor  # log-ratios
    r_l: Tensor
    policy: tuple[Tensor, Tensor]  # log-probabilities
    reference: tuple[Tensor | float, Tensor | float]
    lengths: tuple[Tensor, Tensor] | None  # at least 1
    nll: Tensor | None  # 0-dim
    beta: float
    eps: float  # label smoothing
    ipo_average: bool
    tau: float

    @property
    def delta(self) -> Tensor:
        return self.s_w - self.s_l

    @property
    def mean_delta(self) -> Tensor:
        """Of scores per token."""
        assert self.lengths is not None
        return self.s_w / self.lengths[0] - self.s_l / self.lengths[1]


def smoothed(x: Tensor, eps: float) -> Tensor:
    """-log sigmoid(x), with the preference the other way round in a share `eps` of the pairs."""
    loss = -logsigmoid(x)
    return loss if eps == 0 else (1 - eps) * loss - eps * logsigmoid(-x)


def sigmoid(p: Pairs) -> Tensor:
    return smoothed(p.beta * p.delta, p.eps)


def sigmoid_norm(p: Pairs) -> Tensor:
    return smoothed(p.beta * p.mean_delta, p.eps)


def hinge(p: Pairs) -> Tensor:
    return torch.relu(1 - p.beta * p.delta)


def slic_hf(p: Pairs) -> Tensor:
    # The hinge without a reference; its margin is 1 / beta, so that one beta serves both.
    return torch.relu(1 / p.beta - (p.policy[0] - p.policy[1]))


def ipo(p: Pairs) -> Tensor:
    error = (p.mean_delta if p.ipo_average else p.delta) - 1 / (2 * p.beta)
    return error.clamp(-MOST_SQUARED, MOST_SQUARED).square()


def exo_pair(p: Pairs) -> Tensor:
    x = p.beta * p.delta
    chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-p.eps))
    return chosen + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(p.eps))


def robust(p: Pairs) -> Tensor:
    x = p.beta * p.delta
    return (p.eps * logsigmoid(-x) - (1 - p.eps) * logsigmoid(x)) / (1 - 2 * p.eps)


def nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.r_w, p.beta * p.r_l
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def bco_pair(p: Pairs) -> Tensor:
    return -logsigmoid(p.beta * p.r_w) - logsigmoid(-p.beta * p.r_l)


def sppo_hard(p: Pairs) -> Tensor:
    half = 0.5 / p.beta
    return (p.r_w - half).square() + (p.r_l + half).square()


def aot(p: Pairs) -> Tensor:
    ours = (p.policy[0] - p.policy[1]).sort().values
    theirs = p.reference[0] - p.reference[1]
    theirs = theirs.sort().values if isinstance(theirs, Tensor) else theirs
    return smoothed(p.beta * (ours - theirs), p.eps)


def aot_unpaired(p: Pairs) -> Tensor:
    return smoothed(p.beta * (p.r_w.sort().values - p.r_l.sort().values), p.eps)


def apo_zero(p: Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.r_w) + torch.sigmoid(p.beta * p.r_l)


def apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.r_w) + torch.sigmoid(-p.beta * (p.r_w - p.r_l))


def discopop(p: Pairs) -> Tensor:
    x = p.beta * p.delta
    gate = x / p.tau
    # sigmoid(gate) exp(-x) in one exponent: the factors alone are 0 and inf.
    exponential = (logsigmoid(gate) - x).clamp(max=MOST_EXPONENT).exp()
    return exponential - torch.sigmoid(-gate) * logsigmoid(x)


def sft(p: Pairs) -> Tensor:
    assert p.nll is not None
    return p.nll.expand(p.r_w.shape)


LINKS: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "slic_hf": slic_hf,
}
# The log partition function of an f-DPO policy cancels in a difference of scores, nowhere else.
OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
SORTING = ("aot", "aot_unpaired")  # a row of their losses is no longer that of a pair

NOTEBOOK = {
    "alpha": "alpha_divergence",
    "JSD": "js_divergence",
    "FKL": "forward_kl",
    "RKL": "reverse_kl",
}
LOSS_TYPES = (*LINKS, *NOTEBOOK)
F_DIVERGENCES = (*DIVERGENCES, *NOTEBOOK)
_LOSS_TYPES = {name.lower(): name for name in LOSS_TYPES}
_F_DIVERGENCES = {name.lower(): NOTEBOOK.get(name, name) for name in F_DIVERGENCES}


# ---------------------------------------------------------------- the loss


class Term(NamedTuple):
    link: str
    divergence: str
    weight: float


def check_loss(
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    alpha: float | None = None,
    f_alpha_divergence_coef: float | None = None,
    label_smoothing: float = 0.0,
    beta: float = 0.1,
    *,
    discopop_tau: float = 0.05,
    weighted: bool = False,
) -> tuple[Term, ...]:
    """The terms of a loss, after checking every option that `dpo_loss` takes beside tensors;
    `weighted`: whether it will get `weights`.

    Raises:
        TypeError, ValueError: one line, which begins with the argument's name.
    """
    check_above_0("beta", beta)
    check_above_0("discopop_tau", discopop_tau)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5): got {label_smoothing}")
    if alpha is not None and f_alpha_divergence_coef is not None:
        raise ValueError(
            "alpha is 1 - f_alpha_divergence_coef, one number by two names: got "
            f"{alpha} and {f_alpha_divergence_coef}; give one"
        )
    if alpha is not None:
        check_number("alpha", alpha)
    if f_alpha_divergence_coef is not None:
        check_number("f_alpha_divergence_coef", f_alpha_divergence_coef)
    divergence = _named("f_divergence", f_divergence, _F_DIVERGENCES, F_DIVERGENCES)
    if divergence == "alpha_divergence" and alpha is None and f_alpha_divergence_coef is None:
        raise ValueError(
            f"alpha must be a number for f_divergence {f_divergence!r}: got None; TRL takes 0.5, "
            "the notebook 1"
        )
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    if not isinstance(names, Sequence) or not names:
        raise TypeError(f"loss_type must be a name, or a list of names: got {loss_type!r}")
    names = [loss_name(name) for name in names]
    factors = [1.0] * len(names) if loss_weights is None else loss_weights
    if isinstance(factors, str) or not isinstance(factors, Sequence):
        raise TypeError(f"loss_weights must be a list of numbers: got {loss_weights!r}")
    if len(factors) != len(names):
        raise ValueError(
            f"loss_weights must hold one number for each of {', '.join(names)}: got {list(factors)}"
        )
    for factor in factors:
        check_number("loss_weights", factor, 0.0)
    if not any(factors):
        raise ValueError(f"loss_weights must not all be 0: got {list(factors)}")
    terms = []
    for name, factor in zip(names, factors, strict=True):
        own = NOTEBOOK.get(name, divergence)
        if own != divergence != "reverse_kl":
            raise ValueError(
                f"loss_type {name!r} is the sigmoid loss under {own}: got f_divergence "
                f"{divergence!r} beside it; leave one out"
            )
        link = "sigmoid" if name in NOTEBOOK else name
        if own != "reverse_kl" and link not in OF_SCORES:
            raise ValueError(
                f"loss_type {name!r} has no f-divergence, since its partition function does not "
                f"cancel: got {own!r}; wanted reverse_kl, or one of {', '.join(OF_SCORES)}"
            )
        if link == "exo_pair" and label_smoothing == 0:
            raise ValueError(
                "label_smoothing must be above 0 for exo_pair, which takes its logarithm: got 0; "
                "its paper uses 1e-3"
            )
        if weighted and link in SORTING:
            raise ValueError(
                f"loss_type {name!r} sorts the batch, so that weights of pairs do not fit: leave "
                "the weighting out"
            )
        terms.append(Term(link, own, float(factor)))
    if label_smoothing and not any(term.link in SMOOTHED for term in terms):
        raise ValueError(
            f"label_smoothing is of {', '.join(SMOOTHED)} alone: got {label_smoothing} for "
            f"{', '.join(names)}; leave it out"
        )
    return tuple(terms)


def loss_name(loss_type: str) -> str:
    """The name of LOSS_TYPES for one in any case.

    Raises:
        TypeError, ValueError: it is none.
    """
    return _named("loss_type", loss_type, _LOSS_TYPES, LOSS_TYPES)


def _named(argument: str, value: object, known: dict[str, str], allowed: Sequence[str]) -> str:
    """The name of ours for one in any case; ValueError with the list for one that is unknown."""
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a name, as 'sigmoid': got {type(value).__name__}")
    if value.lower() not in known:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}: got {value!r}")
    return known[value.lower()]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    reference_free: bool = False,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    alpha: float | None = None,
    f_alpha_divergence_coef: float | None = None,
    label_smoothing: float = 0.0,
    ipo_average: bool = False,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    weights: Tensor | None = None,
    discopop_tau: float = 0.05,
) -> DPOLoss:
    """Losses and rewards of preference pairs from the log-probabilities of their answers.

    Args:
        policy_chosen_logps, policy_rejected_logps: [B], floating; log pi(y) summed over tokens.
        reference_chosen_logps, reference_rejected_logps: the same of the reference model.
        reference_free: takes the reference's as 0; they may then be None.
        beta: strength of the tie to the reference.
        loss_type: a name of LOSS_TYPES in any case, or several whose losses are added. The
            notebook's alpha, JSD, FKL and RKL are the sigmoid loss under that divergence.
        loss_weights: a factor for each loss type.
        f_divergence: a name of F_DIVERGENCES; another than reverse_kl only where a loss is made of
            the difference of scores (OF_SCORES).
        alpha: coefficient a of the alpha divergence as in the notebook, which wants this or the
            next (1, as there, with loss_type "alpha"). 1 is the forward KL, 0, as a limit, the
            reverse KL. Below 0 f' is finite at 0, where f-DPO's theory does not hold.
        f_alpha_divergence_coef: the same in TRL's convention, 1 - a (0.5 is its default).
        label_smoothing: share of pairs whose preference is the wrong way round, in [0, 0.5); for
            sigmoid (and the notebook's names), sigmoid_norm, robust, exo_pair, aot, aot_unpaired.
        ipo_average: scores per token for ipo (TRL from 0.7.11 on), sums as they are otherwise.
        chosen_lengths, rejected_lengths: [B] tokens of the answers; for ipo_average, sigmoid_norm
            and (the chosen ones) sft.
        chosen_nll: 0-dim; for sft, where the log-probabilities are weighted sums. Otherwise
            -chosen_logps.sum() / chosen_lengths.sum().
        weights: [B] factors of the losses, not differentiated (see `wpo_weights`).
        discopop_tau: temperature of discopop's gate.

    Returns:
        DPOLoss, float32 (float64 for float64 log-probabilities).

    Raises:
        TypeError, ValueError: tensors or options that do not fit.

    Formula: sigmoid = -log sigmoid(beta (s_w - s_l)), s = f'(pi / ref) shifted to 0 at pi = ref:
    log-ratio r (reverse_kl), 1 - exp(-r) (forward_kl), log 2 + log sigmoid(r) (js_divergence),
    (1 - exp(-a r)) / a (alpha_divergence); docs/dpo.md has the others. slic_hf is max(0, 1 / beta -
    log pi(y_w) + log pi(y_l)). An exponent stops at 80, an ipo error at 1e17: flat from there on.
    Source: Wang et al. 2309.16240, equation 7; TRL 1.16.
    """
    terms = check_loss(
        loss_type,
        loss_weights,
        f_divergence,
        alpha,
        f_alpha_divergence_coef,
        label_smoothing,
        beta,
        discopop_tau=discopop_tau,
        weighted=weights is not None,
    )
    dtype = _check_logps(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    policy = (policy_chosen_logps.to(dtype), policy_rejected_logps.to(dtype))
    reference: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
    if not reference_free:
        if reference_chosen_logps is None or reference_rejected_logps is None:
            raise ValueError(
                "reference_chosen_logps and reference_rejected_logps are None: pass them, or "
                "reference_free=True"
            )
        _check_logps(
            policy_chosen_logps=policy_chosen_logps,
            reference_chosen_logps=reference_chosen_logps,
            reference_rejected_logps=reference_rejected_logps,
        )
        reference = (reference_chosen_logps.to(dtype), reference_rejected_logps.to(dtype))
    like = policy[0]
    links = {term.link for term in terms}
    per_token = "sigmoid_norm" in links or (ipo_average and "ipo" in links)
    lengths = None
    if per_token:
        lengths = (
            _length("chosen_lengths", chosen_lengths, like).clamp(min=1),
            _length("rejected_lengths", rejected_lengths, like).clamp(min=1),
        )
    nll = None
    if "sft" in links:
        nll = chosen_nll
        if nll is None:
            tokens = _length("chosen_lengths", chosen_lengths, like).sum()
            nll = -policy[0].sum() / tokens.clamp(min=1)
        elif not isinstance(nll, Tensor) or nll.dim():
            shape = tuple(nll.shape) if isinstance(nll, Tensor) else type(nll).__name__
            raise ValueError(f"chosen_nll must be a 0-dim tensor, a mean over tokens: got {shape}")
    if weights is not None:
        _row("weights", weights, like)
        weights = weights.detach().to(dtype)
    chosen_ratios, rejected_ratios = policy[0] - reference[0], policy[1] - reference[1]
    if f_alpha_divergence_coef is not None:
        alpha = 1 - f_alpha_divergence_coef
    a = 1.0 if alpha is None else float(alpha)
    pairs = Pairs(
        s_w=chosen_ratios,
        s_l=rejected_ratios,
        r_w=chosen_ratios,
        r_l=rejected_ratios,
        policy=policy,
        reference=reference,
        lengths=lengths,
        nll=nll,
        beta=beta,
        eps=label_smoothing,
        ipo_average=ipo_average,
        tau=discopop_tau,
    )
    losses: Tensor | None = None
    for term in terms:
        score = DIVERGENCES[term.divergence]
        loss = LINKS[term.link](
            pairs._replace(s_w=score(chosen_ratios, a), s_l=score(rejected_ratios, a))
        )
        loss = loss if term.weight == 1 else term.weight * loss
        losses = loss if losses is None else losses + loss
    assert losses is not None
    if weights is not None:
        losses = losses * weights
    return DPOLoss(losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach())


def _check_logps(**logps: object) -> torch.dtype:
    """The dtype to compute in, after checking that all are [B] like the first."""
    (first_name, first), *others = logps.items()
    check_floating(first_name, first)
    assert isinstance(first, Tensor)
    if first.dim() != 1:
        raise ValueError(
            f"{first_name} must be [B], a number for each pair: got shape {tuple(first.shape)}"
        )
    for name, tensor in others:
        check_floating(name, tensor)
        _row(name, tensor, first)
    dtypes = [tensor.dtype for tensor in logps.values() if isinstance(tensor, Tensor)]
    return accumulation_dtype(functools.reduce(torch.promote_types, dtypes))


def _row(name: str, tensor: object, like: Tensor) -> None:
    """Raises unless `tensor` holds a number for each pair."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must hold a number for each pair, shape {tuple(like.shape)}: "
            f"got {tuple(tensor.shape)}"
        )
    check_same_device(name, tensor, "policy_chosen_logps", like)


def _length(name: str, lengths: object, like: Tensor) -> Tensor:
    """Lengths as floats, after checking that they are there."""
    if lengths is None:
        raise ValueError(
            f"{name} is None: sft, sigmoid_norm and ipo with ipo_average=True count tokens; pass "
            "the lengths of the answers"
        )
    _row(name, lengths, like)
    assert isinstance(lengths, Tensor)
    return lengths.to(like.dtype)
