"""perturb_past against Uber's way written down plainly: every loss, window, step and spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from onepass.bench import plain_pplm as plain
from onepass.pplm import PPLM_BOW, PPLM_BOW_DISCRIM, PPLM_DISCRIM, ClassificationHead, perturb_past
from support.tiny_models import D, V, tiny

LOSSES = {"bow": PPLM_BOW, "discrim": PPLM_DISCRIM, "both": PPLM_BOW_DISCRIM}


def made(name: str, rows: int = 1, n_tokens: int = 9, scale: float = 10.0) -> tuple[Any, Tensor]:
    """A model whose random weights are large enough for it to have opinions, and ids."""
    model = tiny(name).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
    generator = torch.Generator().manual_seed(1)
    return model, torch.randint(3, V, (rows, n_tokens), generator=generator)


def bags() -> list[Tensor]:
    """Two bags as one-hot rows, in the first of which a word stands twice."""
    words = torch.tensor([5, 17, 17, 40]), torch.tensor([60, 61])
    return [torch.nn.functional.one_hot(w, V).float() for w in words]


def head(n_classes: int = 3) -> ClassificationHead:
    torch.manual_seed(3)
    return ClassificationHead(n_classes, D).requires_grad_(False)


def inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """What the loop knows before a token: pasts, the last token, logits and hidden states."""
    with torch.no_grad():
        _, past, _ = plain.run(model, None, input_ids=ids[:, :-1])
        logits, unpert_past, hidden = plain.run(model, None, input_ids=ids)
    return {
        "past": past,
        "model": model,
        "last": ids[:, -1:],
        "unpert_past": unpert_past,
        "unpert_logits": logits,
        "accumulated_hidden": hidden[:, :-1].sum(1),
        "one_hot_bows_vectors": bags(),
        "classifier": head(),
        "class_label": 2,
        "stepsize": 0.02,
    }


def assert_same(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(got[0], wanted[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], wanted[1].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[2], torch.stack(wanted[2]), rtol=1e-4, atol=tolerance)
    losses = torch.tensor([float(x) for x in wanted[3]])
    torch.testing.assert_close(torch.stack(got[3]), losses, rtol=tolerance, atol=tolerance)


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "window": {"window_length": 3},
    "decay": {"window_length": 5, "decay": True},
    "window longer than the past": {"window_length": 20, "decay": True},
    "gamma 1, five steps": {"gamma": 1.0, "num_iterations": 5, "stepsize": 0.05},
    "gamma 0": {"gamma": 0.0},
    "no KL": {"kl_scale": 0.0},
    "much KL": {"kl_scale": 2.0, "stepsize": 0.1},
    "two ahead": {"horizon_length": 2},
    "no step": {"stepsize": 0.0},
}


@pytest.mark.parametrize("name", ["gpt2_tied", "llama"])  # the second has 2 key-value heads of 4
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_transcription(name: str, loss: str, case: str) -> None:
    model, ids = made(name)
    options = inputs(model, ids) | CASES[case] | {"loss_type": LOSSES[loss]}
    assert_same(perturb_past(**options), plain.perturb_past(**options))


@pytest.mark.parametrize("loss", LOSSES)
def test_window_side_last(loss: str) -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"loss_type": LOSSES[loss], "window_length": 3}
    got = perturb_past(**options, window_side="last")
    assert_same(got, plain.perturb_past(**options, side="last"))
    before, after = options["past"][0], got[0][0]
    assert torch.equal(before[..., :-3, :], after[..., :-3, :])
    assert not torch.equal(before[..., -3:, :], after[..., -3:, :])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_is_coupled_as_upstream(loss: str) -> None:
    model, ids = made("gpt2_tied", rows=3)
    options = inputs(model, ids) | {"loss_type": LOSSES[loss]}
    assert_same(perturb_past(**options), plain.perturb_past(**options))


def test_largest_norm_is_carried_from_token_to_token() -> None:
    model, ids = made("gpt2_tied")
    first = inputs(model, ids[:, :6]) | {"loss_type": PPLM_BOW}
    second = inputs(model, ids) | {"loss_type": PPLM_BOW}
    got, wanted = perturb_past(**first), plain.perturb_past(**first)
    assert_same(
        perturb_past(**second, grad_norms=got[2]),
        plain.perturb_past(**second, grad_norms=wanted[2]),
    )
    assert (perturb_past(**second, grad_norms=got[2])[2] >= got[2]).all()
